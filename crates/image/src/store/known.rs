//! What this process knows of images that it has seen complete.
//!
//! A document means the same for ever, since its digest names it. So what the
//! documents of an image say is kept when nobody holds the image any more; only
//! the layers have to be looked at again, which a collection may have taken.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Image;
use super::layers::LayerRecord;
use super::layout::{FileLock, Layout, Stamp};
use crate::config::ParsedConfig;
use crate::unpack::{LayerForm, LayerNotes};
use crate::{Digest, ImageConfig, ImageReference};

/// Images that nobody holds and that are remembered.
const MAX_REMEMBERED: usize = 64;

/// What the documents of an image say, and which layers they were true of.
#[derive(Debug)]
pub(crate) struct Contents {
    manifest: Digest,
    diff_ids: Vec<Digest>,
    config: ImageConfig,
    form: LayerForm,
    notes: LayerNotes,
    layers: Vec<PathBuf>,
    /// Of the layers' records; `None` is one that was gone already.
    stamps: Vec<Option<Stamp>>,
}

/// What all handles of one image share.
#[derive(Debug)]
pub(crate) struct ImageData {
    contents: Arc<Contents>,
    _in_use: FileLock,
}

/// By manifest.
#[derive(Debug, Default)]
pub(super) struct KnownImages(Mutex<HashMap<Digest, Known>>);

#[derive(Debug)]
struct Known {
    contents: Arc<Contents>,
    /// While somebody here holds it.
    live: Weak<ImageData>,
}

impl Contents {
    pub(super) fn of(
        layout: &Layout,
        manifest: &Digest,
        config: ParsedConfig,
        records: &[LayerRecord],
        form: LayerForm,
    ) -> Self {
        let mut notes = LayerNotes::default();
        for record in records {
            notes.add(&record.notes);
        }
        Self {
            manifest: manifest.clone(),
            layers: config.diff_ids.iter().map(|diff_id| layout.layer_tree(diff_id)).collect(),
            stamps: config.diff_ids.iter().map(|diff_id| stamp(layout, diff_id)).collect(),
            diff_ids: config.diff_ids,
            config: config.config,
            form,
            notes,
        }
    }

    /// Whether every layer is the one that was looked at. It stays so while the
    /// manifest is marked in use.
    pub(super) fn are_unchanged(&self, layout: &Layout) -> bool {
        let mut layers = self.diff_ids.iter().zip(&self.stamps);
        layers.all(|(diff_id, known)| known.is_some() && stamp(layout, diff_id) == *known)
    }
}

fn stamp(layout: &Layout, diff_id: &Digest) -> Option<Stamp> {
    Stamp::of(&layout.layer_record(diff_id)).ok()
}

impl ImageData {
    pub(crate) fn manifest(&self) -> &Digest {
        &self.contents.manifest
    }

    pub(crate) fn diff_ids(&self) -> &[Digest] {
        &self.contents.diff_ids
    }

    pub(crate) fn handle(self: &Arc<Self>, reference: &ImageReference) -> Image {
        let contents = &self.contents;
        Image {
            reference: reference.to_string(),
            digest: contents.manifest.to_string(),
            layers: contents.layers.clone(),
            config: contents.config.clone(),
            form: contents.form,
            notes: contents.notes,
            data: self.clone(),
        }
    }
}

impl KnownImages {
    pub(super) fn live(&self, manifest: &Digest) -> Option<Arc<ImageData>> {
        self.locked().get(manifest)?.live.upgrade()
    }

    pub(super) fn contents(&self, manifest: &Digest) -> Option<Arc<Contents>> {
        Some(self.locked().get(manifest)?.contents.clone())
    }

    /// Takes over the mark of an image that is complete, unless somebody here
    /// holds the image already.
    pub(super) fn admit(&self, contents: Arc<Contents>, in_use: FileLock) -> Arc<ImageData> {
        let mut known = self.locked();
        if let Some(data) = known.get(&contents.manifest).and_then(|known| known.live.upgrade()) {
            return data;
        }
        if known.len() >= MAX_REMEMBERED {
            known.retain(|_, known| known.live.strong_count() > 0);
        }
        let data = Arc::new(ImageData { contents: contents.clone(), _in_use: in_use });
        known.insert(contents.manifest.clone(), Known { contents, live: Arc::downgrade(&data) });
        data
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

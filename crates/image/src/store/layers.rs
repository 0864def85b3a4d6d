//! Unpacked layers: made once, by one worker, trusted only when whole.
//!
//! Writing thousands of files through to the disk takes long, and nobody needs
//! it before the machine fails. So a layer first counts only for the current
//! boot; after a sync in the background it counts for good. One that a power
//! failure may have hurt is unpacked again from its blob.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::layout::{FileLock, Layout, write_file};
use super::{Inner, blocking};
use crate::unpack::{CancelOnDrop, LayerForm, LayerNotes, UnpackOptions, unpack_layer};
use crate::{Digest, ImageError};

/// What is known about an unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: Digest,
    /// The blob it was made from.
    pub(crate) blob: Digest,
    pub(crate) form: LayerForm,
    /// Length of the plain tar.
    pub(crate) stream_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) entries: u64,
    #[serde(default)]
    pub(crate) notes: LayerNotes,
    /// The boot in which it was written, until it is known to be on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unsynced_in_boot: Option<String>,
}

/// Whatever stands in `layers/`, usable or not.
pub(crate) fn read_record(layout: &Layout, diff_id: &Digest) -> Option<LayerRecord> {
    let content = fs::read(layout.layer_record(diff_id)).ok()?;
    serde_json::from_slice(&content).ok()
}

impl Inner {
    /// The layer's record if it can be used as it is. With its manifest marked
    /// in use it then stays.
    pub(crate) async fn ready_layer(&self, diff_id: &Digest) -> Result<Option<LayerRecord>, ImageError> {
        let _store = self.layout.lock_shared().await?;
        Ok(read_record(&self.layout, diff_id).filter(|record| {
            record.diff_id == *diff_id
                && record.form == self.form
                && record.unsynced_in_boot.as_deref().is_none_or(|boot| boot == boot_id())
        }))
    }

    /// Unpacks the layer unless somebody has.
    pub(crate) async fn ensure_layer(
        self: &Arc<Self>,
        diff_id: &Digest,
        blob: &Digest,
        bytes_read: Arc<AtomicU64>,
    ) -> Result<LayerRecord, ImageError> {
        if let Some(record) = self.ready_layer(diff_id).await? {
            return Ok(record);
        }
        let lock = FileLock::exclusive(&self.layout.layer_lock(diff_id)).await?;
        if let Some(record) = self.ready_layer(diff_id).await? {
            return Ok(record);
        }
        let permit = self.unpacks.clone().acquire_owned().await;
        let cancel = CancelOnDrop::default();
        let cancelled = cancel.0.clone();
        let (inner, diff_id, blob) = (self.clone(), diff_id.clone(), blob.clone());
        blocking(move || {
            let options = UnpackOptions { form: inner.form, limits: inner.limits(), cancelled, bytes_read };
            let record = inner.unpack(&diff_id, &blob, &options);
            // Held until the layer is in place, whether or not anybody waits.
            drop((lock, permit));
            record
        })
        .await
    }

    /// No layer may be larger than the whole store.
    pub(crate) fn limits(&self) -> crate::UnpackLimits {
        let limits = self.options.limits;
        crate::UnpackLimits { max_bytes: limits.max_bytes.min(self.options.max_bytes), ..limits }
    }

    fn unpack(&self, diff_id: &Digest, blob: &Digest, options: &UnpackOptions) -> Result<LayerRecord, ImageError> {
        let path = self.layout.blob(blob);
        let file = File::open(&path).map_err(|error| ImageError::storage("read a layer", &path, error))?;
        let scratch = self.session.scratch_directory("layer")?;
        let tree = scratch.path().join("fs");
        fs::create_dir(&tree).map_err(|error| ImageError::storage("unpack a layer", &tree, error))?;
        let unpacked = unpack_layer(file, &tree, options)?;
        if unpacked.diff_id != *diff_id {
            return Err(ImageError::DigestMismatch {
                what: "an unpacked layer".into(),
                expected: diff_id.to_string(),
                actual: unpacked.diff_id.to_string(),
            });
        }
        let record = LayerRecord {
            diff_id: diff_id.clone(),
            blob: blob.clone(),
            form: options.form,
            stream_bytes: unpacked.stream_bytes,
            disk_bytes: unpacked.disk_bytes,
            entries: unpacked.entries,
            notes: unpacked.notes,
            unsynced_in_boot: Some(boot_id().to_owned()),
        };
        write_record(scratch.path(), &record)?;
        let target = self.layout.layer(diff_id);
        self.discard(&target)?;
        scratch.place(&target)?;
        Ok(record)
    }

    /// Moves something out of the way; it is removed when the lock is free.
    pub(super) fn discard(&self, path: &Path) -> Result<(), ImageError> {
        let trash = self.session.scratch("trash");
        match fs::rename(path, &trash) {
            Ok(()) => {
                super::layout::remove_tree(&trash);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(ImageError::storage("remove a layer", path, error)),
        }
    }

    /// Brings layers of this boot to the disk for good. Losing this work to a
    /// killed process costs an unpack after the next boot, no more.
    pub(crate) fn settle_layers(&self, diff_ids: &[Digest]) -> Result<(), ImageError> {
        let fresh = diff_ids.iter().filter(|diff_id| {
            read_record(&self.layout, diff_id).is_some_and(|record| record.unsynced_in_boot.is_some())
        });
        let fresh: Vec<&Digest> = fresh.collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let layers = self.layout.layers();
        let failed = |error: io::Error| ImageError::storage("sync layers", &layers, error);
        let directory = File::open(&layers).map_err(failed)?;
        rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))?;
        for diff_id in fresh {
            // Under the lock, so that a layer is not replaced meanwhile.
            let Some(_lock) = FileLock::try_exclusive(&self.layout.layer_lock(diff_id))? else { continue };
            let Some(mut record) = read_record(&self.layout, diff_id) else { continue };
            if record.unsynced_in_boot.take().is_some_and(|boot| boot == boot_id()) {
                let content = serde_json::to_vec(&record).map_err(|error| failed(error.into()))?;
                write_file(&self.session, &self.layout.layer_record(diff_id), &content)?;
            }
        }
        Ok(())
    }
}

fn write_record(directory: &Path, record: &LayerRecord) -> Result<(), ImageError> {
    let path = directory.join("layer.json");
    let failed = |error: io::Error| ImageError::storage("write a layer", &path, error);
    let content = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
    fs::write(&path, content).map_err(failed)
}

/// Differs after every start of the machine.
fn boot_id() -> &'static str {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    BOOT_ID.get_or_init(|| {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        id.trim().to_owned()
    })
}

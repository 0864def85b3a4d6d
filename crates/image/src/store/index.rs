//! Which reference means which manifest. One small file, changed only under
//! the store's exclusive lock, read again when it has changed on disk.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use stacyvm_api::Timestamp;

use super::layout::{Layout, Session, Stamp, write_file};
use crate::{Digest, ImageError};

/// Layout of the file, and of the store with it.
const VERSION: u32 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    version: u32,
    /// By complete reference.
    pub(crate) references: BTreeMap<String, IndexEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexEntry {
    pub(crate) manifest: Digest,
    /// The multi-platform index that the manifest was chosen from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<Digest>,
    pub(crate) stored_at: Timestamp,
}

/// The index as last read.
#[derive(Debug, Default)]
pub(crate) struct CachedIndex(Mutex<Option<(Stamp, Index)>>);

impl CachedIndex {
    pub(crate) fn lookup(&self, layout: &Layout, reference: &str) -> Result<Option<IndexEntry>, ImageError> {
        self.with(layout, |index| index.references.get(reference).cloned())
    }

    pub(crate) fn snapshot(&self, layout: &Layout) -> Result<Index, ImageError> {
        self.with(layout, Index::clone)
    }

    fn with<T>(&self, layout: &Layout, read: impl FnOnce(&Index) -> T) -> Result<T, ImageError> {
        let path = layout.index();
        let stamp = match Stamp::of(&path) {
            Ok(stamp) => stamp,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(read(&Index::default())),
            Err(error) => return Err(ImageError::storage("read the image index", path, error)),
        };
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, index)) = cached.as_ref()
            && *known == stamp
        {
            return Ok(read(index));
        }
        let index = load(layout)?;
        let answer = read(&index);
        // A newer file than `stamp` is read again next time, which is harmless.
        *cached = Some((stamp, index));
        Ok(answer)
    }
}

fn load(layout: &Layout) -> Result<Index, ImageError> {
    let path = layout.index();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Index::default()),
        Err(error) => return Err(ImageError::storage("read the image index", path, error)),
    };
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|error| ImageError::storage("read the image index", &path, error))?;
    if index.version > VERSION {
        let error = io::Error::other(format!("version {} was written by a newer StacyVM", index.version));
        return Err(ImageError::storage("read the image index", path, error));
    }
    Ok(index)
}

/// Changes the index; the caller holds the store's exclusive lock.
pub(crate) fn update(layout: &Layout, session: &Session, change: impl FnOnce(&mut Index)) -> Result<Index, ImageError> {
    let before = load(layout)?;
    let mut index = before.clone();
    change(&mut index);
    index.version = VERSION;
    if index != before {
        let content = serde_json::to_vec_pretty(&index)
            .map_err(|error| ImageError::storage("write the image index", layout.index(), error))?;
        write_file(session, &layout.index(), &content)?;
    }
    Ok(index)
}

//! Layers that sandboxes use, recorded so that they outlive every process.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::Image;
use super::layout::{Layout, Session, list_directory};
use crate::{Digest, ImageError};

/// Owners are sandbox ids; this leaves room for prefixes.
const MAX_OWNER_BYTES: usize = 128;

/// One owner's hold on the layers of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub owner: String,
    pub reference: String,
    pub manifest: Digest,
    /// Bottom first.
    pub layers: Vec<Digest>,
}

/// Not synced: after a power failure no sandbox lives to need its lease.
pub(super) fn write(layout: &Layout, session: &Session, owner: &str, image: &Image) -> Result<(), ImageError> {
    let path = path(layout, owner)?;
    let lease = Lease {
        owner: owner.to_owned(),
        reference: image.reference.clone(),
        manifest: image.data.manifest().clone(),
        layers: image.data.diff_ids().to_vec(),
    };
    let failed = |error: io::Error| ImageError::storage("record a lease", &path, error);
    let content = serde_json::to_vec(&lease).map_err(|error| failed(error.into()))?;
    let scratch = session.scratch("lease");
    fs::write(&scratch, content).map_err(failed)?;
    fs::rename(&scratch, &path).map_err(failed)
}

pub(super) fn remove(layout: &Layout, owner: &str) -> Result<(), ImageError> {
    let path = path(layout, owner)?;
    match fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ImageError::storage("remove a lease", path, error)),
    }
}

pub(super) fn list(layout: &Layout) -> Result<Vec<Lease>, ImageError> {
    let mut leases = Vec::new();
    for path in list_directory(&layout.leases())? {
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(ImageError::storage("read a lease", path, error)),
        };
        match serde_json::from_slice(&content) {
            Ok(lease) => leases.push(lease),
            // Only a power failure leaves one half written, and it ended the
            // sandbox too.
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "an unreadable lease is dropped");
                let _ = fs::remove_file(&path);
            }
        }
    }
    leases.sort_by(|a: &Lease, b: &Lease| a.owner.cmp(&b.owner));
    Ok(leases)
}

fn path(layout: &Layout, owner: &str) -> Result<std::path::PathBuf, ImageError> {
    let is_valid = !owner.is_empty()
        && owner.len() <= MAX_OWNER_BYTES
        && !owner.starts_with('.')
        && owner.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if !is_valid {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "owners are letters, digits, `-`, `_` and `.`");
        return Err(ImageError::storage("record a lease", layout.leases(), error));
    }
    Ok(layout.leases().join(format!("{owner}.json")))
}

//! Collection: what nothing needs goes, then the least recently used images
//! until the store fits.
//!
//! Needed is what a reference in the index, a locked manifest (a live handle
//! or a pull in progress, in any process) or a lease leads to. Handles are
//! looked at before leases: a launcher records its lease while it still holds
//! the handle, so one of the two is always seen. Everything happens under the
//! store's exclusive lock, but by renames only; the removing comes after.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::index::{self, Index};
use super::layers::read_record;
use super::layout::{FileLock, claim_stale_sessions, list_directory, remove_tree};
use super::{Documents, Inner, descriptor_digest, leases};
use crate::{Digest, ImageError};

/// Interrupted downloads are worth keeping for the next try, for a while.
const PARTIAL_MAX_AGE: Duration = Duration::from_hours(24);

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GarbageReport {
    /// References dropped for want of room.
    pub removed_images: Vec<String>,
    pub removed_layers: usize,
    pub removed_blobs: usize,
    pub freed_bytes: u64,
    /// Size of the store afterwards.
    pub remaining_bytes: u64,
}

#[derive(Default)]
struct Needed {
    blobs: HashSet<Digest>,
    layers: HashSet<Digest>,
}

impl Inner {
    /// Frees what nothing needs.
    pub(super) fn collect_orphans(&self) -> Result<GarbageReport, ImageError> {
        self.collect(u64::MAX)
    }

    pub(super) fn collect_garbage(&self) -> Result<GarbageReport, ImageError> {
        self.collect(self.options.max_bytes)
    }

    /// After something was stored: sync it, and make room if there is none.
    pub(crate) fn tidy(&self, diff_ids: &[Digest]) {
        let outcome = self.settle_layers(diff_ids).and_then(|()| self.collect_garbage());
        match outcome {
            Ok(report) if report == GarbageReport { remaining_bytes: report.remaining_bytes, ..Default::default() } => {
            }
            Ok(report) => tracing::info!(?report, "image store collected"),
            Err(error) => tracing::warn!(%error, "image store could not be tidied"),
        }
    }

    fn collect(&self, max_bytes: u64) -> Result<GarbageReport, ImageError> {
        let mut report = GarbageReport::default();
        let mut trash = Vec::new();
        {
            let _store = self.layout.lock_exclusive()?;
            trash.extend(claim_stale_sessions(&self.layout, &self.session)?);
            remove_idle_locks(&self.layout.locks())?;
            let mut index = index::update(&self.layout, &self.session, |_| {})?;
            let used = self.used_manifests(&index)?;
            let leases = leases::list(&self.layout)?;
            let running: HashSet<Digest> = leases.iter().map(|lease| lease.manifest.clone()).collect();
            loop {
                let mut needed = self.needed(&index, &used)?;
                needed.layers.extend(leases.iter().flat_map(|lease| lease.layers.iter().cloned()));
                let stored = self.sweep(&needed, &mut report, &mut trash)?;
                let mut partial = self.sweep_partials(PARTIAL_MAX_AGE, &mut report, &mut trash)?;
                if stored + partial > max_bytes {
                    partial = self.sweep_partials(Duration::ZERO, &mut report, &mut trash)?;
                }
                report.remaining_bytes = stored + partial;
                if report.remaining_bytes <= max_bytes {
                    break;
                }
                let Some(victim) = self.least_recently_used(&index, &used, &running) else { break };
                index = index::update(&self.layout, &self.session, |index| {
                    index.references.retain(|reference, entry| {
                        let stays = entry.manifest != victim;
                        if !stays {
                            report.removed_images.push(reference.clone());
                        }
                        stays
                    });
                })?;
            }
        }
        for path in trash {
            remove_tree(&path);
        }
        Ok(report)
    }

    /// Manifests locked by anybody; marks that mean nothing any more go.
    fn used_manifests(&self, index: &Index) -> Result<HashSet<Digest>, ImageError> {
        let mut used = HashSet::new();
        for path in list_directory(&self.layout.in_use_directory())? {
            let Some(digest) = digest_of(&path) else { continue };
            match FileLock::try_exclusive(&path)? {
                None => {
                    used.insert(digest);
                }
                Some(_lock) if !index.references.values().any(|entry| entry.manifest == digest) => {
                    let _ = fs::remove_file(&path);
                }
                Some(_lock) => {}
            }
        }
        Ok(used)
    }

    fn needed(&self, index: &Index, used: &HashSet<Digest>) -> Result<Needed, ImageError> {
        let mut needed = Needed::default();
        let manifests: BTreeSet<&Digest> = index.references.values().map(|entry| &entry.manifest).chain(used).collect();
        for digest in manifests {
            needed.blobs.insert(digest.clone());
            self.add_needs(digest, &mut needed)?;
        }
        Ok(needed)
    }

    /// A document that cannot be read at all ends the collection with an
    /// error; one that makes no sense needs nothing.
    fn add_needs(&self, manifest: &Digest, needed: &mut Needed) -> Result<(), ImageError> {
        let Some(bytes) = self.read_document(manifest)? else { return Ok(()) };
        let Ok(parsed) = super::parse_manifest("", &bytes) else { return Ok(()) };
        for descriptor in std::iter::once(parsed.config()).chain(parsed.layers()) {
            needed.blobs.extend(descriptor_digest("", descriptor));
        }
        match self.documents("", manifest) {
            Ok(Some(Documents { config, .. })) => needed.layers.extend(config.diff_ids),
            Ok(None) | Err(ImageError::Malformed { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Moves away what is not needed; returns the size of what stays.
    fn sweep(&self, needed: &Needed, report: &mut GarbageReport, trash: &mut Vec<PathBuf>) -> Result<u64, ImageError> {
        let mut remaining = 0;
        for path in list_directory(&self.layout.blobs())? {
            let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            if digest_of(&path).is_some_and(|digest| needed.blobs.contains(&digest)) {
                remaining += size;
            } else {
                self.throw_away(&path, trash)?;
                report.removed_blobs += 1;
                report.freed_bytes += size;
            }
        }
        for path in list_directory(&self.layout.layers())? {
            let digest = digest_of(&path);
            let record = digest.as_ref().and_then(|digest| read_record(&self.layout, digest));
            let size = record.map_or(0, |record| record.disk_bytes);
            if digest.is_some_and(|digest| needed.layers.contains(&digest)) {
                remaining += size;
            } else {
                self.throw_away(&path, trash)?;
                report.removed_layers += 1;
                report.freed_bytes += size;
            }
        }
        Ok(remaining)
    }

    fn sweep_partials(
        &self,
        max_age: Duration,
        report: &mut GarbageReport,
        trash: &mut Vec<PathBuf>,
    ) -> Result<u64, ImageError> {
        let mut remaining = 0;
        for path in list_directory(&self.layout.partials())? {
            let Ok(metadata) = fs::metadata(&path) else { continue };
            let age = metadata.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
            let is_old = age.unwrap_or_default() >= max_age;
            let lock = match digest_of(&path) {
                Some(digest) => FileLock::try_exclusive(&self.layout.blob_lock(&digest))?,
                None => None,
            };
            if lock.is_some() && is_old {
                self.throw_away(&path, trash)?;
                report.freed_bytes += metadata.len();
            } else {
                remaining += metadata.len();
            }
        }
        Ok(remaining)
    }

    fn throw_away(&self, path: &Path, trash: &mut Vec<PathBuf>) -> Result<(), ImageError> {
        let target = self.session.scratch("trash");
        fs::rename(path, &target).map_err(|error| ImageError::storage("collect", path, error))?;
        trash.push(target);
        Ok(())
    }

    /// The mark of use carries the time; an image never used since it was
    /// stored has the time of that.
    fn least_recently_used(&self, index: &Index, used: &HashSet<Digest>, running: &HashSet<Digest>) -> Option<Digest> {
        let candidates = index
            .references
            .values()
            .filter(|entry| !used.contains(&entry.manifest) && !running.contains(&entry.manifest));
        let last_use = |digest: &Digest| {
            fs::metadata(self.layout.in_use(digest))
                .and_then(|metadata| metadata.modified())
                .unwrap_or(SystemTime::UNIX_EPOCH)
        };
        candidates.map(|entry| &entry.manifest).min_by_key(|digest| last_use(digest)).cloned()
    }
}

fn digest_of(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?).ok()
}

fn remove_idle_locks(directory: &Path) -> Result<(), ImageError> {
    for path in list_directory(directory)? {
        if let Some(_held) = FileLock::try_exclusive(&path)? {
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

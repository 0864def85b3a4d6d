//! Where things lie in the store, and how several processes share it.
//!
//! ```text
//! blobs/sha256/HEX      manifests, configurations, layers as downloaded
//! layers/HEX/fs         a layer unpacked, by diff id
//! layers/HEX/layer.json what is known about it
//! partial/HEX           a download in progress
//! index.json            which reference means which manifest
//! leases/OWNER.json     layers a sandbox uses, also while no server runs
//! inuse/HEX             locked (shared) by processes that use a manifest
//! locks/NAME            one worker at a time per blob and layer
//! store.lock            shared to look, exclusive to change the index or collect
//! tmp/SESSION           a process's own scratch space, locked while it lives
//! ```
//!
//! Every file appears by rename, complete; every lock is an `flock`, so that
//! the kernel lets go of it however a process ends.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::{Digest, ImageError};

/// How often a waiter for another worker looks again.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// The store's own lock is held for milliseconds; whoever holds it longer is
/// stopped or stuck.
const STORE_LOCK_WAIT: Duration = Duration::from_secs(30);
const STORE_LOCK_POLL: Duration = Duration::from_millis(2);

#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes the directories. The store's own is private: layers hold setuid
    /// files that must not be reachable for other users of the host.
    pub(crate) fn create(root: &Path) -> Result<Self, ImageError> {
        let failed = |error| ImageError::storage("prepare the image store", root, error);
        let layout = Self { root: root.to_owned() };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        for directory in ["blobs/sha256", "layers", "partial", "leases", "inuse", "locks", "tmp"] {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(directory)).map_err(failed)?;
        }
        Ok(layout)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.layers().join(diff_id.hex())
    }

    pub(crate) fn layer_record(&self, diff_id: &Digest) -> PathBuf {
        self.layer(diff_id).join("layer.json")
    }

    pub(crate) fn layer_tree(&self, diff_id: &Digest) -> PathBuf {
        self.layer(diff_id).join("fs")
    }

    pub(crate) fn partials(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(crate) fn partial(&self, digest: &Digest) -> PathBuf {
        self.partials().join(digest.hex())
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub(crate) fn in_use_directory(&self) -> PathBuf {
        self.root.join("inuse")
    }

    pub(crate) fn in_use(&self, manifest: &Digest) -> PathBuf {
        self.in_use_directory().join(manifest.hex())
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.root.join("index.json")
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    pub(crate) fn blob_lock(&self, digest: &Digest) -> PathBuf {
        self.locks().join(format!("blob-{}", digest.hex()))
    }

    pub(crate) fn layer_lock(&self, diff_id: &Digest) -> PathBuf {
        self.locks().join(format!("layer-{}", diff_id.hex()))
    }

    pub(crate) fn sessions(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Held for moments only, and never across an await.
    pub(crate) async fn lock_shared(&self) -> Result<FileLock, ImageError> {
        let path = self.root.join("store.lock");
        let deadline = Instant::now() + STORE_LOCK_WAIT;
        loop {
            if let Some(lock) = FileLock::try_shared(&path)? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(stuck(&path));
            }
            tokio::time::sleep(STORE_LOCK_POLL).await;
        }
    }

    /// For blocking threads only.
    pub(crate) fn lock_exclusive(&self) -> Result<FileLock, ImageError> {
        let path = self.root.join("store.lock");
        let deadline = Instant::now() + STORE_LOCK_WAIT;
        loop {
            if let Some(lock) = FileLock::try_exclusive(&path)? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(stuck(&path));
            }
            std::thread::sleep(STORE_LOCK_POLL);
        }
    }
}

fn stuck(path: &Path) -> ImageError {
    let error = io::Error::new(io::ErrorKind::TimedOut, "another process holds the lock and does not let go");
    ImageError::storage("lock the image store", path, error)
}

/// Tells one version of a file from the next: each is a new inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { inode: metadata.ino(), length: metadata.len(), modified })
    }
}

/// An `flock` on a file that may be removed by whoever holds it exclusively.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Self>, ImageError> {
        Self::attempt(path, FlockOperation::NonBlockingLockExclusive)
    }

    pub(crate) fn try_shared(path: &Path) -> Result<Option<Self>, ImageError> {
        Self::attempt(path, FlockOperation::NonBlockingLockShared)
    }

    /// Waits for as long as the other worker takes; dropping the future stops
    /// waiting.
    pub(crate) async fn exclusive(path: &Path) -> Result<Self, ImageError> {
        loop {
            if let Some(lock) = Self::try_exclusive(path)? {
                return Ok(lock);
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }

    fn attempt(path: &Path, operation: FlockOperation) -> Result<Option<Self>, ImageError> {
        let failed = |error: io::Error| ImageError::storage("lock the image store", path, error);
        loop {
            let file =
                OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(failed)?;
            match rustix::fs::flock(&file, operation) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(failed(error.into())),
            }
            // The file may have been removed between open and lock; a lock on
            // a removed file excludes nobody.
            let held = file.metadata().map_err(failed)?;
            match fs::metadata(path) {
                Ok(current) if current.ino() == held.ino() && current.dev() == held.dev() => {
                    return Ok(Some(Self { file }));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Marks the locked file as used now.
    pub(crate) fn touch(&self) {
        // Only the order of collection depends on it.
        let _ = self.file.set_modified(std::time::SystemTime::now());
    }
}

/// A process's scratch directory, removed with the process or by the next one.
#[derive(Debug)]
pub(crate) struct Session {
    path: PathBuf,
    next: AtomicU64,
    _lock: FileLock,
}

impl Session {
    /// Clears what dead processes left, then makes a directory of our own.
    pub(crate) fn create(layout: &Layout) -> Result<Self, ImageError> {
        let (session, stale) = {
            let _store = layout.lock_exclusive()?;
            let session = Self::make(layout)?;
            let stale = claim_stale_sessions(layout, &session)?;
            (session, stale)
        };
        for path in stale {
            remove_tree(&path);
        }
        Ok(session)
    }

    fn make(layout: &Layout) -> Result<Self, ImageError> {
        let failed = |error| ImageError::storage("prepare the image store", layout.sessions(), error);
        let directory = tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .tempdir_in(layout.sessions())
            .map_err(failed)?
            .keep();
        let lock = FileLock::try_exclusive(&directory.join("lock"))?
            .ok_or_else(|| failed(io::Error::other("a fresh lock is taken")))?;
        Ok(Self { path: directory, next: AtomicU64::new(0), _lock: lock })
    }

    /// A name nobody has used.
    pub(crate) fn scratch(&self, purpose: &str) -> PathBuf {
        self.path.join(format!("{purpose}-{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn scratch_directory(&self, purpose: &str) -> Result<ScratchDirectory, ImageError> {
        let path = self.scratch(purpose);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| ImageError::storage("make a temporary directory", &path, error))?;
        Ok(ScratchDirectory { path: Some(path) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        remove_tree(&self.path);
    }
}

/// Removed when dropped, unless it was put in its place.
#[derive(Debug)]
pub(crate) struct ScratchDirectory {
    path: Option<PathBuf>,
}

impl ScratchDirectory {
    pub(crate) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// Renames it into place; on failure it is removed as usual.
    pub(crate) fn place(mut self, target: &Path) -> Result<(), ImageError> {
        fs::rename(self.path(), target).map_err(|error| ImageError::storage("place a layer", target, error))?;
        self.path = None;
        Ok(())
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            remove_tree(path);
        }
    }
}

/// Moves what dead processes left into `session`, for the caller to remove when
/// it no longer holds the store's exclusive lock, which it needs here so that
/// no session is half made.
pub(crate) fn claim_stale_sessions(layout: &Layout, session: &Session) -> Result<Vec<PathBuf>, ImageError> {
    let mut claimed = Vec::new();
    for path in list_directory(&layout.sessions())? {
        let lock = path.join("lock");
        let is_stale = !lock.exists() || FileLock::try_exclusive(&lock).is_ok_and(|lock| lock.is_some());
        if is_stale {
            let target = session.scratch("stale");
            fs::rename(&path, &target)
                .map_err(|error| ImageError::storage("clean up the image store", &path, error))?;
            claimed.push(target);
        }
    }
    Ok(claimed)
}

pub(crate) fn list_directory(path: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let failed = |error| ImageError::storage("read the image store", path, error);
    fs::read_dir(path).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect()
}

/// Writes a small file so that it is there whole or not at all, also after a
/// power failure.
pub(crate) fn write_file(session: &Session, path: &Path, content: &[u8]) -> Result<(), ImageError> {
    let failed = |error| ImageError::storage("write to the image store", path, error);
    let scratch = session.scratch("file");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&scratch).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    place_file(&scratch, path)
}

/// Moves a complete, synced file into place.
pub(crate) fn place_file(from: &Path, to: &Path) -> Result<(), ImageError> {
    let failed = |error| ImageError::storage("write to the image store", to, error);
    fs::rename(from, to).map_err(failed)?;
    if let Some(parent) = to.parent() {
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed)?;
    }
    Ok(())
}

/// Removes a file or tree as far as it can be; what stays is found by the next
/// sweep. Layers of an ordinary user may hold directories that their owner
/// cannot enter, which are opened up first.
pub(crate) fn remove_tree(path: &Path) {
    let remove = || match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    let mut outcome = remove();
    if outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        open_up(path);
        outcome = remove();
    }
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove");
        }
        Ok(()) | Err(_) => {}
    }
}

fn open_up(path: &Path) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    if !metadata.is_dir() {
        return;
    }
    // Failing here shows as the failure to remove.
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        open_up(&entry.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_lock_file_excludes_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = FileLock::try_exclusive(&path).unwrap().unwrap();
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        assert!(FileLock::try_shared(&path).unwrap().is_none());
        fs::remove_file(&path).unwrap();
        let second = FileLock::try_exclusive(&path).unwrap().unwrap();
        drop(first);
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        drop(second);
        let shared = FileLock::try_shared(&path).unwrap().unwrap();
        assert!(FileLock::try_shared(&path).unwrap().is_some());
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        drop(shared);
    }

    #[test]
    fn sessions_of_dead_processes_are_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        let stale = layout.sessions().join("1-gone");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("lock"), "").unwrap();
        fs::write(stale.join("rubbish"), "x").unwrap();
        let alive = Session::create(&layout).unwrap();
        assert!(!stale.exists());
        let scratch = alive.scratch_directory("x").unwrap();
        let other = Session::create(&layout).unwrap();
        assert!(scratch.path().exists());
        drop(other);
        let path = alive.path.clone();
        drop(scratch);
        drop(alive);
        assert!(!path.exists());
        assert_eq!(fs::metadata(directory.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

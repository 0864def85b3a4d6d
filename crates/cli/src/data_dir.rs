//! The directory a server keeps everything in: who may use it, who does, and
//! the secret that only this server knows.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use stacyvm_engine::StoreError;

use crate::failure::Advice;

const SYSTEM_DIR: &str = "/var/lib/stacyvm";
const USER_DIR: &str = ".local/share/stacyvm";
const LOCK_FILE: &str = "server.lock";
const SECRET_FILE: &str = "server.secret";

/// Takes up room that a server which starts on a full disk then has.
const RESERVE_FILE: &str = "server.reserve";

/// More than a start writes: records, the database's log, the host image.
const RESERVE_BYTES: u64 = 16 << 20;

/// The reserve is made where there is this many times as much room.
const RESERVE_SHARE: u64 = 4;

/// Bytes of the server secret.
pub(crate) const SECRET_BYTES: usize = 32;

/// Where a server keeps its things unless told otherwise.
fn default_path(home: Option<&Path>) -> anyhow::Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from(SYSTEM_DIR));
    }
    let home = home.ok_or_else(|| Advice::new("there is no home directory to keep data in", "pass --data-dir"))?;
    Ok(home.join(USER_DIR))
}

/// The directory that was chosen, or the default, as an absolute path.
pub(crate) fn resolve(chosen: Option<&Path>, home: Option<&Path>) -> anyhow::Result<PathBuf> {
    match chosen {
        Some(dir) => std::path::absolute(dir).with_context(|| format!("cannot use {}", dir.display())),
        None => default_path(home),
    }
}

/// Makes the directory, for its owner alone.
pub(crate) fn create(path: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot use the data directory {}", path.display());
    DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(cannot)?;
    let metadata = path.metadata().with_context(cannot)?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        let message = format!("the data directory {} belongs to another user", path.display());
        return Err(Advice::new(message, "run as that user, or pass another --data-dir").into());
    }
    if metadata.mode() & 0o077 != 0 {
        std::fs::set_permissions(path, Permissions::from_mode(0o700)).with_context(cannot)?;
    }
    Ok(())
}

/// Holds a data directory for one server. The kernel lets go of it when the
/// process ends, however it ends.
#[derive(Debug)]
pub(crate) struct DataDirLock {
    _file: File,
}

impl DataDirLock {
    pub(crate) fn take(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(LOCK_FILE);
        let cannot = || format!("cannot lock {}", path.display());
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(in_use(dir, &mut file).into()),
            Err(std::fs::TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        let written =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        match written {
            // The number is for people; the lock holds without it.
            Err(error) if is_no_space(&error) => {}
            written => written.with_context(cannot)?,
        }
        Ok(Self { _file: file })
    }
}

/// Sets room aside for a later start; where the disk is full, gives what was set
/// aside to this one, so that what runs can be looked at and destroyed.
pub(crate) fn keep_room(dir: &Path) {
    let path = dir.join(RESERVE_FILE);
    let Ok(disk) = rustix::fs::statvfs(dir) else { return };
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if path.exists() {
        if available < RESERVE_BYTES && std::fs::remove_file(&path).is_ok() {
            tracing::warn!(dir = %dir.display(), "the disk of the data directory is full: the reserve is used up");
        }
    } else if available >= RESERVE_BYTES * RESERVE_SHARE {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|file| {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES).map_err(Into::into)
        });
        if let Err(error) = made {
            // Not every file system can; a start on a full disk then fails.
            tracing::debug!(%error, "no room could be set aside");
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Says plainly that it is the disk, whatever could not be written.
pub(crate) fn explain_full_disk(error: anyhow::Error, dir: &Path) -> anyhow::Error {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(is_no_space)
            || cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_disk_full)
    };
    if !error.chain().any(is_full) {
        return error;
    }
    let message = format!("the disk that holds the data directory {} is full", dir.display());
    error.context(Advice::new(message, "free some space there and start again; sandboxes that run are not touched"))
}

fn is_no_space(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Whether a server has used the directory, now or earlier.
pub(crate) fn had_server(dir: &Path) -> bool {
    dir.join(LOCK_FILE).exists()
}

/// Who holds a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Process id, where the holder wrote it.
    pub(crate) pid: Option<u32>,
}

/// The server that holds the directory now, if one does. Changes nothing.
pub(crate) fn holder(dir: &Path) -> Option<Holder> {
    let mut file = File::open(dir.join(LOCK_FILE)).ok()?;
    match file.try_lock_shared() {
        Err(std::fs::TryLockError::WouldBlock) => Some(Holder { pid: written_pid(&mut file) }),
        Ok(()) | Err(std::fs::TryLockError::Error(_)) => None,
    }
}

fn written_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn in_use(dir: &Path, file: &mut File) -> Advice {
    let holder = written_pid(file);
    let who = holder.map_or_else(|| "another server".to_owned(), |pid| format!("another server (process {pid})"));
    Advice::new(
        format!("{who} uses the data directory {}", dir.display()),
        "stop that server first, or start this one with another --data-dir and --port",
    )
}

/// The secret that agents' tokens are derived from: made once, kept for ever,
/// because sandboxes that outlive the server know only tokens made from it.
pub(crate) fn server_secret(dir: &Path) -> anyhow::Result<[u8; SECRET_BYTES]> {
    let path = dir.join(SECRET_FILE);
    match std::fs::read(&path) {
        Ok(bytes) => bytes.try_into().map_err(|bytes: Vec<u8>| {
            let message = format!("{} has {} bytes instead of {SECRET_BYTES}", path.display(), bytes.len());
            Advice::new(message, "restore it from a backup, or delete it and lose the sandboxes that still run").into()
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => make_secret(dir, &path),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Written aside and renamed: a crash leaves the whole secret or none.
fn make_secret(dir: &Path, path: &Path) -> anyhow::Result<[u8; SECRET_BYTES]> {
    let mut secret = [0; SECRET_BYTES];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut secret)).context("read random bytes")?;
    let scratch = dir.join(format!("{SECRET_FILE}.new"));
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
        file.write_all(&secret)?;
        file.sync_all()?;
        std::fs::rename(&scratch, path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_and_its_secret_are_for_the_owner_alone() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("a/b");
        create(&dir).unwrap();
        assert_eq!(dir.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        create(&dir).unwrap();
        assert_eq!(dir.metadata().unwrap().mode() & 0o777, 0o700, "an open one is closed");

        let secret = server_secret(&dir).unwrap();
        assert_ne!(secret, [0; SECRET_BYTES]);
        assert_eq!(server_secret(&dir).unwrap(), secret, "it stays the same");
        assert_eq!(dir.join(SECRET_FILE).metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_secret_is_not_replaced_silently() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(SECRET_FILE), "short").unwrap();
        assert!(server_secret(dir.path()).unwrap_err().to_string().contains("5 bytes instead of 32"));
    }

    #[test]
    fn a_second_server_is_told_who_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DataDirLock::take(dir.path()).unwrap();
        let error = DataDirLock::take(dir.path()).unwrap_err().to_string();
        assert_eq!(holder(dir.path()), Some(Holder { pid: Some(std::process::id()) }));
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        assert_eq!(holder(dir.path()), None);
        DataDirLock::take(dir.path()).unwrap();
    }
}

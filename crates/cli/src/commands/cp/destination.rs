//! A local directory that a sandbox fills.
//!
//! Whoever is in the sandbox chose the names, and may have put links here with
//! an earlier copy. So every step below the directory goes from descriptor to
//! descriptor and follows no link: one that is in the way of a directory or a
//! file is replaced by it, as tar does.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, open, openat, symlinkat, unlinkat};
use rustix::io::Errno;

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

const NEW_FILE: OFlags = OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::CLOEXEC);

/// Pipes that stand where a file is expected do not block.
const OLD_FILE: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Names in it are relative and without `..`.
pub(super) struct Destination {
    directory: OwnedFd,
    path: PathBuf,
}

impl Destination {
    /// The directory that the user named, who may have named a link to it; made
    /// if missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        Ok(Self { directory: open(path, DIRECTORY, Mode::empty())?, path: path.to_owned() })
    }

    /// A directory in it, made if missing.
    pub(super) fn within(&self, name: &Path) -> io::Result<Self> {
        Ok(Self { directory: self.make_directory(name)?, path: self.path.join(name) })
    }

    /// For people.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn make_directory(&self, name: &Path) -> io::Result<OwnedFd> {
        let mut directory = self.directory.try_clone()?;
        for part in name {
            directory = enter_or_make(&directory, part)?;
        }
        Ok(directory)
    }

    /// An empty file that nobody else may read yet.
    pub(super) fn create_file(&self, name: &Path) -> io::Result<File> {
        let (parent, last) = self.make_room(name)?;
        Ok(openat(parent, last, NEW_FILE, Mode::RUSR | Mode::WUSR)?.into())
    }

    pub(super) fn create_link(&self, name: &Path, to: &Path) -> io::Result<()> {
        let (parent, last) = self.make_room(name)?;
        Ok(symlinkat(to, parent, last)?)
    }

    pub(super) fn open_file(&self, name: &Path) -> io::Result<File> {
        let parent = self.find_directory(name.parent().unwrap_or(Path::new("")))?;
        let file = File::from(openat(parent, last_of(name), OLD_FILE, Mode::empty())?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no file")) }
    }

    /// Nothing happens where a link or a file took the directory's place.
    pub(super) fn set_directory_mode(&self, name: &Path, mode: u32) -> io::Result<()> {
        let directory = match self.find_directory(name) {
            Ok(directory) => directory,
            Err(Errno::NOTDIR | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // The descriptor's own path: one that may be unreadable takes no `fchmod`.
        std::fs::set_permissions(format!("/proc/self/fd/{}", directory.as_raw_fd()), Permissions::from_mode(mode))
    }

    fn find_directory(&self, name: &Path) -> Result<OwnedFd, Errno> {
        let mut directory = openat(&self.directory, ".", DIRECTORY, Mode::empty())?;
        for part in name {
            directory = enter(&directory, part)?;
        }
        Ok(directory)
    }

    /// The directory that a name is in, made if missing, and the last part of the
    /// name, which nothing has any more.
    fn make_room<'a>(&self, name: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let parent = self.make_directory(name.parent().unwrap_or(Path::new("")))?;
        let last = last_of(name);
        match unlinkat(&parent, last, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok((parent, last)),
            Err(error) => Err(error.into()),
        }
    }
}

fn last_of(name: &Path) -> &OsStr {
    name.file_name().unwrap_or_default()
}

fn enter(directory: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(directory, name, DIRECTORY.union(OFlags::NOFOLLOW), Mode::empty())
}

fn enter_or_make(directory: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    match enter(directory, name) {
        Ok(found) => return Ok(found),
        Err(Errno::NOENT) => {}
        Err(Errno::NOTDIR) => unlinkat(directory, name, AtFlags::empty())?,
        Err(error) => return Err(error.into()),
    }
    mkdirat(directory, name, Mode::RWXU | Mode::RWXG | Mode::RWXO)?;
    Ok(enter(directory, name)?)
}

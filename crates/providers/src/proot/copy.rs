//! A private copy of a root file system, made without privileges.
//!
//! PRoot has no overlays: what a sandbox may write has to be its own. Files are
//! cloned where the file system can (btrfs, xfs), and copied by the kernel
//! elsewhere. Layers come from hostile images, so everything is relative to an
//! open directory and no symbolic link is ever followed.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// Deeper trees are refused: each level holds two descriptors.
const MAX_DEPTH: usize = 200;

/// Of a mode, what a copy keeps: nothing may become setuid in it.
const KEPT_MODE: u32 = 0o1777;

/// How overlays say that a directory hides what lies below (image store).
const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// What could not be copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) files: u64,
    /// Not readable for this user (`/etc/shadow` in a root that root made).
    pub(super) unreadable: u64,
}

/// Merges layers, bottom first, into the directory `target`. With `owner`,
/// which only root may give, everything there becomes his. Files of more than
/// `most` bytes together are `QuotaExceeded`.
pub(super) fn copy_layers<P: AsRef<Path>>(
    layers: &[P],
    target: &Path,
    owner: Option<u32>,
    most: Option<u64>,
) -> io::Result<Copied> {
    let target = open_directory(rustix::fs::CWD, target)?;
    let mut work = Work { owner, room: most.unwrap_or(u64::MAX), copied: Copied::default() };
    for layer in layers {
        let layer =
            rustix::fs::open(layer.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        work.merge(layer.as_fd(), target.as_fd(), 0)?;
    }
    work.own(target.as_fd())?;
    Ok(work.copied)
}

pub(super) fn open_directory<P: rustix::path::Arg>(parent: impl AsFd, name: P) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Removes whatever has this name, with all below it; nothing there is fine.
pub(super) fn remove(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    remove_at_depth(parent, name, 0)
}

fn remove_at_depth(parent: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // Linux says one, POSIX the other.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    clear(open_directory(parent, name)?.as_fd(), depth + 1)?;
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

fn clear(directory: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !is_dots(entry.file_name()) {
            remove_at_depth(directory, entry.file_name(), depth)?;
        }
    }
    Ok(())
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

struct Work {
    owner: Option<u32>,
    /// Bytes that may still be copied.
    room: u64,
    copied: Copied,
}

impl Work {
    fn merge(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("directories are nested too deeply"));
        }
        for entry in Dir::read_from(source)? {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) {
                continue;
            }
            let stat = rustix::fs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => self.directory(source, target, name, &stat, depth)?,
                FileType::RegularFile => self.file(source, target, name, &stat)?,
                FileType::Symlink => self.link(source, target, name)?,
                FileType::CharacterDevice if stat.st_rdev == 0 => remove(target, name)?,
                // Devices are bound from the host; sockets and pipes are nobody's.
                FileType::CharacterDevice
                | FileType::BlockDevice
                | FileType::Fifo
                | FileType::Socket
                | FileType::Unknown => {}
            }
        }
        Ok(())
    }

    fn directory(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        depth: usize,
    ) -> io::Result<()> {
        let from = match open_directory(source, name) {
            Ok(from) => Some(from),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(error),
        };
        let existing = rustix::fs::statat(target, name, AtFlags::SYMLINK_NOFOLLOW).ok();
        let is_directory = existing.is_some_and(|old| FileType::from_raw_mode(old.st_mode) == FileType::Directory);
        if !is_directory {
            remove(target, name)?;
            rustix::fs::mkdirat(target, name, Mode::RWXU)?;
        }
        let to = open_directory(target, name)?;
        // A lower layer may have left it closed.
        rustix::fs::fchmod(&to, Mode::RWXU)?;
        match &from {
            Some(from) => {
                if is_directory && is_opaque(from) {
                    clear(to.as_fd(), depth)?;
                }
                self.merge(from.as_fd(), to.as_fd(), depth + 1)?;
            }
            None => self.copied.unreadable += 1,
        }
        self.own(to.as_fd())?;
        // A directory that its owner cannot enter could not be removed either.
        rustix::fs::fchmod(&to, Mode::from_raw_mode((stat.st_mode & KEPT_MODE) | 0o700))?;
        rustix::fs::futimens(&to, &times(stat))?;
        Ok(())
    }

    fn file(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let from = match rustix::fs::openat(source, name, flags, Mode::empty()) {
            Ok(from) => from,
            Err(Errno::ACCESS | Errno::PERM) => {
                self.copied.unreadable += 1;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let size = stat.st_size.cast_unsigned();
        self.room = self.room.checked_sub(size).ok_or(io::ErrorKind::QuotaExceeded)?;
        remove(target, name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to = rustix::fs::openat(target, name, flags, Mode::RUSR | Mode::WUSR)?;
        if stat.st_size > 0 && rustix::fs::ioctl_ficlone(&to, &from).is_err() {
            // Copied inside the kernel where both ends allow it.
            let (mut from, mut to) = (File::from(from), File::from(to.try_clone()?));
            io::copy(&mut from, &mut to)?;
        }
        self.own(to.as_fd())?;
        rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o777))?;
        rustix::fs::futimens(&to, &times(stat))?;
        self.copied.files += 1;
        Ok(())
    }

    fn link(&self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let text = rustix::fs::readlinkat(source, name, Vec::new())?;
        remove(target, name)?;
        rustix::fs::symlinkat(text, target, name)?;
        if let Some(owner) = self.owner {
            let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
            rustix::fs::chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    fn own(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        match self.owner {
            Some(owner) => Ok(rustix::fs::fchown(file, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?),
            None => Ok(()),
        }
    }
}

fn is_opaque(directory: &OwnedFd) -> bool {
    OPAQUE.iter().any(|name| {
        let mut value = [0u8; 4];
        rustix::fs::fgetxattr(directory, *name, &mut value).is_ok_and(|length| value[..length] == *b"y")
    })
}

fn times(stat: &Stat) -> Timestamps {
    let modified = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.cast_signed() };
    Timestamps { last_access: modified, last_modification: modified }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn layers_merge_and_links_are_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [lower, upper, target, outside] = ["lower", "upper", "target", "outside"].map(|name| dir.path().join(name));
        for path in [&lower, &upper, &target, &outside] {
            std::fs::create_dir(path).unwrap();
        }
        std::fs::write(outside.join("precious"), "precious").unwrap();
        // A lower layer's link must not carry an upper layer's file out.
        symlink(&outside, lower.join("way-out")).unwrap();
        std::fs::create_dir(upper.join("way-out")).unwrap();
        std::fs::write(upper.join("way-out/precious"), "overwritten").unwrap();
        std::fs::write(lower.join("program"), "old").unwrap();
        std::fs::write(upper.join("program"), "new").unwrap();
        std::fs::set_permissions(upper.join("program"), PermissionsExt::from_mode(0o4755)).unwrap();
        std::fs::create_dir(lower.join("closed")).unwrap();
        std::fs::write(lower.join("closed/kept"), "kept").unwrap();
        std::fs::set_permissions(lower.join("closed"), PermissionsExt::from_mode(0o500)).unwrap();

        let copied = copy_layers(&[&lower, &upper], &target, None, Some(100)).unwrap();
        assert_eq!(copied, Copied { files: 4, unreadable: 0 });
        assert_eq!(std::fs::read_to_string(outside.join("precious")).unwrap(), "precious");
        assert_eq!(std::fs::read_to_string(target.join("way-out/precious")).unwrap(), "overwritten");
        let program = std::fs::metadata(target.join("program")).unwrap();
        assert_eq!((program.mode() & 0o7777, program.nlink()), (0o755, 1));
        assert_eq!(std::fs::read_to_string(target.join("program")).unwrap(), "new");
        assert_eq!(std::fs::metadata(target.join("closed")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::read_to_string(target.join("closed/kept")).unwrap(), "kept");

        let small = dir.path().join("small");
        std::fs::create_dir(&small).unwrap();
        let refused = copy_layers(&[&lower, &upper], &small, None, Some(10)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::QuotaExceeded);
    }
}

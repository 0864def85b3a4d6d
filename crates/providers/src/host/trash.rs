//! Removing trees that a guest has written.
//!
//! A guest can nest directories deeper than any stack or descriptor table is:
//! a recursive removal would crash the server. So directories are never
//! entered twice over: one that is not empty is moved up beside the others and
//! emptied in turn. Its name says which tree it is of, also to a later process:
//! `TREE`, and `TREE.PART` for what was moved up. Names are taken relative to an open directory and symlinks
//! are unlinked, never followed. Where the server is an ordinary user, guests
//! are the same one, and a directory that they closed is opened again.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Between the name of a tree and what tells its parts apart.
const PART: char = '.';

/// Makes names in the trash unique within a process; see [`fresh_name`].
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Moves a tree into the trash, from where it is removed later. Missing is fine.
pub(crate) fn discard(trash: &Path, tree: &Path) -> io::Result<()> {
    match std::fs::rename(tree, trash.join(fresh_name().to_string_lossy().as_ref())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved,
    }
}

/// What the owner of a directory needs to empty it.
const OPEN_TO_OWNER: Mode = Mode::RWXU;

/// Removes everything in the trash; returns how many trees that was, those
/// included of which an earlier process has left but parts. What cannot be
/// removed holds nothing else up.
pub(crate) fn empty(trash: &Path) -> io::Result<usize> {
    let trash = open_dir(rustix::fs::CWD, trash)?;
    let mut waiting: VecDeque<CString> = names(trash.as_fd())?.into_iter().map(|(name, _)| name).collect();
    let trees = waiting.iter().map(|name| tree_of(name)).collect::<BTreeSet<_>>().len();
    let mut failure = None;
    while let Some(name) = waiting.pop_front() {
        match step(trash.as_fd(), &name) {
            Ok(moved_up) if moved_up.is_empty() => {}
            Ok(moved_up) => {
                waiting.extend(moved_up);
                waiting.push_back(name);
            }
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    failure.map_or(Ok(trees), Err)
}

/// Removes one thing in the trash, or moves up what lies in it: then it has to
/// be looked at again.
fn step(trash: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<CString>> {
    if remove_entry(trash, name, FileType::Unknown)? {
        return Ok(Vec::new());
    }
    let moved_up = clear(trash, name)?;
    if moved_up.is_empty() {
        // Nothing is left in it; unless somebody writes into the trash.
        remove_entry(trash, name, FileType::Directory)?;
    }
    Ok(moved_up)
}

/// Unlinks what can be unlinked in a directory and moves the rest up.
fn clear(trash: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<CString>> {
    let opened = match open_dir(trash, name) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_to_owner(trash, name)?;
            open_dir(trash, name)
        }
        opened => opened,
    };
    let directory = match opened {
        // Another worker had it already.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened?,
    };
    if !Mode::from_raw_mode(rustix::fs::fstat(&directory)?.st_mode).contains(OPEN_TO_OWNER) {
        rustix::fs::fchmod(&directory, OPEN_TO_OWNER)?;
    }
    let mut moved = Vec::new();
    for (entry, kind) in names(directory.as_fd())? {
        if remove_entry(directory.as_fd(), &entry, kind)? {
            continue;
        }
        let fresh = fresh_part(name);
        let rename = || rustix::fs::renameat(&directory, &entry, trash, &fresh);
        let renamed = match rename() {
            // Its `..` changes, which is a write to it.
            Err(Errno::ACCESS) => open_to_owner(directory.as_fd(), &entry).and_then(|()| Ok(rename()?)),
            renamed => renamed.map_err(Into::into),
        };
        match renamed {
            Ok(()) => moved.push(fresh),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(moved)
}

/// Only for what was just seen to be a directory, and where no guest runs any
/// more: this follows symbolic links.
fn open_to_owner(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    Ok(rustix::fs::chmodat(parent, name, OPEN_TO_OWNER, AtFlags::empty())?)
}

/// False when it is a directory with something in it.
fn remove_entry(parent: BorrowedFd<'_>, name: &CStr, kind: FileType) -> io::Result<bool> {
    if kind != FileType::Directory {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(true),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<(CString, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

fn open_dir<P: rustix::path::Arg>(parent: impl AsFd, name: P) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// The tree that something in the trash is, or is a part of.
fn tree_of(name: &CStr) -> String {
    let name = name.to_string_lossy();
    name.split(PART).next().unwrap_or_default().to_owned()
}

/// A name for what is moved up out of something in the trash.
fn fresh_part(of: &CStr) -> CString {
    let name = format!("{}{PART}{}", tree_of(of), fresh_name().to_string_lossy());
    CString::new(name).unwrap_or_default()
}

/// A name no other process uses either: it holds our pid and our start.
fn fresh_name() -> CString {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    CString::new(format!("{}-{nanos}-{number}", std::process::id())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn trees_deeper_than_any_stack_go_and_links_are_not_followed() {
        // In memory: on a disk, this many nested directories take a while.
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let (trash, outside) = (root.path().join("trash"), root.path().join("outside"));
        std::fs::create_dir(&trash).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("precious"), "x").unwrap();

        let tree = root.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let mut at = open_dir(rustix::fs::CWD, &tree).unwrap();
        // Far beyond PATH_MAX and the default number of descriptors.
        for depth in 0..5000 {
            rustix::fs::mkdirat(&at, "deeper", Mode::from_raw_mode(0o700)).unwrap();
            if depth % 100 == 0 {
                rustix::fs::symlinkat(&outside, &at, "link").unwrap();
            }
            at = open_dir(&at, "deeper").unwrap();
        }
        symlink(&outside, tree.join("to-outside")).unwrap();
        std::fs::write(tree.join("file"), "content").unwrap();

        discard(&trash, &tree).unwrap();
        discard(&trash, &tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(empty(&trash).unwrap(), 1);
        assert_eq!(std::fs::read_dir(&trash).unwrap().count(), 0);
        assert_eq!(std::fs::metadata(outside.join("precious")).unwrap().size(), 1);
    }

    /// As a server leaves it that is killed in the middle.
    #[test]
    fn parts_are_counted_as_the_tree_that_they_are_of() {
        let root = tempfile::tempdir().unwrap();
        let (trash, tree) = (root.path().join("trash"), root.path().join("tree"));
        std::fs::create_dir(&trash).unwrap();
        for number in 0..5 {
            std::fs::create_dir_all(tree.join(format!("outer/inner-{number}/innermost"))).unwrap();
        }
        discard(&trash, &tree).unwrap();
        let opened = open_dir(rustix::fs::CWD, &trash).unwrap();
        for _ in 0..2 {
            for (name, _) in names(opened.as_fd()).unwrap() {
                step(opened.as_fd(), &name).unwrap();
            }
        }
        assert!(std::fs::read_dir(&trash).unwrap().count() > 1);
        assert_eq!((empty(&trash).unwrap(), empty(&trash).unwrap()), (1, 0));
    }
}

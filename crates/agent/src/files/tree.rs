//! Directories: listing, making, renaming, removing, permissions.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::entry::{Entry, EntryKind};
use crate::Failure;
use crate::user::{Database, Identity};

/// Entries of one listing.
const MAX_ENTRIES: usize = 100_000;

/// Directory levels of one listing.
const MAX_DEPTH: u32 = 512;

const DIRECTORY_MODE: u32 = 0o755;

/// What a removal may take with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// A file, a link or an empty directory, which must exist.
    Single,
    /// Anything below too; what is not there is no error.
    Recursive,
}

/// Entries below a directory, in order of path.
pub(crate) fn list(dir: &Path, depth: u32) -> Result<Vec<Entry>, Failure> {
    let names = Database::current().names();
    let mut entries = Vec::new();
    let mut waiting = vec![(dir.to_owned(), 1u32)];
    while let Some((dir, level)) = waiting.pop() {
        let listing = match fs::read_dir(&dir) {
            Ok(listing) => listing,
            Err(error) if level == 1 => return Err(not_a_directory(&dir, &error)),
            // It went away, or became something else, while we looked.
            Err(_) => continue,
        };
        for found in listing {
            let Ok(found) = found else { break };
            let path = found.path();
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if entries.len() >= MAX_ENTRIES {
                return Err(Failure::Busy(format!(
                    "more than {MAX_ENTRIES} entries below {}: list a smaller tree or less deeply",
                    dir.display()
                )));
            }
            let entry = Entry::new(&path, &metadata, &names);
            if entry.kind == EntryKind::Directory && level < depth.clamp(1, MAX_DEPTH) {
                waiting.push((path, level + 1));
            }
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// Makes a directory and what is missing above it.
pub(crate) fn make_dir(path: &Path, owner: &Identity) -> Result<Entry, Failure> {
    make_parents(path, owner)?;
    match fs::create_dir(path) {
        Ok(()) => own(path, owner)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(if path.is_dir() {
                Failure::FileExists(path.display().to_string())
            } else {
                Failure::FileConflict(format!("not a directory: {}", path.display()))
            });
        }
        Err(error) => return Err(Failure::file(path, &error)),
    }
    Entry::read(path)
}

/// Makes the directories above a path, owned by who asked.
pub(crate) fn make_parents(path: &Path, owner: &Identity) -> Result<(), Failure> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let missing: Vec<&Path> = parent.ancestors().take_while(|dir| fs::symlink_metadata(dir).is_err()).collect();
    for dir in missing.into_iter().rev() {
        match fs::create_dir(dir) {
            Ok(()) => own(dir, owner)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Failure::file(dir, &error)),
        }
    }
    if parent.is_dir() { Ok(()) } else { Err(Failure::FileConflict(format!("not a directory: {}", parent.display()))) }
}

/// Renames; what stands at the new path is replaced if the kernel allows it.
pub(crate) fn rename(from: &Path, to: &Path, owner: &Identity) -> Result<Entry, Failure> {
    fs::symlink_metadata(from).map_err(|error| Failure::file(from, &error))?;
    make_parents(to, owner)?;
    match fs::rename(from, to) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => move_across(from, to)?,
        Err(error) => return Err(Failure::file(to, &error)),
    }
    Entry::read(to)
}

/// Whether the last part is a name. The root has none, and neither have `.` and
/// `..`, which the kernel refuses only once everything in them is gone.
fn is_named(path: &Path) -> bool {
    let parts = path.as_os_str().as_encoded_bytes().rsplit(|byte| *byte == b'/');
    !matches!(parts.into_iter().find(|part| !part.is_empty()), None | Some(b"." | b".."))
}

pub(crate) fn remove(path: &Path, removal: Removal) -> Result<(), Failure> {
    let fail = |error: io::Error| Failure::file(path, &error);
    if !is_named(path) {
        let message = format!("only what has a name of its own can be removed, not {}", path.display());
        return Err(Failure::InvalidArgument(message));
    }
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if removal == Removal::Recursive && is_missing(&error) => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    let result = match (metadata.is_dir(), removal) {
        (false, _) => fs::remove_file(path),
        (true, Removal::Single) => fs::remove_dir(path),
        // Walks by descriptor, so that a link swapped in is not followed.
        (true, Removal::Recursive) => fs::remove_dir_all(path),
    };
    match result {
        Err(error) if removal == Removal::Recursive && is_missing(&error) => Ok(()),
        other => other.map_err(fail),
    }
}

pub(crate) fn chmod(path: &Path, mode: u32) -> Result<(), Failure> {
    if mode > 0o7777 {
        return Err(Failure::InvalidArgument(format!("not permission bits: {mode:o}")));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| Failure::file(path, &error))
}

/// Between two file systems: copy, then remove.
fn move_across(from: &Path, to: &Path) -> Result<(), Failure> {
    let metadata = fs::symlink_metadata(from).map_err(|error| Failure::file(from, &error))?;
    let fail = |path: &Path, error: io::Error| Failure::file(path, &error);
    if metadata.is_file() {
        fs::copy(from, to).map_err(|error| fail(to, error))?;
    } else if metadata.is_symlink() {
        let target = fs::read_link(from).map_err(|error| fail(from, error))?;
        std::os::unix::fs::symlink(target, to).map_err(|error| fail(to, error))?;
    } else if metadata.is_dir() {
        fs::create_dir(to).map_err(|error| fail(to, error))?;
        for found in fs::read_dir(from).map_err(|error| fail(from, error))? {
            let found: PathBuf = found.map_err(|error| fail(from, error))?.path();
            if let Some(name) = found.file_name() {
                move_across(&found, &to.join(name))?;
            }
        }
        fs::set_permissions(to, metadata.permissions()).map_err(|error| fail(to, error))?;
    } else {
        return Err(Failure::FileConflict(format!("cannot be moved to another file system: {}", from.display())));
    }
    let _ = std::os::unix::fs::lchown(to, Some(metadata.uid()), Some(metadata.gid()));
    remove(from, Removal::Single)
}

fn own(dir: &Path, owner: &Identity) -> Result<(), Failure> {
    let result = fs::set_permissions(dir, fs::Permissions::from_mode(DIRECTORY_MODE))
        .and_then(|()| std::os::unix::fs::lchown(dir, Some(owner.uid), Some(owner.gid)));
    match result {
        // An agent without privileges owns all it makes.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(|error| Failure::file(dir, &error)),
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn not_a_directory(dir: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotADirectory => Failure::InvalidArgument(format!("not a directory: {}", dir.display())),
        _ => Failure::file(dir, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Identity {
        let uid = rustix::process::getuid().as_raw();
        let gid = rustix::process::getgid().as_raw();
        Identity { name: "me".to_owned(), uid, gid, groups: vec![gid], home: "/".to_owned() }
    }

    #[test]
    fn trees_are_made_listed_moved_and_removed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let deep = root.path().join("a/b/c");
        assert_eq!(make_dir(&deep, &me()).expect("new").kind, EntryKind::Directory);
        assert!(matches!(make_dir(&deep, &me()), Err(Failure::FileExists(_))));
        fs::write(root.path().join("a/file"), b"x").expect("writable");

        let names = |depth| {
            let entries = list(root.path(), depth).expect("a directory");
            entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
        };
        assert_eq!(names(1), ["a"]);
        assert_eq!(names(9), ["a", "b", "c", "file"]);
        assert!(matches!(list(&root.path().join("a/file"), 1), Err(Failure::InvalidArgument(_))));
        assert!(matches!(list(&root.path().join("none"), 1), Err(Failure::FileNotFound(_))));

        rename(&root.path().join("a/file"), &root.path().join("new/dir/file"), &me()).expect("parents are made");
        assert!(matches!(remove(&root.path().join("a"), Removal::Single), Err(Failure::FileConflict(_))));
        std::fs::write(root.path().join("a/kept"), "").expect("a file");
        for unnamed in ["a/.", "a/./", "a/b/..", "a/b/..//"] {
            let refused = remove(&root.path().join(unnamed), Removal::Recursive);
            assert!(matches!(refused, Err(Failure::InvalidArgument(_))), "{unnamed}: {refused:?}");
        }
        assert!(matches!(remove(Path::new("//"), Removal::Recursive), Err(Failure::InvalidArgument(_))));
        assert!(root.path().join("a/kept").exists());
        remove(&root.path().join("a"), Removal::Recursive).expect("everything below too");
        remove(&root.path().join("a"), Removal::Recursive).expect("missing is no error");
        assert!(matches!(remove(&root.path().join("a"), Removal::Single), Err(Failure::FileNotFound(_))));
        assert_eq!(names(9), ["new", "dir", "file"]);
    }

    #[test]
    fn odd_names_are_shown_and_survive() {
        use std::os::unix::ffi::OsStrExt as _;
        let root = tempfile::tempdir().expect("a temporary directory");
        let odd = root.path().join(std::ffi::OsStr::from_bytes(b"\xff\xfe\n"));
        fs::write(odd, b"x").expect("Linux takes any bytes");
        assert_eq!(list(root.path(), 1).expect("a directory")[0].name, "\u{fffd}\u{fffd}\n");
    }
}

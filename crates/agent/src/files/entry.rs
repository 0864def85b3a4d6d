//! What a directory entry is.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use crate::Failure;
use crate::user::{Database, Names};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    Other,
}

/// One file, directory or link. Names that are not UTF-8 are shown with
/// replacement characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub name: String,
    pub path: String,
    pub kind: EntryKind,
    pub size: u64,
    /// Permission bits only.
    pub mode: u32,
    pub owner: String,
    pub group: String,
    pub modified_seconds: i64,
    pub modified_nanos: i32,
    pub symlink_target: Option<String>,
}

impl Entry {
    /// The entry itself, not what a link points to.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let metadata = std::fs::symlink_metadata(path).map_err(|error| Failure::file(path, &error))?;
        Ok(Self::new(path, &metadata, &Database::current().names()))
    }

    pub(crate) fn new(path: &Path, metadata: &Metadata, names: &Names) -> Self {
        let file_type = metadata.file_type();
        let kind = if file_type.is_file() {
            EntryKind::File
        } else if file_type.is_dir() {
            EntryKind::Directory
        } else if file_type.is_symlink() {
            EntryKind::Symlink
        } else {
            debug_assert!(
                file_type.is_fifo()
                    || file_type.is_socket()
                    || file_type.is_char_device()
                    || file_type.is_block_device()
            );
            EntryKind::Other
        };
        let symlink_target = (kind == EntryKind::Symlink)
            .then(|| std::fs::read_link(path).ok().map(|target| target.to_string_lossy().into_owned()))
            .flatten();
        Self {
            name: path.file_name().map_or_else(|| "/".to_owned(), |name| name.to_string_lossy().into_owned()),
            path: path.to_string_lossy().into_owned(),
            kind,
            size: metadata.len(),
            mode: metadata.mode() & 0o7777,
            owner: names.user(metadata.uid()),
            group: names.group(metadata.gid()),
            modified_seconds: metadata.mtime(),
            modified_nanos: metadata.mtime_nsec() as i32,
            symlink_target,
        }
    }

    /// As `ls -l` shows it.
    pub(crate) fn permissions(&self) -> String {
        let kind = match self.kind {
            EntryKind::File => '-',
            EntryKind::Directory => 'd',
            EntryKind::Symlink => 'l',
            EntryKind::Other => '?',
        };
        let bits = |shift: u32, special: u32, letter: char| {
            let bits = self.mode >> shift;
            let execute = match (bits & 1 != 0, self.mode & special != 0) {
                (true, false) => 'x',
                (false, false) => '-',
                (true, true) => letter,
                (false, true) => letter.to_ascii_uppercase(),
            };
            [if bits & 4 != 0 { 'r' } else { '-' }, if bits & 2 != 0 { 'w' } else { '-' }, execute]
        };
        std::iter::once(kind)
            .chain(bits(6, 0o4000, 's'))
            .chain(bits(3, 0o2000, 's'))
            .chain(bits(0, 0o1000, 't'))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_look_like_ls() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut entry = Entry::read(dir.path()).expect("it exists");
        entry.mode = 0o1777;
        assert_eq!(entry.permissions(), "drwxrwxrwt");
        entry.kind = EntryKind::File;
        entry.mode = 0o4644;
        assert_eq!(entry.permissions(), "-rwSr--r--");
        entry.mode = 0o2755;
        assert_eq!(entry.permissions(), "-rwxr-sr-x");
    }

    #[test]
    fn links_are_described_not_followed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).expect("a new name");
        let entry = Entry::read(&link).expect("the link exists");
        assert_eq!((entry.kind, entry.symlink_target.as_deref()), (EntryKind::Symlink, Some("/nowhere")));
        assert_eq!(entry.name, "link");
    }
}

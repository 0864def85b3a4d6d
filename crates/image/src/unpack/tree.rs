//! One directory on disk that a hostile archive is written into.
//!
//! Everything is an `*at` call on a descriptor of the parent, and parents are
//! opened with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`, so that no
//! name and no planted symbolic link leads out, whatever the archive says.
//! Nobody else writes here: the directory lies below the store's own 0700 one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::path::EntryPath;
use super::reader::TarEntry;
use super::{LayerForm, LayerNotes};

/// How overlayfs is told that a directory hides what lies below.
const TRUSTED_OPAQUE: &str = "trusted.overlay.opaque";
const USER_OPAQUE: &str = "user.overlay.opaque";

#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("{0}")]
    Refused(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for TreeError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::LOOP | Errno::NOTDIR | Errno::XDEV => {
                Self::Refused("a parent is a symbolic link or not a directory")
            }
            Errno::NAMETOOLONG => Self::Refused("name too long"),
            other => Self::Io(other.into()),
        }
    }
}

type Result<T> = std::result::Result<T, TreeError>;

pub(crate) struct Tree {
    root: OwnedFd,
    form: LayerForm,
    /// The last parent: archives list directory by directory.
    parent: Option<(EntryPath, OwnedFd)>,
    /// Directory modes and times wait for the end: files written into a
    /// directory change its time, and a read-only one takes no files.
    directories: BTreeMap<EntryPath, DirectoryMetadata>,
    pub(crate) notes: LayerNotes,
}

struct DirectoryMetadata {
    mode: u32,
    times: Timestamps,
}

impl Tree {
    /// `root` must be an empty directory that nobody else uses.
    pub(crate) fn new(root: &Path, form: LayerForm) -> Result<Self> {
        let root =
            fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, form, parent: None, directories: BTreeMap::new(), notes: LayerNotes::default() })
    }

    pub(crate) fn directory(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<()> {
        let Some((parent_path, name)) = path.split() else {
            self.parent = None;
            let root = self.root.try_clone()?;
            self.own(&root, entry)?;
            self.set_xattrs(root.as_fd(), entry, FileType::Directory)?;
            self.remember(path, entry);
            return Ok(());
        };
        let name = OsStr::from_bytes(name);
        let parent = self.parent(&parent_path)?;
        let was_whiteout = self.make_room(&parent, name, path, FileType::Directory)?;
        match fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let directory = open_directory(parent.as_fd(), name)?;
        self.own(&directory, entry)?;
        if was_whiteout {
            self.set_opaque(directory.as_fd())?;
        }
        self.set_xattrs(directory.as_fd(), entry, FileType::Directory)?;
        self.remember(path, entry);
        Ok(())
    }

    /// The new file, open for writing; [`Tree::finish_file`] completes it.
    pub(crate) fn create_file(&mut self, path: &EntryPath) -> Result<File> {
        let (parent_path, name) = path.split().ok_or(TreeError::Refused("the root is not a directory"))?;
        let name = OsStr::from_bytes(name);
        let parent = self.parent(&parent_path)?;
        self.make_room(&parent, name, path, FileType::RegularFile)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(fs::openat(&parent, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Owner before mode, since a change of owner clears setuid; capabilities
    /// after both, since either clears them.
    pub(crate) fn finish_file(&mut self, file: &File, entry: &TarEntry) -> Result<()> {
        self.own(file, entry)?;
        fs::fchmod(file, Mode::from_raw_mode(entry.mode))?;
        self.set_xattrs(file.as_fd(), entry, FileType::RegularFile)?;
        fs::futimens(file, &times(entry))?;
        Ok(())
    }

    pub(crate) fn symlink(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<()> {
        let (parent_path, name) = path.split().ok_or(TreeError::Refused("the root is not a directory"))?;
        if entry.link.is_empty() || entry.link.contains(&0) {
            return Err(TreeError::Refused("symbolic link without a valid target"));
        }
        let name = OsStr::from_bytes(name);
        let parent = self.parent(&parent_path)?;
        self.make_room(&parent, name, path, FileType::Symlink)?;
        fs::symlinkat(OsStr::from_bytes(&entry.link), &parent, name)?;
        self.own_at(parent.as_fd(), name, entry)?;
        fs::utimensat(&parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Both names lie in this layer, and the target must be here already.
    pub(crate) fn hard_link(&mut self, path: &EntryPath, target: &EntryPath) -> Result<()> {
        let (parent_path, name) = path.split().ok_or(TreeError::Refused("the root is not a directory"))?;
        let (target_parent_path, target_name) =
            target.split().ok_or(TreeError::Refused("hard link to the root directory"))?;
        if path == target {
            return Ok(());
        }
        if path.covers(target) {
            return Err(TreeError::Refused("hard link to something below itself"));
        }
        let missing = TreeError::Refused("hard link to a file that is not in this layer");
        let name = OsStr::from_bytes(name);
        let target_name = OsStr::from_bytes(target_name);
        let target_parent = match self.open_beneath(&target_parent_path) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Err(missing),
            Err(error) => return Err(error.into()),
        };
        match kind_of(target_parent.as_fd(), target_name)? {
            Some(FileType::RegularFile | FileType::Symlink | FileType::Fifo) => {}
            Some(FileType::Directory) => return Err(TreeError::Refused("hard link to a directory")),
            Some(_) | None => return Err(missing),
        }
        let parent = self.parent(&parent_path)?;
        self.make_room(&parent, name, path, FileType::RegularFile)?;
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link stays one.
        fs::linkat(&target_parent, target_name, &parent, name, AtFlags::empty())?;
        Ok(())
    }

    pub(crate) fn fifo(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<()> {
        let (parent_path, name) = path.split().ok_or(TreeError::Refused("the root is not a directory"))?;
        let name = OsStr::from_bytes(name);
        let parent = self.parent(&parent_path)?;
        self.make_room(&parent, name, path, FileType::Fifo)?;
        fs::mknodat(&parent, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        self.own_at(parent.as_fd(), name, entry)?;
        // Follows symbolic links, but what stands here is the pipe just made.
        fs::chmodat(&parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
        fs::utimensat(&parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Hides `path` of the layers below, as overlayfs wants it: a character
    /// device 0:0. What this layer itself put there stays.
    pub(crate) fn whiteout(&mut self, path: &EntryPath) -> Result<()> {
        let (parent_path, name) = path.split().ok_or(TreeError::Refused("whiteout of the root"))?;
        let name = OsStr::from_bytes(name);
        let parent = self.parent(&parent_path)?;
        match kind_of(parent.as_fd(), name)? {
            Some(FileType::Directory) => {
                let directory = open_directory(parent.as_fd(), name)?;
                return self.set_opaque(directory.as_fd());
            }
            Some(_) => return Ok(()),
            None => {}
        }
        match fs::mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => Ok(()),
            // Before Linux 5.8 only root may; the deleted file then shows.
            Err(Errno::PERM) if self.form == LayerForm::Rootless => {
                self.notes.whiteouts_missing += 1;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Hides everything that the layers below have in this directory.
    pub(crate) fn opaque(&mut self, path: &EntryPath) -> Result<()> {
        let directory = self.parent(path)?;
        self.set_opaque(directory.as_fd())
    }

    /// Applies what had to wait, deepest directories first so that none is
    /// closed before those below it are done.
    pub(crate) fn finish(mut self) -> Result<LayerNotes> {
        self.parent = None;
        for (path, metadata) in std::mem::take(&mut self.directories).into_iter().rev() {
            let directory = if path.is_root() { self.root.try_clone()? } else { self.open_beneath(&path)? };
            fs::fchmod(&directory, Mode::from_raw_mode(metadata.mode))?;
            fs::futimens(&directory, &metadata.times)?;
        }
        Ok(self.notes)
    }

    fn remember(&mut self, path: &EntryPath, entry: &TarEntry) {
        self.directories.insert(path.clone(), DirectoryMetadata { mode: entry.mode, times: times(entry) });
    }

    /// A descriptor of the directory, made with its missing parents.
    fn parent(&mut self, path: &EntryPath) -> Result<OwnedFd> {
        if path.is_root() {
            return Ok(self.root.try_clone()?);
        }
        if let Some((cached, directory)) = &self.parent
            && cached == path
        {
            return Ok(directory.try_clone()?);
        }
        let directory = match self.open_beneath(path) {
            Ok(directory) => directory,
            // Not a directory: perhaps a whiteout of this very layer.
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_directories(path)?,
            Err(error) => return Err(error.into()),
        };
        self.parent = Some((path.clone(), directory.try_clone()?));
        Ok(directory)
    }

    /// Directories that the archive uses without listing them: root's, 0755.
    fn make_directories(&mut self, path: &EntryPath) -> Result<OwnedFd> {
        let mut directory = self.root.try_clone()?;
        for component in path.components() {
            let name = OsStr::from_bytes(component);
            let was_whiteout = kind_of(directory.as_fd(), name)? == Some(FileType::CharacterDevice);
            if was_whiteout {
                fs::unlinkat(&directory, name, AtFlags::empty())?;
            }
            let made = match fs::mkdirat(&directory, name, Mode::RWXU) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(error) => return Err(error.into()),
            };
            directory = open_directory(directory.as_fd(), name)?;
            if made {
                fs::fchmod(&directory, Mode::from_raw_mode(0o755))?;
            }
            if was_whiteout {
                self.set_opaque(directory.as_fd())?;
            }
        }
        Ok(directory)
    }

    fn open_beneath(&self, path: &EntryPath) -> std::result::Result<OwnedFd, Errno> {
        if path.is_root() {
            return self.root.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        match fs::openat2(&self.root, OsStr::from_bytes(path.as_bytes()), flags, Mode::empty(), resolve) {
            // Kernels before 5.6, and container runtimes that do not know it.
            Err(Errno::NOSYS | Errno::PERM) => self.walk(path),
            outcome => outcome,
        }
    }

    /// The same without `openat2`: a component at a time, following nothing.
    fn walk(&self, path: &EntryPath) -> std::result::Result<OwnedFd, Errno> {
        let mut directory: Option<OwnedFd> = None;
        for component in path.components() {
            let parent = directory.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            directory = Some(open_directory(parent, OsStr::from_bytes(component))?);
        }
        directory.ok_or(Errno::NOENT)
    }

    /// Clears the way for a new entry; a later entry of the same name wins, as
    /// in tar. Says whether a whiteout stood there.
    fn make_room(&mut self, parent: &OwnedFd, name: &OsStr, path: &EntryPath, new: FileType) -> Result<bool> {
        match kind_of(parent.as_fd(), name)? {
            None => Ok(false),
            Some(FileType::Directory) if new == FileType::Directory => Ok(false),
            Some(FileType::Directory) => {
                self.parent = None;
                self.directories.retain(|known, _| !path.covers(known));
                remove_tree_at(parent.as_fd(), name)?;
                Ok(false)
            }
            Some(kind) => {
                fs::unlinkat(parent, name, AtFlags::empty())?;
                Ok(kind == FileType::CharacterDevice)
            }
        }
    }

    fn own(&mut self, file: impl AsFd, entry: &TarEntry) -> Result<()> {
        match self.form {
            LayerForm::Root => Ok(fs::fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?),
            LayerForm::Rootless => {
                self.note_owner(entry);
                Ok(())
            }
        }
    }

    fn own_at(&mut self, parent: BorrowedFd<'_>, name: &OsStr, entry: &TarEntry) -> Result<()> {
        match self.form {
            LayerForm::Root => {
                let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
                Ok(fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
            }
            LayerForm::Rootless => {
                self.note_owner(entry);
                Ok(())
            }
        }
    }

    /// Our own user stands for the image's root; other owners are lost.
    fn note_owner(&mut self, entry: &TarEntry) {
        if entry.uid != 0 || entry.gid != 0 {
            self.notes.owners_lost += 1;
        }
    }

    /// Only attributes that cannot steer the host: `user.*` except those that
    /// overlayfs itself reads, and file capabilities.
    fn set_xattrs(&mut self, file: BorrowedFd<'_>, entry: &TarEntry, kind: FileType) -> Result<()> {
        for (name, value) in &entry.xattrs {
            let is_user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
            let is_capability = name == b"security.capability" && kind == FileType::RegularFile;
            if !(is_user || is_capability) || name.contains(&0) {
                self.notes.xattrs_dropped += 1;
                continue;
            }
            match fs::fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty()) {
                Ok(()) => {}
                // Not every file system takes every name and size, and not
                // everybody may grant capabilities.
                Err(Errno::NOTSUP | Errno::PERM | Errno::NOSPC | Errno::TOOBIG | Errno::RANGE | Errno::INVAL) => {
                    self.notes.xattrs_dropped += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn set_opaque(&mut self, directory: BorrowedFd<'_>) -> Result<()> {
        let name = match self.form {
            LayerForm::Root => TRUSTED_OPAQUE,
            LayerForm::Rootless => USER_OPAQUE,
        };
        match fs::fsetxattr(directory, name, b"y", XattrFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOTSUP) if self.form == LayerForm::Rootless => {
                self.notes.whiteouts_missing += 1;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn times(entry: &TarEntry) -> Timestamps {
    let mtime = Timespec { tv_sec: entry.mtime_seconds, tv_nsec: i64::from(entry.mtime_nanos) };
    Timestamps { last_access: mtime, last_modification: mtime }
}

fn open_directory(parent: BorrowedFd<'_>, name: &OsStr) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty())
}

fn kind_of(parent: BorrowedFd<'_>, name: &OsStr) -> std::result::Result<Option<FileType>, Errno> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a directory and all below it, following nothing. The depth is
/// bounded by [`EntryPath`], and so are recursion and open descriptors.
fn remove_tree_at(parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    let directory = open_directory(parent, name)?;
    let mut entries = Vec::new();
    for entry in fs::Dir::read_from(&directory)? {
        let entry = entry?;
        let child = entry.file_name().to_bytes().to_vec();
        if child != b"." && child != b".." {
            entries.push(child);
        }
    }
    for child in entries {
        let child = OsStr::from_bytes(&child);
        match kind_of(directory.as_fd(), child)? {
            Some(FileType::Directory) => remove_tree_at(directory.as_fd(), child)?,
            Some(_) => fs::unlinkat(&directory, child, AtFlags::empty())?,
            None => {}
        }
    }
    Ok(fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

//! Trees as tar archives, out and in.
//!
//! Packing and unpacking go in short steps, so that a slow client never occupies
//! a thread. Unpacking trusts nothing: a path that climbs (`..`) is refused, and
//! links, whether planted by the archive or there before, lead nowhere outside
//! the destination, which is their root.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, stream};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::blocking;
use super::content::PIECE_BYTES;
use super::tar::{self, TarHeader, TarKind, TarReader};
use super::tree;
use crate::Failure;
use crate::user::Identity;

/// Entries of one archive.
const MAX_ENTRIES: usize = 2_000_000;

/// Directory levels of one archive.
const MAX_DEPTH: usize = 512;

const DIRECTORY_MODE: u32 = 0o755;

/// The tree below a directory, or one file, as an uncompressed tar with names
/// relative to it.
pub(crate) async fn pack(
    path: PathBuf,
) -> Result<impl Stream<Item = Result<Bytes, Failure>> + Send + 'static, Failure> {
    let packer = blocking(move || Packer::open(&path)).await?;
    Ok(stream::try_unfold(Some(packer), |packer| async move {
        let Some(mut packer) = packer else { return Ok(None) };
        let (piece, rest) = blocking(move || {
            let mut piece = Vec::with_capacity(PIECE_BYTES + tar::BLOCK_BYTES * 4);
            let more = packer.fill(&mut piece)?;
            Ok((Bytes::from(piece), more.then_some(packer)))
        })
        .await?;
        Ok(Some((piece, rest)))
    }))
}

/// Unpacks below a directory, which is made if missing. Everything belongs to
/// `owner`.
pub(crate) async fn unpack(
    path: PathBuf,
    owner: Identity,
    archive: impl Stream<Item = Result<Bytes, Failure>> + Unpin,
) -> Result<(), Failure> {
    let destination = blocking(move || Destination::open(&path, owner)).await?;
    let destination = Arc::new(destination);
    let mut reader = TarReader::new(archive);
    let mut directories = Vec::new();
    let mut entries = 0;
    while let Some(header) = reader.next().await? {
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(Failure::InvalidArgument(format!("more than {MAX_ENTRIES} entries in one archive")));
        }
        let Some(name) = safe_name(&header.path)? else { continue };
        let target = Arc::clone(&destination);
        if header.kind == TarKind::File {
            unpack_file(&mut reader, target, name, header).await?;
        } else {
            if header.kind == TarKind::Directory {
                directories.push((name.clone(), header.clone()));
            }
            blocking(move || target.make(&name, &header)).await?;
        }
    }
    // Last, so that a directory without write permission can be filled.
    blocking(move || directories.iter().rev().try_for_each(|(name, header)| destination.finish_dir(name, header))).await
}

async fn unpack_file<S: Stream<Item = Result<Bytes, Failure>> + Unpin>(
    reader: &mut TarReader<S>,
    target: Arc<Destination>,
    name: PathBuf,
    header: TarHeader,
) -> Result<(), Failure> {
    let mut file: Option<Arc<File>> = None;
    loop {
        // One step for a small file: name, content, owner and permissions.
        let mut pieces = Vec::new();
        let mut length = 0;
        let mut finished = false;
        while length < PIECE_BYTES {
            let Some(piece) = reader.content().await? else {
                finished = true;
                break;
            };
            length += piece.len();
            pieces.push(piece);
        }
        let (target, name, header, opened) = (Arc::clone(&target), name.clone(), header.clone(), file.take());
        let written = blocking(move || {
            let file = match opened {
                Some(file) => file,
                None => Arc::new(target.create_file(&name)?),
            };
            let fail = |error: io::Error| Failure::file(&name, &error);
            pieces.iter().try_for_each(|piece| (&*file).write_all(piece)).map_err(fail)?;
            if finished {
                target.finish_file(&file, &header).map_err(fail)?;
            }
            Ok(file)
        })
        .await?;
        if finished {
            return Ok(());
        }
        file = Some(written);
    }
}

/// Walks a tree and writes it piece by piece.
struct Packer {
    root: PathBuf,
    /// Names still to visit, the next one in front.
    waiting: VecDeque<PathBuf>,
    /// The file being written, and how much of it is left.
    current: Option<(File, u64)>,
    padding: usize,
    entries: usize,
}

impl Packer {
    fn open(path: &Path) -> Result<Self, Failure> {
        let metadata = fs::metadata(path).map_err(|error| Failure::file(path, &error))?;
        let (root, waiting) = if metadata.is_dir() {
            (path.to_owned(), Self::children(path, Path::new(""))?.into())
        } else {
            let name = path.file_name().map(PathBuf::from).unwrap_or_default();
            (path.parent().unwrap_or(Path::new("/")).to_owned(), VecDeque::from([name]))
        };
        Ok(Self { root, waiting, current: None, padding: 0, entries: 0 })
    }

    /// Adds about one piece; false when the archive is complete.
    fn fill(&mut self, piece: &mut Vec<u8>) -> Result<bool, Failure> {
        while piece.len() < PIECE_BYTES {
            if let Some((file, left)) = self.current.take() {
                self.add_content(piece, file, left)?;
            } else if let Some(name) = self.waiting.pop_front() {
                self.add_entry(piece, &name)?;
            } else {
                piece.extend_from_slice(&tar::END);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn add_entry(&mut self, piece: &mut Vec<u8>, name: &Path) -> Result<(), Failure> {
        let path = self.root.join(name);
        let fail = |error: io::Error| Failure::file(&path, &error);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // It went away since its directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(fail(error)),
        };
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(Failure::Busy(format!("more than {MAX_ENTRIES} files: pack a smaller tree")));
        }
        let file_type = metadata.file_type();
        let mut header = TarHeader {
            path: name.as_os_str().as_bytes().to_vec(),
            kind: TarKind::File,
            link: Vec::new(),
            size: 0,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified_seconds: metadata.mtime(),
        };
        if file_type.is_dir() {
            header.kind = TarKind::Directory;
            header.path.push(b'/');
            if name.components().count() < MAX_DEPTH {
                for child in Self::children(&self.root, name)?.into_iter().rev() {
                    self.waiting.push_front(child);
                }
            }
        } else if file_type.is_symlink() {
            header.kind = TarKind::Symlink;
            header.link = fs::read_link(&path).map_err(fail)?.into_os_string().into_vec();
        } else if file_type.is_fifo() {
            header.kind = TarKind::Fifo;
        } else if file_type.is_file() {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(fail(error)),
            };
            header.size = file.metadata().map_err(fail)?.len();
            self.padding = tar::padding(header.size);
            self.current = Some((file, header.size));
        } else {
            // Sockets and devices mean nothing elsewhere.
            return Ok(());
        }
        piece.extend(header.encode());
        Ok(())
    }

    /// Exactly as much as the header announced: what a file lost meanwhile is
    /// zeros, what it gained is left out.
    fn add_content(&mut self, piece: &mut Vec<u8>, mut file: File, left: u64) -> Result<(), Failure> {
        let wanted = left.min((PIECE_BYTES - piece.len().min(PIECE_BYTES)).max(tar::BLOCK_BYTES) as u64);
        let before = piece.len();
        let read = (&mut file)
            .take(wanted)
            .read_to_end(piece)
            .map_err(|error| Failure::Internal(format!("read a file to pack: {error}")))?;
        if (read as u64) < wanted {
            piece.resize(before + wanted as usize, 0);
        }
        if wanted == left {
            piece.resize(piece.len() + self.padding, 0);
        } else {
            self.current = Some((file, left - wanted));
        }
        Ok(())
    }

    fn children(root: &Path, name: &Path) -> Result<Vec<PathBuf>, Failure> {
        let dir = root.join(name);
        let listing = match fs::read_dir(&dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Failure::file(&dir, &error)),
        };
        let mut children: Vec<PathBuf> = listing.flatten().map(|found| name.join(found.file_name())).collect();
        children.sort();
        Ok(children)
    }
}

/// Where an archive is unpacked.
struct Destination {
    dir: OwnedFd,
    owner: Identity,
}

impl Destination {
    fn open(path: &Path, owner: Identity) -> Result<Self, Failure> {
        match tree::make_dir(path, &owner) {
            Ok(_) | Err(Failure::FileExists(_)) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| Failure::file(path, &error.into()))?;
        Ok(Self { dir, owner })
    }

    /// Anything without content.
    fn make(&self, name: &Path, header: &TarHeader) -> Result<(), Failure> {
        let (parent, last) = self.parent(name)?;
        let fail = |error: Errno| Failure::file(name, &error.into());
        match header.kind {
            TarKind::Directory => match rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(DIRECTORY_MODE)) {
                Ok(()) => self.own(&parent, last).map_err(fail),
                Err(Errno::EXIST) if is_dir(&parent, last) => Ok(()),
                Err(Errno::EXIST) => {
                    rustix::fs::unlinkat(&parent, last, AtFlags::empty()).map_err(fail)?;
                    rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(DIRECTORY_MODE)).map_err(fail)?;
                    self.own(&parent, last).map_err(fail)
                }
                Err(error) => Err(fail(error)),
            },
            TarKind::Symlink => {
                clear(&parent, last).map_err(fail)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&header.link), &parent, last).map_err(fail)?;
                self.own(&parent, last).map_err(fail)
            }
            TarKind::HardLink => {
                let target = safe_name(&header.link)?
                    .ok_or_else(|| Failure::InvalidArgument("the archive links to its own root".to_owned()))?;
                let (target_parent, target_last) = self.parent(&target)?;
                clear(&parent, last).map_err(fail)?;
                rustix::fs::linkat(&target_parent, target_last, &parent, last, AtFlags::empty()).map_err(fail)
            }
            TarKind::Fifo => {
                clear(&parent, last).map_err(fail)?;
                let mode = Mode::from_raw_mode(header.mode & 0o777);
                rustix::fs::mknodat(&parent, last, FileType::Fifo, mode, 0).map_err(fail)?;
                self.own(&parent, last).map_err(fail)
            }
            // Content is streamed by `unpack_file`.
            TarKind::File => Ok(()),
        }
    }

    fn create_file(&self, name: &Path) -> Result<File, Failure> {
        let (parent, last) = self.parent(name)?;
        let fail = |error: Errno| Failure::file(name, &error.into());
        clear(&parent, last).map_err(fail)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&parent, last, flags, Mode::from_raw_mode(0o600)).map_err(fail)?.into())
    }

    fn finish_file(&self, file: &File, header: &TarHeader) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.owner.uid), Gid::from_raw(self.owner.gid));
        accept_unprivileged(rustix::fs::fchown(file, Some(uid), Some(gid)))?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(header.mode))?;
        Ok(rustix::fs::futimens(file, &times(header))?)
    }

    fn finish_dir(&self, name: &Path, header: &TarHeader) -> Result<(), Failure> {
        let (parent, last) = self.parent(name)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // A later entry may have replaced it.
        let Ok(dir) = rustix::fs::openat(&parent, last, flags, Mode::empty()) else { return Ok(()) };
        let fail = |error: Errno| Failure::file(name, &error.into());
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(header.mode)).map_err(fail)?;
        rustix::fs::futimens(&dir, &times(header)).map_err(fail)
    }

    /// The directory that holds `name`, made if missing, and the last part.
    fn parent<'a>(&self, name: &'a Path) -> Result<(OwnedFd, &'a OsStr), Failure> {
        let last = name.file_name().unwrap_or_default();
        let above = name.parent().unwrap_or(Path::new(""));
        let fail = |error: Errno| Failure::file(name, &error.into());
        match self.open_beneath(above) {
            Ok(dir) => return Ok((dir, last)),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(fail(error)),
        }
        // Made or found a moment ago: what cannot be opened now is a link to
        // what is not there, as links that lead out of the destination are.
        let open_made = |at: &Path| match self.open_beneath(at) {
            Err(Errno::NOENT) => Err(Failure::InvalidArgument(format!(
                "the archive writes through a link that leads to nothing in its destination: {}",
                at.display()
            ))),
            opened => opened.map_err(fail),
        };
        let mut at = PathBuf::new();
        for part in above.components() {
            let dir = open_made(&at)?;
            let mode = Mode::from_raw_mode(DIRECTORY_MODE);
            match rustix::fs::mkdirat(&dir, part.as_os_str(), mode) {
                Ok(()) => self.own(&dir, part.as_os_str()).map_err(fail)?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(fail(error)),
            }
            at.push(part);
        }
        Ok((open_made(&at)?, last))
    }

    /// Opens a directory with the destination as the root of every link.
    fn open_beneath(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat2(&self.dir, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            // Kernels and runtimes without this call: no links at all.
            Err(Errno::NOSYS | Errno::PERM) => {
                let mut dir = rustix::fs::openat(&self.dir, ".", flags, Mode::empty())?;
                for part in path.components() {
                    dir = rustix::fs::openat(&dir, part.as_os_str(), flags | OFlags::NOFOLLOW, Mode::empty())?;
                }
                Ok(dir)
            }
            other => other,
        }
    }

    fn own(&self, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
        let (uid, gid) = (Uid::from_raw(self.owner.uid), Gid::from_raw(self.owner.gid));
        accept_unprivileged(rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
    }
}

/// An agent without privileges owns all it makes.
fn accept_unprivileged(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::PERM) => Ok(()),
        other => other,
    }
}

/// Makes room for a new entry; a directory with content stays and is an error.
fn clear(parent: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR),
        other => other,
    }
}

fn is_dir(parent: impl AsFd, name: &OsStr) -> bool {
    // A link to a directory is one too: it is followed within the destination.
    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|found| matches!(FileType::from_raw_mode(found.st_mode), FileType::Directory | FileType::Symlink))
}

fn times(header: &TarHeader) -> Timestamps {
    let modified = Timespec { tv_sec: header.modified_seconds, tv_nsec: 0 };
    Timestamps { last_access: modified, last_modification: modified }
}

/// A relative path without `.`; `None` for the root itself.
fn safe_name(name: &[u8]) -> Result<Option<PathBuf>, Failure> {
    let mut safe = PathBuf::new();
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                let shown = OsString::from_vec(name.to_vec());
                return Err(Failure::InvalidArgument(format!(
                    "the archive climbs out of its directory: {}",
                    shown.display()
                )));
            }
            part => safe.push(OsStr::from_bytes(part)),
        }
    }
    if safe.components().count() > MAX_DEPTH {
        return Err(Failure::InvalidArgument("the archive is nested too deeply".to_owned()));
    }
    Ok(Some(safe).filter(|safe| !safe.as_os_str().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_the_destination() {
        let safe = |name: &[u8]| safe_name(name).expect("a safe name").map(|name| name.display().to_string());
        assert_eq!(safe(b"./a//b/."), Some("a/b".to_owned()));
        assert_eq!(safe(b"/etc/passwd"), Some("etc/passwd".to_owned()));
        assert_eq!(safe(b"./"), None);
        assert!(safe_name(b"a/../../b").is_err());
    }
}

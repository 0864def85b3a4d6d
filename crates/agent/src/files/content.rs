//! Reading and writing the bytes of files, in pieces.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::entry::Entry;
use super::tree::make_parents;
use super::{blocking, open_regular};
use crate::Failure;
use crate::user::Identity;

/// Read or written in one step.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Files of unknown length (those of `/proc` claim to be empty) are read whole
/// up to here.
const MAX_UNSIZED_BYTES: u64 = 4 << 20;

const DEFAULT_MODE: u32 = 0o644;

/// An open file and which bytes of it are wanted.
pub(crate) struct Reading {
    pub entry: Entry,
    file: File,
    /// Already read, where the length could not be known otherwise.
    whole: Option<Bytes>,
}

impl Reading {
    pub(crate) async fn open(path: PathBuf) -> Result<Self, Failure> {
        blocking(move || {
            let file = open_regular(&path)?;
            let fail = |error: io::Error| Failure::file(&path, &error);
            let metadata = file.metadata().map_err(fail)?;
            let mut entry = Entry::new(&path, &metadata, &crate::user::Database::current().names());
            let mut whole = None;
            if entry.size == 0 {
                let mut bytes = Vec::new();
                (&file).take(MAX_UNSIZED_BYTES).read_to_end(&mut bytes).map_err(fail)?;
                entry.size = bytes.len() as u64;
                whole = Some(Bytes::from(bytes));
            }
            Ok(Self { entry, file, whole })
        })
        .await
    }

    /// The bytes from `start` to `end` in pieces. A file that is cut meanwhile
    /// ends the stream with an error, because its length was announced.
    pub(crate) fn stream(
        self,
        start: u64,
        end: u64,
    ) -> impl futures_util::Stream<Item = Result<Bytes, Failure>> + Send + 'static {
        let whole = self.whole.map(|whole| whole.slice(start as usize..end as usize));
        let (whole, rest) = match whole {
            Some(whole) => (Some(whole), None),
            None => (None, Some((Arc::new(self.file), start))),
        };
        let whole = futures_util::stream::iter(whole.filter(|whole| !whole.is_empty()).map(Ok));
        let path = self.entry.path;
        let pieces = futures_util::stream::try_unfold(rest, move |state| {
            let path = path.clone();
            async move {
                let Some((file, at)) = state.filter(|(_, at)| *at < end) else { return Ok(None) };
                let wanted = (end - at).min(PIECE_BYTES as u64) as usize;
                let reader = Arc::clone(&file);
                let piece = blocking(move || read_piece(&reader, at, wanted, &path)).await?;
                let next = at + piece.len() as u64;
                Ok(Some((piece, Some((file, next)))))
            }
        });
        futures_util::StreamExt::chain(whole, pieces)
    }
}

fn read_piece(file: &File, at: u64, wanted: usize, path: &str) -> Result<Bytes, Failure> {
    let mut piece = Vec::with_capacity(wanted);
    while piece.len() < wanted {
        let offset = at + piece.len() as u64;
        // Into memory that was never cleared: a quarter of the time of a read.
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut piece), offset) {
            Ok(0) => return Err(Failure::FileConflict(format!("{path} became shorter while it was read"))),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::file(Path::new(path), &error.into())),
        }
    }
    Ok(Bytes::from(piece))
}

/// A file being written beside its destination, which it replaces at the end.
pub(crate) struct Writing {
    destination: PathBuf,
    temporary: Temporary,
    owner: Identity,
    mode: Option<u32>,
}

pub(crate) struct WriteOptions {
    pub owner: Identity,
    /// Those of the file that is replaced, or `0644`, unless given.
    pub mode: Option<u32>,
}

/// Removed when it did not become the destination.
struct Temporary {
    path: PathBuf,
    file: Option<Arc<File>>,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Writing {
    pub(crate) async fn create(path: PathBuf, options: WriteOptions) -> Result<Self, Failure> {
        blocking(move || {
            let destination = follow_links(path)?;
            match std::fs::symlink_metadata(&destination) {
                Ok(found) if found.is_file() => {}
                Ok(found) if found.is_dir() => {
                    return Err(Failure::FileConflict(format!("is a directory: {}", destination.display())));
                }
                Ok(_) => return Err(Failure::FileConflict(format!("not a regular file: {}", destination.display()))),
                Err(_) => make_parents(&destination, &options.owner)?,
            }
            let temporary = Temporary::create(&destination)?;
            Ok(Self { destination, temporary, owner: options.owner, mode: options.mode })
        })
        .await
    }

    pub(crate) async fn write(&mut self, pieces: Vec<Bytes>) -> Result<(), Failure> {
        let Some(file) = self.temporary.file.clone() else { return Ok(()) };
        let path = self.destination.clone();
        blocking(move || {
            let mut file = &*file;
            pieces.iter().try_for_each(|piece| file.write_all(piece)).map_err(|error| Failure::file(&path, &error))
        })
        .await
    }

    /// Puts the file in its place.
    pub(crate) async fn finish(self) -> Result<Entry, Failure> {
        blocking(move || self.finish_now()).await
    }

    fn finish_now(mut self) -> Result<Entry, Failure> {
        let fail = |error: io::Error| Failure::file(&self.destination, &error);
        let Some(file) = self.temporary.file.clone() else {
            return Err(Failure::Internal("the file is already in its place".to_owned()));
        };
        let replaced = std::fs::symlink_metadata(&self.destination).ok().filter(std::fs::Metadata::is_file);
        let kept = replaced.as_ref().map(|found| found.mode() & 0o7777);
        let mode = self.mode.or(kept).unwrap_or(DEFAULT_MODE);
        match rustix::fs::fchown(
            &file,
            Some(rustix::fs::Uid::from_raw(self.owner.uid)),
            Some(rustix::fs::Gid::from_raw(self.owner.gid)),
        ) {
            // An agent without privileges owns all it makes.
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(error) => return Err(fail(error.into())),
        }
        file.set_permissions(std::fs::Permissions::from_mode(mode)).map_err(fail)?;
        match std::fs::rename(&self.temporary.path, &self.destination) {
            Ok(()) => self.temporary.file = None,
            // A file mounted on its own, such as /etc/hosts, cannot be replaced,
            // only rewritten.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                copy_into(&file, &self.destination).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
        }
        Entry::read(&self.destination)
    }
}

impl Temporary {
    fn create(destination: &Path) -> Result<Self, Failure> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let dir = destination.parent().unwrap_or(Path::new("/"));
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!(".stacyvm-{}-{number}.tmp", std::process::id()));
            let opened = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path);
            match opened {
                Ok(file) => return Ok(Self { path, file: Some(Arc::new(file)) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::file(destination, &error)),
            }
        }
    }
}

fn copy_into(from: &File, destination: &Path) -> io::Result<()> {
    let to = std::fs::OpenOptions::new().write(true).truncate(true).open(destination)?;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        let count = from.read_at(&mut buffer, at)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all_at(&buffer[..count], at)?;
        at += count as u64;
    }
}

/// What a write to this path would write to: the end of a chain of links, which
/// need not exist yet.
fn follow_links(path: PathBuf) -> Result<PathBuf, Failure> {
    const MAX_LINKS: usize = 40;
    let mut path = path;
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(Failure::FileConflict(format!("is a directory: {}", path.display())));
    }
    for _ in 0..MAX_LINKS {
        match std::fs::read_link(&path) {
            Ok(target) => {
                let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
                path = dir.join(target);
            }
            Err(_) => return Ok(path),
        }
    }
    Err(Failure::InvalidArgument(format!("too many symbolic links: {}", path.display())))
}

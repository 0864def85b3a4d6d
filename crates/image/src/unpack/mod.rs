//! Turns a layer blob into a directory that overlayfs can stack.
//!
//! A layer is hostile input: see [`tree`] for how it is kept inside its
//! directory, [`reader`] and [`path`] for what is refused before anything is
//! written, and [`UnpackLimits`] for how much it may write. Device nodes are
//! left out, since a sandbox's `/dev` is ours. Ids stay as in the layer: the
//! launcher maps them when it mounts.

mod compression;
mod path;
mod reader;
mod tree;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::digest::Hasher;
use crate::{Digest, ImageError};

pub(crate) use compression::{Compression, decompress};
use path::EntryPath;
use reader::TarError;
pub(crate) use reader::{EntryKind, TarReader};
use tree::{Tree, TreeError};

/// Entries of one layer; the largest images have a few hundred thousand.
const MAX_LAYER_ENTRIES: u64 = 4_000_000;
/// Unpacked bytes of one layer.
const MAX_LAYER_BYTES: u64 = 64 << 30;
/// What headers and padding add to content, per entry, in the plain stream.
const STREAM_OVERHEAD_BYTES: u64 = 4 * 512;
/// Padding after the end of the archive; tar's records are 10 KiB, and tapes
/// had larger ones.
const MAX_TRAILING_BYTES: u64 = 16 << 20;
const COPY_BUFFER_BYTES: usize = 256 * 1024;
/// Disk usage is counted in whole blocks, as file systems do.
const DISK_BLOCK_BYTES: u64 = 4096;

/// How much one layer may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    pub max_bytes: u64,
    pub max_entries: u64,
}

impl Default for UnpackLimits {
    fn default() -> Self {
        Self { max_bytes: MAX_LAYER_BYTES, max_entries: MAX_LAYER_ENTRIES }
    }
}

/// How unpacked layers express what the kernel wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerForm {
    /// Ids as in the layer, `trusted.overlay.*`: for overlays mounted by root.
    Root,
    /// Everything owned by our user, `user.overlay.*`: for overlays mounted
    /// with `userxattr` in a user namespace.
    Rootless,
}

impl LayerForm {
    /// What this process can make.
    pub fn of_this_process() -> Self {
        if rustix::process::geteuid().is_root() { Self::Root } else { Self::Rootless }
    }
}

/// What of a layer could not be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerNotes {
    /// Device nodes, always left out.
    pub devices_skipped: u64,
    /// Attributes that are not allowed, or that the file system does not take.
    pub xattrs_dropped: u64,
    /// Entries whose owner is not ours to set.
    pub owners_lost: u64,
    /// Deletions that could not be expressed.
    pub whiteouts_missing: u64,
}

impl LayerNotes {
    pub(crate) fn add(&mut self, other: &Self) {
        self.devices_skipped += other.devices_skipped;
        self.xattrs_dropped += other.xattrs_dropped;
        self.owners_lost += other.owners_lost;
        self.whiteouts_missing += other.whiteouts_missing;
    }
}

/// A layer as it lies on disk now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Digest of the plain stream.
    pub(crate) diff_id: Digest,
    /// Length of the plain stream.
    pub(crate) stream_bytes: u64,
    /// Disk used, to a block.
    pub(crate) disk_bytes: u64,
    pub(crate) entries: u64,
    pub(crate) notes: LayerNotes,
}

/// Set to end blocking work early.
pub(crate) type CancelFlag = Arc<AtomicBool>;

/// Ends blocking work when the future that waits for it is dropped.
#[derive(Default)]
pub(crate) struct CancelOnDrop(pub(crate) CancelFlag);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
pub(crate) struct UnpackOptions {
    pub(crate) form: LayerForm,
    pub(crate) limits: UnpackLimits,
    pub(crate) cancelled: CancelFlag,
    /// Counts bytes of the blob as they are read.
    pub(crate) bytes_read: Arc<AtomicU64>,
}

/// Unpacks a blob into an existing empty directory. On failure the directory
/// holds rubbish, which the caller removes.
pub(crate) fn unpack_layer(blob: File, into: &Path, options: &UnpackOptions) -> Result<Unpacked, ImageError> {
    let counted = CountingReader { input: blob, count: options.bytes_read.clone() };
    let (_, plain) = decompress(counted)?;
    let stream = PlainStream::new(plain, options);
    let mut reader = TarReader::new(BufReader::with_capacity(COPY_BUFFER_BYTES, stream), options.limits.max_entries);
    let mut writer = LayerWriter {
        tree: Tree::new(into, options.form).map_err(|error| refused("", error, into))?,
        limits: options.limits,
        content_bytes: 0,
        disk_bytes: DISK_BLOCK_BYTES,
        entries: 0,
        buffer: vec![0; COPY_BUFFER_BYTES],
        root: into,
    };
    writer.write_all(&mut reader)?;
    let LayerWriter { tree, disk_bytes, entries, .. } = writer;
    let notes = tree.finish().map_err(|error| refused("", error, into))?;
    let mut rest = reader.into_input();
    // What follows the end marker counts for the digest.
    let padding = io::copy(&mut rest.by_ref().take(MAX_TRAILING_BYTES + 1), &mut io::sink());
    if padding.map_err(|error| stream_error("", &error))? > MAX_TRAILING_BYTES {
        return Err(ImageError::TooLarge { what: "what follows the layer's end".into(), limit: MAX_TRAILING_BYTES });
    }
    let (diff_id, stream_bytes) = rest.into_inner().finish();
    Ok(Unpacked { diff_id, stream_bytes, disk_bytes, entries, notes })
}

struct LayerWriter<'a> {
    tree: Tree,
    limits: UnpackLimits,
    content_bytes: u64,
    disk_bytes: u64,
    entries: u64,
    buffer: Vec<u8>,
    root: &'a Path,
}

impl LayerWriter<'_> {
    fn write_all(&mut self, reader: &mut TarReader<impl Read>) -> Result<(), ImageError> {
        while let Some(entry) = reader.next_entry().map_err(tar_error)? {
            let name = entry.display_name();
            let path = EntryPath::parse(&entry.name).map_err(|reason| bad_layer(&name, reason))?;
            self.entries += 1;
            if self.apply_whiteout(&name, &path)? {
                continue;
            }
            let outcome = match entry.kind {
                EntryKind::File => {
                    self.write_file(&path, &entry, reader)?;
                    Ok(())
                }
                EntryKind::Directory => {
                    self.disk_bytes += DISK_BLOCK_BYTES;
                    self.tree.directory(&path, &entry)
                }
                EntryKind::Symlink => self.tree.symlink(&path, &entry),
                EntryKind::HardLink => {
                    let target = EntryPath::parse(&entry.link).map_err(|reason| bad_layer(&name, reason))?;
                    self.tree.hard_link(&path, &target)
                }
                EntryKind::Fifo => self.tree.fifo(&path, &entry),
                EntryKind::Device => {
                    self.tree.notes.devices_skipped += 1;
                    Ok(())
                }
            };
            outcome.map_err(|error| refused(&name, error, self.root))?;
        }
        Ok(())
    }

    /// Markers of the image specification, "Representing Changes".
    fn apply_whiteout(&mut self, name: &str, path: &EntryPath) -> Result<bool, ImageError> {
        const PREFIX: &[u8] = b".wh.";
        const OPAQUE: &[u8] = b".wh..wh..opq";
        /// Left by AUFS, means nothing to others.
        const AUFS_PREFIX: &[u8] = b".wh..wh.";
        let Some((parent, last)) = path.split() else { return Ok(false) };
        let Some(hidden) = last.strip_prefix(PREFIX) else { return Ok(false) };
        let outcome = if last == OPAQUE {
            self.tree.opaque(&parent)
        } else if last.starts_with(AUFS_PREFIX) {
            Ok(())
        } else {
            let hidden_name = [parent.as_bytes(), b"/", hidden].concat();
            let target = EntryPath::parse(&hidden_name).map_err(|reason| bad_layer(name, reason))?;
            if hidden.is_empty() || target.split().is_none_or(|(_, last)| last != hidden) {
                return Err(bad_layer(name, "whiteout without a name"));
            }
            self.tree.whiteout(&target)
        };
        outcome.map_err(|error| refused(name, error, self.root))?;
        Ok(true)
    }

    fn write_file(
        &mut self,
        path: &EntryPath,
        entry: &reader::TarEntry,
        content: &mut TarReader<impl Read>,
    ) -> Result<(), ImageError> {
        let name = entry.display_name();
        if entry.size > self.limits.max_bytes.saturating_sub(self.content_bytes) {
            return Err(ImageError::TooLarge { what: "the unpacked layer".into(), limit: self.limits.max_bytes });
        }
        self.content_bytes += entry.size;
        self.disk_bytes += entry.size.next_multiple_of(DISK_BLOCK_BYTES);
        let mut file = self.tree.create_file(path).map_err(|error| refused(&name, error, self.root))?;
        loop {
            let count = content.read(&mut self.buffer).map_err(|error| stream_error(&name, &error))?;
            if count == 0 {
                break;
            }
            file.write_all(&self.buffer[..count])
                .map_err(|error| ImageError::storage("write a layer", self.root, error))?;
        }
        self.tree.finish_file(&file, entry).map_err(|error| refused(&name, error, self.root))
    }
}

fn bad_layer(entry: &str, reason: impl Into<String>) -> ImageError {
    ImageError::BadLayer { entry: entry.to_owned(), reason: reason.into() }
}

fn refused(entry: &str, error: TreeError, root: &Path) -> ImageError {
    match error {
        TreeError::Refused(reason) => bad_layer(entry, reason),
        TreeError::Io(error) => ImageError::storage("write a layer", root, error),
    }
}

pub(crate) fn tar_error(error: TarError) -> ImageError {
    match error {
        TarError::Malformed { entry, reason } => bad_layer(&entry, reason),
        TarError::Io(error) => stream_error("", &error),
    }
}

/// A read failure: our own limits travel inside it, all else is a broken blob.
pub(crate) fn stream_error(entry: &str, error: &io::Error) -> ImageError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<StreamStop>()) {
        Some(StreamStop::TooLong(limit)) => ImageError::TooLarge { what: "the unpacked layer".into(), limit: *limit },
        Some(StreamStop::Cancelled) => ImageError::Cancelled { reference: String::new() },
        None => bad_layer(entry, format!("unreadable: {error}")),
    }
}

#[derive(Debug, thiserror::Error)]
enum StreamStop {
    #[error("longer than {0} bytes")]
    TooLong(u64),
    #[error("cancelled")]
    Cancelled,
}

/// Hashes and bounds the plain bytes of a layer.
pub(crate) struct PlainStream<'a> {
    input: Box<dyn Read + Send + 'a>,
    hasher: Hasher,
    count: u64,
    limit: u64,
    cancelled: CancelFlag,
}

impl<'a> PlainStream<'a> {
    pub(crate) fn new(input: Box<dyn Read + Send + 'a>, options: &UnpackOptions) -> Self {
        let UnpackLimits { max_bytes, max_entries } = options.limits;
        let limit = max_bytes.saturating_add(max_entries.saturating_mul(STREAM_OVERHEAD_BYTES));
        Self { input, hasher: Hasher::default(), count: 0, limit, cancelled: options.cancelled.clone() }
    }

    pub(crate) fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.count)
    }
}

impl Read for PlainStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other(StreamStop::Cancelled));
        }
        let count = self.input.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        if self.count > self.limit {
            return Err(io::Error::other(StreamStop::TooLong(self.limit)));
        }
        Ok(count)
    }
}

struct CountingReader<R> {
    input: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

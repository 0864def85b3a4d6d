//! Opens what is to be imported, and takes files out of it into the store's
//! scratch space, hashed on the way. Archives are read front to back, since
//! compressed ones cannot be read otherwise.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{HASH_BUFFER_BYTES, bad_archive};
use crate::digest::Hasher;
use crate::store::{Inner, Layout, MAX_DOCUMENT_BYTES, Session};
use crate::unpack::{
    CancelFlag, Compression, EntryKind, LayerForm, PlainStream, TarReader, UnpackLimits, UnpackOptions, decompress,
    stream_error, tar_error,
};
use crate::{Digest, ImageError};

/// Files of an image archive: a handful per layer.
const MAX_ARCHIVE_ENTRIES: u64 = 20_000;
/// Aliases that lead to aliases.
const MAX_ALIAS_STEPS: usize = 8;

pub(super) enum Contents<'a> {
    Images(Source<'a>),
    RootFs(RootFs),
}

pub(super) struct RootFs {
    pub(super) blob: Arc<Spooled>,
    pub(super) compression: Compression,
    pub(super) diff_id: Digest,
}

/// A complete file in scratch space, removed with the last who needs it.
#[derive(Debug)]
pub(super) struct Spooled {
    path: PathBuf,
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// An archive or directory of images, by the names of its files.
pub(super) struct Source<'a> {
    inner: &'a Inner,
    files: BTreeMap<String, Arc<Spooled>>,
    place: Place,
}

enum Place {
    /// Files are taken when asked for.
    Directory(OwnedFd),
    /// All files are in `files` already; links point at others.
    Archive { aliases: BTreeMap<String, String> },
}

enum Scanned {
    Images,
    RootFs { compression: Compression, diff_id: Digest },
}

/// Tells what `path` is and prepares it for reading.
pub(super) fn open<'a>(inner: &'a Inner, path: &Path, cancelled: &CancelFlag) -> Result<Contents<'a>, ImageError> {
    let metadata = fs::metadata(path).map_err(|error| bad_archive(path, error.to_string()))?;
    if metadata.is_dir() {
        return open_directory(inner, path);
    }
    let options = UnpackOptions {
        form: LayerForm::Root,
        limits: UnpackLimits { max_bytes: inner.options.max_bytes, ..inner.limits() },
        cancelled: cancelled.clone(),
        bytes_read: Arc::default(),
    };
    match scan(path, &options)? {
        Scanned::Images => spool(inner, path, &options).map(Contents::Images),
        Scanned::RootFs { compression, diff_id } => {
            let mut file = open_file(path)?;
            let blob = Spooled::copy(&inner.session, &mut file, inner.options.max_bytes)
                .map_err(|error| archive_error(path, error))?;
            Ok(Contents::RootFs(RootFs { blob, compression, diff_id }))
        }
    }
}

impl Source<'_> {
    /// The file of that name, `None` if there is none.
    pub(super) fn file(&mut self, name: &str) -> Result<Option<Arc<Spooled>>, ImageError> {
        if let Some(file) = self.files.get(name) {
            return Ok(Some(file.clone()));
        }
        match &self.place {
            Place::Directory(root) => {
                let Some(mut file) = open_beneath(root, name)? else { return Ok(None) };
                let spooled = Spooled::copy(&self.inner.session, &mut file, self.inner.options.max_bytes)
                    .map_err(|error| archive_error(Path::new(name), error))?;
                self.files.insert(name.to_owned(), spooled.clone());
                Ok(Some(spooled))
            }
            Place::Archive { aliases } => {
                let mut name = name;
                for _ in 0..MAX_ALIAS_STEPS {
                    let Some(target) = aliases.get(name) else { return Ok(None) };
                    if let Some(file) = self.files.get(target) {
                        return Ok(Some(file.clone()));
                    }
                    name = target;
                }
                Ok(None)
            }
        }
    }

    /// A small file's content.
    pub(super) fn document(&mut self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        self.file(name)?.map(|file| file.read_document()).transpose()
    }
}

impl Spooled {
    pub(super) fn from_bytes(session: &Session, bytes: &[u8]) -> Result<Arc<Self>, ImageError> {
        Self::copy(session, &mut &*bytes, bytes.len() as u64)
    }

    /// Copies all of `input`, which may not be longer than `limit`.
    pub(super) fn copy(session: &Session, input: &mut dyn Read, limit: u64) -> Result<Arc<Self>, ImageError> {
        let path = session.scratch("spool");
        let failed = |error| ImageError::storage("copy a file", &path, error);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        // From here on the file goes with the value.
        let mut spooled = Self { path: path.clone(), digest: Digest::of(b""), size: 0 };
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; HASH_BUFFER_BYTES];
        loop {
            let count = input.read(&mut buffer).map_err(|error| stream_error("", &error))?;
            if count == 0 {
                break;
            }
            spooled.size += count as u64;
            if spooled.size > limit {
                return Err(ImageError::TooLarge { what: "a file to import".into(), limit });
            }
            hasher.update(&buffer[..count]);
            file.write_all(&buffer[..count]).map_err(failed)?;
        }
        spooled.digest = hasher.finish();
        Ok(Arc::new(spooled))
    }

    /// Makes it a blob of the store, safe from power failures.
    pub(super) fn place(&self, layout: &Layout) -> Result<(), ImageError> {
        let target = layout.blob(&self.digest);
        let failed = |error| ImageError::storage("store a blob", &target, error);
        if target.exists() {
            return Ok(());
        }
        File::open(&self.path).and_then(|file| file.sync_all()).map_err(failed)?;
        match fs::hard_link(&self.path, &target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        File::open(layout.blobs()).and_then(|directory| directory.sync_all()).map_err(failed)
    }

    pub(super) fn read_document(&self) -> Result<Vec<u8>, ImageError> {
        if self.size > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge { what: "a document to import".into(), limit: MAX_DOCUMENT_BYTES });
        }
        fs::read(&self.path).map_err(|error| ImageError::storage("read a file", &self.path, error))
    }

    pub(super) fn compression(&self) -> Result<Compression, ImageError> {
        let file = File::open(&self.path).map_err(|error| ImageError::storage("read a file", &self.path, error))?;
        decompress(file).map(|(compression, _)| compression)
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // What stays goes with the session.
        let _ = fs::remove_file(&self.path);
    }
}

fn open_file(path: &Path) -> Result<File, ImageError> {
    File::open(path).map_err(|error| bad_archive(path, error.to_string()))
}

fn open_directory<'a>(inner: &'a Inner, path: &Path) -> Result<Contents<'a>, ImageError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| bad_archive(path, io::Error::from(error).to_string()))?;
    let mut source = Source { inner, files: BTreeMap::new(), place: Place::Directory(root) };
    let is_layout = source.file("oci-layout")?.is_some() || source.file("manifest.json")?.is_some();
    if !is_layout {
        return Err(bad_archive(path, "the directory is neither an OCI layout nor an unpacked docker archive"));
    }
    Ok(Contents::Images(source))
}

/// Links inside the directory are followed (old docker archives have them),
/// links out of it are not.
fn open_beneath(root: &OwnedFd, name: &str) -> Result<Option<File>, ImageError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let failed = |error: io::Error| ImageError::storage("read an image directory", name, error);
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(root, name, flags.difference(OFlags::NOFOLLOW), Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM) if !name.split('/').any(|part| part == "..") => {
            rustix::fs::openat(root, name, flags, Mode::empty())
        }
        outcome => outcome,
    };
    match opened {
        Ok(descriptor) => {
            let file = File::from(descriptor);
            let is_file = file.metadata().map_err(failed)?.is_file();
            Ok(is_file.then_some(file))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(failed(error.into())),
    }
}

/// Reads until it is clear what the archive is; a root file system is read to
/// its end, since its digest is needed.
fn scan(path: &Path, options: &UnpackOptions) -> Result<Scanned, ImageError> {
    let (compression, plain) = decompress(open_file(path)?)?;
    let stream = BufReader::with_capacity(HASH_BUFFER_BYTES, PlainStream::new(plain, options));
    let mut reader = TarReader::new(stream, options.limits.max_entries);
    let mut entries = 0u64;
    while let Some(entry) = reader.next_entry().map_err(|error| archive_error(path, tar_error(error)))? {
        entries += 1;
        let Some(name) = plain_name(&entry.name) else { continue };
        if entry.kind != EntryKind::File || entry.size > MAX_DOCUMENT_BYTES {
            continue;
        }
        let is_marker: fn(&[u8]) -> bool = match name.as_str() {
            "oci-layout" => is_oci_layout,
            "manifest.json" => is_docker_manifest,
            _ => continue,
        };
        let mut content = Vec::new();
        reader.read_to_end(&mut content).map_err(|error| bad_archive(path, error.to_string()))?;
        if is_marker(&content) {
            return Ok(Scanned::Images);
        }
    }
    if entries == 0 {
        return Err(bad_archive(path, "the archive is empty"));
    }
    let mut rest = reader.into_input();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| bad_archive(path, error.to_string()))?;
    let (diff_id, _) = rest.into_inner().finish();
    Ok(Scanned::RootFs { compression, diff_id })
}

/// A root file system may well have a file of the same name.
fn is_oci_layout(content: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(content).is_ok_and(|json| json["imageLayoutVersion"].is_string())
}

fn is_docker_manifest(content: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(content).is_ok_and(|json| {
        json.as_array()
            .is_some_and(|images| images.iter().all(|image| image["Config"].is_string() && image["Layers"].is_array()))
    })
}

fn spool<'a>(inner: &'a Inner, path: &Path, options: &UnpackOptions) -> Result<Source<'a>, ImageError> {
    let (_, plain) = decompress(open_file(path)?)?;
    let stream = BufReader::with_capacity(HASH_BUFFER_BYTES, PlainStream::new(plain, options));
    let mut reader = TarReader::new(stream, MAX_ARCHIVE_ENTRIES);
    let mut files = BTreeMap::new();
    let mut aliases = BTreeMap::new();
    while let Some(entry) = reader.next_entry().map_err(|error| archive_error(path, tar_error(error)))? {
        let Some(name) = plain_name(&entry.name) else { continue };
        match entry.kind {
            EntryKind::File => {
                let spooled = Spooled::copy(&inner.session, &mut reader, inner.options.max_bytes)
                    .map_err(|error| archive_error(path, error))?;
                files.insert(name, spooled);
            }
            EntryKind::Symlink => {
                let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                if let Some(target) = resolve(directory, &entry.link) {
                    aliases.insert(name, target);
                }
            }
            EntryKind::HardLink => {
                if let Some(target) = plain_name(&entry.link) {
                    aliases.insert(name, target);
                }
            }
            EntryKind::Directory | EntryKind::Fifo | EntryKind::Device => {}
        }
    }
    Ok(Source { inner, files, place: Place::Archive { aliases } })
}

fn archive_error(path: &Path, error: ImageError) -> ImageError {
    match error {
        ImageError::BadLayer { reason, .. } => bad_archive(path, reason),
        other => other,
    }
}

/// Names are only keys of a map here, but they should compare equal.
fn plain_name(name: &[u8]) -> Option<String> {
    resolve("", name)
}

/// `link` seen from `directory`, within the archive; nothing above it.
fn resolve(directory: &str, link: &[u8]) -> Option<String> {
    let link = std::str::from_utf8(link).ok()?;
    let start = if link.starts_with('/') { "" } else { directory };
    let mut parts: Vec<&str> = Vec::new();
    for part in start.split('/').chain(link.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_within_the_archive() {
        assert_eq!(resolve("abc", b"../def/layer.tar").as_deref(), Some("def/layer.tar"));
        assert_eq!(resolve("", b"./x//y").as_deref(), Some("x/y"));
        assert_eq!(resolve("a", b"/x").as_deref(), Some("x"));
        assert_eq!(resolve("a", b"../../x"), None);
    }

    #[test]
    fn files_of_a_root_file_system_are_no_markers() {
        assert!(is_oci_layout(br#"{"imageLayoutVersion":"1.0.0"}"#));
        assert!(!is_oci_layout(b"{}"));
        assert!(is_docker_manifest(br#"[{"Config":"x.json","RepoTags":null,"Layers":[]}]"#));
        assert!(!is_docker_manifest(br#"{"name":"web app"}"#));
        assert!(!is_docker_manifest(br#"[{"src":"icon.png"}]"#));
    }
}

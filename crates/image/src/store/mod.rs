//! The local store: every image once, by content, for all processes of a host.
//!
//! ```text
//!  reference ──index──► manifest ──► configuration ──► diff ids
//!                          │                              │
//!                          ▼                              ▼
//!                   layer blobs  ───────unpack────►  layer directories
//! ```
//!
//! [`ImageStore::get`] answers from memory when it knows the image and its layers
//! have not changed, from disk when the image is complete there, and pulls
//! otherwise.
//! Concurrent callers share one pull. What a live [`Image`] or a recorded lease
//! needs is never collected.

mod flight;
mod gc;
mod index;
mod known;
mod layers;
mod layout;
mod leases;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageManifest;
use stacyvm_api::Timestamp;
use stacyvm_sandbox::ProgressSink;
use tokio::sync::Semaphore;

use crate::archive::{self, ExportFormat, ImportOptions};
use crate::config::{ParsedConfig, Platform, parse_config};
use crate::registry::{Registry, RegistryOptions};
use crate::unpack::{LayerForm, LayerNotes, UnpackLimits};
use crate::{Digest, ImageConfig, ImageError, ImageReference};

pub(crate) use flight::{Flights, Reporter};
pub use gc::GarbageReport;
pub(crate) use index::IndexEntry;
use index::{CachedIndex, Index};
pub(crate) use known::ImageData;
use known::{Contents, KnownImages};
pub(crate) use layers::LayerRecord;
pub(crate) use layout::{FileLock, Layout, Session, place_file, write_file};
pub use leases::Lease;

/// Size of the store that collection aims for, unless configured.
pub const DEFAULT_MAX_BYTES: u64 = 50 << 30;
/// Manifests and configurations are small JSON documents.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 8 << 20;
/// Docker's limit; overlayfs has its own at 500.
pub(crate) const MAX_LAYERS: usize = 127;
/// Downloads at a time, of all pulls together.
const MAX_PARALLEL_DOWNLOADS: usize = 6;
/// Unpacking is bound by processor and disk.
const MAX_PARALLEL_UNPACKS: usize = 4;

/// How a store is opened. Nothing here is read from the environment.
#[derive(Debug, Clone)]
pub struct ImageStoreOptions {
    /// The store's own directory, made with mode 0700.
    pub root: PathBuf,
    /// Least recently used images are dropped above this.
    pub max_bytes: u64,
    /// A docker `config.json` with credentials.
    pub docker_config: Option<PathBuf>,
    /// `HOST[:PORT]` of registries to speak plain HTTP with, besides loopback.
    pub plain_http_registries: Vec<String>,
    pub platform: Platform,
    pub limits: UnpackLimits,
}

impl ImageStoreOptions {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            max_bytes: DEFAULT_MAX_BYTES,
            docker_config: None,
            plain_http_registries: Vec::new(),
            platform: Platform::host(),
            limits: UnpackLimits::default(),
        }
    }
}

/// A content-addressed cache of images. Cheap to clone; several processes may
/// have the same one open.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) session: Session,
    pub(crate) options: ImageStoreOptions,
    pub(crate) registry: Registry,
    pub(crate) downloads: Arc<Semaphore>,
    pub(crate) unpacks: Arc<Semaphore>,
    pub(crate) form: LayerForm,
    index: CachedIndex,
    flights: Flights<Arc<ImageData>>,
    known: KnownImages,
}

/// An image ready to be mounted. Its layers stay on disk while it lives.
#[derive(Debug, Clone)]
pub struct Image {
    /// Complete, as `docker.io/library/alpine:latest`.
    pub reference: String,
    /// Of the manifest for this platform.
    pub digest: String,
    /// Unpacked directories, bottom first; never write to them.
    pub layers: Vec<PathBuf>,
    pub config: ImageConfig,
    /// How the layers express whiteouts and owners.
    pub form: LayerForm,
    /// What of its layers could not be kept, added up.
    pub notes: LayerNotes,
    pub(crate) data: Arc<ImageData>,
}

/// One line of `stacyvm image list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    pub reference: String,
    pub digest: String,
    /// Unpacked, on disk; layers that images share count in each.
    pub size_bytes: u64,
    /// As downloaded.
    pub download_bytes: u64,
    /// When the image was built, RFC 3339, where it says so.
    pub created: Option<String>,
    pub stored_at: Timestamp,
    pub layers: usize,
    pub architecture: String,
}

/// Manifest and configuration of an image that is in the store.
pub(crate) struct Documents {
    pub(crate) manifest: ImageManifest,
    pub(crate) config: ParsedConfig,
}

impl ImageStore {
    pub async fn open(options: ImageStoreOptions) -> Result<Self, ImageError> {
        let registry = Registry::new(RegistryOptions {
            docker_config: options.docker_config.clone(),
            plain_http_registries: options.plain_http_registries.clone(),
        });
        blocking(move || {
            let layout = Layout::create(&options.root)?;
            let session = Session::create(&layout)?;
            let inner = Inner {
                layout,
                session,
                registry,
                downloads: Arc::new(Semaphore::new(MAX_PARALLEL_DOWNLOADS)),
                unpacks: Arc::new(Semaphore::new(MAX_PARALLEL_UNPACKS)),
                form: LayerForm::of_this_process(),
                index: CachedIndex::default(),
                flights: Flights::default(),
                known: KnownImages::default(),
                options,
            };
            Ok(Self { inner: Arc::new(inner) })
        })
        .await
    }

    /// The image, from the store where it is there, pulled otherwise.
    pub async fn get(&self, reference: &str, progress: &dyn ProgressSink) -> Result<Image, ImageError> {
        let reference: ImageReference = reference.parse()?;
        if let Some(image) = self.inner.known(&reference).await? {
            return Ok(image);
        }
        let inner = self.inner.clone();
        let data = self
            .inner
            .flights
            .join(format!("get {reference}"), progress, |report| {
                let reference = reference.clone();
                async move { inner.get(&reference, report).await }
            })
            .await?;
        Ok(data.handle(&reference))
    }

    /// The image as its registry has it now, whatever is stored.
    pub async fn pull(&self, reference: &str, progress: &dyn ProgressSink) -> Result<Image, ImageError> {
        let reference: ImageReference = reference.parse()?;
        let inner = self.inner.clone();
        let data = self
            .inner
            .flights
            .join(format!("pull {reference}"), progress, |report| {
                let reference = reference.clone();
                async move { inner.pull(&reference, report).await }
            })
            .await?;
        Ok(data.handle(&reference))
    }

    /// Brings in a docker archive, an OCI layout (both as directory or tar) or
    /// a root file system tar, compressed or not. Returns one image per name.
    pub async fn import(
        &self,
        path: &Path,
        options: ImportOptions,
        progress: &dyn ProgressSink,
    ) -> Result<Vec<Image>, ImageError> {
        archive::import(&self.inner, path, options, progress).await
    }

    /// Writes an image to a tar file that others can import.
    pub async fn export(&self, reference: &str, path: &Path, format: ExportFormat) -> Result<(), ImageError> {
        let reference: ImageReference = reference.parse()?;
        archive::export(&self.inner, &reference, path, format).await
    }

    /// Every stored image, by reference.
    pub async fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let inner = self.inner.clone();
        blocking(move || inner.list()).await
    }

    /// Takes the reference away and frees what nothing else needs. Sandboxes
    /// that use the image keep its layers until they end.
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let reference: ImageReference = reference.parse()?;
        let inner = self.inner.clone();
        blocking(move || {
            inner
                .change_index(|index| index.references.remove(&reference.to_string()))?
                .ok_or_else(|| ImageError::NotStored { reference: reference.to_string() })?;
            inner.collect_orphans().map(drop)
        })
        .await
    }

    /// Frees what no reference, handle or lease needs, then drops the least
    /// recently used images until the store fits its size.
    pub async fn collect_garbage(&self) -> Result<GarbageReport, ImageError> {
        let inner = self.inner.clone();
        blocking(move || inner.collect_garbage()).await
    }

    /// Records that `owner` (a sandbox id) uses the image's layers, also when
    /// no process holds a handle. Replaces an earlier lease of that owner.
    pub async fn lease(&self, owner: &str, image: &Image) -> Result<(), ImageError> {
        let (inner, owner, image) = (self.inner.clone(), owner.to_owned(), image.clone());
        blocking(move || leases::write(&inner.layout, &inner.session, &owner, &image)).await
    }

    /// Ends a lease; one that does not exist is fine.
    pub async fn release(&self, owner: &str) -> Result<(), ImageError> {
        let (inner, owner) = (self.inner.clone(), owner.to_owned());
        blocking(move || leases::remove(&inner.layout, &owner)).await
    }

    /// Every lease, for a provider to release those whose sandbox is gone.
    pub async fn leases(&self) -> Result<Vec<Lease>, ImageError> {
        let inner = self.inner.clone();
        blocking(move || leases::list(&inner.layout)).await
    }
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore").field("root", &self.inner.layout.root()).finish_non_exhaustive()
    }
}

impl Inner {
    /// An image that was complete when it was last asked for, if it still is:
    /// its documents are not read again.
    async fn known(&self, reference: &ImageReference) -> Result<Option<Image>, ImageError> {
        let Some(entry) = self.lookup(reference)? else { return Ok(None) };
        if let Some(data) = self.known.live(&entry.manifest) {
            return Ok(Some(data.handle(reference)));
        }
        let Some(contents) = self.known.contents(&entry.manifest) else { return Ok(None) };
        let in_use = self.mark_in_use(&entry.manifest).await?;
        if !contents.are_unchanged(&self.layout) {
            return Ok(None);
        }
        Ok(Some(self.known.admit(contents, in_use).handle(reference)))
    }

    pub(crate) fn live_data(&self, manifest: &Digest) -> Option<Arc<ImageData>> {
        self.known.live(manifest)
    }

    pub(crate) fn lookup(&self, reference: &ImageReference) -> Result<Option<IndexEntry>, ImageError> {
        self.index.lookup(&self.layout, &reference.to_string())
    }

    /// From here on the collector keeps what the manifest names. The caller
    /// looks at what is there only afterwards.
    pub(crate) async fn mark_in_use(&self, manifest: &Digest) -> Result<FileLock, ImageError> {
        let _store = self.layout.lock_shared().await?;
        let path = self.layout.in_use(manifest);
        let lock = FileLock::try_shared(&path)?.ok_or_else(|| {
            ImageError::storage("lock an image", &path, io::Error::other("held without the store's lock"))
        })?;
        lock.touch();
        Ok(lock)
    }

    /// A blob that is there and that the collector will leave, if its manifest
    /// is marked in use.
    pub(crate) async fn has_blob(&self, digest: &Digest) -> Result<bool, ImageError> {
        let _store = self.layout.lock_shared().await?;
        Ok(self.layout.blob(digest).exists())
    }

    /// A small blob, checked against its digest.
    pub(crate) fn read_document(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ImageError> {
        let path = self.layout.blob(digest);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ImageError::storage("read a blob", path, error)),
        };
        if Digest::of(&bytes) == *digest {
            return Ok(Some(bytes));
        }
        // A damaged disk; without the file it is fetched again.
        tracing::warn!(%digest, "a stored blob does not match its digest and is dropped");
        let _ = fs::remove_file(path);
        Ok(None)
    }

    /// Manifest and configuration, where both are there.
    pub(crate) fn documents(&self, reference: &str, manifest: &Digest) -> Result<Option<Documents>, ImageError> {
        let Some(bytes) = self.read_document(manifest)? else { return Ok(None) };
        let manifest = parse_manifest(reference, &bytes)?;
        let Some(bytes) = self.read_document(&descriptor_digest(reference, manifest.config())?)? else {
            return Ok(None);
        };
        let config = parse_config(&reference, &bytes)?;
        check_layers(reference, &manifest, &config)?;
        Ok(Some(Documents { manifest, config }))
    }

    /// The shared part of a handle, once every layer is in place.
    pub(crate) fn admit(
        &self,
        manifest: &Digest,
        config: ParsedConfig,
        records: &[LayerRecord],
        in_use: FileLock,
    ) -> Arc<ImageData> {
        let contents = Contents::of(&self.layout, manifest, config, records, self.form);
        self.known.admit(Arc::new(contents), in_use)
    }

    /// Changes the index under the store's exclusive lock.
    pub(crate) fn change_index<T>(&self, change: impl FnOnce(&mut Index) -> T) -> Result<T, ImageError> {
        let _store = self.layout.lock_exclusive()?;
        let mut answer = None;
        index::update(&self.layout, &self.session, |index| answer = Some(change(index)))?;
        answer
            .ok_or_else(|| ImageError::storage("change the index", self.layout.index(), io::Error::other("no change")))
    }

    /// Lets `reference` mean `entry`.
    pub(crate) fn tag(&self, reference: &ImageReference, entry: IndexEntry) -> Result<(), ImageError> {
        self.change_index(|index| index.references.insert(reference.to_string(), entry)).map(drop)
    }

    fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let mut summaries = Vec::new();
        for (reference, entry) in self.index.snapshot(&self.layout)?.references {
            let Some(documents) = self.documents(&reference, &entry.manifest)? else { continue };
            let records = documents.config.diff_ids.iter().map(|diff_id| layers::read_record(&self.layout, diff_id));
            summaries.push(ImageSummary {
                reference,
                digest: entry.manifest.to_string(),
                size_bytes: records.flatten().map(|record| record.disk_bytes).sum(),
                download_bytes: documents.manifest.layers().iter().map(oci_spec::image::Descriptor::size).sum(),
                created: documents.config.config.created,
                stored_at: entry.stored_at,
                layers: documents.config.diff_ids.len(),
                architecture: documents.config.config.architecture,
            });
        }
        Ok(summaries)
    }
}

pub(crate) fn parse_manifest(reference: &str, bytes: &[u8]) -> Result<ImageManifest, ImageError> {
    let manifest: ImageManifest = serde_json::from_slice(bytes)
        .map_err(|error| ImageError::malformed(&reference, format!("manifest: {error}")))?;
    if manifest.schema_version() != 2 {
        return Err(ImageError::Unsupported { what: "a manifest of schema version 1".into() });
    }
    if manifest.layers().len() > MAX_LAYERS {
        return Err(ImageError::malformed(&reference, format!("more than {MAX_LAYERS} layers")));
    }
    Ok(manifest)
}

pub(crate) fn descriptor_digest(
    reference: &str,
    descriptor: &oci_spec::image::Descriptor,
) -> Result<Digest, ImageError> {
    descriptor
        .digest()
        .as_ref()
        .parse()
        .map_err(|error: crate::digest::InvalidDigest| ImageError::malformed(&reference, error.to_string()))
}

pub(crate) fn check_layers(reference: &str, manifest: &ImageManifest, config: &ParsedConfig) -> Result<(), ImageError> {
    let (layers, diff_ids) = (manifest.layers().len(), config.diff_ids.len());
    if layers == diff_ids {
        return Ok(());
    }
    Err(ImageError::malformed(&reference, format!("{layers} layers but {diff_ids} diff ids")))
}

/// Runs file work off the async threads. The work always runs to its end, so
/// that nothing is left half done when a caller goes away.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(ImageError::storage("finish", "", error)),
        },
    }
}

//! From a reference to an image that can be mounted, with whatever has to
//! happen in between: nothing, unpacking, or downloading.
//!
//! The order matters for the collector of any process: the manifest is marked
//! in use before anything else, then manifest, configuration and layers are
//! stored in this order, so that what is there is always known to be needed.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::{StreamExt as _, TryStreamExt as _};
use oci_spec::image::{Descriptor, ImageManifest, MediaType};
use stacyvm_api::Timestamp;
use stacyvm_sandbox::Progress;

use crate::config::{ParsedConfig, parse_config};
use crate::registry::{BlobRequest, RawManifest};
use crate::store::{
    FileLock, ImageData, IndexEntry, Inner, LayerRecord, MAX_DOCUMENT_BYTES, Reporter, blocking, check_layers,
    descriptor_digest, parse_manifest, place_file, write_file,
};
use crate::{Digest, ImageError, ImageReference};

/// What a download leaves free; a full disk hurts more than this image helps.
const MIN_FREE_BYTES: u64 = 64 << 20;
/// Layers of one image in the works at a time; more gain nothing.
const MAX_PARALLEL_LAYERS: usize = 4;

impl Inner {
    /// What is stored under `reference`, completed if need be, else a pull.
    pub(crate) async fn get(
        self: Arc<Self>,
        reference: &ImageReference,
        report: Reporter,
    ) -> Result<Arc<ImageData>, ImageError> {
        let Some(entry) = self.stored(reference).await? else {
            return self.pull(reference, report).await;
        };
        if let Some(data) = self.live_data(&entry.manifest) {
            return Ok(data);
        }
        let in_use = self.mark_in_use(&entry.manifest).await?;
        let steps = Steps::new(reference, report);
        let outcome = self.complete(reference, &entry.manifest, in_use, &steps).await;
        match outcome {
            // A stored blob turned out damaged and was dropped: once more, now
            // from the registry.
            Err(ImageError::DigestMismatch { .. } | ImageError::BadLayer { .. })
                if !self.is_intact(&entry.manifest).await? =>
            {
                let in_use = self.mark_in_use(&entry.manifest).await?;
                self.complete(reference, &entry.manifest, in_use, &steps).await
            }
            outcome => outcome,
        }
    }

    pub(crate) async fn pull(
        self: Arc<Self>,
        reference: &ImageReference,
        report: Reporter,
    ) -> Result<Arc<ImageData>, ImageError> {
        let steps = Steps::new(reference, report);
        steps.resolving();
        let resolved = self.registry.resolve(reference, &self.options.platform).await?;
        let RawManifest { bytes, digest } = resolved.manifest;
        // A manifest we cannot use is not stored.
        let manifest = parse_manifest(&reference.to_string(), &bytes)?;
        check_kinds(reference, &manifest)?;
        self.check_sizes(reference, &manifest)?;
        let in_use = self.mark_in_use(&digest).await?;
        let (inner, manifest_digest) = (self.clone(), digest.clone());
        blocking(move || inner.store_document(&manifest_digest, &bytes)).await?;
        let data = self.complete(reference, &digest, in_use, &steps).await?;
        let entry = IndexEntry { manifest: digest, index: resolved.index, stored_at: Timestamp::now() };
        self.name_and_tidy(vec![(reference.clone(), entry)], &data).await?;
        Ok(data)
    }

    /// Lets references mean an image that is complete, then cleans up behind.
    pub(crate) async fn name_and_tidy(
        self: &Arc<Self>,
        names: Vec<(ImageReference, IndexEntry)>,
        data: &Arc<ImageData>,
    ) -> Result<(), ImageError> {
        let inner = self.clone();
        blocking(move || names.iter().try_for_each(|(reference, entry)| inner.tag(reference, entry.clone()))).await?;
        let (inner, diff_ids) = (self.clone(), data.diff_ids().to_vec());
        // Nobody waits for this, and the runtime waits for it at its end.
        tokio::task::spawn_blocking(move || inner.tidy(&diff_ids));
        Ok(())
    }

    /// The index's entry, or the manifest that a digest names directly.
    async fn stored(self: &Arc<Self>, reference: &ImageReference) -> Result<Option<IndexEntry>, ImageError> {
        if let Some(entry) = self.lookup(reference)? {
            return Ok(Some(entry));
        }
        let Some(digest) = reference.digest().cloned() else { return Ok(None) };
        let (inner, reference) = (self.clone(), reference.clone());
        blocking(move || {
            if inner.documents(&reference.to_string(), &digest).ok().flatten().is_none() {
                return Ok(None);
            }
            let entry = IndexEntry { manifest: digest, index: None, stored_at: Timestamp::now() };
            inner.tag(&reference, entry.clone())?;
            Ok(Some(entry))
        })
        .await
    }

    /// Brings in what the manifest needs and is missing. The manifest is
    /// marked in use by `in_use`, which the result takes over.
    pub(crate) async fn complete(
        self: &Arc<Self>,
        reference: &ImageReference,
        manifest: &Digest,
        in_use: FileLock,
        steps: &Steps,
    ) -> Result<Arc<ImageData>, ImageError> {
        let (parsed, config) = self.fetch_documents(reference, manifest, steps).await?;
        let layers = parsed.layers().iter().zip(&config.diff_ids);
        let layers = layers
            .map(|(descriptor, diff_id)| {
                Ok((descriptor_digest(&steps.name, descriptor)?, descriptor.size(), diff_id.clone()))
            })
            .collect::<Result<Vec<_>, ImageError>>()?;
        steps.expect(layers.iter().map(|(_, size, _)| size).sum(), layers.len());
        let mut work = Vec::with_capacity(layers.len());
        for (blob, size, diff_id) in layers {
            work.push(self.complete_layer(reference, blob, size, diff_id, steps));
        }
        let records: Vec<LayerRecord> =
            futures_util::stream::iter(work).buffered(MAX_PARALLEL_LAYERS).try_collect().await?;
        Ok(self.admit(manifest, config, &records, in_use))
    }

    async fn complete_layer(
        self: &Arc<Self>,
        reference: &ImageReference,
        blob: Digest,
        size: u64,
        diff_id: Digest,
        steps: &Steps,
    ) -> Result<LayerRecord, ImageError> {
        self.ensure_blob(reference, &blob, size, steps).await?;
        let read = Arc::new(AtomicU64::new(0));
        let record = steps.watch_unpack(&read, size, self.ensure_layer(&diff_id, &blob, read.clone())).await?;
        steps.layer_done();
        Ok(record)
    }

    /// Manifest and configuration, from the store or the registry.
    async fn fetch_documents(
        self: &Arc<Self>,
        reference: &ImageReference,
        digest: &Digest,
        steps: &Steps,
    ) -> Result<(ImageManifest, ParsedConfig), ImageError> {
        let bytes = if let Some(bytes) = self.read_document(digest)? {
            bytes
        } else {
            steps.resolving();
            let fetched = self.registry.manifest(reference, digest.as_str()).await?;
            let (inner, digest, bytes) = (self.clone(), digest.clone(), fetched.bytes.clone());
            blocking(move || inner.store_document(&digest, &bytes)).await?;
            fetched.bytes
        };
        let manifest = parse_manifest(&steps.name, &bytes)?;
        check_kinds(reference, &manifest)?;
        let config_digest = descriptor_digest(&steps.name, manifest.config())?;
        if manifest.config().size() > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge { what: "the image configuration".into(), limit: MAX_DOCUMENT_BYTES });
        }
        if self.read_document(&config_digest)?.is_none() {
            self.ensure_blob(reference, &config_digest, manifest.config().size(), &Steps::silent(reference)).await?;
        }
        let bytes = self.read_document(&config_digest)?.ok_or_else(|| {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            ImageError::storage("read a configuration", self.layout.blob(&config_digest), missing)
        })?;
        let config = parse_config(reference, &bytes)?;
        check_layers(&steps.name, &manifest, &config)?;
        self.check_platform(reference, &config)?;
        Ok((manifest, config))
    }

    fn store_document(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        write_file(&self.session, &self.layout.blob(digest), bytes)
    }

    /// Downloads a blob unless it is here or on its way.
    async fn ensure_blob(
        self: &Arc<Self>,
        reference: &ImageReference,
        digest: &Digest,
        size: u64,
        steps: &Steps,
    ) -> Result<(), ImageError> {
        if self.has_blob(digest).await? {
            steps.downloaded(size);
            return Ok(());
        }
        let _lock = FileLock::exclusive(&self.layout.blob_lock(digest)).await?;
        if self.has_blob(digest).await? {
            steps.downloaded(size);
            return Ok(());
        }
        let _permit = self.downloads.acquire().await;
        let partial = self.layout.partial(digest);
        let counted = AtomicU64::new(0);
        let request = BlobRequest {
            reference,
            digest,
            size,
            partial: &partial,
            on_progress: &|have| steps.download_at(&counted, have),
        };
        self.registry.fetch_blob(&request).await?;
        place_file(&partial, &self.layout.blob(digest))
    }

    fn check_sizes(&self, reference: &ImageReference, manifest: &ImageManifest) -> Result<(), ImageError> {
        let total = manifest.layers().iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size()));
        let Some(total) = total.filter(|total| *total <= self.options.max_bytes) else {
            return Err(ImageError::TooLarge { what: format!("image `{reference}`"), limit: self.options.max_bytes });
        };
        let root = self.layout.root();
        let failed = |error: io::Error| ImageError::storage("look at free space", root, error);
        let space = rustix::fs::statvfs(root).map_err(|error| failed(error.into()))?;
        if space.f_bavail.saturating_mul(space.f_frsize) < total.saturating_add(MIN_FREE_BYTES) {
            let error = io::Error::new(io::ErrorKind::StorageFull, format!("{total} bytes do not fit"));
            return Err(ImageError::storage("make room for an image", root, error));
        }
        Ok(())
    }

    fn check_platform(&self, reference: &ImageReference, config: &ParsedConfig) -> Result<(), ImageError> {
        let platform = &self.options.platform;
        // Some tools leave it out; they build for the machine they run on.
        let is_silent = config.architecture.to_string().is_empty();
        if is_silent || platform.accepts(&config.os, &config.architecture) {
            return Ok(());
        }
        Err(ImageError::PlatformUnavailable {
            reference: reference.to_string(),
            platform: platform.to_string(),
            available: format!("{}/{}", config.os, config.architecture),
        })
    }

    /// Hashes every blob of an image and drops those that are damaged.
    async fn is_intact(self: &Arc<Self>, manifest: &Digest) -> Result<bool, ImageError> {
        let (inner, manifest) = (self.clone(), manifest.clone());
        blocking(move || {
            let Some(documents) = inner.documents("", &manifest)? else { return Ok(false) };
            let mut intact = true;
            for descriptor in documents.manifest.layers() {
                let digest = descriptor_digest("", descriptor)?;
                let path = inner.layout.blob(&digest);
                if crate::archive::hash_file(&path)?.0 != digest {
                    tracing::warn!(%digest, "a stored layer does not match its digest and is dropped");
                    fs::remove_file(&path)
                        .map_err(|error| ImageError::storage("drop a damaged layer", &path, error))?;
                    intact = false;
                }
            }
            Ok(intact)
        })
        .await
    }
}

/// Helm charts, signatures and the like are stored as images too.
pub(crate) fn check_kinds(reference: &ImageReference, manifest: &ImageManifest) -> Result<(), ImageError> {
    const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    let kind = manifest.config().media_type();
    let is_image = *kind == MediaType::ImageConfig || kind.as_ref() == DOCKER_CONFIG;
    if !is_image {
        return Err(ImageError::Unsupported { what: format!("`{reference}`: it is not a container image ({kind})") });
    }
    let unknown = |layer: &&Descriptor| {
        let name = layer.media_type().as_ref();
        !name.contains("tar") || name.ends_with("+encrypted")
    };
    match manifest.layers().iter().find(unknown) {
        Some(layer) => {
            Err(ImageError::Unsupported { what: format!("`{reference}`: a layer of type {}", layer.media_type()) })
        }
        None => Ok(()),
    }
}

/// What the watcher is told, added up over the layers in the works.
pub(crate) struct Steps {
    name: String,
    report: Option<Reporter>,
    total: AtomicU64,
    downloaded: AtomicU64,
    unpacked: AtomicU64,
    layers: AtomicUsize,
    layers_done: AtomicUsize,
}

impl Steps {
    pub(crate) fn new(reference: &ImageReference, report: Reporter) -> Self {
        Self { report: Some(report), ..Self::silent(reference) }
    }

    pub(crate) fn silent(reference: &ImageReference) -> Self {
        Self {
            name: reference.to_string(),
            report: None,
            total: AtomicU64::new(0),
            downloaded: AtomicU64::new(0),
            unpacked: AtomicU64::new(0),
            layers: AtomicUsize::new(0),
            layers_done: AtomicUsize::new(0),
        }
    }

    fn resolving(&self) {
        self.send("resolve", format!("asking the registry for {}", self.name), 0, 0);
    }

    fn expect(&self, bytes: u64, layers: usize) {
        for counter in [&self.downloaded, &self.unpacked] {
            counter.store(0, Ordering::Relaxed);
        }
        self.layers_done.store(0, Ordering::Relaxed);
        self.total.store(bytes, Ordering::Relaxed);
        self.layers.store(layers, Ordering::Relaxed);
        self.tell();
    }

    fn downloaded(&self, bytes: u64) {
        self.downloaded.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    /// `have` of one blob are here, of which `counted` were counted before.
    fn download_at(&self, counted: &AtomicU64, have: u64) {
        let before = counted.swap(have, Ordering::Relaxed);
        if have >= before {
            self.downloaded.fetch_add(have - before, Ordering::Relaxed);
        } else {
            self.downloaded.fetch_sub(before - have, Ordering::Relaxed);
        }
        self.tell();
    }

    fn layer_done(&self) {
        self.layers_done.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    /// Follows a counter that another thread moves.
    async fn watch_unpack<T>(&self, read: &AtomicU64, size: u64, work: impl Future<Output = T>) -> T {
        const PERIOD: std::time::Duration = std::time::Duration::from_millis(100);
        let mut work = std::pin::pin!(work);
        let mut counted = 0;
        loop {
            tokio::select! {
                outcome = &mut work => {
                    self.unpacked.fetch_add(size.saturating_sub(counted), Ordering::Relaxed);
                    return outcome;
                }
                () = tokio::time::sleep(PERIOD) => {
                    let now = read.load(Ordering::Relaxed).min(size);
                    self.unpacked.fetch_add(now.saturating_sub(counted), Ordering::Relaxed);
                    counted = counted.max(now);
                    self.tell();
                }
            }
        }
    }

    fn tell(&self) {
        let total = self.total.load(Ordering::Relaxed);
        let downloaded = self.downloaded.load(Ordering::Relaxed);
        let (done, layers) = (self.layers_done.load(Ordering::Relaxed), self.layers.load(Ordering::Relaxed));
        let message = format!("{}: {done} of {layers} layers", self.name);
        if downloaded < total {
            self.send("pull", message, downloaded, total);
        } else {
            self.send("unpack", message, self.unpacked.load(Ordering::Relaxed), total);
        }
    }

    fn send(&self, phase: &'static str, message: String, done_bytes: u64, total_bytes: u64) {
        if let Some(report) = &self.report {
            report.report(Progress { phase, message, done_bytes, total_bytes });
        }
    }
}

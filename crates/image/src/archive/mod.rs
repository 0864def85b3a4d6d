//! Images as files: in from archives and layouts, out again.
//!
//! | what | told by |
//! |---|---|
//! | OCI layout, as directory or tar | `oci-layout` and `index.json` |
//! | docker archive (`docker save`) | `manifest.json` that lists images |
//! | root file system (`docker export`, `tar`) | anything else that is a tar |

mod export;
mod images;
mod source;

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use stacyvm_api::Timestamp;
use stacyvm_sandbox::ProgressSink;

use crate::digest::Hasher;
use crate::pull::{Steps, check_kinds};
use crate::store::{
    Flights, Image, ImageData, IndexEntry, Inner, Reporter, blocking, descriptor_digest, parse_manifest, write_file,
};
use crate::unpack::{CancelFlag, CancelOnDrop, Compression};
use crate::{Digest, ImageError, ImageReference, Platform};

pub use export::ExportFormat;
pub(crate) use export::export;
use source::{Contents, Spooled};

const HASH_BUFFER_BYTES: usize = 256 * 1024;
/// What shells and tools expect when an image says nothing.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// What to call the image. Needed when the archive does not say, and only
    /// possible when it holds a single image.
    pub name: Option<String>,
}

/// An image found in an archive, with everything it needs at hand.
struct Candidate {
    names: Vec<String>,
    manifest: Vec<u8>,
    /// Configuration and layers, complete.
    blobs: Vec<Arc<Spooled>>,
}

type Imported = Vec<(ImageReference, Arc<ImageData>)>;

pub(crate) async fn import(
    inner: &Arc<Inner>,
    path: &Path,
    options: ImportOptions,
    progress: &dyn ProgressSink,
) -> Result<Vec<Image>, ImageError> {
    let name = options.name.map(|name| name.parse::<ImageReference>()).transpose()?;
    let (inner, path) = (inner.clone(), path.to_owned());
    // Not shared with anybody, but it reports and ends like a pull.
    let flights = Flights::<Imported>::default();
    let key = path.display().to_string();
    let imported = flights.join(key, progress, |report| import_all(inner, path, name, report)).await?;
    Ok(imported.iter().map(|(reference, data)| data.handle(reference)).collect())
}

async fn import_all(
    inner: Arc<Inner>,
    path: PathBuf,
    name: Option<ImageReference>,
    report: Reporter,
) -> Result<Imported, ImageError> {
    let cancel = CancelOnDrop::default();
    let candidates = {
        let (inner, path, name, cancelled) = (inner.clone(), path.clone(), name.clone(), cancel.0.clone());
        blocking(move || find_candidates(&inner, &path, name.as_ref(), &cancelled)).await?
    };
    let mut imported = Vec::new();
    for candidate in candidates {
        let names = choose_names(&path, &candidate, name.as_ref())?;
        let data = bring_in(&inner, candidate, &names, &report).await?;
        imported.extend(names.into_iter().map(|name| (name, data.clone())));
    }
    Ok(imported)
}

/// Stores one image in the order that the collector relies on.
async fn bring_in(
    inner: &Arc<Inner>,
    candidate: Candidate,
    names: &[ImageReference],
    report: &Reporter,
) -> Result<Arc<ImageData>, ImageError> {
    let Some(first) = names.first() else { return Err(ImageError::NotStored { reference: String::new() }) };
    let manifest = parse_manifest(&first.to_string(), &candidate.manifest)?;
    check_kinds(first, &manifest)?;
    let digest = Digest::of(&candidate.manifest);
    let in_use = inner.mark_in_use(&digest).await?;
    let store = inner.clone();
    let manifest_digest = digest.clone();
    blocking(move || {
        write_file(&store.session, &store.layout.blob(&manifest_digest), &candidate.manifest)?;
        candidate.blobs.iter().try_for_each(|blob| blob.place(&store.layout))
    })
    .await?;
    let steps = Steps::new(first, report.clone());
    let data = inner.complete(first, &digest, in_use, &steps).await?;
    let entry = IndexEntry { manifest: digest, index: None, stored_at: Timestamp::now() };
    let entries = names.iter().map(|name| (name.clone(), entry.clone())).collect();
    inner.name_and_tidy(entries, &data).await?;
    Ok(data)
}

fn choose_names(
    path: &Path,
    candidate: &Candidate,
    given: Option<&ImageReference>,
) -> Result<Vec<ImageReference>, ImageError> {
    if let Some(given) = given {
        return Ok(vec![given.clone()]);
    }
    let names: Vec<ImageReference> = candidate.names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
    if names.is_empty() {
        return Err(bad_archive(path, "it does not say how the image is called; give it a name"));
    }
    Ok(names)
}

fn find_candidates(
    inner: &Inner,
    path: &Path,
    name: Option<&ImageReference>,
    cancelled: &CancelFlag,
) -> Result<Vec<Candidate>, ImageError> {
    let candidates = match source::open(inner, path, cancelled)? {
        Contents::RootFs(rootfs) => {
            if name.is_none() {
                return Err(bad_archive(
                    path,
                    "it is a root file system, which has no name of its own; give it one with --name",
                ));
            }
            vec![rootfs_candidate(inner, path, rootfs)?]
        }
        Contents::Images(mut source) => images::find(&mut source, path, &inner.options.platform)?,
    };
    if candidates.is_empty() {
        return Err(bad_archive(path, format!("it holds no image for {}", inner.options.platform)));
    }
    if name.is_some() && candidates.len() > 1 {
        return Err(bad_archive(
            path,
            format!("it holds {} images; import them under their own names", candidates.len()),
        ));
    }
    Ok(candidates)
}

/// An image of one layer. The same file gives the same image each time.
fn rootfs_candidate(inner: &Inner, path: &Path, rootfs: source::RootFs) -> Result<Candidate, ImageError> {
    let Platform { os, architecture, .. } = &inner.options.platform;
    let modified = fs::metadata(path).map_or(0, |metadata| metadata.mtime());
    let created = Timestamp::from_unix_ms(modified.saturating_mul(1000)).to_string();
    let config = json!({
        "created": created,
        "architecture": architecture.to_string(),
        "os": os.to_string(),
        "config": { "Env": [DEFAULT_PATH], "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": [rootfs.diff_id] },
        "history": [{ "created": created, "created_by": "stacyvm image import" }],
    });
    let config = Spooled::from_bytes(&inner.session, config.to_string().as_bytes())?;
    let manifest = manifest_json(&config, &[(&rootfs.blob, rootfs.compression)]);
    Ok(Candidate { names: Vec::new(), manifest, blobs: vec![config, rootfs.blob] })
}

fn manifest_json(config: &Spooled, layers: &[(&Spooled, Compression)]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|(blob, compression)| {
            let media_type = compression.layer_media_type().to_string();
            json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.size })
        })
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest,
            "size": config.size,
        },
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

/// Digest and length of a file.
pub(crate) fn hash_file(path: &Path) -> Result<(Digest, u64), ImageError> {
    let failed = |error| ImageError::storage("read a file", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    let mut length = 0;
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Ok((hasher.finish(), length));
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
    }
}

fn bad_archive(path: &Path, reason: impl Into<String>) -> ImageError {
    ImageError::BadArchive { path: path.to_owned(), reason: reason.into() }
}

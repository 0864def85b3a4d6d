//! Writes an image to a tar that we, docker, podman and skopeo can read.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use crate::store::{Documents, Inner, blocking, descriptor_digest};
use crate::unpack::decompress;
use crate::{Digest, ImageError, ImageReference};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExportFormat {
    /// An OCI layout: blobs and digests stay as they are.
    #[default]
    Oci,
    /// What `docker save` writes and `docker load` reads: plain layers.
    Docker,
}

pub(crate) async fn export(
    inner: &Arc<Inner>,
    reference: &ImageReference,
    path: &Path,
    format: ExportFormat,
) -> Result<(), ImageError> {
    let not_stored = || ImageError::NotStored { reference: reference.to_string() };
    let entry = inner.lookup(reference)?.ok_or_else(not_stored)?;
    let in_use = inner.mark_in_use(&entry.manifest).await?;
    let documents = inner.documents(&reference.to_string(), &entry.manifest)?.ok_or_else(not_stored)?;
    let (inner, reference, path) = (inner.clone(), reference.clone(), path.to_owned());
    blocking(move || {
        let _in_use = in_use;
        let failed = |error| ImageError::storage("write the archive", &path, error);
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(parent).map_err(failed)?;
        let mut tar = tar::Builder::new(io::BufWriter::new(file));
        match format {
            ExportFormat::Oci => write_oci(&inner, &mut tar, &reference, &entry.manifest, &documents, &path)?,
            ExportFormat::Docker => write_docker(&inner, &mut tar, &reference, &documents, &path)?,
        }
        let file = tar.into_inner().and_then(|buffer| buffer.into_inner().map_err(io::IntoInnerError::into_error));
        let file = file.map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    })
    .await
}

type Tar = tar::Builder<io::BufWriter<tempfile::NamedTempFile>>;

fn write_oci(
    inner: &Inner,
    tar: &mut Tar,
    reference: &ImageReference,
    manifest: &Digest,
    documents: &Documents,
    path: &Path,
) -> Result<(), ImageError> {
    let failed = |error| ImageError::storage("write the archive", path, error);
    let manifest_file = inner.layout.blob(manifest);
    let size = std::fs::metadata(&manifest_file).map_err(failed)?.len();
    let media_type = documents.manifest.media_type().clone();
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": media_type.map_or("application/vnd.oci.image.manifest.v1+json".to_owned(), |kind| kind.to_string()),
            "digest": manifest,
            "size": size,
            "annotations": {
                "io.containerd.image.name": reference.to_string(),
                "org.opencontainers.image.ref.name": reference.to_string(),
            },
        }],
    });
    append_bytes(tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(failed)?;
    append_bytes(tar, "index.json", index.to_string().as_bytes()).map_err(failed)?;
    let mut written = HashSet::new();
    let name = reference.to_string();
    let mut digests = vec![manifest.clone(), descriptor_digest(&name, documents.manifest.config())?];
    for layer in documents.manifest.layers() {
        digests.push(descriptor_digest(&name, layer)?);
    }
    for digest in digests {
        if !written.insert(digest.clone()) {
            continue;
        }
        let blob = inner.layout.blob(&digest);
        let file = File::open(&blob).map_err(|error| ImageError::storage("read a blob", &blob, error))?;
        let size = file.metadata().map_err(failed)?.len();
        append(tar, &format!("blobs/sha256/{}", digest.hex()), size, file).map_err(failed)?;
    }
    Ok(())
}

fn write_docker(
    inner: &Inner,
    tar: &mut Tar,
    reference: &ImageReference,
    documents: &Documents,
    path: &Path,
) -> Result<(), ImageError> {
    let failed = |error| ImageError::storage("write the archive", path, error);
    let name = reference.to_string();
    let config = descriptor_digest(&name, documents.manifest.config())?;
    let config_name = format!("{}.json", config.hex());
    let config_bytes = std::fs::read(inner.layout.blob(&config)).map_err(failed)?;
    append_bytes(tar, &config_name, &config_bytes).map_err(failed)?;
    let mut names = Vec::new();
    for (layer, diff_id) in documents.manifest.layers().iter().zip(&documents.config.diff_ids) {
        let layer_name = format!("{}/layer.tar", diff_id.hex());
        if !names.contains(&layer_name) {
            let blob = inner.layout.blob(&descriptor_digest(&name, layer)?);
            let open = || File::open(&blob).map_err(|error| ImageError::storage("read a blob", &blob, error));
            // A tar entry states its size first, so the layer is read twice.
            let size = io::copy(&mut decompress(open()?)?.1, &mut io::sink()).map_err(failed)?;
            append(tar, &layer_name, size, decompress(open()?)?.1).map_err(failed)?;
        }
        names.push(layer_name);
    }
    // Docker knows no name with a digest.
    let tags: Vec<String> = reference
        .tag()
        .map(|tag| format!("{}/{}:{tag}", reference.registry(), reference.repository()))
        .into_iter()
        .collect();
    let manifest = json!([{ "Config": config_name, "RepoTags": tags, "Layers": names }]);
    append_bytes(tar, "manifest.json", manifest.to_string().as_bytes()).map_err(failed)
}

fn append_bytes(tar: &mut Tar, name: &str, bytes: &[u8]) -> io::Result<()> {
    append(tar, name, bytes.len() as u64, bytes)
}

/// Same content, same archive: no times, no owners.
fn append(tar: &mut Tar, name: &str, size: u64, content: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    tar.append_data(&mut header, name, content)
}

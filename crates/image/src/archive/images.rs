//! Finds the images in an OCI layout or a docker archive.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use serde::Deserialize;

use super::source::{Source, Spooled};
use super::{Candidate, bad_archive, descriptor_digest, manifest_json, parse_manifest};
use crate::registry::{parse_index, select_platform};
use crate::store::MAX_LAYERS;
use crate::unpack::Compression;
use crate::{Digest, ImageError, Platform};

/// Images of one archive.
const MAX_IMAGES: usize = 256;
/// A complete name (containerd, docker, buildkit).
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// A tag, or a complete name (podman, skopeo).
const REF_NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// One element of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Newer docker archives are OCI layouts too; those keep the digests that
/// registries know, so they come first.
pub(super) fn find(source: &mut Source<'_>, path: &Path, platform: &Platform) -> Result<Vec<Candidate>, ImageError> {
    let docker = match source.document("manifest.json")? {
        Some(bytes) => serde_json::from_slice::<Vec<DockerImage>>(&bytes)
            .map_err(|error| bad_archive(path, format!("manifest.json: {error}")))?,
        None => Vec::new(),
    };
    if docker.len() > MAX_IMAGES {
        return Err(bad_archive(path, format!("more than {MAX_IMAGES} images")));
    }
    if let Some(bytes) = source.document("index.json")?
        && source.document("oci-layout")?.is_some()
    {
        return find_oci(source, path, &bytes, &docker, platform);
    }
    docker.iter().map(|image| docker_candidate(source, path, image)).collect()
}

fn find_oci(
    source: &mut Source<'_>,
    path: &Path,
    index: &[u8],
    docker: &[DockerImage],
    platform: &Platform,
) -> Result<Vec<Candidate>, ImageError> {
    let index: ImageIndex =
        serde_json::from_slice(index).map_err(|error| bad_archive(path, format!("index.json: {error}")))?;
    if index.manifests().len() > MAX_IMAGES {
        return Err(bad_archive(path, format!("more than {MAX_IMAGES} images")));
    }
    // Entries of one name are one image for several platforms.
    let mut by_name: BTreeMap<Vec<String>, Vec<Descriptor>> = BTreeMap::new();
    for entry in index.manifests() {
        by_name.entry(annotated_names(entry)).or_default().push(entry.clone());
    }
    let mut candidates = Vec::new();
    for (names, entries) in by_name {
        let chosen = match entries.as_slice() {
            [only] => only.clone(),
            several => match choose(path, several, platform)? {
                Some(chosen) => chosen,
                None => continue,
            },
        };
        if let Some(candidate) = oci_candidate(source, path, names, &chosen, docker, platform)? {
            candidates.push(candidate);
        }
    }
    Ok(candidates)
}

fn choose(path: &Path, entries: &[Descriptor], platform: &Platform) -> Result<Option<Descriptor>, ImageError> {
    let mut index = ImageIndex::default();
    index.set_manifests(entries.to_vec());
    match select_platform(&path.display(), &index, platform) {
        Ok(digest) => Ok(entries.iter().find(|entry| entry.digest().as_ref() == digest.as_str()).cloned()),
        // Perhaps one of them is an index of its own.
        Err(ImageError::PlatformUnavailable { .. }) => {
            Ok(entries.iter().find(|entry| *entry.media_type() == MediaType::ImageIndex).cloned())
        }
        Err(error) => Err(error),
    }
}

/// The image that an entry of `index.json` leads to, through an index of
/// platforms if there is one.
fn oci_candidate(
    source: &mut Source<'_>,
    path: &Path,
    mut names: Vec<String>,
    entry: &Descriptor,
    docker: &[DockerImage],
    platform: &Platform,
) -> Result<Option<Candidate>, ImageError> {
    let shown = path.display().to_string();
    let mut bytes = blob(source, path, &descriptor_digest(&shown, entry)?)?.read_document()?;
    if let Some(index) = parse_index(&shown, &bytes)? {
        let digest = select_platform(&shown, &index, platform)?;
        bytes = blob(source, path, &digest)?.read_document()?;
    }
    let manifest = parse_manifest(&shown, &bytes)?;
    // Attestations and other artifacts lie beside images.
    if !manifest.config().media_type().as_ref().contains("image") {
        return Ok(None);
    }
    let config_digest = descriptor_digest(&shown, manifest.config())?;
    let mut blobs = vec![blob(source, path, &config_digest)?];
    for layer in manifest.layers() {
        blobs.push(blob(source, path, &descriptor_digest(&shown, layer)?)?);
    }
    if names.is_empty() {
        let same_config = docker.iter().filter(|image| image.config.contains(config_digest.hex()));
        names = same_config.flat_map(|image| image.repo_tags.iter().flatten().cloned()).collect();
    }
    Ok(Some(Candidate { names, manifest: bytes, blobs }))
}

fn annotated_names(entry: &Descriptor) -> Vec<String> {
    let Some(annotations) = entry.annotations() else { return Vec::new() };
    let complete = annotations.get(NAME_ANNOTATION);
    // A bare tag says nothing about the repository.
    let reference = annotations.get(REF_NAME_ANNOTATION).filter(|name| name.contains(['/', ':']));
    complete.or(reference).into_iter().cloned().collect()
}

fn blob(source: &mut Source<'_>, path: &Path, digest: &Digest) -> Result<Arc<Spooled>, ImageError> {
    let file = source
        .file(&format!("blobs/sha256/{}", digest.hex()))?
        .ok_or_else(|| bad_archive(path, format!("it lacks the blob {digest}")))?;
    verify(path, &file, digest)?;
    Ok(file)
}

fn verify(path: &Path, file: &Spooled, expected: &Digest) -> Result<(), ImageError> {
    if file.digest == *expected {
        return Ok(());
    }
    Err(ImageError::DigestMismatch {
        what: format!("a blob of `{}`", path.display()),
        expected: expected.to_string(),
        actual: file.digest.to_string(),
    })
}

/// Docker's format has no manifest, so one is written; the layers are checked
/// against the configuration's diff ids when they are unpacked.
fn docker_candidate(source: &mut Source<'_>, path: &Path, image: &DockerImage) -> Result<Candidate, ImageError> {
    if image.layers.len() > MAX_LAYERS {
        return Err(bad_archive(path, format!("more than {MAX_LAYERS} layers")));
    }
    let missing = |name: &str| bad_archive(path, format!("it lacks `{name}`"));
    let config = source.file(&image.config)?.ok_or_else(|| missing(&image.config))?;
    let mut layers: Vec<(Arc<Spooled>, Compression)> = Vec::new();
    for name in &image.layers {
        let layer = source.file(name)?.ok_or_else(|| missing(name))?;
        let compression = layer.compression()?;
        layers.push((layer, compression));
    }
    let described: Vec<(&Spooled, Compression)> = layers.iter().map(|(layer, kind)| (layer.as_ref(), *kind)).collect();
    let manifest = manifest_json(&config, &described);
    let mut blobs = vec![config];
    blobs.extend(layers.into_iter().map(|(layer, _)| layer));
    Ok(Candidate { names: image.repo_tags.clone().unwrap_or_default(), manifest, blobs })
}

//! Builds layers and images in memory, honest ones and others.

use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use stacyvm_image::Digest;
use tar::{EntryType, Header};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// A tar stream under construction. Names are bytes and unchecked.
#[derive(Clone, Default)]
pub(crate) struct Layer {
    bytes: Vec<u8>,
}

/// Everything about an entry but its name.
#[derive(Clone)]
pub(crate) struct Entry<'a> {
    pub(crate) kind: EntryType,
    pub(crate) content: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) mtime: u64,
    pub(crate) xattrs: &'a [(&'a str, &'a [u8])],
}

impl Default for Entry<'_> {
    fn default() -> Self {
        Self { kind: EntryType::Regular, content: b"", link: b"", mode: 0o644, owner: (0, 0), mtime: 1000, xattrs: &[] }
    }
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name.as_bytes(), &Entry { content, ..Entry::default() })
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.entry(name.as_bytes(), &Entry { kind: EntryType::Directory, mode: 0o755, ..Entry::default() })
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        let entry = Entry { kind: EntryType::Symlink, link: target.as_bytes(), mode: 0o777, ..Entry::default() };
        self.entry(name.as_bytes(), &entry)
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        let entry = Entry { kind: EntryType::Link, link: target.as_bytes(), ..Entry::default() };
        self.entry(name.as_bytes(), &entry)
    }

    pub(crate) fn special(self, name: &str, kind: EntryType) -> Self {
        self.entry(name.as_bytes(), &Entry { kind, ..Entry::default() })
    }

    pub(crate) fn entry(mut self, name: &[u8], entry: &Entry<'_>) -> Self {
        let mut records = Vec::new();
        for (key, value) in entry.xattrs {
            records.extend(record(&format!("SCHILY.xattr.{key}"), value));
        }
        // What does not fit the old fields goes in front, as GNU tar does.
        if name.len() > 100 {
            records.extend(record("path", name));
        }
        if entry.link.len() > 100 {
            records.extend(record("linkpath", entry.link));
        }
        if !records.is_empty() {
            self = self.raw(EntryType::XHeader, b"pax", &records, &Entry::default());
        }
        self.raw(entry.kind, name, entry.content, entry)
    }

    /// One header and its content, without any help.
    pub(crate) fn raw(mut self, kind: EntryType, name: &[u8], content: &[u8], entry: &Entry<'_>) -> Self {
        let mut header = Header::new_ustar();
        let fields = header.as_old_mut();
        let shown = &name[..name.len().min(100)];
        fields.name[..shown.len()].copy_from_slice(shown);
        let link = &entry.link[..entry.link.len().min(100)];
        fields.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(entry.mtime);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn tar(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A layer as it travels: compressed bytes, and the digest of the plain ones.
#[derive(Clone)]
pub(crate) struct Blob {
    pub(crate) media_type: &'static str,
    pub(crate) bytes: Vec<u8>,
    pub(crate) diff_id: Digest,
}

impl Blob {
    pub(crate) fn plain(layer: &Layer) -> Self {
        let bytes = layer.tar();
        Self { media_type: "application/vnd.oci.image.layer.v1.tar", diff_id: Digest::of(&bytes), bytes }
    }

    pub(crate) fn gzip(layer: &Layer) -> Self {
        let plain = layer.tar();
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Self { media_type, bytes: gzip(&plain), diff_id: Digest::of(&plain) }
    }

    pub(crate) fn zstd(layer: &Layer) -> Self {
        let plain = layer.tar();
        let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
        Self { media_type, bytes: zstd(&plain), diff_id: Digest::of(&plain) }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }
}

/// A whole image: documents and layers.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Blob>,
}

impl TestImage {
    pub(crate) fn new(layers: Vec<Blob>) -> Self {
        let run = json!({ "Env": ["PATH=/bin", "GREETING=hello"], "Cmd": ["/bin/sh"] });
        Self::for_architecture(layers, &run, &host_architecture())
    }

    pub(crate) fn for_architecture(layers: Vec<Blob>, run: &Value, architecture: &str) -> Self {
        let config = json!({
            "created": "2024-05-06T07:08:09Z",
            "architecture": architecture,
            "os": "linux",
            "config": run,
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>() },
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": Digest::of(&config), "size": config.len() },
            "layers": layers.iter().map(|layer| json!({
                "mediaType": layer.media_type, "digest": layer.digest(), "size": layer.bytes.len(),
            })).collect::<Vec<_>>(),
        });
        Self { manifest: manifest.to_string().into_bytes(), config, layers }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// As an OCI layout of the given name.
    pub(crate) fn oci_layout(&self, name: Option<&str>) -> Layer {
        let annotations = name.map(|name| json!({ "org.opencontainers.image.ref.name": name }));
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": OCI_MANIFEST, "digest": self.digest(), "size": self.manifest.len(),
            "annotations": annotations.unwrap_or_else(|| json!({})),
        }]});
        let mut archive = Layer::new()
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .file("index.json", index.to_string().as_bytes());
        for content in [&self.manifest, &self.config].into_iter().chain(self.layers.iter().map(|layer| &layer.bytes)) {
            archive = archive.file(&format!("blobs/sha256/{}", Digest::of(content).hex()), content);
        }
        archive
    }

    /// As `docker save` of old wrote it.
    pub(crate) fn docker_archive(&self, names: &[&str]) -> Layer {
        let config_name = format!("{}.json", Digest::of(&self.config).hex());
        let layer_names: Vec<String> = (0..self.layers.len()).map(|index| format!("layer{index}/layer.tar")).collect();
        let mut archive = Layer::new();
        for (name, layer) in layer_names.iter().zip(&self.layers) {
            archive = archive.file(name, &layer.bytes);
        }
        let manifest = json!([{ "Config": config_name, "RepoTags": names, "Layers": layer_names }]);
        archive.file(&config_name, &self.config).file("manifest.json", manifest.to_string().as_bytes())
    }
}

pub(crate) fn host_architecture() -> String {
    match std::env::consts::ARCH {
        "x86_64" => "amd64".into(),
        "aarch64" => "arm64".into(),
        other => other.into(),
    }
}

/// A layer with a working shell.
pub(crate) fn busybox_layer() -> Layer {
    let busybox = std::fs::read("/bin/busybox")
        .unwrap_or_else(|error| panic!("/bin/busybox: {error}; install busybox-static (scripts/test-packages.txt)"));
    let program = Entry { content: &busybox, mode: 0o755, ..Entry::default() };
    Layer::new()
        .directory("bin/")
        .entry(b"bin/busybox", &program)
        .symlink("bin/sh", "busybox")
        .symlink("bin/cat", "busybox")
        .directory("etc/")
        .file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
}

/// A small image, different for each `mark`.
pub(crate) fn small_image(mark: &str) -> TestImage {
    TestImage::new(vec![Blob::gzip(&Layer::new().file("mark", mark.as_bytes()))])
}

pub(crate) fn write_archive(directory: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

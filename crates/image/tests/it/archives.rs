//! Import and export.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stacyvm_image::{Digest, ExportFormat, Image, ImageError, ImportOptions};
use tempfile::TempDir;

use crate::build::{Blob, Layer, TestImage, busybox_layer, gzip, small_image, write_archive, zstd};
use crate::support::{Recorded, TestStore, entries};

async fn import(store: &TestStore, path: &Path, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
    store.store.import(path, ImportOptions { name: name.map(str::to_owned) }, &()).await
}

fn two_layers() -> TestImage {
    let base = Blob::plain(&busybox_layer());
    let upper = Blob::gzip(&Layer::new().file("etc/greeting", b"hello").file("etc/.wh.passwd", b""));
    TestImage::new(vec![base, upper])
}

#[track_caller]
fn assert_two_layers(image: &Image) {
    assert_eq!(image.layers.len(), 2);
    assert_eq!(fs::read(image.layers[1].join("etc/greeting")).unwrap(), b"hello");
    assert!(image.layers[0].join("bin/busybox").exists());
    assert_eq!(image.config.env[1], ("GREETING".to_owned(), "hello".to_owned()));
    assert_eq!(image.config.cmd, vec!["/bin/sh"]);
}

#[tokio::test]
async fn a_docker_archive_comes_in_under_its_names() {
    let store = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    let archive = two_layers().docker_archive(&["tool:1", "registry.example/team/tool:2"]).tar();
    for (name, bytes) in [("a.tar", archive.clone()), ("a.tar.gz", gzip(&archive)), ("a.tar.zst", zstd(&archive))] {
        let images = import(&store, &write_archive(directory.path(), name, &bytes), None).await.unwrap();
        let names: Vec<&str> = images.iter().map(|image| image.reference.as_str()).collect();
        assert_eq!(names, ["docker.io/library/tool:1", "registry.example/team/tool:2"]);
        images.iter().for_each(assert_two_layers);
    }
    let listed = store.store.list().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].reference, "docker.io/library/tool:1");
    assert_eq!(listed[0].layers, 2);
    assert_eq!(listed[0].created.as_deref(), Some("2024-05-06T07:08:09Z"));
    assert!(listed[0].size_bytes > 500_000, "{listed:?}");
    assert_two_layers(&store.store.get("tool:1", &()).await.unwrap());
}

#[tokio::test]
async fn an_oci_layout_comes_in_as_tar_and_as_directory() {
    let image = two_layers();
    let directory = TempDir::new().unwrap();
    let layout = image.oci_layout(Some("tool:oci")).tar();
    let tar = write_archive(directory.path(), "layout.tar", &layout);
    let unpacked = directory.path().join("layout");
    fs::create_dir(&unpacked).unwrap();
    assert!(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&unpacked).status().unwrap().success());
    for path in [tar, unpacked] {
        let store = TestStore::open().await;
        let images = import(&store, &path, None).await.unwrap();
        assert_eq!(images[0].reference, "docker.io/library/tool:oci");
        assert_eq!(images[0].digest, image.digest().as_str());
        assert_two_layers(&images[0]);
        // A name given wins over what the archive says.
        let renamed = import(&store, &path, Some("other:name")).await.unwrap();
        assert_eq!(renamed[0].reference, "docker.io/library/other:name");
    }
}

#[tokio::test]
async fn a_root_file_system_becomes_an_image_of_one_layer() {
    let store = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    // Files that look like an archive's own must not confuse anybody.
    let rootfs = busybox_layer().file("manifest.json", b"{\"name\":\"web app\"}").tar();
    let path = write_archive(directory.path(), "root.tar.gz", &gzip(&rootfs));
    let images = import(&store, &path, Some("mine:1")).await.unwrap();
    assert_eq!(images[0].layers.len(), 1);
    assert_eq!(fs::read(images[0].layers[0].join("manifest.json")).unwrap(), b"{\"name\":\"web app\"}");
    assert_eq!(images[0].config.cmd, vec!["/bin/sh"]);
    assert_eq!(images[0].config.env[0].0, "PATH");
    let again = import(&store, &path, Some("mine:2")).await.unwrap();
    assert_eq!(again[0].digest, images[0].digest);
    let refused = import(&store, &path, None).await.unwrap_err();
    assert!(matches!(&refused, ImageError::BadArchive { reason, .. } if reason.contains("name")), "{refused}");
}

#[tokio::test]
async fn the_test_image_script_makes_an_image() {
    let store = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../scripts/make-test-image.sh");
    let path = directory.path().join("alpine.tar");
    assert!(Command::new(script).arg(&path).status().unwrap().success());
    let images = import(&store, &path, None).await.unwrap();
    assert_eq!(images[0].reference, "docker.io/library/alpine:latest");
    assert_eq!(fs::read_link(images[0].layers[0].join("bin/sleep")).unwrap(), Path::new("busybox"));
    assert!(fs::read_to_string(images[0].layers[0].join("etc/passwd")).unwrap().contains("user:x:1000"));
}

#[tokio::test]
async fn exports_come_back_the_same() {
    let first = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    let archive = write_archive(directory.path(), "in.tar", &two_layers().oci_layout(Some("tool:1")).tar());
    let imported = import(&first, &archive, None).await.unwrap().remove(0);
    for format in [ExportFormat::Oci, ExportFormat::Docker] {
        let out = directory.path().join("out.tar");
        first.store.export("tool:1", &out, format).await.unwrap();
        let second = TestStore::open().await;
        let back = import(&second, &out, None).await.unwrap().remove(0);
        assert_eq!(back.reference, imported.reference);
        assert_eq!(back.config, imported.config);
        assert_two_layers(&back);
        let layers = |image: &Image| {
            image.layers.iter().map(|path| path.parent().unwrap().file_name().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(layers(&back), layers(&imported));
        match format {
            ExportFormat::Oci => assert_eq!(back.digest, imported.digest),
            // Docker's format has no manifest to keep.
            ExportFormat::Docker => assert_ne!(back.digest, imported.digest),
        }
    }
    assert_eq!(entries(directory.path()), ["in.tar", "out.tar"]);
    let missing = first.store.export("nothing:here", &directory.path().join("x"), ExportFormat::Oci).await;
    assert!(matches!(missing, Err(ImageError::NotStored { .. })));
}

#[tokio::test]
async fn archives_that_lie_are_refused_and_leave_nothing() {
    let image = small_image("honest");
    let config_name = format!("blobs/sha256/{}", Digest::of(&image.config).hex());
    let layer_name = format!("blobs/sha256/{}", image.layers[0].digest().hex());
    let directory = TempDir::new().unwrap();
    let mut wrong_diff_id = small_image("a");
    wrong_diff_id.layers = vec![Blob { diff_id: Digest::of(b"else"), ..wrong_diff_id.layers.remove(0) }];
    let wrong_diff_id = TestImage::new(wrong_diff_id.layers);
    let whole = image.oci_layout(Some("x:1")).tar();
    // Two blocks of zeros end it, after at least one of the last file.
    let cut_in_last_file = whole[..whole.len() - 1535].to_vec();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        // A later file of the same name replaces the honest one.
        ("configuration", image.oci_layout(Some("x:1")).file(&config_name, b"{}").tar()),
        ("layer", image.oci_layout(Some("x:1")).file(&layer_name, b"other").tar()),
        ("diff id", wrong_diff_id.oci_layout(Some("x:1")).tar()),
        ("docker diff id", wrong_diff_id.docker_archive(&["x:1"]).tar()),
        ("no layer", Layer::new().file("manifest.json", br#"[{"Config":"c","RepoTags":["x"],"Layers":["l"]}]"#).tar()),
        ("bad name", image.oci_layout(Some("UPPER:1")).tar()),
        ("no name", image.oci_layout(None).tar()),
        ("cut", image.oci_layout(Some("x:1")).tar()[..3000].to_vec()),
        ("cut in its last file", cut_in_last_file),
        ("not a tar", b"hello world".repeat(100)),
        ("empty", Vec::new()),
        ("xz", b"\xfd7zXZ\0 and so on".to_vec()),
    ];
    let store = TestStore::open().await;
    for (what, bytes) in cases {
        let path = write_archive(directory.path(), "case.tar", &bytes);
        let error = import(&store, &path, None).await.expect_err(what);
        let is_typed = matches!(
            error,
            ImageError::BadArchive { .. }
                | ImageError::DigestMismatch { .. }
                | ImageError::InvalidReference { .. }
                | ImageError::Unsupported { .. }
        );
        assert!(is_typed, "{what}: {error:?}");
    }
    assert!(store.store.list().await.unwrap().is_empty());
    store.store.collect_garbage().await.unwrap();
    assert!(entries(&store.root().join("layers")).is_empty());
    assert!(entries(&store.root().join("blobs/sha256")).is_empty());
    let session = &entries(&store.root().join("tmp"))[0];
    assert_eq!(entries(&store.root().join("tmp").join(session)), ["lock"]);
}

#[tokio::test]
async fn old_docker_archives_link_their_layers() {
    let store = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    let blob = Blob::plain(&Layer::new().file("a", b"a"));
    let image = TestImage::new(vec![blob.clone(), blob.clone()]);
    let config = format!("{}.json", Digest::of(&image.config).hex());
    let manifest =
        format!(r#"[{{"Config":"{config}","RepoTags":["twice:1"],"Layers":["one/layer.tar","two/layer.tar"]}}]"#);
    let archive = Layer::new()
        .file("one/layer.tar", &blob.bytes)
        .symlink("two/layer.tar", "../one/layer.tar")
        .file(&config, &image.config)
        .file("manifest.json", manifest.as_bytes());
    let images = import(&store, &write_archive(directory.path(), "old.tar", &archive.tar()), None).await.unwrap();
    assert_eq!(images[0].layers.len(), 2);
    assert_eq!(images[0].layers[0], images[0].layers[1]);
}

#[tokio::test]
async fn imports_report_progress() {
    let store = TestStore::open().await;
    let directory = TempDir::new().unwrap();
    let path = write_archive(directory.path(), "a.tar", &two_layers().docker_archive(&["tool:1"]).tar());
    let progress = Recorded::default();
    store.store.import(&path, ImportOptions::default(), &progress).await.unwrap();
    let all = progress.all();
    let last = all.last().expect("some progress");
    assert_eq!(last.phase, "unpack");
    assert!(last.message.contains("tool:1"), "{last:?}");
    assert!(last.total_bytes > 0);
}

//! Handles, leases, collection, and processes that die.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use stacyvm_image::{Digest, Image, ImageError, ImageStore, ImageStoreOptions, ImportOptions};
use tempfile::TempDir;

use crate::build::{Blob, Layer, TestImage, small_image, write_archive};
use crate::registry::RealRegistry;
use crate::support::{TestStore, entries};

async fn import(store: &ImageStore, name: &str, image: &TestImage) -> Image {
    let directory = TempDir::new().unwrap();
    let path = write_archive(directory.path(), "image.tar", &image.oci_layout(Some(name)).tar());
    store.import(&path, ImportOptions::default(), &()).await.unwrap().remove(0)
}

/// An image of about `kib` kilobytes that shares nothing with others.
fn image_of(mark: &str, kib: usize) -> TestImage {
    TestImage::new(vec![Blob::plain(&Layer::new().file("data", &mark.as_bytes().repeat(kib * 1024 / mark.len())))])
}

fn names(listed: &[stacyvm_image::ImageSummary]) -> Vec<&str> {
    listed.iter().map(|image| image.reference.trim_start_matches("docker.io/library/")).collect()
}

#[tokio::test]
async fn removing_frees_what_nobody_else_needs() {
    let store = TestStore::open().await;
    let shared = Blob::plain(&Layer::new().file("shared", b"s"));
    let own = |mark: &str| Blob::plain(&Layer::new().file("own", mark.as_bytes()));
    drop(import(&store.store, "a:1", &TestImage::new(vec![shared.clone(), own("a")])).await);
    drop(import(&store.store, "b:1", &TestImage::new(vec![shared.clone(), own("b")])).await);
    store.store.remove("a:1").await.unwrap();
    let expected = {
        let mut expected = vec![shared.diff_id.hex().to_owned(), own("b").diff_id.hex().to_owned()];
        expected.sort();
        expected
    };
    assert_eq!(entries(&store.root().join("layers")), expected);
    assert!(matches!(store.store.remove("a:1").await, Err(ImageError::NotStored { .. })));
    store.store.remove("b:1").await.unwrap();
    assert!(entries(&store.root().join("layers")).is_empty());
    assert!(entries(&store.root().join("blobs/sha256")).is_empty());
}

#[tokio::test]
async fn a_handle_keeps_its_layers_also_against_other_processes() {
    let store = TestStore::open().await;
    let other = store.open_again().await;
    let image = import(&store.store, "a:1", &small_image("held")).await;
    other.remove("a:1").await.unwrap();
    other.collect_garbage().await.unwrap();
    store.store.collect_garbage().await.unwrap();
    assert_eq!(fs::read(image.layers[0].join("mark")).unwrap(), b"held");
    let copy = image.clone();
    drop(image);
    other.collect_garbage().await.unwrap();
    assert!(copy.layers[0].exists());
    let path = copy.layers[0].clone();
    drop(copy);
    other.collect_garbage().await.unwrap();
    assert!(!path.exists());
}

/// What is remembered of an image is not trusted over what is on the disk.
#[tokio::test]
async fn an_image_that_is_known_is_looked_for_again() {
    let store = TestStore::open().await;
    let image = import(&store.store, "a:1", &small_image("first")).await;
    let (layer, digest) = (image.layers[0].clone(), image.digest.clone());
    drop(image);
    fs::remove_dir_all(layer.parent().unwrap()).unwrap();
    let again = store.store.get("a:1", &()).await.unwrap();
    assert_eq!((&again.layers[0], &again.digest), (&layer, &digest));
    assert_eq!(fs::read(layer.join("mark")).unwrap(), b"first");
    drop(again);
    // Whoever else uses the store may let the name mean something else.
    drop(import(&store.open_again().await, "a:1", &small_image("second")).await);
    let other = store.store.get("a:1", &()).await.unwrap();
    assert_eq!(fs::read(other.layers[0].join("mark")).unwrap(), b"second");
    store.open_again().await.remove("a:1").await.unwrap();
    drop(other);
    let gone = store.store.get("a:1", &()).await.unwrap_err();
    assert!(!matches!(gone, ImageError::Storage { .. }), "{gone:?}");
}

#[tokio::test]
async fn a_lease_keeps_layers_when_no_process_does() {
    let store = TestStore::open().await;
    let image = import(&store.store, "a:1", &small_image("leased")).await;
    store.store.lease("sb-1", &image).await.unwrap();
    store.store.lease("sb-2", &image).await.unwrap();
    let path = image.layers[0].clone();
    let digest = image.digest.clone();
    drop(image);
    store.store.remove("a:1").await.unwrap();
    // As after a restart.
    let later = store.open_again().await;
    later.collect_garbage().await.unwrap();
    assert!(path.exists());
    let leases = later.leases().await.unwrap();
    assert_eq!(leases.iter().map(|lease| lease.owner.as_str()).collect::<Vec<_>>(), ["sb-1", "sb-2"]);
    assert_eq!(leases[0].manifest.as_str(), digest);
    later.release("sb-1").await.unwrap();
    later.release("sb-1").await.unwrap();
    later.collect_garbage().await.unwrap();
    assert!(path.exists());
    later.release("sb-2").await.unwrap();
    later.collect_garbage().await.unwrap();
    assert!(!path.exists());
    let image = import(&later, "b:1", &small_image("x")).await;
    for owner in ["", "../x", ".hidden", "a/b", &"x".repeat(200)] {
        assert!(later.lease(owner, &image).await.is_err(), "{owner:?}");
    }
}

#[tokio::test]
async fn the_least_recently_used_images_make_room() {
    let store = TestStore::open_with(|options| options.max_bytes = 1_000_000).await;
    for name in ["a:1", "b:1", "c:1"] {
        drop(import(&store.store, name, &image_of(name, 100)).await);
    }
    // Each takes 200 KB, blob and layer; `a` was used last, `b` is in use.
    drop(store.store.get("a:1", &()).await.unwrap());
    let held = store.store.get("b:1", &()).await.unwrap();
    drop(import(&store.store, "d:1", &image_of("d", 100)).await);
    drop(store.store.get("a:1", &()).await.unwrap());
    drop(import(&store.store, "e:1", &image_of("e", 200)).await);
    let report = store.store.collect_garbage().await.unwrap();
    assert!(report.remaining_bytes <= 1_000_000, "{report:?}");
    let listed = store.store.list().await.unwrap();
    let left = names(&listed);
    assert!(left.contains(&"b:1"), "in use: {left:?}");
    assert!(left.contains(&"e:1"), "newest: {left:?}");
    assert!(!left.contains(&"c:1"), "oldest: {left:?}");
    assert!(held.layers[0].exists());
    for image in &listed {
        assert!(store.store.get(&image.reference, &()).await.unwrap().layers[0].join("data").exists());
    }
}

#[tokio::test]
async fn interrupted_downloads_are_kept_for_a_day_unless_room_is_short() {
    let store = TestStore::open().await;
    let partial = |mark: &str, age: Duration| {
        let path = store.root().join("partial").join(Digest::of(mark.as_bytes()).hex());
        fs::write(&path, mark).unwrap();
        fs::File::open(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
        path
    };
    let (fresh, old) = (partial("fresh", Duration::ZERO), partial("old", Duration::from_hours(25)));
    store.store.collect_garbage().await.unwrap();
    assert!(fresh.exists() && !old.exists());
    let mut options = ImageStoreOptions::new(store.root());
    options.max_bytes = 1;
    ImageStore::open(options).await.unwrap().collect_garbage().await.unwrap();
    assert!(!fresh.exists());
}

#[tokio::test]
async fn an_image_larger_than_the_store_is_refused() {
    let store = TestStore::open_with(|options| options.max_bytes = 50_000).await;
    let directory = TempDir::new().unwrap();
    // Small to download, large to unpack.
    let bomb = TestImage::new(vec![Blob::gzip(&Layer::new().file("zeros", &vec![0; 1_000_000]))]);
    let path = write_archive(directory.path(), "bomb.tar", &bomb.oci_layout(Some("bomb:1")).tar());
    let error = store.store.import(&path, ImportOptions::default(), &()).await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { limit: 50_000, .. }), "{error:?}");
    assert!(entries(&store.root().join("layers")).is_empty());
}

#[tokio::test]
async fn a_layer_that_a_power_failure_may_have_hurt_is_made_again() {
    let store = TestStore::open().await;
    let image = small_image("boots");
    drop(import(&store.store, "a:1", &image).await);
    let layer = store.root().join("layers").join(image.layers[0].diff_id.hex());
    let record = layer.join("layer.json");
    // The store syncs in the background and would write over the damage.
    is_synced(&record).await;
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["unsynced_in_boot"] = "another-boot".into();
    fs::write(&record, json.to_string()).unwrap();
    fs::write(layer.join("fs/mark"), "").unwrap();
    let reopened = store.open_again().await;
    let image = reopened.get("a:1", &()).await.unwrap();
    assert_eq!(fs::read(image.layers[0].join("mark")).unwrap(), b"boots");
}

#[tokio::test]
async fn stored_layers_become_durable_in_the_background() {
    let store = TestStore::open().await;
    let image = small_image("durable");
    drop(import(&store.store, "a:1", &image).await);
    let record = store.root().join("layers").join(image.layers[0].diff_id.hex()).join("layer.json");
    is_synced(&record).await;
}

async fn is_synced(record: &Path) {
    crate::support::eventually("the layer is synced", || {
        !fs::read_to_string(record).unwrap().contains("unsynced_in_boot")
    })
    .await;
}

#[tokio::test]
async fn the_store_is_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let store = TestStore::open().await;
    assert_eq!(fs::metadata(store.root()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn an_index_of_a_newer_version_is_left_alone() {
    let store = TestStore::open().await;
    drop(import(&store.store, "a:1", &small_image("x")).await);
    let index = store.root().join("index.json");
    let newer = fs::read_to_string(&index).unwrap().replace("\"version\": 1", "\"version\": 99");
    fs::write(&index, &newer).unwrap();
    let later = store.open_again().await;
    assert!(matches!(later.get("a:1", &()).await, Err(ImageError::Storage { .. })));
    assert!(matches!(later.remove("a:1").await, Err(ImageError::Storage { .. })));
    assert_eq!(fs::read_to_string(&index).unwrap(), newer);
}

/// What the killed child does: imports and pulls until it is killed.
const CHILD_STORE: &str = "STACYVM_TEST_CHILD_STORE";
const CHILD_REGISTRY: &str = "STACYVM_TEST_CHILD_REGISTRY";
const CHILD_IMAGES: usize = 8;

fn child_image(index: usize) -> TestImage {
    let mut layer = Layer::new();
    for file in 0..200 {
        layer = layer.file(&format!("d{file}/f"), format!("{index}-{file}").repeat(200).as_bytes());
    }
    TestImage::new(vec![Blob::gzip(&layer), Blob::plain(&Layer::new().file("mark", index.to_string().as_bytes()))])
}

/// Not a test by itself: the body of the process that the next test kills.
#[tokio::test]
async fn killed_child() {
    let (Ok(root), Ok(registry)) = (std::env::var(CHILD_STORE), std::env::var(CHILD_REGISTRY)) else { return };
    let store = ImageStore::open(ImageStoreOptions::new(root)).await.unwrap();
    println!("child ready");
    loop {
        for index in 0..CHILD_IMAGES {
            if index % 2 == 0 {
                drop(store.pull(&format!("{registry}/kill:{index}"), &()).await.unwrap());
            } else {
                drop(import(&store, &format!("kill:{index}"), &child_image(index)).await);
            }
        }
        for image in store.list().await.unwrap() {
            store.remove(&image.reference).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_process_killed_at_any_point_leaves_a_sound_store() {
    const ROUNDS: u32 = 12;
    let registry = RealRegistry::start();
    for index in (0..CHILD_IMAGES).step_by(2) {
        registry.push("kill", &index.to_string(), &child_image(index)).await;
    }
    let store = TestStore::open().await;
    let mut seen = 0;
    for round in 0..ROUNDS {
        kill_child_after(&store.root(), &registry.host, round * 37);
        let survivor = store.open_again().await;
        for image in survivor.list().await.unwrap() {
            seen += 1;
            let index: usize = image.reference.rsplit(':').next().unwrap().parse().unwrap();
            let image = survivor.get(&image.reference, &()).await.unwrap();
            assert_sound(&image, index);
        }
        survivor.collect_garbage().await.unwrap();
        assert_eq!(entries(&store.root().join("tmp")).len(), 2, "only the two live sessions");
        check_blobs(&store.root());
        for index in [0, 1] {
            let image = match index % 2 {
                0 => survivor.get(&format!("{}/kill:{index}", registry.host), &()).await.unwrap(),
                _ => import(&survivor, &format!("kill:{index}"), &child_image(index)).await,
            };
            assert_sound(&image, index);
        }
    }
    assert!(seen > 0, "the child never got anything done");
}

#[track_caller]
fn assert_sound(image: &Image, index: usize) {
    assert_eq!(fs::read(image.layers[1].join("mark")).unwrap(), index.to_string().as_bytes());
    for file in 0..200 {
        let content = fs::read(image.layers[0].join(format!("d{file}/f"))).unwrap();
        assert_eq!(content, format!("{index}-{file}").repeat(200).as_bytes());
    }
}

fn check_blobs(root: &Path) {
    let blobs = root.join("blobs/sha256");
    for name in entries(&blobs) {
        assert_eq!(Digest::of(&fs::read(blobs.join(&name)).unwrap()).hex(), name);
    }
}

/// Runs the child, lets it work for about `delay_ms`, and kills it hard.
fn kill_child_after(root: &Path, registry: &str, delay_ms: u32) {
    let program: PathBuf = std::env::current_exe().unwrap();
    let mut child = Command::new(program)
        .args(["--exact", "store::killed_child", "--nocapture"])
        .env(CHILD_STORE, root)
        .env(CHILD_REGISTRY, registry)
        // What it leaves behind goes with the store.
        .env("TMPDIR", root.parent().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("child ready")), "the child could not start");
    // Any moment is as good as another; this one only varies.
    std::thread::sleep(Duration::from_millis(delay_ms.into()));
    child.kill().unwrap();
    child.wait().unwrap();
}

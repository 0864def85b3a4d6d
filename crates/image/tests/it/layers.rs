//! Unpacking: what honest layers mean, and what hostile ones try.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use stacyvm_image::{Image, ImageError, ImageStore, ImageStoreOptions, ImportOptions, LayerForm, UnpackLimits};
use tar::EntryType;
use tempfile::TempDir;

use crate::build::{Blob, Entry, Layer, TestImage, busybox_layer, gzip, write_archive};
use crate::support::{TestStore, entries, require_root};

async fn unpack(store: &ImageStore, layers: Vec<Layer>) -> Result<Image, ImageError> {
    let image = TestImage::new(layers.iter().map(Blob::plain).collect());
    let directory = TempDir::new().unwrap();
    let path = write_archive(directory.path(), "image.tar", &image.oci_layout(Some("layers:1")).tar());
    store.import(&path, ImportOptions::default(), &()).await.map(|mut images| images.remove(0))
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    let length = rustix::fs::lgetxattr(path, name, buffer.as_mut_slice()).ok()?;
    buffer.truncate(length);
    Some(buffer)
}

/// The whole stack as overlayfs shows it: `path kind content` per line.
fn merged_view(image: &Image) -> Vec<String> {
    let scratch = TempDir::new().unwrap();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(scratch.path().join(name)).unwrap();
    }
    let lower: Vec<String> = image.layers.iter().rev().map(|layer| layer.display().to_string()).collect();
    let script = "mount -t overlay overlay -o \"lowerdir=$1,upperdir=$2/upper,workdir=$2/work\" \"$2/merged\" && \
                  cd \"$2/merged\" && find . -mindepth 1 | sort | while read -r p; do \
                  if [ -d \"$p\" ]; then echo \"$p/\"; else echo \"$p=$(cat \"$p\")\"; fi; done";
    // The mount lives and ends with this namespace.
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh", &lower.join(":")])
        .arg(scratch.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim_start_matches("./").to_owned()).collect()
}

#[tokio::test]
async fn metadata_is_kept() {
    require_root();
    let store = TestStore::open().await;
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let setuid = Entry { mode: 0o4755, owner: (7, 8), mtime: 123_456_789, content: b"x", ..Entry::default() };
    let xattrs: &[(&str, &[u8])] = &[
        ("user.note", b"line\nbreak"),
        ("user.overlay.opaque", b"y"),
        ("trusted.overlay.opaque", b"y"),
        ("trusted.evil", b"1"),
        ("security.selinux", b"1"),
        ("security.capability", capability),
    ];
    let with_xattrs = Entry { xattrs, ..Entry::default() };
    let read_only =
        Entry { kind: EntryType::Directory, mode: 0o555, owner: (1000, 1000), mtime: 5, ..Entry::default() };
    let owned_link = Entry { kind: EntryType::Symlink, link: b"../gone", owner: (70_000, 70_001), ..Entry::default() };
    let layer = Layer::new()
        .entry(b"read-only", &read_only)
        .file("read-only/inside", b"i")
        .entry(b"setuid", &setuid)
        .entry(b"attributes", &with_xattrs)
        .entry(b"link", &owned_link)
        .entry(b"pipe", &Entry { kind: EntryType::Fifo, mode: 0o620, owner: (9, 9), ..Entry::default() })
        .hard_link("twin", "setuid")
        .hard_link("link-twin", "link")
        .special("disk", EntryType::Block)
        .special("null", EntryType::Char)
        .entry(b"caf\xe9/\xff", &Entry { content: b"bytes", ..Entry::default() })
        .file(&long, b"long");
    let image = unpack(&store.store, vec![layer]).await.unwrap();
    let root = &image.layers[0];
    let meta = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
    assert_eq!((meta("setuid").uid(), meta("setuid").gid()), (7, 8));
    assert_eq!(meta("setuid").permissions().mode() & 0o7777, 0o4755);
    assert_eq!(meta("setuid").mtime(), 123_456_789);
    assert_eq!(meta("setuid").ino(), meta("twin").ino());
    assert_eq!((meta("read-only").uid(), meta("read-only").mtime()), (1000, 5));
    assert_eq!(meta("read-only").permissions().mode() & 0o7777, 0o555);
    assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("../gone"));
    assert_eq!((meta("link").uid(), meta("link").gid()), (70_000, 70_001));
    assert_eq!(meta("link").ino(), meta("link-twin").ino());
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!((meta("pipe").uid(), meta("pipe").permissions().mode() & 0o7777), (9, 0o620));
    assert_eq!(fs::read(root.join(OsStr::from_bytes(b"caf\xe9/\xff"))).unwrap(), b"bytes");
    assert_eq!(fs::read(root.join(&long)).unwrap(), b"long");
    let attributes = root.join("attributes");
    assert_eq!(xattr(&attributes, "user.note").as_deref(), Some(b"line\nbreak".as_slice()));
    assert_eq!(xattr(&attributes, "security.capability").as_deref(), Some(capability));
    for dropped in ["user.overlay.opaque", "trusted.overlay.opaque", "trusted.evil", "security.selinux"] {
        assert_eq!(xattr(&attributes, dropped), None, "{dropped}");
    }
    assert!(!root.join("disk").exists() && !root.join("null").exists());
    assert_eq!(image.notes.devices_skipped, 2);
    assert_eq!(image.notes.xattrs_dropped, 4);
    assert_eq!(image.form, LayerForm::Root);
}

#[tokio::test]
async fn whiteouts_hide_what_lies_below() {
    require_root();
    let store = TestStore::open().await;
    let bottom = Layer::new()
        .file("keep", b"1")
        .file("gone", b"1")
        .file("dir/gone", b"1")
        .file("dir/keep", b"1")
        .file("opaque/old", b"1")
        .file("replaced/old", b"1")
        .file("late/old", b"1")
        .file("to-file/old", b"1");
    let top = Layer::new()
        .file(".wh.gone", b"")
        .file("dir/.wh.gone", b"")
        .file("dir/.wh.never-was", b"")
        .file("opaque/new", b"2")
        .file("opaque/.wh..wh..opq", b"")
        // Whiteout first, then the same name again: new content only.
        .file(".wh.replaced", b"")
        .file("replaced/new", b"2")
        // And the other way round.
        .file("late/new", b"2")
        .file(".wh.late", b"")
        .file("to-file", b"2")
        .file(".wh..wh.plnk", b"aufs")
        .file("added", b"2");
    let image = unpack(&store.store, vec![bottom, top]).await.unwrap();
    assert_eq!(
        merged_view(&image),
        [
            "added=2",
            "dir/",
            "dir/keep=1",
            "keep=1",
            "late/",
            "late/new=2",
            "opaque/",
            "opaque/new=2",
            "replaced/",
            "replaced/new=2",
            "to-file=2",
        ]
    );
    let whiteout = fs::symlink_metadata(image.layers[1].join("gone")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    assert_eq!(whiteout.rdev(), 0);
    assert_eq!(xattr(&image.layers[1].join("opaque"), "trusted.overlay.opaque").as_deref(), Some(b"y".as_slice()));
}

#[tokio::test]
async fn later_entries_win() {
    let store = TestStore::open().await;
    let layer = Layer::new()
        .file("twice", b"first")
        .file("twice", b"second")
        .file("dir-to-file/a/b", b"x")
        .file("dir-to-file", b"file")
        .file("file-to-dir", b"file")
        .file("linked", b"original")
        .hard_link("other-name", "linked")
        .file("linked", b"changed")
        .symlink("link-to-dir", "nowhere")
        .directory("link-to-dir")
        .file("link-to-dir/inside", b"i")
        .directory("file-to-dir")
        .directory("mode")
        .entry(b"mode", &Entry { kind: EntryType::Directory, mode: 0o700, ..Entry::default() });
    let image = unpack(&store.store, vec![layer]).await.unwrap();
    let root = &image.layers[0];
    let read = |name: &str| fs::read(root.join(name)).unwrap();
    assert_eq!(read("twice"), b"second");
    assert_eq!(read("dir-to-file"), b"file");
    // A hard link is not written through.
    assert_eq!((read("linked"), read("other-name")), (b"changed".to_vec(), b"original".to_vec()));
    assert_eq!(read("link-to-dir/inside"), b"i");
    assert!(root.join("file-to-dir").is_dir());
    assert_eq!(fs::metadata(root.join("mode")).unwrap().permissions().mode() & 0o777, 0o700);
}

/// Somewhere a layer must not reach, with a file to spoil.
fn outside() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("secret"), "untouched").unwrap();
    let path = directory.path().to_owned();
    (directory, path)
}

#[tokio::test]
async fn nothing_leads_out_of_the_layer() {
    let (_guard, outside) = outside();
    let target = outside.to_str().unwrap();
    let secret = format!("{target}/secret");
    let deep_out = format!("{}{}", "../".repeat(40), secret.trim_start_matches('/'));
    let cases: Vec<(&str, Layer)> = vec![
        ("dot-dot", Layer::new().file(&deep_out, b"evil")),
        ("dot-dot inside", Layer::new().file("a/../../x", b"evil")),
        ("symlink parent", Layer::new().symlink("d", target).file("d/secret", b"evil")),
        ("deep symlink parent", Layer::new().symlink("a/d", target).file("a/d/sub/secret", b"evil")),
        ("relative symlink parent", Layer::new().symlink("d", "../../../..").file("d/evil", b"evil")),
        ("symlink to a symlink", Layer::new().symlink("a", target).symlink("b", "a").file("b/secret", b"evil")),
        ("directory through symlink", Layer::new().symlink("d", target).directory("d/sub")),
        ("symlink through symlink", Layer::new().symlink("d", target).symlink("d/s", "x")),
        ("fifo through symlink", Layer::new().symlink("d", target).special("d/p", EntryType::Fifo)),
        ("whiteout through symlink", Layer::new().symlink("d", target).file("d/.wh.secret", b"")),
        ("opaque through symlink", Layer::new().symlink("d", target).file("d/.wh..wh..opq", b"")),
        ("hard link out", Layer::new().hard_link("h", &secret)),
        ("hard link dot-dot", Layer::new().hard_link("h", &deep_out)),
        ("hard link through symlink", Layer::new().symlink("d", target).hard_link("h", "d/secret")),
        ("hard link name through symlink", Layer::new().file("f", b"x").symlink("d", target).hard_link("d/h", "f")),
        ("hard link to a directory", Layer::new().directory("d").hard_link("h", "d")),
        ("hard link to nothing", Layer::new().hard_link("h", "missing")),
        ("hard link to a whiteout", Layer::new().file(".wh.x", b"").hard_link("h", "x")),
        ("file as parent", Layer::new().file("f", b"x").file("f/below", b"x")),
        ("whiteout of dot-dot", Layer::new().file(".wh...", b"")),
        ("whiteout of dot", Layer::new().file("a/.wh..", b"")),
        ("whiteout of nothing", Layer::new().file(".wh.", b"")),
        ("root as a file", Layer::new().file("./", b"").symlink(".", target)),
    ];
    for (what, layer) in cases {
        let store = TestStore::open().await;
        match unpack(&store.store, vec![layer]).await {
            Err(ImageError::BadLayer { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(entries(&outside), ["secret"], "{what}");
        assert_eq!(fs::read(&secret).unwrap(), b"untouched", "{what}");
        assert!(entries(&store.root().join("layers")).is_empty(), "{what}");
    }
}

#[tokio::test]
async fn tricks_that_are_harmless_stay_inside() {
    let (_guard, outside) = outside();
    let secret = outside.join("secret");
    let store = TestStore::open().await;
    let layer = Layer::new()
        // Absolute names lie below the root, as tar has it.
        .file(secret.to_str().unwrap(), b"inside")
        // A link out is text until somebody follows it; replacing it is no
        // following, and neither is changing its owner or time.
        .symlink("link", secret.to_str().unwrap())
        .file("link", b"replaced")
        .symlink("stays", secret.to_str().unwrap())
        .hard_link("abs", "/stays");
    let image = unpack(&store.store, vec![layer]).await.unwrap();
    let root = &image.layers[0];
    assert_eq!(fs::read(root.join(secret.strip_prefix("/").unwrap())).unwrap(), b"inside");
    assert!(fs::symlink_metadata(root.join("link")).unwrap().is_file());
    assert_eq!(fs::read_link(root.join("abs")).unwrap(), secret);
    assert_eq!(fs::read(&secret).unwrap(), b"untouched");
}

#[tokio::test]
async fn bombs_and_monsters_are_refused() {
    let limits = UnpackLimits { max_bytes: 1 << 20, max_entries: 1000 };
    let raw = |kind: EntryType, content: &[u8]| Layer::new().raw(kind, b"x", content, &Entry::default());
    let many = (0..1001).fold(Layer::new(), |layer, index| layer.file(&index.to_string(), b""));
    let big_owner = Entry { owner: (0o777_7777, 0), ..Entry::default() };
    let cases: Vec<(&str, Vec<u8>, bool)> = vec![
        ("too many entries", many.tar(), false),
        ("too many bytes", Layer::new().file("zeros", &vec![0; 2 << 20]).tar(), true),
        (
            "too many bytes in pieces",
            (0..5).fold(Layer::new(), |l, i| l.file(&i.to_string(), &vec![0; 300_000])).tar(),
            true,
        ),
        ("bytes after the end", [Layer::new().file("a", b"a").tar(), vec![7; 8 << 20]].concat(), true),
        ("long path", raw(EntryType::GNULongName, &vec![b'a'; 5000]).file("x", b"").tar(), false),
        ("long link", raw(EntryType::GNULongLink, &vec![b'a'; 5000]).symlink("x", "y").tar(), false),
        ("long component", Layer::new().file(&"a".repeat(256), b"").tar(), false),
        ("deep", Layer::new().file(&"d/".repeat(300), b"").tar(), false),
        ("huge extended header", raw(EntryType::XHeader, &vec![b'a'; (1 << 20) + 1]).tar(), false),
        ("broken extended header", raw(EntryType::XHeader, b"99 path=x\n").file("x", b"").tar(), false),
        ("sparse", raw(EntryType::GNUSparse, b"").tar(), false),
        ("unknown kind", raw(EntryType::new(b'Z'), b"").tar(), false),
        ("NUL in a name", raw(EntryType::XHeader, b"13 path=a\0b\0\n").file("x", b"").tar(), false),
        ("cut", Layer::new().entry(b"a", &Entry { content: &[1; 4000], ..big_owner }).tar()[..2000].to_vec(), false),
        ("rubbish", b"rubbish".repeat(1000), false),
        ("cut gzip", gzip(&Layer::new().file("a", &[1; 4000]).tar())[..60].to_vec(), false),
    ];
    for (what, bytes, is_size) in cases {
        let store = TestStore::open_with(|options| options.limits = limits).await;
        let blob = Blob {
            media_type: "application/vnd.oci.image.layer.v1.tar",
            diff_id: stacyvm_image::Digest::of(&bytes),
            bytes,
        };
        let directory = TempDir::new().unwrap();
        let layout = TestImage::new(vec![blob]).oci_layout(Some("x:1")).tar();
        let path = write_archive(directory.path(), "image.tar", &layout);
        let error = store.store.import(&path, ImportOptions::default(), &()).await.expect_err(what);
        match error {
            ImageError::BadLayer { .. } if !is_size => {}
            ImageError::TooLarge { .. } if is_size => {}
            other => panic!("{what}: {other:?}"),
        }
        assert!(entries(&store.root().join("layers")).is_empty(), "{what}");
    }
}

#[tokio::test]
async fn a_gzip_bomb_stops_at_the_limit() {
    let store = TestStore::open_with(|options| options.limits.max_bytes = 4 << 20).await;
    // 64 MB of zeros in 64 KB; its header says so honestly, then lies.
    let honest = Layer::new().file("zeros", &vec![0; 64 << 20]).tar();
    let directory = TempDir::new().unwrap();
    for bytes in [honest.clone(), honest[512..].to_vec()] {
        let bytes = gzip(&bytes);
        assert!(bytes.len() < 1 << 20);
        let blob = Blob {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
            diff_id: stacyvm_image::Digest::of(b"not needed"),
            bytes,
        };
        let path =
            write_archive(directory.path(), "image.tar", &TestImage::new(vec![blob]).oci_layout(Some("x:1")).tar());
        let error = store.store.import(&path, ImportOptions::default(), &()).await.unwrap_err();
        assert!(matches!(error, ImageError::TooLarge { .. }), "{error:?}");
    }
}

const ROOTLESS_STORE: &str = "STACYVM_TEST_ROOTLESS_STORE";
/// `nobody` on every Linux.
const NOBODY: u32 = 65534;

fn rootless_layers() -> Vec<Layer> {
    let closed = Entry { kind: EntryType::Directory, mode: 0o000, owner: (0, 0), ..Entry::default() };
    let foreign = Entry { content: b"f", owner: (1000, 1000), mode: 0o4755, ..Entry::default() };
    let upper = Layer::new()
        .entry(b"closed", &closed)
        .file("closed/inside", b"i")
        .entry(b"foreign", &foreign)
        .file("etc/.wh.passwd", b"")
        .file("bin/.wh..wh..opq", b"")
        .special("null", EntryType::Char);
    vec![busybox_layer(), upper]
}

/// Not a test by itself: what the next test runs as an ordinary user.
#[tokio::test]
async fn rootless_child() {
    let Ok(root) = std::env::var(ROOTLESS_STORE) else { return };
    assert!(!rustix::process::geteuid().is_root());
    let store = ImageStore::open(ImageStoreOptions::new(root)).await.unwrap();
    let image = unpack(&store, rootless_layers()).await.unwrap();
    assert_eq!(image.form, LayerForm::Rootless);
    assert_eq!(image.notes.owners_lost, 1);
    assert_eq!(image.notes.devices_skipped, 1);
    let root = &image.layers[1];
    assert_eq!(fs::symlink_metadata(root.join("closed")).unwrap().permissions().mode() & 0o777, 0);
    assert_eq!(fs::symlink_metadata(root.join("foreign")).unwrap().permissions().mode() & 0o7777, 0o4755);
    assert_eq!(xattr(&root.join("bin"), "user.overlay.opaque").as_deref(), Some(b"y".as_slice()));
    // Since Linux 5.8 everybody may make whiteouts; before, it is noted.
    let whiteout = fs::symlink_metadata(root.join("etc/passwd"));
    assert_eq!(whiteout.is_ok(), image.notes.whiteouts_missing == 0);
    // What cannot be entered can still be removed.
    let path = image.layers[1].clone();
    drop(image);
    store.remove("layers:1").await.unwrap();
    assert!(!path.exists());
    println!("rootless done");
}

#[tokio::test]
async fn an_ordinary_user_can_unpack_too() {
    require_root();
    let directory = TempDir::new().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // The user must be able to reach the program.
    let program = directory.path().join("it");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(&program);
    command
        .args(["--exact", "layers::rootless_child", "--nocapture"])
        .env(ROOTLESS_STORE, directory.path().join("images"))
        .env("TMPDIR", directory.path());
    std::os::unix::process::CommandExt::uid(&mut command, NOBODY);
    std::os::unix::process::CommandExt::gid(&mut command, NOBODY);
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && stdout.contains("rootless done"),
        "{stdout}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

//! Files.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use stacyvm_sandbox::{ByteStream, EntryKind, FileContent, RemoveOptions, Session as _, SessionError, WriteOptions};

use crate::harness::Agent;

fn content(pieces: &[&'static [u8]]) -> ByteStream {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
    stream::iter(pieces).boxed()
}

async fn bytes(content: FileContent) -> Vec<u8> {
    let pieces: Vec<Bytes> = content.stream.try_collect().await.expect("the whole body");
    pieces.concat()
}

#[tokio::test]
async fn bytes_survive_a_round_trip() {
    let agent = Agent::start();
    let every_byte: &'static [u8] = (0..=255).collect::<Vec<u8>>().leak();
    let path = agent.path("deep/dir/\u{65e5}\u{672c} \u{1F600}?&%.bin");
    let written = agent.session.write(&path, content(&[every_byte, b"", b"tail"]), WriteOptions::default()).await;
    let written = written.expect("parents are made");
    assert_eq!((written.size, written.mode, written.path.as_str()), (260, 0o644, path.as_str()));

    let read = agent.session.read(&path, None).await.expect("it is there");
    assert_eq!((read.entry.size, read.range.clone()), (260, 0..260));
    assert_eq!(bytes(read).await, [every_byte, b"tail"].concat());
    let part = agent.session.read(&path, Some(250..900)).await.expect("a part of it exists");
    assert_eq!(part.range, 250..260);
    assert_eq!(bytes(part).await, [&every_byte[250..], b"tail"].concat());
    let behind = agent.session.read(&path, Some(900..901)).await.expect("nothing of it exists");
    assert_eq!((behind.range.clone(), bytes(behind).await.len()), (900..900, 0));

    let empty = agent.path("empty");
    agent.session.write(&empty, content(&[]), WriteOptions::default()).await.expect("an empty file");
    assert_eq!(bytes(agent.session.read(&empty, None).await.expect("it is there")).await.len(), 0);
}

#[tokio::test]
async fn a_file_is_replaced_whole_or_not_at_all() {
    let agent = Agent::start();
    let path = agent.path("file");
    let options = WriteOptions { mode: Some(0o750), user: None };
    agent.session.write(&path, content(&[b"old"]), options).await.expect("new");
    let broken = stream::iter([Ok(Bytes::from_static(b"new")), Err(SessionError::Gone)]).boxed();
    let interrupted = agent.session.write(&path, broken, WriteOptions::default()).await;
    assert!(matches!(interrupted, Err(SessionError::Gone)), "its own cause comes back: {interrupted:?}");
    assert_eq!(std::fs::read(&path).expect("still there"), b"old");

    agent.session.write(&path, content(&[b"new"]), WriteOptions::default()).await.expect("replaced");
    assert_eq!(std::fs::read(&path).expect("there"), b"new");
    let mode = std::fs::metadata(&path).expect("there").permissions().mode() & 0o7777;
    assert_eq!(mode, 0o750, "the old permissions stay");
    let names: Vec<_> = std::fs::read_dir(&agent.dir).expect("a directory").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["file"], "no temporary file is left");
}

#[tokio::test]
async fn directories_are_listed_moved_and_removed() {
    let agent = Agent::start();
    agent.session.make_dir(&agent.path("a/b")).await.expect("new");
    assert!(matches!(agent.session.make_dir(&agent.path("a/b")).await, Err(SessionError::FileConflict(_))));
    std::os::unix::fs::symlink("b", agent.dir.join("a/link")).expect("a new link");
    std::fs::write(agent.dir.join("a").join(std::ffi::OsStr::from_bytes(b"\xff")), b"x").expect("any bytes");
    let listed = agent.session.list(&agent.path("a"), 1).await.expect("a directory");
    let seen: Vec<_> = listed.iter().map(|entry| (entry.name.as_str(), entry.kind)).collect();
    assert_eq!(
        seen,
        [("b", EntryKind::Directory), ("link", EntryKind::Symlink), ("\u{fffd}", EntryKind::File)],
        "{listed:?}"
    );
    assert_eq!(listed[1].symlink_target.as_deref(), Some("b"));

    agent.session.rename(&agent.path("a"), &agent.path("x/y")).await.expect("parents are made");
    assert!(matches!(agent.session.stat(&agent.path("a")).await, Err(SessionError::FileNotFound(_))));
    let single = agent.session.remove(&agent.path("x/y"), RemoveOptions::default()).await;
    assert!(matches!(single, Err(SessionError::FileConflict(_))), "{single:?}");
    agent.session.remove(&agent.path("x"), RemoveOptions { recursive: true }).await.expect("everything");
    assert!(agent.session.list(&agent.path("."), 3).await.expect("a directory").is_empty());
}

#[tokio::test]
async fn what_is_not_a_file_is_refused_quickly() {
    let agent = Agent::start();
    let fifo = agent.path("fifo");
    agent.shell("mkfifo fifo; mkdir dir; ln -s loop loop").await;
    assert!(matches!(agent.session.read(&fifo, None).await, Err(SessionError::FileConflict(_))));
    assert!(matches!(agent.session.read(&agent.path("dir"), None).await, Err(SessionError::FileConflict(_))));
    assert!(matches!(agent.session.read(&agent.path("none"), None).await, Err(SessionError::FileNotFound(_))));
    assert!(matches!(agent.session.read(&agent.path("loop"), None).await, Err(SessionError::InvalidArgument(_))));
    for path in [&fifo, &agent.path("dir"), &"/dev/null".to_owned()] {
        let written = agent.session.write(path, content(&[b"x"]), WriteOptions::default()).await;
        assert!(matches!(written, Err(SessionError::FileConflict(_))), "{path}: {written:?}");
    }
    // Reading is fine where the kernel tells no length.
    let status = agent.session.read("/proc/uptime", None).await.expect("a file of /proc");
    assert!(!bytes(status).await.is_empty());
    let own = format!("/proc/{}/environ", agent.child.id());
    assert!(matches!(agent.session.read(&own, None).await, Err(SessionError::FileForbidden(_))));
}

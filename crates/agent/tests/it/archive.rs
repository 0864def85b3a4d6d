//! Trees as tar.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use stacyvm_sandbox::{ByteStream, Session as _, SessionError};

use crate::harness::Agent;

async fn pack(agent: &Agent, path: &str) -> Vec<u8> {
    let pieces = agent.session.archive(path).await.expect("it is there");
    pieces.try_collect::<Vec<Bytes>>().await.expect("the whole archive").concat()
}

fn stream_of(archive: &[u8]) -> ByteStream {
    let pieces: Vec<_> = archive.chunks(10_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

/// Runs the machine's own tar, which knows the format better than our tests.
fn tar(arguments: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new("tar").args(arguments).current_dir(dir).output().expect("tar is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[tokio::test]
async fn a_tree_survives_a_round_trip() {
    let agent = Agent::start();
    let long = "l".repeat(120);
    agent
        .shell(&format!(
            "mkdir -p from/a/{long}/{long}; printf small > from/a/small; chmod 750 from/a/small; \
             head -c 3000000 /dev/urandom > from/large; : > from/empty; ln -s ../nowhere from/link; \
             echo x > 'from/a/{long}/{long}/deep'; chmod 500 from/a; touch -d @1000000 from/a/small; mkfifo from/pipe"
        ))
        .await;
    let archive = pack(&agent, &agent.path("from")).await;
    let out = agent.dir.join("by-tar");
    std::fs::create_dir(&out).expect("a new directory");
    std::fs::write(agent.dir.join("archive.tar"), &archive).expect("writable");
    tar(&["-xf", "../archive.tar"], &out);
    let same = |left: &str, right: &str| {
        let output =
            Command::new("diff").args(["-r", "--no-dereference", left, right]).current_dir(&agent.dir).output();
        let output = output.expect("diff is installed");
        // Pipes cannot be compared and are said to differ.
        let differences = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(differences.lines().all(|line| line.contains("fifo")), "{differences}");
    };
    same("from", "by-tar");

    agent.session.extract(&agent.path("by-agent"), stream_of(&archive)).await.expect("a good archive");
    same("from", "by-agent");
    let small = std::fs::metadata(agent.dir.join("by-agent/a/small")).expect("unpacked");
    assert_eq!((small.permissions().mode() & 0o7777, small.mtime()), (0o750, 1_000_000));
    let dir = std::fs::metadata(agent.dir.join("by-agent/a")).expect("unpacked");
    assert_eq!(dir.permissions().mode() & 0o7777, 0o500);
}

#[tokio::test]
async fn archives_of_other_programs_are_unpacked() {
    let agent = Agent::start();
    // Too long for the first field of a header; ustar cuts it in two.
    let long = "p".repeat(95);
    agent
        .shell(&format!("mkdir -p t/{long}; echo 1 > t/{long}/file; ln t/{long}/file t/hard; ln -s {long} t/sym"))
        .await;
    for format in ["gnu", "pax", "ustar", "oldgnu"] {
        let archive = tar(&["-c", "--format", format, "-f", "-", "-C", "t", "."], &agent.dir);
        let out = agent.path(format);
        agent.session.extract(&out, stream_of(&archive)).await.unwrap_or_else(|error| panic!("{format}: {error}"));
        assert_eq!(std::fs::read_to_string(format!("{out}/sym/file")).expect("through the link"), "1\n");
        let inode = |path: String| std::fs::metadata(path).expect("unpacked").ino();
        assert_eq!(inode(format!("{out}/hard")), inode(format!("{out}/{long}/file")), "one file, two names");
    }
}

#[tokio::test]
async fn a_single_file_is_an_archive_too() {
    let agent = Agent::start();
    std::fs::write(agent.dir.join("one"), b"1").expect("writable");
    let archive = pack(&agent, &agent.path("one")).await;
    agent.session.extract(&agent.path("out"), stream_of(&archive)).await.expect("a good archive");
    assert_eq!(std::fs::read(agent.dir.join("out/one")).expect("unpacked"), b"1");
    let missing = agent.session.archive(&agent.path("none")).await.err();
    assert!(matches!(missing, Some(SessionError::FileNotFound(_))), "{missing:?}");
}

#[tokio::test]
async fn a_hostile_archive_writes_nothing_outside() {
    let agent = Agent::start();
    let victim = agent.dir.join("victim");
    std::fs::create_dir(&victim).expect("a new directory");
    std::fs::write(victim.join("file"), b"untouched").expect("writable");
    // A link out of the destination, then files through it and over it; the same
    // with absolute names, with `..`, and with hard links.
    let script = r#"
import io, sys, tarfile
victim, kind = sys.argv[1], sys.argv[2]
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
def file(name, content=b"owned"):
    info = tarfile.TarInfo(name); info.size = len(content)
    out.addfile(info, io.BytesIO(content))
def link(name, target, hard=False):
    info = tarfile.TarInfo(name); info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    info.linkname = target; out.addfile(info)
if kind == "through":
    link("door", victim); file("door/file"); file("door/new")
elif kind == "relative":
    link("door", "../victim"); file("door/file")
elif kind == "over":
    link("file", victim + "/file"); file("file")
elif kind == "absolute":
    file(victim + "/file")
elif kind == "climb":
    file("../victim/file")
elif kind == "hard":
    link("grab", victim + "/file", hard=True); file("grab")
elif kind == "hard-climb":
    link("grab", "../victim/file", hard=True); file("grab")
out.close()
"#;
    for kind in ["through", "relative", "over", "absolute", "climb", "hard", "hard-climb"] {
        let archive = Command::new("python3").args(["-c", script]).arg(&victim).arg(kind).output().expect("python");
        assert!(archive.status.success(), "{}", String::from_utf8_lossy(&archive.stderr));
        let out = agent.path(&format!("out-{kind}"));
        // Refused or kept inside: both are fine, as long as nothing got out.
        let result = agent.session.extract(&out, stream_of(&archive.stdout)).await;
        assert_eq!(std::fs::read(victim.join("file")).expect("still there"), b"untouched", "{kind}: {result:?}");
        let names = std::fs::read_dir(&victim).expect("a directory").count();
        assert_eq!(names, 1, "{kind}: {result:?}");
        if let "through" | "relative" = kind {
            // It is the archive that is wrong; no file of anybody's is missing.
            assert!(matches!(result, Err(SessionError::InvalidArgument(_))), "{kind}: {result:?}");
        }
    }
}

#[tokio::test]
async fn a_damaged_archive_is_an_error() {
    let agent = Agent::start();
    let garbage = agent.session.extract(&agent.path("out"), stream_of(&vec![7; 100_000])).await;
    assert!(matches!(garbage, Err(SessionError::InvalidArgument(_))), "{garbage:?}");
    std::fs::write(agent.dir.join("file"), vec![1; 200_000]).expect("writable");
    let archive = pack(&agent, &agent.path("file")).await;
    let cut = agent.session.extract(&agent.path("out"), stream_of(&archive[..100_000])).await;
    assert!(matches!(cut, Err(SessionError::InvalidArgument(_))), "{cut:?}");
}

#[tokio::test]
async fn many_small_files_are_no_problem() {
    let agent = Agent::start();
    agent.shell("mkdir many; cd many; seq 3000 | xargs touch").await;
    let archive = pack(&agent, &agent.path("many")).await;
    agent.session.extract(&agent.path("again"), stream_of(&archive)).await.expect("a good archive");
    assert_eq!(std::fs::read_dir(agent.path("again")).expect("unpacked").count(), 3000);
}

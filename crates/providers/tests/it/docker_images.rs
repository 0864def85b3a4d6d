//! Images that are not made for us.

use std::path::{Path, PathBuf};
use std::process::Command;

use stacyvm_sandbox::{Provider as _, SandboxSpec, Session as _, StartRequest, WriteOptions};

use crate::docker_fixture::{DockerFixture, spec};
use crate::inside::{argv, run};

fn made(directory: &Path, script: &str) -> PathBuf {
    let archive = directory.join("rootfs.tar");
    let output = Command::new("sh").arg("-ec").arg(script).arg("sh").arg(&archive).output().expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    archive
}

#[tokio::test(flavor = "multi_thread")]
async fn entrypoint_user_directory_volume_and_health_check_of_an_image_are_no_obstacle() {
    let fixture = DockerFixture::start();
    let directory = tempfile::tempdir().expect("a directory");
    let script = format!("{}/../../scripts/make-test-image.sh --rootfs \"$1\"", env!("CARGO_MANIFEST_DIR"));
    let changes = [
        "ENTRYPOINT [\"/bin/false\"]",
        "CMD [\"/bin/false\"]",
        "USER user",
        "WORKDIR /srv/app",
        "VOLUME /data",
        "ENV COLOUR=blue",
        "HEALTHCHECK --interval=1s CMD touch /tmp/checked",
    ];
    fixture.daemon.import(&made(directory.path(), &script), "odd:1", &changes);
    let id = fixture.create(&SandboxSpec { image: "odd:1".into(), ..spec() }).await;

    assert_eq!(fixture.output(&id, "id -un; pwd; echo $COLOUR $GREETING").await, "user\n/srv/app\nblue hello");
    assert_eq!(fixture.output(&id, "echo mine > /workspace/mine && stat -c %U /workspace/mine").await, "user");
    let session = fixture.session(&id).await;
    let content: stacyvm_sandbox::ByteStream =
        Box::pin(futures_util::stream::iter([Ok(bytes::Bytes::from_static(b"by the API"))]));
    let entry = session.write("/workspace/new/file", content, WriteOptions::default()).await.expect("written");
    assert_eq!((entry.owner.as_str(), entry.mode), ("user", 0o644));
    assert_eq!(fixture.output(&id, "cat /workspace/new/file; echo more >> /workspace/new/file").await, "by the API");
    // Nothing checks the image's health: it would run before and beside the agent.
    assert_eq!(fixture.output(&id, "ls /data /tmp").await, "/data:\n\n/tmp:");

    let volume = fixture.daemon.docker(&["inspect", "--format", "{{range .Mounts}}{{.Name}}{{end}}", id.as_str()]);
    assert!(!volume.is_empty(), "the image's volume is one of the daemon's");
    fixture.provider.destroy(&id).await.expect("destroyed");
    assert!(!fixture.daemon.client(&["volume", "inspect", &volume]).status.success(), "it went with the sandbox");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_shell_works() {
    let fixture = DockerFixture::start();
    let directory = tempfile::tempdir().expect("a directory");
    let script = "work=$(mktemp -d); cp /bin/busybox \"$work/busybox\"; tar --create --file \"$1\" -C \"$work\" busybox; rm -r \"$work\"";
    fixture.daemon.import(&made(directory.path(), script), "bare:1", &[]);
    let id = fixture.create(&SandboxSpec { image: "bare:1".into(), ..spec() }).await;
    let session = fixture.session(&id).await;
    let ran = run(&session, argv(&["/busybox", "echo", "no shell"])).await;
    assert_eq!((ran.exit.code, ran.stdout.as_str()), (Some(0), "no shell\n"));
    let shell = session.start(StartRequest { argv: vec!["sh".into()], ..StartRequest::default() }).await;
    assert!(matches!(shell.err(), Some(stacyvm_sandbox::SessionError::CommandNotFound(_))));
    session.make_dir("/workspace/a/b").await.expect("made");
    session.rename("/workspace/a/b", "/workspace/c").await.expect("renamed");
    assert_eq!(session.glob("/workspace/*").await.expect("found"), ["/workspace/a", "/workspace/c"]);
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

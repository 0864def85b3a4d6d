//! The provider `proot`, from making its root to a command in a sandbox.

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::support::{Server, Site, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_made_and_commands_run_in_it() {
    let site = Site::with_image();
    let rootfs = site.home().join("rootfs");
    let path = rootfs.to_str().expect("text").to_owned();
    site.run(&["rootfs", "build", "--image", "alpine:latest", &path]).await.ok().says("made");
    assert!(rootfs.join("bin/busybox").is_file());
    let again = site.run(&["rootfs", "build", "--image", "alpine:latest", &path]).await;
    again.failed(1).says("is there already").says("not there yet");
    let root = site.run(&["rootfs", "build", "--image", "alpine:latest", "/"]).await.failed(1);
    assert!(root.stderr().contains("not there yet") && !root.stderr().contains("remove"), "{root}");

    let server = Server::start_with(&site, |serve| {
        serve.arg("--destroy-on-exit");
        serve.env("STACYVM_PROVIDERS_DEFAULT", "proot").env("STACYVM_PROVIDERS_PROOT_ROOTFS_PATH", &path);
    })
    .await;
    for image in ["rootfs", "alpine:latest"] {
        let ran = server.run(&["run", "--image", image, "--", "sh", "-c", "id -u; pwd; cat /etc/hostname"]).await.ok();
        assert!(ran.stdout().starts_with("0\n/workspace\n"), "{ran}");
    }
    let shown: Value = server.run(&["providers", "proot", "--json"]).await.json();
    let names: Vec<_> = shown["health"]["findings"].as_array().expect("a list").iter().collect();
    let level = |name: &str| names.iter().find(|finding| finding["name"] == name).expect("a finding")["level"].clone();
    assert_eq!(level("proot.binary"), "ok", "{shown}");
    assert_eq!(level("proot.rootfs"), "ok", "{shown}");
    // busybox has a shell, and none of the languages.
    assert_eq!(level("proot.languages"), "warning", "{shown}");
    let kept = server.run(&["list", "--json"]).await.ok();
    assert!(!kept.stdout().contains("running"), "{kept}");
}

/// A tool that works on when its caller ends would fill a directory that nobody
/// knows of.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_interrupted_build_had_begun_is_removed() {
    let site = Site::new();
    let tools = site.home().join("tools");
    std::fs::create_dir(&tools).expect("a directory");
    // As debootstrap does: something mounted inside, and children that work on.
    let tool = "#!/bin/sh\nfor target; do :; done\nmkdir \"$target/proc\"\nmount -t proc proc \"$target/proc\"\n\
                echo $$ > \"$HOME/began\"\nsleep 600\n";
    std::fs::write(tools.join("debootstrap"), tool).expect("writable");
    std::fs::set_permissions(tools.join("debootstrap"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("ours");
    let mut build = site.program();
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display());
    let mut build = build.args(["rootfs", "build", "made/rootfs"]).env("PATH", path).spawn().expect("it starts");
    let began = site.home().join("began");
    let tool = eventually("debootstrap begins", async || {
        std::fs::read_to_string(&began).ok()?.trim().parse::<i32>().ok().and_then(Pid::from_raw)
    })
    .await;
    let pid = Pid::from_raw(build.id().cast_signed()).expect("a process");
    rustix::process::kill_process(pid, Signal::TERM).expect("it runs");
    assert_eq!(build.wait().expect("it ends").code(), Some(1));
    assert!(rustix::process::test_kill_process(tool).is_err(), "the tool works on");
    let left: Vec<_> = std::fs::read_dir(site.home().join("made")).expect("a directory").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("readable");
    assert!(!mounts.contains(site.home().to_str().expect("text")), "{mounts}");
}

/// What the operator's settings bound is shown, and said where it ends a
/// command.
#[tokio::test(flavor = "multi_thread")]
async fn limits_in_force_are_shown_and_named() {
    let site = Site::with_image();
    let start = async |arguments: &[&str]| {
        Server::start_with(&site, |serve| {
            serve.args(arguments).env("STACYVM_PROVIDERS_DEFAULT", "proot");
            serve.env("STACYVM_PROVIDERS_PROOT_MAX_MEMORY_MB", "200").env("STACYVM_PROVIDERS_PROOT_MAX_DISK_MB", "24");
        })
        .await
    };
    let server = start(&[]).await;
    let id = server.run(&["spawn", "--image", "alpine:latest"]).await.ok().stdout().trim().to_owned();
    let before: Value = server.run(&["inspect", &id, "--json"]).await.json();
    assert_eq!((&before["memory_mb"], &before["disk_size_mb"]), (&200.into(), &24.into()), "{before}");
    server.stop(Signal::TERM).await;
    let server = start(&["--destroy-on-exit"]).await;
    let shown: Value = server.run(&["inspect", &id, "--json"]).await.json();
    for field in ["memory_mb", "disk_size_mb", "limits"] {
        assert_eq!(shown[field], before[field], "after a restart: {shown}");
    }
    let enforced = shown["limits"]["enforced"].as_array().expect("a list");
    assert!(enforced.contains(&"disk".into()) && enforced.contains(&"memory".into()), "{shown}");
    let page = server.run(&["inspect", &id]).await.ok();
    assert!(page.stdout().lines().any(|line| line.starts_with("disk") && line.contains("24")), "{page}");

    // One file by the kernel, many by the watcher.
    let one = "dd if=/dev/zero of=/workspace/big bs=1M count=60";
    server.run(&["exec", &id, "--", "sh", "-c", one]).await.says("SANDBOX_DISK_FULL");
    let many = "rm /workspace/big; for i in $(seq 40); do dd if=/dev/zero of=/workspace/f$i bs=1M count=1; done; \
                while true; do sleep 0.1; done";
    let ran = server.run(&["exec", &id, "--", "sh", "-c", many]).await.says("SANDBOX_DISK_FULL");
    assert_eq!(ran.status(), Some(137), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_namespaces_a_key_is_needed() {
    let site = Site::with_image();
    // Sandboxes of root's are other users, who have to get there.
    let base = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("open to all");
    let start = async |key: Option<&str>| {
        Server::start_with(&site, |serve| {
            serve.arg("--destroy-on-exit");
            serve.env("STACYVM_PROVIDERS_DEFAULT", "proot").env("STACYVM_PROVIDERS_PROOT_NAMESPACES", "false");
            serve.env_remove("STACYVM_DEFAULTS_NETWORK");
            serve.env("STACYVM_PROVIDERS_PROOT_WORKSPACE_BASE", base.path().join("base"));
            if let Some(key) = key {
                serve.env("STACYVM_AUTH_API_KEY", key);
            }
        })
        .await
    };
    let open = start(None).await;
    open.run(&["run", "--", "true"]).await.failed(125).says("stacyvm key create");

    // The first key opens it at once, without a new start.
    let health = async |server: &Server, key: &str| {
        let mut command = server.program(&["providers", "proot", "--json"]);
        command.env("STACYVM_API_KEY", key);
        let shown: Value = crate::support::run(command, b"").await.json();
        shown["health"]["healthy"] == true
    };
    let made: Value = open.run(&["key", "create", "me", "--scope", "admin", "--scope", "read", "--json"]).await.json();
    let key = made["key"].as_str().expect("a key").to_owned();
    eventually("the provider can be used", async || health(&open, &key).await.then_some(())).await;
    drop(open);
    let closed = start(Some("a-key-of-the-test-with-32-characters")).await;
    assert!(health(&closed, "a-key-of-the-test-with-32-characters").await, "not from the first answer on");
    let mut command = closed.program(&["run", "--", "echo", "works"]);
    command.env("STACYVM_API_KEY", "a-key-of-the-test-with-32-characters");
    let ran = crate::support::run(command, b"").await.ok();
    assert_eq!(ran.stdout(), "works\n", "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_distribution_is_made_and_its_python_runs() {
    let site = Site::with_image();
    let rootfs = site.home().join("debian");
    let path = rootfs.to_str().expect("text").to_owned();
    // A whole distribution: minutes on a loaded machine, and it says how far it is.
    let mut build = tokio::process::Command::from(site.program());
    let made = build.args(["rootfs", "build", "--include", "python3-minimal", &path]).output().await.expect("it runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let server = Server::start_with(&site, |serve| {
        serve.arg("--destroy-on-exit");
        serve.env("STACYVM_PROVIDERS_DEFAULT", "proot").env("STACYVM_PROVIDERS_PROOT_ROOTFS_PATH", &path);
    })
    .await;
    let ran = server.run(&["run", "--image", "rootfs", "--", "python3", "-c", "print(6*7)"]).await.ok();
    assert_eq!(ran.stdout(), "42\n", "{ran}");
}

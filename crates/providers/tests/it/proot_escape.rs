//! Ways out of a root that is only pretended.
//!
//! Both what commands try and what the API is made to do for them: it all goes
//! through the agent, which is under PRoot itself.

use bytes::Bytes;
use futures_util::StreamExt as _;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::{Provider as _, Session as _, SessionError, WriteOptions};

use crate::fixture::chain;
use crate::ordinary_user::{Circumstances, as_ordinary_user};
use crate::proot_fixture::{Apart, Proot};

const SECRET: &str = "a secret of the host";

/// A file of the host that whoever runs the sandbox could read.
fn precious() -> (tempfile::TempDir, String) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).expect("open to all");
    let file = dir.path().join("precious");
    std::fs::write(&file, SECRET).expect("written");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).expect("open to all");
    (dir, file.to_str().expect("text").to_owned())
}

async fn read(fixture: &Proot, id: &SandboxId, path: &str) -> Result<String, SessionError> {
    let mut content = fixture.session(id).await.read(path, None).await?.stream;
    let mut bytes = Vec::new();
    while let Some(part) = content.next().await {
        bytes.extend_from_slice(&part?);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn write(fixture: &Proot, id: &SandboxId, path: &str) -> Result<(), SessionError> {
    let content = futures_util::stream::once(async { Ok(Bytes::from_static(b"overwritten")) }).boxed();
    fixture.session(id).await.write(path, content, WriteOptions::default()).await.map(drop)
}

async fn no_way_out(apart: Apart) {
    let fixture = Proot::start(apart).await;
    let (dir, precious) = precious();
    let id = fixture.create(&fixture.spec()).await;
    // No hard link to the host's file, and no rename of it.
    let ran = fixture.sh(&id, &format!("ln {precious} /workspace/hard || mv {precious} /workspace/moved")).await;
    assert_ne!(ran.exit.code, Some(0), "{ran:?}");
    let agent = fixture.output(&id, "echo $PPID").await;
    let ways = [
        precious.clone(),
        format!("/workspace/../../../../../..{precious}"),
        format!("/proc/self/root{precious}"),
        format!("/proc/1/root{precious}"),
        format!("/proc/{agent}/root{precious}"),
        format!("/proc/self/cwd/../../../../../..{precious}"),
        format!("/proc/self/fd/../root{precious}"),
        format!("/dev/fd/../root{precious}"),
    ];
    for (number, way) in ways.iter().enumerate() {
        // The path itself, and a link that a guest has planted.
        let link = format!("/workspace/link-{number}");
        fixture.output(&id, &format!("ln -s '{way}' {link}")).await;
        for path in [way, &link] {
            let ran = fixture.sh(&id, &format!("cat '{path}'; echo x >>'{path}'")).await;
            assert!(!ran.stdout.contains(SECRET), "{path}: {ran:?}");
            let text = read(&fixture, &id, path).await.unwrap_or_default();
            assert!(!text.contains(SECRET), "{path}");
            let _ = write(&fixture, &id, path).await;
            assert_eq!(std::fs::read_to_string(&precious).expect("readable"), SECRET, "{path}");
        }
    }
    // A directory that is swapped for a link while the API writes into it.
    let swap = format!(
        "mkdir -p /workspace/d; i=0; while [ $i -lt 300 ]; do rm -rf /workspace/d; ln -s {} /workspace/d; \
         rm /workspace/d; mkdir /workspace/d; i=$((i+1)); done",
        dir.path().display()
    );
    let racing = fixture.sh(&id, &swap);
    let writing = async {
        for _ in 0..60 {
            let _ = write(&fixture, &id, "/workspace/d/precious").await;
        }
    };
    tokio::join!(racing, writing);
    assert_eq!(std::fs::read_to_string(&precious).expect("readable"), SECRET);
    let names: Vec<_> = std::fs::read_dir(dir.path()).expect("readable").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["precious"]);
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_path_leads_out_with_namespaces() {
    no_way_out(Apart::Namespaces).await;
}

#[test]
fn no_path_leads_out_for_an_ordinary_user() {
    const NAME: &str = "proot_escape::no_path_leads_out_for_an_ordinary_user";
    as_ordinary_user(NAME, Circumstances::ALONE, async || no_way_out(Apart::Shared).await);
}

/// System calls that released versions of PRoot do not know would take a path
/// of the host's as it is.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_proot_does_not_know_are_not_there() {
    let fixture = Proot::with(Apart::Shared, |options| options.rootfs = crate::proot_fixture::debian_root()).await;
    let id = fixture.create(&fixture.spec()).await;
    // openat2, statx, faccessat2, execveat, io_uring_setup, open_tree.
    let script = "foreach $n (437, 332, 439, 322, 425, 428) { $! = 0; \
                  $r = syscall($n, -100, my $p = '/etc/passwd', my $b = chr(0) x 256, 24, my $c = chr(0) x 256); \
                  print \"$n \", ($r < 0 ? $! + 0 : 'worked'), \"\\n\" }";
    let ran = fixture.run(&id, crate::proot_fixture::argv(&["perl", "-e", script])).await;
    let expected = "437 38\n332 38\n439 38\n322 38\n425 1\n428 1\n";
    assert_eq!(ran.stdout, expected, "{ran:?}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

/// What a guest may do to other processes of its user, by number of the call
/// and arguments, with the error that it gets (Linux on x86_64).
#[cfg(target_arch = "x86_64")]
async fn others_are_left_alone() {
    let fixture = Proot::with(Apart::Shared, |options| options.rootfs = crate::proot_fixture::debian_root()).await;
    let id = fixture.create(&fixture.spec()).await;
    let own = std::process::id();
    let script = format!(
        r#"sub try {{ my $name = shift; $! = 0; my $r = syscall(shift, @_); print "$name ", ($r < 0 ? $! + 0 : "worked"), ", " }}
        my $none = pack("QQ", 0, 0);
        try("prlimit", 302, {own}, 7, $none, 0);
        try("prlimit of oneself", 302, 0, 4, $none, 0);
        try("reading limits", 302, 0, 7, 0, my $old = $none);
        try("nice", 141, 0, {own}, 5);
        try("nice of a user", 141, 2, 0, 5);
        try("nice of oneself", 141, 0, 0, 5);
        try("scheduler", 144, {own}, 0, pack("i", 0));
        open(my $status, "<", "/proc/self/status");
        my ($proot) = map {{ /^TracerPid:\s+(\d+)/ ? $1 + 0 : () }} <$status>;
        try("processors of PRoot", 203, $proot, 8, pack("Q", 1));
        try("processors of oneself", 203, $$ + 0, 8, pack("Q", 1));
        try("pidfd_send_signal", 424, 0, 9, 0, 0);
        try("shared memory", 29, 4711, 4096, 0600);
        try("file in memory", 319, my $n = "x", 0);
        try("owner of signals", 72, 0, 8, {own});
        try("not dumpable", 157, 4, 0, 0, 0, 0);
        try("datagrams to paths", 41, 1, 2 | 02000000, 0);
        try("raw to paths", 41, 1, 3, 0);
        try("pair of datagrams", 53, 1, 2, 0, my $pair = pack("ii", 0, 0));
        try("streams", 41, 1, 1, 0);
        try("datagrams elsewhere", 41, 2, 2, 0);"#
    );
    let ran = fixture.run(&id, crate::proot_fixture::argv(&["perl", "-e", &script])).await;
    let expected = "prlimit 1, prlimit of oneself worked, reading limits worked, nice 1, nice of a user 1, \
                    nice of oneself worked, scheduler 1, processors of PRoot 1, processors of oneself worked, pidfd_send_signal 38, shared memory 38, file in memory 38, \
                    owner of signals 1, not dumpable 1, datagrams to paths 1, raw to paths 1, pair of datagrams 1, \
                    streams worked, datagrams elsewhere worked, ";
    assert_eq!(ran.stdout, expected, "{ran:?}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_ordinary_users_guest_leaves_others_alone_on_debian() {
    const NAME: &str = "proot_escape::an_ordinary_users_guest_leaves_others_alone_on_debian";
    as_ordinary_user(NAME, Circumstances::ALONE, others_are_left_alone);
}

/// Whoever writes to PRoot's memory decides what PRoot does.
#[cfg(target_arch = "x86_64")]
async fn proots_memory_is_closed(apart: Apart) {
    let fixture = Proot::with(apart, |options| options.rootfs = crate::proot_fixture::debian_root()).await;
    let id = fixture.create(&fixture.spec()).await;
    let proot = if apart == Apart::Namespaces { 1 } else { fixture.pid(&id) };
    let script = format!(
        r#"print open(my $f, '+<', "/proc/{proot}/mem") ? "open\n" : $! + 0 . "\n";
        for my $call (310, 311) {{ $! = 0; syscall($call, {proot}, 0, 0, 0, 0, 0); print $! + 0, "\n" }}
        open($f, '<', "/proc/{proot}/fd/4") or die "closed\n"; print <$f>"#
    );
    let ran = fixture.run(&id, crate::proot_fixture::argv(&["perl", "-e", &script])).await;
    // 13 and 1: by Landlock, by the filter. The configuration was there once.
    assert_eq!(
        ran.stdout,
        "13
1
1
",
        "{ran:?}"
    );
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn proots_memory_is_closed_with_namespaces() {
    proots_memory_is_closed(Apart::Namespaces).await;
}

#[cfg(target_arch = "x86_64")]
#[test]
fn proots_memory_is_closed_to_an_ordinary_users_guest_on_debian() {
    const NAME: &str = "proot_escape::proots_memory_is_closed_to_an_ordinary_users_guest_on_debian";
    as_ordinary_user(NAME, Circumstances::ALONE, async || proots_memory_is_closed(Apart::Shared).await);
}

/// The launcher confines whatever it starts; here that is a program that goes
/// straight for the host's files, as code that overcame PRoot would.
async fn the_kernel_holds_without_proot() {
    let fixture = Proot::with(Apart::Shared, |options| options.program = options.launcher.program.clone()).await;
    let precious = fixture.sandboxes().join("precious");
    std::fs::write(&precious, SECRET).expect("written");
    let refused = fixture.provider.create(&SandboxId::random(), &fixture.spec(), &()).await;
    let said = chain(&refused.expect_err("no agent has started"));
    assert!(said.contains("read Err(PermissionDenied), write Err(PermissionDenied), inside Ok(())"), "{said}");
    assert_eq!(std::fs::read_to_string(&precious).expect("readable"), SECRET);
    std::fs::remove_file(&precious).expect("removed");
    fixture.finish().await;
}

#[test]
fn the_kernel_holds_an_ordinary_users_sandbox_without_proot() {
    const NAME: &str = "proot_escape::the_kernel_holds_an_ordinary_users_sandbox_without_proot";
    as_ordinary_user(NAME, Circumstances::ALONE, the_kernel_holds_without_proot);
}

/// With the same user inside and outside, nothing else would.
async fn signals_stay_inside() {
    let fixture = Proot::start(Apart::Shared).await;
    let id = fixture.create(&fixture.spec()).await;
    let own = std::process::id();
    let ran = fixture.sh(&id, &format!("kill -0 $$ && kill -0 {own}")).await;
    assert!(ran.exit.code != Some(0) && ran.stderr.contains("Operation not permitted"), "{ran:?}");
    let ran = fixture.sh(&id, &format!("cat /proc/{own}/environ")).await;
    assert!(ran.exit.code != Some(0) && ran.stdout.is_empty(), "{ran:?}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[test]
fn signals_stay_inside_for_an_ordinary_user() {
    const NAME: &str = "proot_escape::signals_stay_inside_for_an_ordinary_user";
    as_ordinary_user(NAME, Circumstances::ALONE, signals_stay_inside);
}

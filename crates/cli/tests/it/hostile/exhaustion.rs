//! Guests that use up what there is: output, processes, memory, disk.

use std::fs;
use std::time::Duration;

use stacyvm_api::{CreateRequest, Disk, ErrorCode, ExecRequest};
use stacyvm_client::{Channel, ExecEvent, UploadOptions};

use super::{Attack, refusal};
use crate::support::{Server, Site, create, eventually, output, script, sh, small, within};

/// What a guest writes; several times what is kept of it anywhere.
const FLOOD_BYTES: u64 = 256 << 20;

/// Most of a flood that the server may hold at a time: one answer, as bytes,
/// as text and as JSON, and what the allocator makes of it.
const FLOOD_MEMORY_KIB: u64 = 160 << 10;

/// Highest resident memory of a process so far.
pub(super) fn peak_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_output_is_cut_or_said_to_be_lost_and_never_kept() {
    let server = Server::start(&Site::with_image(), &["--destroy-on-exit"]).await;
    let client = server.client();
    let guest = create(&client, &small()).await;
    output(&guest, "echo warm").await;
    let before = peak_kib(server.pid());

    let flood = format!("yes 0123456789abcde | head -c {FLOOD_BYTES}");
    let result = within("a flood into one answer", sh(&guest, &flood)).await;
    assert_eq!((result.exit_code, result.truncated, result.error), (0, true, None));
    assert!((1 << 20..=16 << 20).contains(&result.stdout.len()), "{} bytes in one answer", result.stdout.len());

    // Nobody reads until the command has ended.
    let mut stream = guest.exec_stream(&script(&format!("{flood}; touch /tmp/ended"))).await.expect("it starts");
    eventually("the command ends without a reader", async || guest.stat("/tmp/ended").await.ok()).await;
    let (mut arrived, mut lost, mut exit) = (0, 0, None);
    while let Some(event) = within("an event", stream.next()).await.expect("an event") {
        match event {
            ExecEvent::Output { channel: Channel::Stdout, data, offset } => {
                arrived += data.len() as u64;
                assert_eq!(offset, Some(arrived + lost));
            }
            ExecEvent::Dropped { bytes } => lost += bytes,
            ExecEvent::Exit(end) => exit = Some(end.code),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((arrived + lost, exit), (FLOOD_BYTES, Some(0)), "{arrived} arrived, {lost} were lost");

    // One line that does not end.
    output(&guest, "head -c 50000000 /dev/zero | tr '\\0' x; echo; echo last").await;
    let logged = guest.logs(5).await.expect("the console");
    assert!(logged.iter().map(String::len).sum::<usize>() < 1 << 20, "one line was kept whole");
    assert_eq!(logged.last().map(String::as_str), Some("last"));

    let grown = peak_kib(server.pid()) - before;
    assert!(grown < FLOOD_MEMORY_KIB, "the server grew by {grown} KiB");
    guest.destroy().await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_bomb_meets_its_limit_and_can_be_destroyed() {
    let image = Some("host".to_owned());
    let attack = Attack::by(&CreateRequest { image, vcpus: Some(0.5), ..small() }).await;
    let bomb = ExecRequest {
        command: "python3".to_owned(),
        args: Some(vec!["-c".to_owned(), FORK_BOMB.to_owned()]),
        mode: Some("argv".to_owned()),
        ..ExecRequest::default()
    };
    attack.guest.exec_background(&bomb).await.expect("it starts");
    let code = eventually("no command can be started", async || {
        attack.guest.exec(&script("true")).await.err().and_then(|error| error.code())
    })
    .await;
    assert_eq!(code, ErrorCode::SandboxPidsExhausted);
    attack.server.run(&["exec", attack.guest.id().as_str(), "--", "true"]).await.failed(125).says("process limit");
    // Files need no process.
    attack.guest.upload("/workspace/file", &b"content"[..], &UploadOptions::default()).await.expect("written");
    assert_eq!(attack.guest.read_file("/workspace/file").await.expect("read"), b"content");
    assert_eq!(attack.guest.glob("/workspace/*").await.expect("found"), ["/workspace/file"]);
    let stats = attack.guest.stats().await.expect("stats");
    assert_eq!((stats.pids_limit, stats.pids), (Some(64), Some(64)));
    attack.ends_well().await;
}

const FORK_BOMB: &str = "
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
";

/// The deadline ends a thousand processes that want all processor time and ignore
/// every signal that can be.
#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_that_spreads_ends_at_its_deadline() {
    let image = Some("host".to_owned());
    let large = CreateRequest { image, memory_mb: Some(1024), pids_limit: Some(1024), ..small() };
    let attack = Attack::by(&large).await;
    assert_eq!(output(&attack.guest, "nice").await, "0", "the agent's own priority is not for commands");
    let bomb = ExecRequest {
        command: "python3".to_owned(),
        args: Some(vec!["-c".to_owned(), SPREADING_BOMB.to_owned()]),
        mode: Some("argv".to_owned()),
        timeout: Some(Duration::from_secs(2).into()),
        ..ExecRequest::default()
    };
    assert_eq!(refusal(attack.guest.exec(&bomb).await), ErrorCode::Timeout);
    // Whoever has ended counts until it was taken note of.
    eventually("all of them are gone", async || {
        attack.guest.stats().await.expect("stats").pids.filter(|pids| *pids < 16)
    })
    .await;
    assert_eq!(output(&attack.guest, "echo alive").await, "alive");
    attack.ends_well().await;
}

const SPREADING_BOMB: &str = "
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def spread():
    while True:
        try:
            os.fork()
        except OSError:
            pass
        time.sleep(0.2)
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
spread()
";

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_used_up_ends_the_command_and_says_so() {
    let attack = Attack::by(&CreateRequest { memory_mb: Some(64), ..small() }).await;
    // `tail` keeps a line until it ends, and this one never does.
    let eaten = sh(&attack.guest, "echo begun; tail /dev/zero").await;
    assert_eq!((eaten.error, eaten.stdout.as_str()), (Some(ErrorCode::SandboxOom), "begun\n"), "{eaten:?}");
    let id = attack.guest.id().as_str();
    let ran = attack.server.run(&["exec", id, "--", "tail", "/dev/zero"]).await.says("SANDBOX_OOM");
    assert_eq!(ran.status(), Some(137), "{ran}");
    assert_eq!(output(&attack.guest, "echo alive").await, "alive");
    // Many at once, and in the background.
    for _ in 0..8 {
        attack.guest.exec_background(&script("tail /dev/zero")).await.expect("it starts");
    }
    eventually("all of them are ended", async || {
        let log = attack.guest.exec_log().await.expect("the log");
        log.iter().all(|command| command.exit_code.is_some()).then_some(())
    })
    .await;
    assert_eq!(output(&attack.guest, "echo alive").await, "alive");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_in_memory_that_is_full_says_so_until_there_is_room() {
    let disk = CreateRequest { disk: Some(Disk::Memory), disk_size_mb: Some(16), ..small() };
    let attack = Attack::by(&disk).await;
    let limits = attack.guest.get().await.expect("a record").limits.expect("limits");
    assert_eq!(limits.disk_backend.as_deref(), Some("memory"));
    let filled = sh(&attack.guest, "dd if=/dev/zero of=/workspace/large bs=1M count=64 2>&1").await;
    assert!(filled.exit_code != 0 && filled.stdout.contains("No space left"), "{filled:?}");

    let (large, options) = (std::io::Cursor::new(vec![7; 4 << 20]), UploadOptions::default());
    let uploaded = attack.guest.upload("/workspace/more", large, &options).await;
    assert_eq!(refusal(uploaded), ErrorCode::SandboxDiskFull);
    assert_eq!(refusal(attack.guest.stat("/workspace/more").await), ErrorCode::FileNotFound, "no half of it stays");
    let local = attack.server.site.home().join("large");
    fs::write(&local, vec![7; 4 << 20]).expect("written");
    let (local, remote) = (local.to_str().expect("text"), format!("{}:/workspace/", attack.guest.id()));
    let copied = attack.server.run(&["cp", local, &remote]).await.says("disk is full");
    assert_eq!(copied.status(), Some(1), "{copied}");

    // Commands still run, and removing makes room.
    assert_eq!(output(&attack.guest, "rm /workspace/large; echo room > /workspace/a; cat /workspace/a").await, "room");
    let shared = sh(&attack.guest, "dd if=/dev/zero of=/dev/shm/large bs=1M count=100 2>&1").await;
    assert!(shared.exit_code != 0, "{shared:?}");
    attack.ends_well().await;
}

/// A disk in memory that may grow beyond the memory limit: the limit wins.
#[tokio::test(flavor = "multi_thread")]
async fn files_in_memory_count_as_memory() {
    let disk = CreateRequest { disk: Some(Disk::Memory), disk_size_mb: Some(512), memory_mb: Some(64), ..small() };
    let attack = Attack::by(&disk).await;
    let filled = sh(&attack.guest, "dd if=/dev/zero of=/workspace/large bs=1M count=400").await;
    assert_eq!(filled.error, Some(ErrorCode::SandboxOom), "{filled:?}");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_burns_its_processor_is_held_to_its_share() {
    let attack = Attack::by(&CreateRequest { vcpus: Some(0.2), ..small() }).await;
    let spin = ExecRequest {
        timeout: Some(Duration::from_secs(2).into()),
        ..script("while :; do :; done & while :; do :; done")
    };
    assert_eq!(refusal(attack.guest.exec(&spin).await), ErrorCode::Timeout);
    // Every descendant went with the deadline.
    assert_eq!(output(&attack.guest, "ps | grep -c 'while [:]'; true").await, "0");
    attack.ends_well().await;
}

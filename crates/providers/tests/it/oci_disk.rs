//! Bounds on what a guest may write: that they hold, and that nothing stays.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use stacyvm_api::{Limit, LimitReport, SandboxId};
use stacyvm_providers::oci::OciProvider;
use stacyvm_sandbox::{
    DiskRequest, Provider, ProviderError, ResourceUsage, SandboxSpec, Session, SessionError, WriteOptions,
};

use crate::fixture::{self, Fixture, eventually, eventually_empty, spec};

const MIB: u64 = 1 << 20;

/// A disk smaller than the memory limit, so that writing it full never runs
/// into that.
const SIZE_MIB: u64 = 64;

/// Tells the test in a process of its own that it is the one to be killed, and
/// where its data is.
const CHURN_IN: &str = "STACYVM_TEST_CHURN_IN";

/// File by which it says that it has begun.
const RUNNING: &str = "running";

pub(crate) fn sized(mib: u64) -> SandboxSpec {
    SandboxSpec {
        disk: DiskRequest { size_mib: Some(mib), in_memory: false },
        requested: [Limit::Disk].into(),
        ..spec()
    }
}

fn in_memory(size_mib: Option<u64>) -> SandboxSpec {
    SandboxSpec { disk: DiskRequest { size_mib, in_memory: true }, ..spec() }
}

/// Makes a sandbox and tells what its record says of its disk.
pub(crate) async fn create(fixture: &Fixture, spec: &SandboxSpec) -> (SandboxId, LimitReport) {
    let id = SandboxId::random();
    let created = fixture.provider.create(&id, spec, &()).await;
    (id, created.unwrap_or_else(|error| panic!("{}", fixture::chain(&error))).limits)
}

pub(crate) fn assert_bounded_by(limits: &LimitReport, backend: &str) {
    assert!(limits.enforced.contains(&Limit::Disk) && !limits.unenforced.contains(&Limit::Disk), "{limits:?}");
    assert_eq!(limits.disk_backend.as_deref(), Some(backend));
}

async fn usage(fixture: &Fixture, id: &SandboxId) -> ResourceUsage {
    fixture.provider.usage(id).await.expect("usage")
}

/// A guest that writes all it can gets `size_mib` and no more, is told so, and
/// goes on working.
pub(crate) async fn assert_bytes_are_bounded(fixture: &Fixture, id: &SandboxId, size_mib: u64) {
    let empty = usage(fixture, id).await;
    let bounds = (size_mib * MIB * 9 / 10)..=(size_mib * MIB);
    assert!(bounds.contains(&empty.disk_limit_bytes), "{empty:?}");
    assert!(empty.disk_bytes.is_some_and(|bytes| bytes < MIB), "{empty:?}");

    let filled = fixture.sh(id, "dd if=/dev/zero of=/workspace/big bs=64k").await;
    let is_told = ["No space left on device", "Disk quota exceeded"].iter().any(|text| filled.stderr.contains(text));
    assert!(filled.exit.code == Some(1) && is_told, "{filled:?}");
    let written: u64 = fixture.output(id, "stat -c %s /workspace/big").await.parse().expect("a number");
    assert!(bounds.contains(&written), "{written} bytes of {size_mib} MiB");
    let full = usage(fixture, id).await;
    let counted = full.disk_bytes.expect("counted");
    assert!(counted >= written && counted <= full.disk_limit_bytes, "{full:?}, {written} bytes were written");

    let piece = futures_util::stream::iter([Ok(Bytes::from(vec![7; 256 << 10]))]).boxed();
    let refused = fixture.session(id).await.write("/workspace/more", piece, WriteOptions::default()).await;
    assert!(matches!(refused, Err(SessionError::DiskFull)), "{refused:?}");
    assert_eq!(fixture.output(id, "echo still here").await, "still here");
    fixture.output(id, "rm /workspace/big && echo fits > /workspace/small").await;
    assert_eq!(fixture.output(id, "cat /workspace/small").await, "fits");
    eventually("what was deleted counts no more", async || {
        usage(fixture, id).await.disk_bytes.is_some_and(|bytes| bytes < MIB)
    })
    .await;
}

/// A guest cannot make so many empty files either that others get none.
pub(crate) async fn assert_files_are_bounded(fixture: &Fixture, id: &SandboxId, size_mib: u64) {
    let script = "
import os
os.mkdir('/workspace/files')
count = 0
try:
    while count < 1_000_000:
        os.close(os.open(f'/workspace/files/{count}', os.O_CREAT))
        count += 1
except OSError as error:
    print(count, error.strerror)
";
    let said = fixture.output(id, &format!("python3 -c \"{script}\"")).await;
    let (count, error) = said.split_once(' ').expect("a count and an error");
    let (count, most): (u64, u64) = (count.parse().expect("a number"), size_mib * MIB / 8192);
    assert!((most / 2..=most).contains(&count), "{said} of {most}");
    assert!(["No space left on device", "Disk quota exceeded"].contains(&error), "{said}");
    fixture.output(id, "rm -r /workspace/files && echo > /workspace/another").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_is_held_by_a_file_system_of_its_own() {
    let fixture = Fixture::start().await;
    let (id, limits) = create(&fixture, &sized(SIZE_MIB)).await;
    assert_bounded_by(&limits, "loop");
    let (neighbour, _) = create(&fixture, &sized(SIZE_MIB)).await;
    let (plain, _) = create(&fixture, &spec()).await;

    assert_bytes_are_bounded(&fixture, &id, SIZE_MIB).await;
    assert_files_are_bounded(&fixture, &id, SIZE_MIB).await;
    fixture.sh(&id, "cat /dev/zero > /workspace/big").await;
    for other in [&neighbour, &plain] {
        fixture.output(other, "head -c 30m /dev/zero > /workspace/file && sync /workspace/file").await;
        assert_eq!(fixture.output(other, "stat -c %s /workspace/file").await, (30 * MIB).to_string());
    }
    for id in [id, neighbour, plain] {
        fixture.provider.destroy(&id).await.expect("destroyed, full or not");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_in_memory_is_held_to_its_size_and_charged() {
    let fixture = Fixture::start().await;
    let (id, limits) = create(&fixture, &in_memory(Some(SIZE_MIB))).await;
    assert_bounded_by(&limits, "memory");
    let before = usage(&fixture, &id).await.memory_bytes;
    fixture.output(&id, "head -c 50m /dev/zero > /workspace/file").await;
    let after = usage(&fixture, &id).await.memory_bytes;
    assert!(before < 40 * MIB && after > 50 * MIB, "{before} {after}");
    fixture.output(&id, "rm /workspace/file").await;
    assert_bytes_are_bounded(&fixture, &id, SIZE_MIB).await;
    assert_files_are_bounded(&fixture, &id, SIZE_MIB).await;

    // Without a size it is told that it is full before it is killed.
    let (other, limits) = create(&fixture, &in_memory(None)).await;
    assert_bounded_by(&limits, "memory");
    assert_bytes_are_bounded(&fixture, &other, spec().memory_mib / 2).await;
    assert_eq!(usage(&fixture, &other).await.oom_kills, 0);
    for id in [id, other] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_size_nothing_is_bounded_and_nothing_wrong_is_said() {
    let fixture = Fixture::start().await;
    let (id, limits) = create(&fixture, &spec()).await;
    assert_eq!(
        (limits.unenforced.as_slice(), limits.disk_backend.as_deref()),
        ([Limit::Disk].as_slice(), Some("none"))
    );
    let usage = usage(&fixture, &id).await;
    assert_eq!((usage.disk_bytes, usage.disk_limit_bytes), (None, 0));
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_held_is_refused_with_a_way_out() {
    let fixture = Fixture::with(|options| options.disk.loop_images = false).await;
    let (id, limits) = create(&fixture, &sized(SIZE_MIB)).await;
    assert_bounded_by(&limits, "memory");
    fixture.provider.destroy(&id).await.expect("destroyed");

    // More than the memory limit: the guest would be killed before it is full.
    let large = sized(spec().memory_mib + 1);
    let refused = fixture.provider.create(&SandboxId::random(), &large, &()).await;
    let Err(ProviderError::LimitUnsupported { message, hint }) = refused else { panic!("{refused:?}") };
    assert_eq!(message, "this host cannot enforce the limit on disk");
    for way_out in ["disk: memory", "prjquota", "/dev/loop-control", "e2fsprogs", "allow_unenforced", "switched off"] {
        assert!(hint.contains(way_out), "{way_out}: {hint}");
    }
    let (id, limits) = create(&fixture, &SandboxSpec { allow_unenforced: true, ..large }).await;
    assert_eq!(
        (limits.unenforced.as_slice(), limits.disk_backend.as_deref()),
        ([Limit::Disk].as_slice(), Some("none"))
    );
    fixture.provider.destroy(&id).await.expect("destroyed");

    let absurd = fixture.provider.create(&SandboxId::random(), &sized(u64::MAX), &()).await;
    assert!(matches!(absurd, Err(ProviderError::InvalidSpec { .. })), "{absurd:?}");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_what_bounds_a_disk() {
    for (loop_images, said) in [(true, "loop file systems"), (false, "in memory")] {
        let fixture = Fixture::with(|options| options.disk.loop_images = loop_images).await;
        let report = fixture.provider.check().await;
        let finding = report.findings.iter().find(|finding| finding.name == "oci.disk").expect("a finding");
        assert!(finding.message.contains(said) && finding.message.contains("no project quota"), "{finding:?}");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_are_asked_for_again_are_prepared() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.disks_ready(), 0, "nobody asked yet");
    let mut made = Vec::new();
    for mib in [8, 8] {
        made.push(create(&fixture, &sized(mib)).await.0);
    }
    eventually("one is ready", async || fixture.disks_ready() == 1).await;
    // The size holds, prepared or not.
    for mib in [8, 16, 1] {
        let (id, _) = create(&fixture, &sized(mib)).await;
        let limit = usage(&fixture, &id).await.disk_limit_bytes;
        assert!((mib * MIB * 9 / 10..=mib * MIB).contains(&limit), "{mib}: {limit}");
        made.push(id);
    }
    for id in made {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_size_that_is_expected_is_prepared_and_many_at_once_are_made() {
    const COUNT: usize = 20;
    let fixture = Fixture::with(|options| options.disk.expected_mib = Some(16)).await;
    eventually("one is ready", async || fixture.disks_ready() == 1).await;
    let mut making = tokio::task::JoinSet::new();
    for _ in 0..COUNT {
        let provider = fixture.provider.clone();
        making.spawn(async move {
            let id = SandboxId::random();
            provider.create(&id, &sized(16), &()).await.map(|_| id)
        });
    }
    let ids: Vec<SandboxId> = making.join_all().await.into_iter().collect::<Result<_, _>>().expect("all are made");
    for id in &ids {
        fixture.output(id, "echo mine > /workspace/file").await;
        fixture.provider.destroy(id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_outlive_the_server_and_go_with_their_sandbox() {
    let mut fixture = Fixture::start().await;
    let (id, _) = create(&fixture, &sized(SIZE_MIB)).await;
    let (memory, _) = create(&fixture, &in_memory(Some(SIZE_MIB))).await;
    let (lost, _) = create(&fixture, &sized(SIZE_MIB)).await;
    for id in [&id, &memory] {
        fixture.output(id, "head -c 20m /dev/zero > /workspace/file").await;
    }
    fixture.restart().await;
    for id in [&id, &memory] {
        let usage = usage(&fixture, id).await;
        assert!(usage.disk_bytes.is_some_and(|bytes| (20 * MIB..22 * MIB).contains(&bytes)), "{usage:?}");
        fixture.output(id, "rm /workspace/file").await;
        assert_bytes_are_bounded(&fixture, id, SIZE_MIB).await;
    }

    // As if the record of a running sandbox had been lost: its disk goes with
    // the processes that the sweep ends.
    std::fs::remove_dir_all(fixture.oci_dir().join("sandboxes").join(lost.as_str())).expect("removed");
    let freed = fixture.provider.sweep().await.expect("swept").join("\n");
    assert!(freed.contains(lost.as_str()), "{freed}");
    eventually("only the known one has a device", async || fixture.loop_devices().len() == 1 + fixture.disks_ready())
        .await;
    for id in [id, memory] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_at_any_point_leaves_no_disk() {
    if let Some(data) = std::env::var_os(CHURN_IN) {
        return churn(Path::new(&data)).await;
    }
    let data = tempfile::tempdir().expect("a directory");
    for milliseconds in [5, 20, 40, 60, 80, 100, 150, 200] {
        let mut server = Command::new(std::env::current_exe().expect("a path"))
            .args(["--exact", "oci_disk::a_server_killed_at_any_point_leaves_no_disk"])
            .env(CHURN_IN, data.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("it starts");
        let running = data.path().join(RUNNING);
        eventually("it runs", async || running.exists()).await;
        // Not waiting for anything: these are the points at which it is killed.
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        server.kill().expect("killed");
        server.wait().expect("ended");
        std::fs::remove_file(running).expect("removable");
    }
    let heir = Fixture::over(data.path()).await;
    heir.provider.sweep().await.expect("swept");
    for sandbox in heir.provider.list().await.expect("listed") {
        heir.provider.destroy(&sandbox.id).await.expect("destroyed");
    }
    eventually_empty("no device is left", async || heir.loop_devices()).await;
    heir.finish().await;
}

/// The process that is killed: makes and destroys sandboxes with disks.
async fn churn(data_dir: &Path) {
    let mut options = fixture::options(data_dir);
    options.disk.expected_mib = Some(8);
    let provider = OciProvider::open(options).await.expect("the provider opens");
    std::fs::write(data_dir.join(RUNNING), "").expect("writable");
    loop {
        for mib in [8, 16] {
            let id = SandboxId::random();
            provider.create(&id, &sized(mib), &()).await.expect("created");
            provider.destroy(&id).await.expect("destroyed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_files_give_the_host_its_room_back() {
    // A file system of the test's own, so that nobody else writes to it.
    let mounted = fixture::Mounted::make(&["mkfs.ext4", "-q"], "rw").expect("mounted");
    let fixture = Fixture::with(|options| options.data_dir = mounted.path().join("data")).await;
    let (id, _) = create(&fixture, &sized(SIZE_MIB)).await;
    let empty = mounted.used_bytes();
    fixture.output(&id, "head -c 50m /dev/urandom > /workspace/file && sync /workspace/file").await;
    eventually("the file takes room", async || {
        fixture.output(&id, "sync -f /workspace").await;
        mounted.used_bytes() > empty + 45 * MIB
    })
    .await;
    fixture.output(&id, "rm /workspace/file && sync -f /workspace").await;
    eventually("its room comes back", async || {
        fixture.provider.sweep().await.expect("swept");
        mounted.used_bytes() < empty + 5 * MIB
    })
    .await;
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_sees_neither_the_device_nor_where_its_file_is() {
    let fixture = Fixture::start().await;
    let (id, _) = create(&fixture, &sized(SIZE_MIB)).await;
    assert_eq!(fixture.output(&id, "cat /sys/block/loop*/loop/backing_file 2>/dev/null; true").await, "");
    assert_eq!(fixture.output(&id, "ls /dev | grep loop; true").await, "");
    let data = fixture.options.data_dir.display().to_string();
    let seen = fixture.output(&id, "cat /proc/self/mountinfo /proc/mounts").await;
    assert!(!seen.contains("loop") && !seen.contains(&data), "{seen}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

//! Disks that the file system itself bounds, on file systems made for the test.

use std::path::Path;
use std::process::Command;

use stacyvm_api::{FindingLevel, SandboxId};
use stacyvm_sandbox::Provider;

use crate::fixture::{Fixture, Mounted, eventually, spec};
use crate::guest_kernel;
use crate::oci_disk::{assert_bounded_by, assert_bytes_are_bounded, assert_files_are_bounded, create, sized};

const SIZE_MIB: u64 = 32;

#[tokio::test(flavor = "multi_thread")]
async fn a_project_quota_holds_on_ext4() {
    holds_on(&["mkfs.ext4", "-q", "-O", "project,quota"], "oci_disk_quota::a_project_quota_holds_on_ext4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_quota_holds_on_xfs() {
    holds_on(&["mkfs.xfs", "-q", "-f"], "oci_disk_quota::a_project_quota_holds_on_xfs").await;
}

/// Here, or where this kernel was built without quotas, in one that has them.
async fn holds_on(format: &[&str], test: &str) {
    match Mounted::make(format, "prjquota") {
        Ok(mounted) => holds(&mounted).await,
        Err(reason) if guest_kernel::is_inside() => panic!("{format:?}: {reason}"),
        Err(_) => guest_kernel::run(test),
    }
}

async fn holds(mounted: &Mounted) {
    let mut fixture = Fixture::with(|options| options.data_dir = mounted.path().join("data")).await;
    let report = fixture.provider.check().await;
    let finding = report.findings.iter().find(|finding| finding.name == "oci.disk").expect("a finding");
    assert!(finding.level == FindingLevel::Ok && finding.message.contains("by a project quota"), "{finding:?}");

    let (id, limits) = create(&fixture, &sized(SIZE_MIB)).await;
    assert_bounded_by(&limits, "project_quota");
    let (neighbour, limits) = create(&fixture, &spec()).await;
    assert_bounded_by(&limits, "project_quota");
    assert_ne!(project(&fixture, &id), project(&fixture, &neighbour));
    assert_bytes_are_bounded(&fixture, &id, SIZE_MIB).await;
    assert_files_are_bounded(&fixture, &id, SIZE_MIB).await;

    // As if the server had died before the launch.
    let (half, _) = create(&fixture, &sized(SIZE_MIB)).await;
    let project_of_half = project(&fixture, &half);
    std::fs::remove_file(fixture.oci_dir().join("sandboxes").join(half.as_str()).join("init.json")).expect("removed");
    fixture.restart().await;
    let freed = fixture.provider.sweep().await.expect("swept").join("\n");
    assert!(freed.contains(half.as_str()), "{freed}");
    eventually("its project is free", async || counted(mounted.path(), project_of_half).is_none()).await;

    assert_bytes_are_bounded(&fixture, &id, SIZE_MIB).await;
    fixture.sh(&id, "cat /dev/zero > /workspace/big").await;
    fixture.output(&neighbour, "head -c 40m /dev/zero > /workspace/file && sync /workspace/file").await;
    let usage = fixture.provider.usage(&neighbour).await.expect("usage");
    assert!(usage.disk_bytes.is_some_and(|bytes| bytes >= 40 << 20) && usage.disk_limit_bytes == 10 << 30, "{usage:?}");
    a_guest_cannot_leave_its_project(&fixture, &id).await;

    let projects = [project(&fixture, &id), project(&fixture, &neighbour)];
    for id in [&id, &neighbour] {
        fixture.provider.destroy(id).await.expect("destroyed, full or not");
    }
    eventually("their projects are free", async || {
        projects.iter().all(|project| counted(mounted.path(), *project).is_none())
    })
    .await;
    a_project_that_something_counts_to_is_not_used(&fixture, mounted.path(), projects[0]).await;
    fixture.finish().await;
}

/// By whatever a root inside may try.
async fn a_guest_cannot_leave_its_project(fixture: &Fixture, id: &SandboxId) {
    fixture.output(id, "rm -f /workspace/big; mkdir /workspace/tree; touch /workspace/tree/file").await;
    for command in ["chattr -p 0 /workspace/tree", "chattr -P /workspace/tree", "chattr -p 0 /workspace/tree/file"] {
        let tried = fixture.sh(id, command).await;
        assert_ne!(tried.exit.code, Some(0), "{command}: {tried:?}");
    }
    let filled = fixture.sh(id, "cat /dev/zero > /workspace/tree/file").await;
    assert_ne!(filled.exit.code, Some(0), "{filled:?}");
}

/// As while the files of an earlier sandbox are still being removed.
async fn a_project_that_something_counts_to_is_not_used(fixture: &Fixture, root: &Path, project_of_first: u32) {
    let left = root.join("left");
    std::fs::write(&left, "left").expect("written");
    let tagged = Command::new("chattr").args(["-p", &project_of_first.to_string()]).arg(&left).output();
    assert!(tagged.expect("chattr starts").status.success());
    // They come from the same range of uids, which is free again.
    let mut projects = Vec::new();
    for _ in 0..2 {
        let (id, _) = create(fixture, &sized(SIZE_MIB)).await;
        projects.push(project(fixture, &id));
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    assert!(!projects.contains(&project_of_first), "{projects:?}");
    std::fs::remove_file(left).expect("removable");
}

/// The number in a sandbox's record.
fn project(fixture: &Fixture, id: &SandboxId) -> u32 {
    let record = fixture.oci_dir().join("sandboxes").join(id.as_str()).join("state.json");
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).expect("readable")).expect("JSON");
    record["disk"]["project"].as_u64().and_then(|project| project.try_into().ok()).expect("a project")
}

/// What the file system still says of a project: its line in the report.
fn counted(root: &Path, project: u32) -> Option<String> {
    let report = Command::new("xfs_quota").args(["-f", "-x", "-c", "report -p -n -b -i"]).arg(root).output();
    let report = report.expect("xfs_quota starts");
    assert!(report.status.success(), "{}", String::from_utf8_lossy(&report.stderr));
    let text = String::from_utf8_lossy(&report.stdout).into_owned();
    assert!(text.contains("#0"), "{text}");
    let name = format!("#{project}");
    text.lines().find(|line| line.split_whitespace().next() == Some(&name)).map(str::to_owned)
}

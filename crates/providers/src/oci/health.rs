//! Whether this host can run sandboxes, and what to do where it cannot.

use std::os::fd::AsFd as _;

use stacyvm_sandbox::HealthReport;

use super::error::{KERNEL_FILES_FIX, OWNERS_FIXED, OWNERS_FIXED_FIX, OciError};
use super::launch::mounts;
use super::network;
use super::pairs::Pair;
use super::rootless::{self, Authority};
use super::runtime::Runtime;
use super::spawner::CallError;
use super::spawner::protocol::{Done, FailureKind, Job};
use crate::host::obstacle::Obstacle;
use crate::host::{cgroup, ids, is_ordinary_user};

/// First kernel whose overlayfs takes layers with shifted owners.
const NEEDED_KERNEL: (u32, u32) = (5, 19);

/// Looks at everything a sandbox needs, without side effects.
pub(super) async fn check(runtime: &Runtime) -> HealthReport {
    let mut report = HealthReport::default();
    kernel(&mut report);
    overlay(&mut report);
    launcher(runtime, &mut report).await;
    let pair = namespaces(runtime, &mut report).await;
    if is_ordinary_user() {
        users(runtime, &mut report).await;
    } else if let Some(pair) = pair {
        owners(runtime, &pair, &mut report);
    }
    control_groups(runtime, &mut report);
    runtime.disks.check(&mut report);
    network(runtime, &mut report);
    report
}

/// What can be said of a host before anything is opened or made on it.
pub(super) fn check_host() -> HealthReport {
    let mut report = HealthReport::default();
    kernel(&mut report);
    overlay(&mut report);
    let missing = cgroup::not_offered();
    if missing.is_empty() {
        report.ok("oci.cgroup", "the host has the controllers memory, cpu and pids, and they can be written");
    }
    for (controller, reason) in missing {
        report.warn(
            &format!("oci.cgroup.{controller}"),
            format!("the {controller} limit cannot be enforced: {reason}"),
            format!(
                "mount a control group hierarchy that has {controller}, read-write; a container needs --privileged for it"
            ),
        );
    }
    match network::nft() {
        Some(path) => report.ok("oci.nft", format!("{} makes the rules of sandboxes' networks", path.display())),
        None => report.warn("oci.nft", "sandboxes have no network: nft is not installed", "install nftables"),
    }
    report
}

fn kernel(report: &mut HealthReport) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (needed, lacks) = if is_ordinary_user() {
        (rootless::NEEDED_KERNEL, "does not let ordinary users mount image layers")
    } else {
        (NEEDED_KERNEL, "cannot shift the owners of image layers")
    };
    if version >= needed {
        report.ok("oci.kernel", format!("Linux {release}"));
    } else {
        let (major, minor) = needed;
        report.fail("oci.kernel", format!("Linux {release} {lacks}"), format!("run Linux {major}.{minor} or newer"));
    }
}

fn overlay(report: &mut HealthReport) {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        report.ok("oci.overlay", "the kernel has overlayfs");
    } else {
        report.warn(
            "oci.overlay",
            "the kernel does not show overlayfs; it may be a module not loaded yet",
            "modprobe overlay",
        );
    }
}

/// Whether the program that is to start sandboxes is still there.
async fn launcher(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "oci.runtime";
    let Some(binary) = &runtime.external else {
        return report.ok(NAME, "sandboxes are started by this program itself");
    };
    match binary.check().await {
        Ok(now) => {
            report
                .ok(NAME, format!("sandboxes are started by {} {} ({})", now.name, now.version, now.program.display()));
        }
        Err(refusal) => report.fail(NAME, chain(&refusal), refusal.fix()),
    }
}

/// Makes a pair and drops it: that is the surest way to know.
async fn namespaces(runtime: &Runtime, report: &mut HealthReport) -> Option<Pair> {
    const NAME: &str = "oci.namespaces";
    let error = match runtime.plain.take().await {
        Ok(pair) => {
            report.ok(NAME, "user and network namespaces can be made");
            return Some(pair);
        }
        Err(error) => error,
    };
    let kind = match &error {
        OciError::Launch(CallError::Failed(failure)) => Some(failure.kind),
        _ => None,
    };
    match kind {
        Some(FailureKind::NamespacesForbidden) => {
            let Obstacle { message, fix } = Obstacle::find();
            report.fail(NAME, message, fix);
        }
        Some(FailureKind::KernelFilesHidden) => report.fail(NAME, chain(&error), KERNEL_FILES_FIX),
        Some(FailureKind::System | FailureKind::UnknownUser | FailureKind::Image | FailureKind::OwnersFixed) | None => {
            let fix = "run the server as root; in a container, allow CAP_SYS_ADMIN and unshare; \
                       see that /proc/sys/user/max_user_namespaces and max_net_namespaces are not used up";
            report.fail(NAME, format!("namespaces cannot be made: {}", chain(&error)), fix);
        }
    }
    None
}

/// Whether layers below the data directory can be shown with a sandbox's owners.
fn owners(runtime: &Runtime, pair: &Pair, report: &mut HealthReport) {
    const NAME: &str = "oci.owners";
    let shifted = mounts::detached_copy(runtime.layout.root(), false)
        .and_then(|mount| mounts::restrict(mount.as_fd(), false, Some(pair.user.as_fd())));
    match shifted {
        Ok(()) => report.ok(NAME, "the owners of files in the data directory can be shifted"),
        Err(error) if mounts::is_owners_fixed(&error) => report.fail(NAME, OWNERS_FIXED, OWNERS_FIXED_FIX),
        Err(error) => report.fail(NAME, format!("{OWNERS_FIXED}: {error}"), "run the server as root"),
    }
}

/// How many uids an ordinary user's sandboxes have.
async fn users(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "oci.users";
    // Where there is no spawner, `oci.namespaces` says why.
    let Ok((Done::Authority(authority), _)) = runtime.spawner.call(Job::Authority, &[]).await else { return };
    let count = authority.ids();
    match authority {
        Authority::User { shortage: Some(reason), .. } => report.warn(
            NAME,
            format!("sandboxes have no user but root: {reason}"),
            "for more, install the package uidmap and give this user a line in /etc/subuid and in /etc/subgid, \
             such as NAME:100000:65536, then start the server again",
        ),
        Authority::User { .. } if count < ids::RANGE => report.warn(
            NAME,
            format!("sandboxes have only {count} uids"),
            "give this user at least 65536 ids in /etc/subuid and in /etc/subgid",
        ),
        Authority::User { .. } | Authority::Root => report.ok(NAME, format!("sandboxes have {count} uids")),
    }
}

fn control_groups(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "oci.cgroup";
    let missing: Vec<String> =
        runtime.cgroups.missing().map(|(controller, reason)| format!("{controller} ({reason})")).collect();
    if missing.is_empty() {
        return report.ok(NAME, "memory, cpu and process limits are enforced");
    }
    let fix = if is_ordinary_user() { cgroup::DELEGATION_FIX } else { cgroup::CONTROLLER_FIX };
    report.warn(NAME, format!("limits that cannot be enforced: {}", missing.join(", ")), fix);
}

fn network(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "oci.network";
    if is_ordinary_user() {
        report.ok(NAME, "sandboxes have no network (`bridge`): only root can connect them");
    } else if runtime.connected.is_none() && network::nft().is_none() {
        report.warn(
            NAME,
            "sandboxes have no network (`bridge`): nft is not installed",
            "install nftables and start the server again",
        );
    } else if runtime.connected.is_none() {
        report.ok(NAME, "sandboxes have no network: it is switched off");
    } else if std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|value| value.trim() == "1") {
        report.ok(NAME, "the host forwards packets of sandboxes");
    } else {
        report.ok(NAME, "the host will forward packets from the first sandbox with a network on");
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

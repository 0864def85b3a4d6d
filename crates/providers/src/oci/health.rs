//! Whether this host can run sandboxes, and what to do where it cannot.

use stacyvm_sandbox::HealthReport;

use super::cgroup;
use super::network;
use super::runtime::Runtime;

/// First kernel whose overlayfs takes layers with shifted owners.
const NEEDED_KERNEL: (u32, u32) = (5, 19);

/// Looks at everything a sandbox needs, without side effects.
pub(super) async fn check(runtime: &Runtime) -> HealthReport {
    let mut report = HealthReport::default();
    kernel(&mut report);
    overlay(&mut report);
    namespaces(runtime, &mut report).await;
    control_groups(runtime, &mut report);
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
        report.ok("oci.cgroup", "the host has the controllers memory, cpu and pids");
    }
    for (controller, reason) in missing {
        report.warn(
            &format!("oci.cgroup.{controller}"),
            format!("the {controller} limit cannot be enforced: {reason}"),
            format!("mount a control group hierarchy that has {controller}"),
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
    if version >= NEEDED_KERNEL {
        report.ok("oci.kernel", format!("Linux {release}"));
    } else {
        let (major, minor) = NEEDED_KERNEL;
        report.fail(
            "oci.kernel",
            format!("Linux {release} cannot shift the owners of image layers"),
            format!("run Linux {major}.{minor} or newer"),
        );
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

/// Makes a pair and drops it: that is the surest way to know.
async fn namespaces(runtime: &Runtime, report: &mut HealthReport) {
    match runtime.plain.take().await {
        Ok(_) => report.ok("oci.namespaces", "user and network namespaces can be made"),
        Err(error) => report.fail(
            "oci.namespaces",
            format!("namespaces cannot be made: {}", chain(&error)),
            "run the server as root; in a container, allow CAP_SYS_ADMIN and unshare; \
             see that /proc/sys/user/max_user_namespaces and max_net_namespaces are not used up",
        ),
    }
}

fn control_groups(runtime: &Runtime, report: &mut HealthReport) {
    let mut complete = true;
    for (controller, reason) in runtime.cgroups.missing() {
        complete = false;
        report.warn(
            &format!("oci.cgroup.{controller}"),
            format!("the {controller} limit cannot be enforced: {reason}"),
            "run as root on a host with this controller, or create sandboxes with allow_unenforced",
        );
    }
    if complete {
        report.ok("oci.cgroup", "memory, cpu and process limits are enforced");
    }
}

fn network(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "oci.network";
    if runtime.connected.is_none() && network::nft().is_none() {
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

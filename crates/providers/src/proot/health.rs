//! Whether this host can run sandboxes, and what to do where it cannot.

use std::path::Path;

use stacyvm_sandbox::HealthReport;

use super::create::KEY_FIX;
use super::error::INSTALL_FIX;
use super::launcher::{self, Known};
use super::options::DEFAULT_ROOTFS;
use super::runtime::{Runtime, is_root};
use super::{program, rootfs};

/// Looks at everything a sandbox needs, without side effects.
pub(super) async fn check(runtime: &Runtime) -> HealthReport {
    let mut report = HealthReport::default();
    binary(runtime, &mut report).await;
    ptrace(&mut report);
    root(runtime, &mut report);
    namespaces(runtime, &mut report);
    reach(&mut report);
    workspace(runtime, &mut report);
    limits(runtime, &mut report);
    report
}

async fn binary(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "proot.binary";
    let program = match program::find(&runtime.options) {
        Ok(program) => program,
        Err(error) => return report.fail(NAME, format!("PRoot is not installed: {error}"), INSTALL_FIX),
    };
    match program::version(&program).await {
        Some(version) => report.ok(NAME, format!("PRoot {version} ({})", program.display())),
        None => report.fail(NAME, format!("{} does not say its version", program.display()), INSTALL_FIX),
    }
}

/// PRoot traces its own children, which only a filter or Yama's strictest
/// setting forbids.
fn ptrace(report: &mut HealthReport) {
    const NAME: &str = "proot.ptrace";
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if scope.trim() == "3" {
        report.fail(
            NAME,
            "the kernel allows no ptrace (kernel.yama.ptrace_scope is 3)",
            "boot with kernel.yama.ptrace_scope=1",
        );
    } else {
        report.ok(NAME, "programs may trace their children");
    }
}

fn root(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "proot.rootfs";
    let path = &runtime.options.rootfs;
    let shown = path.display();
    if !path.is_dir() {
        let message = format!("image `rootfs` is not there: {shown} is no directory");
        // Whoever names a directory wants it; the usual one need not be there
        // for images of a registry.
        let is_optional = path == Path::new(DEFAULT_ROOTFS) && runtime.options.images.is_some();
        let fix = build_fix(path);
        return if is_optional { report.warn(NAME, message, fix) } else { report.fail(NAME, message, fix) };
    }
    if !["bin/sh", "usr/bin/sh"].iter().any(|shell| path.join(shell).symlink_metadata().is_ok()) {
        return report.warn(NAME, format!("{shown} has no /bin/sh"), build_fix(path));
    }
    report.ok(NAME, format!("image `rootfs` is {shown}"));
    let (there, missing) = rootfs::programs(path, &runtime.options.languages);
    if missing.is_empty() {
        report.ok("proot.languages", format!("image `rootfs` has {}", list(&there)));
    } else {
        report.warn(
            "proot.languages",
            format!("image `rootfs` lacks {}", list(&missing)),
            "install them there (`stacyvm rootfs build --include`), or take them out of providers.proot.languages",
        );
    }
}

/// Packages of a distribution need root; an image does not.
fn build_fix(path: &Path) -> String {
    let image = if is_root() { "" } else { "--image python:3.12-slim " };
    format!("stacyvm rootfs build {image}{}", path.display())
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "none of providers.proot.languages".to_owned() } else { names.join(", ") }
}

fn namespaces(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "proot.namespaces";
    match &runtime.shared {
        None => report.ok(NAME, "sandboxes have processes, mounts and a network of their own"),
        Some(why) if runtime.options.shared_network.is_given() => report.warn(
            NAME,
            format!("sandboxes share this host's processes and network: {why}"),
            "let ordinary users make user namespaces (user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)",
        ),
        Some(why) => report.fail(
            NAME,
            format!("sandboxes would share this host's network, and this server demands no key: {why}"),
            KEY_FIX,
        ),
    }
}

/// What holds guests where PRoot does not.
fn reach(report: &mut HealthReport) {
    const NAME: &str = "proot.landlock";
    const FIX: &str = "boot Linux 6.12 or later with Landlock (lsm=landlock,...)";
    match launcher::known() {
        Known::All => report.ok(NAME, "the kernel keeps sandboxes to their files, and signals inside"),
        Known::Files => report.warn(NAME, "the kernel keeps sandboxes to their files, but not their signals", FIX),
        Known::Nothing => {
            report.warn(NAME, "this kernel has no Landlock: PRoot alone keeps sandboxes to their files", FIX);
        }
    }
}

fn workspace(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "proot.workspace";
    match runtime.closed_directory() {
        None => report.ok(NAME, format!("sandboxes are kept in {}", runtime.layout.sandboxes().display())),
        Some(closed) => report.fail(
            NAME,
            format!("sandboxes run as users of their own, who cannot pass {}", closed.display()),
            "set providers.proot.workspace_base to a directory that everybody may pass, such as /var/lib/stacyvm-proot",
        ),
    }
}

fn limits(runtime: &Runtime, report: &mut HealthReport) {
    const NAME: &str = "proot.limits";
    let missing: Vec<&str> = runtime.cgroups.missing().map(|(controller, _)| controller).collect();
    if missing.is_empty() {
        return report.ok(NAME, "memory, cpu and process limits are enforced by control groups");
    }
    let pids = if runtime.counts_processes() { "processes by the kernel" } else { "no limit on processes" };
    report.warn(
        NAME,
        format!(
            "no control groups for {}: memory is held by a watcher, {pids}, and no limit on cpu",
            missing.join(", ")
        ),
        crate::host::cgroup::DELEGATION_FIX,
    );
}

//! `/proc` and `/sys`: what the kernel tells, less what a guest has no
//! business with. The lists are Docker's (moby `oci/defaults.go`).

use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

use super::mounts;
use crate::oci::spawner::protocol::{Failure, Step};

const MASKED_IN_PROC: [&str; 10] = [
    "proc/acpi",
    "proc/asound",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
];

const MASKED_IN_SYS: [&str; 3] = [
    // Ours: the host's paths of the files behind loop devices.
    "sys/devices/virtual/block",
    "sys/devices/virtual/powercap",
    "sys/firmware",
];

/// Masked for every processor that has it.
const MASKED_PER_CPU: &str = "thermal_throttle";
const CPUS: &str = "sys/devices/system/cpu";

/// What is mounted in these places is of no use for anything else.
const HARMLESS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const READ_ONLY: [&str; 5] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];

/// Mounts `proc` of this process's pid namespace below the current directory,
/// which holds `../empty` and `dev/null`.
pub(super) fn mount_proc() -> Result<(), Failure> {
    mounts::mount_new("proc", "proc", HARMLESS, "").step("mount /proc")?;
    for path in READ_ONLY {
        if exists(path) {
            mounts::bind(path, path, true).step("make kernel settings read-only")?;
        }
    }
    MASKED_IN_PROC.iter().try_for_each(|path| mask(path)).step("mask kernel files")
}

/// The same of `sys`, which shows this process's network namespace.
pub(super) fn mount_sys() -> Result<(), Failure> {
    mounts::mount_new("sysfs", "sys", HARMLESS | MountFlags::RDONLY, "").step("mount /sys")?;
    let masked = masked_in_sys(Path::new(CPUS)).step("mask kernel files")?;
    masked.iter().try_for_each(|path| mask(path)).step("mask kernel files")
}

/// What another runtime has to mask, and to make read-only.
pub(in crate::oci) fn hidden() -> io::Result<(Vec<String>, Vec<String>)> {
    let absolute = |path: String| format!("/{path}");
    let in_proc = MASKED_IN_PROC.map(str::to_owned).into_iter();
    let masked = in_proc.chain(masked_in_sys(&Path::new("/").join(CPUS))?);
    Ok((masked.map(absolute).collect(), READ_ONLY.map(|path| absolute(path.to_owned())).into()))
}

/// `cpus` is where the kernel lists its processors.
fn masked_in_sys(cpus: &Path) -> io::Result<Vec<String>> {
    let mut paths: Vec<String> = MASKED_IN_SYS.map(str::to_owned).into();
    for entry in std::fs::read_dir(cpus)? {
        let cpu = entry?.file_name();
        let Some(name) = cpu.to_str() else { continue };
        if name.strip_prefix("cpu").is_some_and(|number| number.parse::<u32>().is_ok()) {
            paths.push(format!("{CPUS}/{name}/{MASKED_PER_CPU}"));
        }
    }
    Ok(paths)
}

/// Covers a directory with an empty one and a file with `/dev/null`.
fn mask(path: &str) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => mounts::bind("../empty", path, true),
        Ok(_) => mounts::bind("dev/null", path, false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn exists(path: &str) -> bool {
    Path::new(path).symlink_metadata().is_ok()
}

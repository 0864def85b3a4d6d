//! `/proc` and `/sys`: what the kernel tells, less what a guest has no
//! business with. The lists are Docker's (moby `oci/defaults.go`).

use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

use super::mounts;
use crate::oci::spawner::protocol::{Failure, Step};

const MASKED: [&str; 13] = [
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
    // Ours: the host's paths of the files behind loop devices.
    "sys/devices/virtual/block",
    "sys/devices/virtual/powercap",
    "sys/firmware",
];

/// Masked for every processor that has it.
const MASKED_PER_CPU: &str = "thermal_throttle";
const CPUS: &str = "sys/devices/system/cpu";

const READ_ONLY: [&str; 5] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];

/// Mounts both below the current directory, which holds `../empty`.
pub(super) fn mount() -> Result<(), Failure> {
    let harmless = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mounts::mount_new("proc", "proc", harmless, "").step("mount /proc")?;
    mounts::mount_new("sysfs", "sys", harmless | MountFlags::RDONLY, "").step("mount /sys")?;
    for path in READ_ONLY {
        if exists(path) {
            mounts::bind(path, path, true).step("make kernel settings read-only")?;
        }
    }
    for path in masked(Path::new(CPUS)).step("mask kernel files")? {
        mask(&path).step("mask kernel files")?;
    }
    Ok(())
}

/// What another runtime has to mask, and to make read-only.
pub(in crate::oci) fn hidden() -> io::Result<(Vec<String>, Vec<String>)> {
    let absolute = |path: String| format!("/{path}");
    let masked = masked(&Path::new("/").join(CPUS))?;
    Ok((masked.into_iter().map(absolute).collect(), READ_ONLY.map(|path| absolute(path.to_owned())).into()))
}

/// Everything to mask; `cpus` is where the kernel lists its processors.
fn masked(cpus: &Path) -> io::Result<Vec<String>> {
    let mut paths: Vec<String> = MASKED.map(str::to_owned).into();
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

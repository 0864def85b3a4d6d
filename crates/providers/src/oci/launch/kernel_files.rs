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
    for path in MASKED {
        mask(path).step("mask kernel files")?;
    }
    for entry in std::fs::read_dir(CPUS).step("mask kernel files")? {
        let cpu = entry.step("mask kernel files")?.file_name();
        let is_cpu = cpu.to_str().and_then(|name| name.strip_prefix("cpu")).is_some_and(|n| n.parse::<u32>().is_ok());
        if is_cpu {
            mask(&format!("{CPUS}/{}/{MASKED_PER_CPU}", cpu.to_string_lossy())).step("mask kernel files")?;
        }
    }
    Ok(())
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

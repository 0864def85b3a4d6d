//! One sandbox's groups: setting limits, reading use, taking them away.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags};

use super::detect::Controller;
use super::{Limits, Place};
use crate::host::process;

/// Period in which a quota of processor time is counted (the kernel's default).
pub(super) const CPU_PERIOD_USEC: u64 = 100_000;

/// Least quota the kernel takes.
const MIN_CPU_QUOTA_USEC: u64 = 1_000;

/// How long a group may stay busy after its last process was killed: waits of
/// 1, 2, 4 … ms up to [`LONGEST_WAIT`], [`REMOVE_ATTEMPTS`] of them (about 3 s).
const REMOVE_ATTEMPTS: u32 = 36;
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// A reading; zero where the host has no such controller.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) cpu_usec: u64,
    /// Without file pages the kernel can drop at will, as Docker counts.
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u64,
    pub(crate) oom_kills: u64,
    pub(crate) pids_refused: u64,
}

pub(super) fn limit_v1(controller: Controller, group: &Path, limits: &Limits) -> io::Result<()> {
    match controller {
        Controller::Memory if limits.memory_bytes > 0 => {
            let bytes = limits.memory_bytes.to_string();
            std::fs::write(group.join("memory.limit_in_bytes"), &bytes)?;
            // Memory and swap together: the same bound leaves no swap.
            write_if_there(&group.join("memory.memsw.limit_in_bytes"), &bytes)
        }
        Controller::Cpu if limits.vcpus > 0.0 => {
            std::fs::write(group.join("cpu.cfs_period_us"), CPU_PERIOD_USEC.to_string())?;
            std::fs::write(group.join("cpu.cfs_quota_us"), cpu_quota_usec(limits.vcpus).to_string())
        }
        Controller::Pids if limits.pids > 0 => std::fs::write(group.join("pids.max"), limits.pids.to_string()),
        Controller::Memory | Controller::Cpu | Controller::CpuAccounting | Controller::Pids => Ok(()),
    }
}

pub(super) fn limit_v2(controller: Controller, group: &Path, limits: &Limits) -> io::Result<()> {
    match controller {
        Controller::Memory if limits.memory_bytes > 0 => {
            std::fs::write(group.join("memory.max"), limits.memory_bytes.to_string())?;
            write_if_there(&group.join("memory.swap.max"), "0")
        }
        Controller::Cpu if limits.vcpus > 0.0 => {
            std::fs::write(group.join("cpu.max"), format!("{} {CPU_PERIOD_USEC}", cpu_quota_usec(limits.vcpus)))
        }
        Controller::Pids if limits.pids > 0 => std::fs::write(group.join("pids.max"), limits.pids.to_string()),
        Controller::Memory | Controller::Cpu | Controller::CpuAccounting | Controller::Pids => Ok(()),
    }
}

/// Whether the kernel bounds swap in this hierarchy.
pub(super) fn bounds_swap(place: &Place) -> bool {
    match place {
        Place::V1(path) => path.join("memory.memsw.limit_in_bytes").exists(),
        Place::V2(path) => path.join("memory.swap.max").exists(),
    }
}

impl Reading {
    pub(super) fn add_v1(&mut self, controller: Controller, group: &Path) {
        match controller {
            Controller::Memory => {
                let droppable = field(group, "memory.stat", "total_inactive_file");
                self.memory_bytes = number(group, "memory.usage_in_bytes").saturating_sub(droppable);
                self.oom_kills = oom_kills_v1(group);
            }
            Controller::CpuAccounting => self.cpu_usec = number(group, "cpuacct.usage") / 1000,
            Controller::Pids => self.add_pids(group),
            Controller::Cpu => {}
        }
    }

    pub(super) fn add_v2(&mut self, controller: Controller, group: &Path) {
        match controller {
            Controller::Memory => {
                let droppable = field(group, "memory.stat", "inactive_file");
                self.memory_bytes = number(group, "memory.current").saturating_sub(droppable);
                self.oom_kills = oom_kills_v2(group);
            }
            Controller::Cpu | Controller::CpuAccounting => self.cpu_usec = field(group, "cpu.stat", "usage_usec"),
            Controller::Pids => self.add_pids(group),
        }
    }

    fn add_pids(&mut self, group: &Path) {
        self.pids = number(group, "pids.current");
        self.pids_refused = field(group, "pids.events", "max");
    }
}

/// Takes a group's limit on processor time away. Without any left in its quota a
/// process does not even die.
pub(crate) fn unthrottle(group: &Path) {
    for (file, none) in [("cpu.cfs_quota_us", "-1"), ("cpu.max", "max")] {
        // It has one of them or neither, or is gone.
        let _ = write_if_there(&group.join(file), none);
    }
}

/// Kills what is in a group and removes it. One that does not exist is fine.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    let mut wait = Duration::from_millis(1);
    for _ in 0..REMOVE_ATTEMPTS {
        match std::fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => kill_all(group)?,
            Err(error) => return Err(error),
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    std::fs::remove_dir(group)
}

fn kill_all(group: &Path) -> io::Result<()> {
    for pid in members(group)? {
        // It is ours to kill as long as it is still listed once we hold it.
        let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if members(group)?.contains(&pid) {
            process::kill(pidfd)?;
        }
    }
    Ok(())
}

fn members(group: &Path) -> io::Result<Vec<Pid>> {
    let procs = match std::fs::read_to_string(group.join("cgroup.procs")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        procs => procs?,
    };
    Ok(procs.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect())
}

pub(super) fn cpu_quota_usec(vcpus: f64) -> u64 {
    ((vcpus * CPU_PERIOD_USEC as f64).round() as u64).max(MIN_CPU_QUOTA_USEC)
}

fn write_if_there(path: &Path, text: &str) -> io::Result<()> {
    match std::fs::OpenOptions::new().write(true).open(path) {
        Ok(mut file) => io::Write::write_all(&mut file, text.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

pub(super) fn oom_kills_v1(group: &Path) -> u64 {
    field(group, "memory.oom_control", "oom_kill")
}

pub(super) fn oom_kills_v2(group: &Path) -> u64 {
    field(group, "memory.events", "oom_kill")
}

fn number(group: &Path, file: &str) -> u64 {
    std::fs::read_to_string(group.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A number out of lines of `name number`.
fn field(group: &Path, file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(group.join(file)).unwrap_or_default();
    text.lines()
        .find_map(|line| line.split_once(' ').filter(|(key, _)| *key == name)?.1.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_fractions_of_the_period() {
        assert_eq!(cpu_quota_usec(2.0), 200_000);
        assert_eq!(cpu_quota_usec(0.25), 25_000);
        assert_eq!(cpu_quota_usec(0.001), MIN_CPU_QUOTA_USEC);
    }

    #[test]
    fn readings_come_from_the_right_lines() {
        let group = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(group.path().join(file), text).unwrap();
        write("memory.usage_in_bytes", "1000\n");
        write("memory.stat", "inactive_file 1\ntotal_inactive_file 300\n");
        write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n");
        write("cpuacct.usage", "5000000\n");
        write("pids.current", "3\n");
        write("pids.events", "max 2\n");
        let mut reading = Reading::default();
        for controller in [Controller::Memory, Controller::CpuAccounting, Controller::Pids] {
            reading.add_v1(controller, group.path());
        }
        let expected = Reading { cpu_usec: 5000, memory_bytes: 700, pids: 3, oom_kills: 7, pids_refused: 2 };
        assert_eq!(reading, expected);
        assert_eq!(number(group.path(), "missing"), 0);
    }
}

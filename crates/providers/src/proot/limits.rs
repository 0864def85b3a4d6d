//! Which limits a sandbox has here, and who holds them.
//!
//! Control groups where the server has some. Without them the kernel still
//! bounds processes of a user (each sandbox is one, or has a user namespace)
//! and the length of a file; memory and files in total are held by a watcher
//! that looks a few times a second, so that they can be exceeded for as long.

use stacyvm_api::{Limit, LimitReport};
use stacyvm_sandbox::{ProviderError, SandboxSpec};

use super::runtime::Runtime;
use super::state::Watched;
use crate::host::cgroup;

/// What a sandbox may use; zero is unlimited.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    pub(super) disk_bytes: u64,
    /// Processes of its user, where that is one sandbox's alone.
    pub(super) max_processes: Option<u64>,
    pub(super) watched: Watched,
}

impl Limits {
    /// The part that control groups hold, where there are any.
    pub(super) fn for_groups(&self, spec: &SandboxSpec) -> cgroup::Limits {
        cgroup::Limits { memory_bytes: self.memory_bytes, vcpus: spec.vcpus, pids: spec.pids_limit }
    }
}

/// Decides, and refuses what was asked for and cannot be held.
pub(super) fn choose(runtime: &Runtime, spec: &SandboxSpec) -> Result<(Limits, LimitReport), ProviderError> {
    if spec.disk.in_memory {
        let message = "the proot runtime keeps no disk in memory: leave `disk.in_memory` out".to_owned();
        return Err(ProviderError::InvalidSpec { message });
    }
    let options = &runtime.options;
    let memory_mib = bounded(spec, Limit::Memory, Some(spec.memory_mib), options.max_memory_mib)?;
    let disk_mib = bounded(spec, Limit::Disk, spec.disk.size_mib, options.max_disk_mib)?;
    let (memory_bytes, disk_bytes) = (memory_mib << 20, disk_mib << 20);

    let groups = cgroup::Limits { memory_bytes, vcpus: spec.vcpus, pids: spec.pids_limit };
    let mut report = runtime.cgroups.report(&groups);
    let memory = memory_bytes > 0 && enforce(&mut report, Limit::Memory);
    let counts = runtime.counts_processes();
    if counts {
        enforce(&mut report, Limit::Pids);
    }
    // A bomb is stopped here too, but no fork is refused: that is no limit.
    let pids = report.unenforced.contains(&Limit::Pids);
    let watched = Watched { memory, pids, disk: disk_bytes > 0 };
    if watched.disk { &mut report.enforced } else { &mut report.unenforced }.push(Limit::Disk);
    report.disk_backend = Some(if watched.disk { "watched" } else { "none" }.to_owned());
    report.memory_mb = Some(memory_mib).filter(|mib| *mib > 0);
    report.disk_size_mb = Some(disk_mib).filter(|mib| *mib > 0);
    if watched.memory {
        // What is in swap counts as memory to the watcher.
        enforce(&mut report, Limit::Swap);
    }
    refuse_unenforced(spec, &report)?;
    let max_processes = Some(spec.pids_limit).filter(|most| counts && *most > 0);
    Ok((Limits { memory_bytes, disk_bytes, max_processes, watched }, report))
}

/// Somebody holds this one after all; false if the kernel did already.
fn enforce(report: &mut LimitReport, limit: Limit) -> bool {
    let Some(at) = report.unenforced.iter().position(|other| *other == limit) else { return false };
    report.enforced.push(report.unenforced.remove(at));
    true
}

/// What is asked for has to fit below the operator's bound; a default that does
/// not becomes it.
fn bounded(spec: &SandboxSpec, limit: Limit, wanted: Option<u64>, most: u64) -> Result<u64, ProviderError> {
    let wanted = wanted.unwrap_or(0);
    if most == 0 || (wanted > 0 && wanted <= most) {
        return Ok(wanted);
    }
    if spec.requested.contains(&limit) && wanted > most {
        let name = format!("{limit:?}").to_lowercase();
        let message = format!("the proot runtime gives a sandbox at most {most} MiB of {name}");
        return Err(ProviderError::InvalidSpec { message });
    }
    Ok(most)
}

fn refuse_unenforced(spec: &SandboxSpec, report: &LimitReport) -> Result<(), ProviderError> {
    let asked = |limit: &&Limit| match limit {
        Limit::Swap => spec.requested.contains(&Limit::Memory),
        Limit::Memory | Limit::Cpu | Limit::Pids | Limit::Disk => spec.requested.contains(limit),
    };
    let missing: Vec<&Limit> = report.unenforced.iter().filter(asked).collect();
    if missing.is_empty() || spec.allow_unenforced {
        return Ok(());
    }
    let names: Vec<String> = missing.iter().map(|limit| format!("{limit:?}").to_lowercase()).collect();
    Err(ProviderError::LimitUnsupported {
        message: format!("this host cannot enforce the limit on {}", names.join(" and ")),
        hint: "leave it out, accept it with allow_unenforced, or run the server with control groups (as root, or with \
               systemd-run --user --scope -p Delegate=yes)"
            .to_owned(),
    })
}

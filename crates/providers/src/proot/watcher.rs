//! Holding limits that the kernel does not hold here.
//!
//! A few times a second it adds up what PRoot's guests use. Beyond the memory
//! limit the largest of them are killed until the rest fits, and all if that does
//! not help; beyond the limits on processes or files all are, but not the agent,
//! so that callers can still look and clean up. A sandbox whose agent is gone is
//! ended, and so is one that stays beyond a limit without its commands.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType};
use stacyvm_api::Limit;

use super::copy::open_directory;
use super::members::{self, Member, Stopped};
use super::registry::Live;
use super::runtime::Runtime;
use super::state;
use crate::host::process;

/// How often memory and processes are looked at.
const PERIOD: Duration = Duration::from_millis(200);

/// Files are counted in every so many of those.
const DISK_EVERY: u64 = 25;

/// Looks in a row at which memory or processes may be beyond their limits before
/// all commands are killed, and before the sandbox is ended.
const PATIENT_EXCESSES: u64 = 5;
const MAX_EXCESSES: u64 = 50;

/// Deeper trees count as full: no descriptor table is deeper.
const MAX_DEPTH: usize = 300;

/// Looks until it is dropped.
pub(super) async fn watch(runtime: &Arc<Runtime>) {
    let mut timer = tokio::time::interval(PERIOD);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for round in 0u64.. {
        timer.tick().await;
        let live = runtime.registry.live();
        if live.is_empty() {
            continue;
        }
        let layout = runtime.layout.clone();
        let looked = tokio::task::spawn_blocking(move || {
            for live in live {
                let root = state::root_dir(&layout.sandbox(&live.record.id));
                let disk = (live.record.watched.disk && round.is_multiple_of(DISK_EVERY)).then_some(root);
                look(&live, disk.as_deref());
            }
        });
        if looked.await.is_err() {
            tracing::warn!("a look at what sandboxes use failed");
        }
    }
}

fn look(live: &Live, root: Option<&Path>) {
    if process::has_ended(live.proot()).unwrap_or(true) {
        return;
    }
    if live.agent.as_ref().is_some_and(|agent| matches!(process::open(agent), Ok(None))) {
        return end(live, "its agent is gone");
    }
    look_at_processes(live);
    if let Some(root) = root {
        look_at_files(live, root);
    }
}

fn look_at_processes(live: &Live) {
    let (record, proot) = (&live.record, live.identity.pid);
    if !record.watched.memory && !record.watched.pids {
        return;
    }
    let members = members::of(proot);
    let used: u64 = members.iter().map(|member| member.memory_bytes).sum();
    let too_large = record.watched.memory && used > record.memory_limit_bytes;
    let too_many = record.watched.pids && record.pids_limit > 0 && members.len() as u64 > record.pids_limit;
    let excesses = live.count_excess(too_large || too_many);
    if excesses > MAX_EXCESSES {
        end(live, "it stays beyond its limits");
    } else if too_many {
        kill_commands(live, Limit::Pids);
    } else if too_large && excesses > PATIENT_EXCESSES {
        kill_commands(live, Limit::Memory);
    } else if too_large {
        tracing::info!(sandbox = %record.id, used, "beyond its memory limit; its largest processes are killed");
        let commands = members.into_iter().filter(|member| Some(member.pid) != agent_of(live)).collect();
        live.count_kill(Limit::Memory);
        let largest = largest(commands, used - record.memory_limit_bytes);
        Stopped::new(live).kill(largest.into_iter().map(|member| member.pid));
    }
}

fn look_at_files(live: &Live, root: &Path) {
    let proot = live.identity.pid;
    let unlinked = members::unlinked_bytes(&members::of(proot));
    let used = disk_bytes(root).unwrap_or(0).saturating_add(unlinked);
    let has_commands = || members::of(proot).iter().any(|member| Some(member.pid) != agent_of(live));
    if used > live.record.disk_limit_bytes && has_commands() {
        kill_commands(live, Limit::Disk);
    }
}

fn agent_of(live: &Live) -> Option<i32> {
    live.agent.as_ref().map(|agent| agent.pid)
}

/// Everything but the agent.
fn kill_commands(live: &Live, limit: Limit) {
    tracing::info!(sandbox = %live.record.id, ?limit, "beyond this limit; its commands are killed");
    live.count_kill(limit);
    if let Err(error) = Stopped::new(live).kill_but(agent_of(live)) {
        tracing::warn!(sandbox = %live.record.id, %error, "its commands cannot be killed");
    }
}

pub(super) fn end(live: &Live, reason: &str) {
    tracing::warn!(sandbox = %live.record.id, reason, "a sandbox is ended");
    if let Err(error) = members::kill_with_proot(live) {
        tracing::warn!(sandbox = %live.record.id, %error, "it cannot be killed");
    }
}

/// As few as together have this much.
fn largest(mut members: Vec<Member>, excess: u64) -> Vec<Member> {
    members.sort_unstable_by_key(|member| std::cmp::Reverse(member.memory_bytes));
    let mut sum = 0u64;
    let needed = |member: &Member| {
        let before = sum;
        sum += member.memory_bytes;
        before < excess
    };
    members.into_iter().take_while(needed).collect()
}

/// What a tree takes on disk. The guest changes it meanwhile, and may nest it
/// as deep as it likes; links are not followed.
pub(super) fn disk_bytes(root: &Path) -> io::Result<u64> {
    let root = open_directory(rustix::fs::CWD, root)?;
    Ok(below(&root.into(), 0))
}

fn below(directory: &File, depth: usize) -> u64 {
    if depth > MAX_DEPTH {
        return u64::MAX;
    }
    let Ok(entries) = Dir::read_from(directory) else { return 0 };
    let mut total = 0u64;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(stat) = rustix::fs::statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        // A file with several names counts once for each: it cannot be told.
        total = total.saturating_add(stat.st_blocks.cast_unsigned() * 512);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            total = total.saturating_add(match open_directory(directory, name) {
                Ok(inner) => below(&inner.into(), depth + 1),
                // Closed to its owner, which is us: something is hidden in it.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => u64::MAX,
                Err(_) => 0,
            });
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_few_processes_go_as_have_what_is_too_much() {
        let member = |pid, memory_bytes| Member { pid, memory_bytes };
        let members = vec![member(1, 10), member(2, 300), member(3, 200), member(4, 0)];
        let pids = |excess| largest(members.clone(), excess).iter().map(|member| member.pid).collect::<Vec<_>>();
        assert_eq!(pids(1), [2]);
        assert_eq!(pids(300), [2]);
        assert_eq!(pids(301), [2, 3]);
        assert_eq!(pids(10_000), [2, 3, 1, 4]);
    }
}

//! Which processes belong to a sandbox, and ending all of them.
//!
//! Where PRoot is the first process of a pid namespace, the kernel ends
//! everything with it. Elsewhere the one thing that no guest can shed is its
//! tracer: sessions, parents and environments change, `TracerPid` does not. So
//! PRoot is stopped first, which stops every fork of a guest half-way, then
//! whatever it traces is killed, and PRoot last, or it goes on. Without the stop
//! a fork bomb grows faster than it is killed: what is killed waits for PRoot,
//! which sees to one process at a time. Should PRoot have died before, its
//! guests are known by the sandbox's own uid, or by what they have open of the
//! sandbox's root.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};

use tokio::io::Interest;

use super::error::ProotError;
use super::registry::Live;
use super::state::Record;
use crate::host::process::Identity;
use crate::host::{process, sys};

/// How long killed processes may take to go.
const DEATH_LIMIT: Duration = Duration::from_secs(20);

/// Between two looks at the process table.
const PAUSE: Duration = Duration::from_millis(5);

/// A process, as the table shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    pid: i32,
    /// Real, effective, saved, and of files.
    uids: [u32; 4],
    tracer: i32,
}

/// Kills everything of a sandbox and waits until it is gone.
pub(super) async fn end(live: &Arc<Live>, sandbox: &Path) -> Result<(), ProotError> {
    let unkillable = || ProotError::Unkillable(live.record.id.clone());
    let killing = Arc::clone(live);
    let killed = tokio::task::spawn_blocking(move || kill_with_proot(&killing)).await;
    let killed = killed.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
    for process in killed.map_err(ProotError::system("kill the sandbox"))? {
        let process = sys::watch(process, Interest::READABLE).map_err(ProotError::system("watch a process"))?;
        let ended = tokio::time::timeout(DEATH_LIMIT, process.readable()).await.map_err(|_| unkillable())?;
        ended.map(drop).map_err(ProotError::system("wait for a process to end"))?;
    }
    match tokio::time::timeout(DEATH_LIMIT, live.ended()).await {
        Ok(ended) => ended.map_err(ProotError::system("wait for the sandbox's end"))?,
        Err(_) => return Err(unkillable()),
    }
    end_stragglers(&live.record, sandbox).await
}

/// Kills all of a sandbox; what is returned may take a moment to end.
pub(super) fn kill_with_proot(live: &Live) -> io::Result<Vec<OwnedFd>> {
    if live.record.namespaces || process::has_ended(live.proot())? {
        return process::kill(live.proot()).map(|()| Vec::new());
    }
    let stopped = Stopped::new(live);
    let killed = stopped.kill_but(None)?;
    // Before it goes on.
    process::kill(live.proot())?;
    Ok(killed)
}

/// PRoot, stopped until this is dropped. A stopped tracer lets nobody go on: a
/// fork ends half-way, and its child does not begin.
pub(super) struct Stopped<'a> {
    live: &'a Live,
    _alone: MutexGuard<'a, ()>,
}

impl<'a> Stopped<'a> {
    pub(super) fn new(live: &'a Live) -> Self {
        let alone = live.only_one_stops_it();
        // One that has ended stops nobody.
        let _ = rustix::process::pidfd_send_signal(live.proot(), Signal::STOP);
        Self { live, _alone: alone }
    }

    /// Kills whatever PRoot traces, except for one, and returns it.
    pub(super) fn kill_but(&self, spared: Option<i32>) -> io::Result<Vec<OwnedFd>> {
        let proot = self.live.identity.pid;
        let deadline = Instant::now() + DEATH_LIMIT;
        let mut seen: HashSet<i32> = spared.into_iter().collect();
        let mut killed = Vec::new();
        loop {
            let fresh: Vec<Row> = table().filter(|row| row.tracer == proot && seen.insert(row.pid)).collect();
            if fresh.is_empty() {
                break;
            }
            killed.extend(fresh.iter().filter_map(|row| kill_exactly(row, |row| row.tracer == proot)));
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(PAUSE);
        }
        // They wait at their exit until PRoot has seen it, unless they are killed there.
        killed.iter().try_for_each(process::kill)?;
        Ok(killed)
    }

    /// Kills some of what it traces.
    pub(super) fn kill(&self, pids: impl IntoIterator<Item = i32>) {
        let tracer = self.live.identity.pid;
        for pid in pids {
            kill_exactly(&Row { pid, uids: [0; 4], tracer }, |row| row.tracer == tracer);
        }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        go_on(self.live.proot());
    }
}

/// Lets a PRoot go on that was stopped; any other is as it was.
pub(super) fn go_on(proot: impl AsFd) {
    let _ = rustix::process::pidfd_send_signal(proot, Signal::CONT);
}

/// Whatever goes on without its PRoot.
pub(super) async fn end_stragglers(record: &Record, sandbox: &Path) -> Result<(), ProotError> {
    if record.namespaces {
        return Ok(());
    }
    let failed = ProotError::system("kill what is left of the sandbox");
    if let Some(uid) = record.uid {
        return end_all(|row| row.uids.contains(&uid)).await.map_err(failed);
    }
    let (own, sandbox) = (rustix::process::geteuid().as_raw(), sandbox.to_owned());
    end_all(move |row| row.uids[0] == own && uses(row.pid, &sandbox)).await.map_err(failed)
}

/// Whether a process works in a directory, or runs a program of it.
fn uses(pid: i32, directory: &Path) -> bool {
    let within =
        |link: &str| std::fs::read_link(format!("/proc/{pid}/{link}")).is_ok_and(|to| to.starts_with(directory));
    let prefix = format!("{}/", directory.display());
    ["cwd", "exe", "root"].into_iter().any(within)
        || std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains(&prefix))
}

/// Kills until none is found any more.
async fn end_all(is_member: impl Fn(&Row) -> bool) -> io::Result<()> {
    let deadline = Instant::now() + DEATH_LIMIT;
    loop {
        let mut found = 0;
        for row in table().filter(&is_member) {
            found += 1;
            kill_exactly(&row, &is_member);
        }
        if found == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Kills the process that was seen, never one that got its number since.
fn kill_exactly(row: &Row, is_member: impl Fn(&Row) -> bool) -> Option<OwnedFd> {
    let pidfd = hold(Pid::from_raw(row.pid)?).ok()?;
    let is_it = read_row(row.pid).is_some_and(|now| is_member(&now));
    (is_it && process::kill(&pidfd).is_ok()).then_some(pidfd)
}

fn hold(pid: Pid) -> rustix::io::Result<OwnedFd> {
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
}

/// Every process that has not ended.
fn table() -> impl Iterator<Item = Row> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| read_row(entry.file_name().to_str()?.parse().ok()?))
}

fn read_row(pid: i32) -> Option<Row> {
    parse_row(pid, &std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// `proc_pid_status(5)`; `None` for one that has ended.
fn parse_row(pid: i32, status: &str) -> Option<Row> {
    // The name comes first and can hold no line break.
    let fields = |name: &str| Some(status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace());
    if matches!(fields("State:")?.next()?, "Z" | "X") {
        return None;
    }
    let uids: Vec<u32> = fields("Uid:")?.map(str::parse).collect::<Result<_, _>>().ok()?;
    Some(Row { pid, uids: uids.try_into().ok()?, tracer: fields("TracerPid:")?.next()?.parse().ok()? })
}

/// A process below PRoot, with what it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) pid: i32,
    pub(super) memory_bytes: u64,
}

/// Everything that PRoot traces.
pub(super) fn of(proot: i32) -> Vec<Member> {
    table()
        .filter(|row| row.tracer == proot)
        .map(|row| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", row.pid)).unwrap_or_default();
            Member { pid: row.pid, memory_bytes: memory_bytes(&status) }
        })
        .collect()
}

/// What a process has of its own, in memory or swapped out.
fn memory_bytes(status: &str) -> u64 {
    let kib = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    ["RssAnon:", "RssShmem:", "VmSwap:"].into_iter().filter_map(kib).sum::<u64>() << 10
}

/// What files take that have no name any more, but are open.
pub(super) fn unlinked_bytes(members: &[Member]) -> u64 {
    let open = members.iter().flat_map(|member| std::fs::read_dir(format!("/proc/{}/fd", member.pid)));
    let files = open.flatten().flatten().filter_map(|entry| std::fs::metadata(entry.path()).ok());
    let unlinked = files.filter(|file| file.is_file() && file.nlink() == 0);
    let distinct: HashMap<(u64, u64), u64> =
        unlinked.map(|file| ((file.dev(), file.ino()), file.blocks() * 512)).collect();
    distinct.values().sum()
}

/// Whether it is certain that PRoot has no child, not even the agent: not every
/// kernel tells.
pub(super) fn is_childless(proot: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{proot}/task/{proot}/children")).is_ok_and(|pids| pids.trim().is_empty())
}

/// The agent: PRoot's first child.
pub(super) fn agent_of(proot: i32) -> Option<Identity> {
    let children = std::fs::read_to_string(format!("/proc/{proot}/task/{proot}/children")).ok()?;
    let identified =
        children.split_whitespace().filter_map(|pid| process::identify(Pid::from_raw(pid.parse().ok()?)?).ok());
    identified.min_by_key(|identity| identity.start_time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_the_dead_are_not_there() {
        let status = "Name:\tx\nState:\tS (sleeping)\nTracerPid:\t42\nUid:\t7\t8\t9\t8\n";
        assert_eq!(parse_row(5, status), Some(Row { pid: 5, uids: [7, 8, 9, 8], tracer: 42 }));
        assert_eq!(parse_row(5, &status.replace("S (sleeping)", "Z (zombie)")), None);
        assert_eq!(parse_row(5, ""), None);
        assert_eq!(memory_bytes("RssAnon:\t     100 kB\nRssFile:\t 7 kB\nVmSwap:\t 4 kB\n"), 104 << 10);
    }

    #[tokio::test]
    async fn what_runs_from_a_directory_is_found_and_ended() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").current_dir(directory.path()).spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(uses(pid, directory.path()));
        assert!(!uses(std::process::id().cast_signed(), directory.path()));
        let reaped = std::thread::spawn(move || child.wait().unwrap());
        end_all(|row| row.pid == pid && uses(row.pid, directory.path())).await.unwrap();
        assert!(!reaped.join().unwrap().success());
    }
}

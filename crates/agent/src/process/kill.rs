//! Killing a command with every descendant.
//!
//! All of them are below the command's supervisor (see [`super::supervisor`]).
//! A pass reads the process table, kills what is below, and looks again until
//! nothing is left. A process that forks faster than it can be found is stopped
//! first, together with everything else in the sandbox, for a moment.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::{Instant, sleep};

use super::mark::Mark;

/// Passes before everything is stopped for the next one.
const PASSES_BEFORE_FREEZE: u32 = 20;

/// So many processes that do not become fewer are stopped at once: to look for
/// them takes the longer the more there are.
const CROWD: usize = 64;

/// Longest look at the table while others run. Where all memory is used up each
/// entry costs a process, whose place the others take at once.
const LONGEST_LOOK: Duration = Duration::from_millis(250);

/// A process that the kernel does not let go (waiting for a dead disk) is left.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);

/// Time for the killed to end, growing from pass to pass.
const FIRST_PAUSE: Duration = Duration::from_micros(300);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Table entries read before other work gets a turn.
const ENTRIES_PER_TURN: usize = 128;

/// What a command has started, and how it is found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree {
    /// All of it is below this process, which is not part of it.
    pub root: i32,
    /// Where the kernel does not keep it there: see [`super::mark`].
    pub mark: Option<Mark>,
}

/// Kills a whole tree, without its root, and returns when nothing of it is left.
/// `may_freeze` is for PID 1 only: it stops every other process.
pub(crate) async fn kill_descendants(tree: Tree, may_freeze: bool) {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    let (mut before, mut keeps_up) = (usize::MAX, false);
    for pass in 0u32.. {
        let freeze = may_freeze && (keeps_up || pass > 0 && pass % PASSES_BEFORE_FREEZE == 0);
        let killed = if freeze { Some(frozen_pass(tree)) } else { pass_once(tree, may_freeze).await };
        if killed == Some(0) || started.elapsed() > GIVE_UP_AFTER {
            return;
        }
        keeps_up = killed.is_none_or(|killed| killed >= CROWD.max(before));
        before = killed.unwrap_or(usize::MAX);
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Inodes of all sockets that this process's descendants hold open.
pub(crate) fn descendant_sockets() -> HashSet<u64> {
    let table: HashMap<i32, Row> = pids().filter_map(read_row).map(|row| (row.pid, row)).collect();
    let own = std::process::id() as i32;
    let mut sockets = HashSet::new();
    for row in table.values().filter(|row| is_below(row, own, &table)) {
        for entry in std::fs::read_dir(format!("/proc/{}/fd", row.pid)).into_iter().flatten().flatten() {
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let inode = target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']'));
            sockets.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    sockets
}

/// The parent of a process that lives; zero when it lies outside this pid
/// namespace.
pub(crate) fn parent(pid: i32) -> Option<i32> {
    read_row(pid).filter(|row| !row.dead).map(|row| row.parent)
}

/// One row of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    pid: i32,
    parent: i32,
    /// Ended; a process whose first thread alone has ended still counts as alive.
    dead: bool,
    start_ticks: u64,
}

/// How many were killed; `None` if looking took too long, where that counts.
async fn pass_once(tree: Tree, in_time: bool) -> Option<usize> {
    let started = Instant::now();
    let mut table = HashMap::new();
    for (index, pid) in pids().enumerate() {
        if let Some(row) = read_row(pid) {
            table.insert(pid, row);
        }
        if in_time && started.elapsed() > LONGEST_LOOK {
            return None;
        }
        if index % ENTRIES_PER_TURN == ENTRIES_PER_TURN - 1 {
            tokio::task::yield_now().await;
        }
    }
    Some(kill_found(tree, &table, kill_exactly))
}

/// As PID 1: nothing can fork while the table is read, nor take the number of
/// what was read in it.
fn frozen_pass(tree: Tree) -> usize {
    let _ = signal_everybody(Signal::STOP);
    let table: HashMap<i32, Row> = pids().filter_map(read_row).map(|row| (row.pid, row)).collect();
    let killed = kill_found(tree, &table, |row| {
        let _ = Pid::from_raw(row.pid).map(|pid| rustix::process::kill_process(pid, Signal::KILL));
    });
    let _ = signal_everybody(Signal::CONT);
    killed
}

fn kill_found(tree: Tree, table: &HashMap<i32, Row>, kill: impl Fn(&Row)) -> usize {
    let mut killed = 0;
    let is_part = |row: &Row| is_below(row, tree.root, table) || tree.mark.is_some_and(|mark| mark.is_on(row.pid));
    for row in table.values() {
        if !row.dead && is_part(row) {
            kill(row);
            killed += 1;
        }
    }
    killed
}

fn is_below(row: &Row, root: i32, table: &HashMap<i32, Row>) -> bool {
    let mut parent = row.parent;
    // A table read while it changes may contain a cycle.
    for _ in 0..=table.len() {
        if parent == root {
            return true;
        }
        match table.get(&parent) {
            Some(above) if above.pid != above.parent => parent = above.parent,
            _ => return false,
        }
    }
    false
}

/// Kills the process that was seen, never one that got its number since.
fn kill_exactly(row: &Row) {
    let Some(pid) = Pid::from_raw(row.pid) else { return };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => {
            let is_it = read_row(row.pid).is_some_and(|now| now.start_ticks == row.start_ticks);
            // Where guests share the host's processes, the call is not there.
            if is_it && rustix::process::pidfd_send_signal(&fd, Signal::KILL) == Err(Errno::NOSYS) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        Err(Errno::SRCH) => {}
        // Runtimes without pidfds.
        Err(_) => {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// `kill(-1)`: every process but PID 1 itself. One system call under the
/// kernel's lock, so that nothing forks past it.
#[expect(unsafe_code, reason = "rustix has no kill(-1)")]
pub(crate) fn signal_everybody(signal: Signal) -> std::io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::kill(-1, signal.as_raw()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn pids() -> impl Iterator<Item = i32> {
    std::fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn read_row(pid: i32) -> Option<Row> {
    parse_row(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// `proc_pid_stat(5)`. The name may contain anything, also `)`.
fn parse_row(pid: i32, stat: &[u8]) -> Option<Row> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let text = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    // Numbered from the state, which is field 3 of the manual page.
    let state = *fields.first()?;
    let threads: u32 = fields.get(17)?.parse().ok()?;
    Some(Row {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        dead: matches!(state, "Z" | "X" | "x") && threads <= 1,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pid: i32, parent: i32) -> (i32, Row) {
        (pid, Row { pid, parent, dead: false, start_ticks: 1 })
    }

    #[test]
    fn descendants_are_found_at_any_depth_and_cycles_end() {
        let table = HashMap::from([row(2, 1), row(3, 2), row(4, 3), row(5, 1), row(6, 7), row(7, 6)]);
        let below: Vec<i32> = {
            let mut found: Vec<i32> =
                table.values().filter(|row| is_below(row, 2, &table)).map(|row| row.pid).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(below, [3, 4]);
    }

    #[test]
    fn a_hostile_name_does_not_confuse_the_parser() {
        let stat = b"17 (a) R 1 (b) S 4 17 17 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 3 0 987654 0 0";
        let expected = Row { pid: 17, parent: 4, dead: false, start_ticks: 987_654 };
        assert_eq!(parse_row(17, stat), Some(expected));
        assert_eq!(parse_row(17, b"17 (broken"), None);

        let own = read_row(std::process::id() as i32).expect("this process is in the table");
        assert!(!own.dead && own.start_ticks > 0);
    }
}

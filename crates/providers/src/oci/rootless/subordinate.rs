//! The uids and gids that an ordinary user has besides his own.
//!
//! The administrator lists them in `/etc/subuid` and `/etc/subgid`
//! (subuid(5)); `newuidmap` and `newgidmap`, which are setuid, check the list
//! and write the map that the kernel would not take from us.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use crate::host::ids::RANGE;

/// Where distributions put setuid programs; the spawner has no `PATH`.
const PROGRAM_DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin"];

/// A lookup of the user may ask the network.
const HELPER_LIMIT: Duration = Duration::from_secs(10);

/// Longest complaint of a helper that is passed on.
const MAX_COMPLAINT_BYTES: u64 = 1024;

/// A whole map: our own user as 0, and what the lists give from 1 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SubordinateIds {
    users: List,
    groups: List,
}

/// The ids of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct List {
    helper: PathBuf,
    extents: Vec<Extent>,
}

/// A run of ids of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    first: u32,
    count: u32,
}

impl SubordinateIds {
    /// What this process's user has; the error says why that is nothing, and
    /// what to do.
    pub(super) fn find() -> Result<Self, String> {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let owners = owners(&passwd, rustix::process::getuid().as_raw());
        let mut users = List::find("newuidmap", "/etc/subuid", &owners)?;
        let mut groups = List::find("newgidmap", "/etc/subgid", &owners)?;
        let count = total(&users.extents).min(total(&groups.extents));
        for list in [&mut users, &mut groups] {
            list.extents = first(&list.extents, count);
        }
        Ok(Self { users, groups })
    }

    /// How many ids there are, our own included.
    pub(super) fn count(&self) -> u32 {
        1 + total(&self.users.extents)
    }

    /// Gives them to the user namespace of a process that has no map yet.
    pub(super) fn install(&self, pid: Pid) -> Result<(), String> {
        self.users.install(pid, rustix::process::getuid().as_raw())?;
        self.groups.install(pid, rustix::process::getgid().as_raw())
    }
}

impl List {
    fn find(helper: &str, file: &str, owners: &[String]) -> Result<Self, String> {
        let mut paths = PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(helper));
        let Some(path) = paths.find(|path| path.is_file()) else {
            return Err(format!("{helper} is not installed (package uidmap)"));
        };
        let extents = extents(&std::fs::read_to_string(file).unwrap_or_default(), owners);
        if extents.is_empty() {
            return Err(format!("{file} has no line for this user, such as {}:100000:65536", owners[0]));
        }
        Ok(Self { helper: path, extents })
    }

    /// `own` becomes 0, the others follow.
    fn install(&self, pid: Pid, own: u32) -> Result<(), String> {
        let mut numbers = vec![pid.as_raw_pid().cast_unsigned(), 0, own, 1];
        let mut inside = 1;
        for extent in &self.extents {
            numbers.extend([inside, extent.first, extent.count]);
            inside += extent.count;
        }
        run(&self.helper, &numbers)
    }
}

/// Names by which the lists may speak of a user, best first.
fn owners(passwd: &str, uid: u32) -> Vec<String> {
    let number = uid.to_string();
    let mut owners: Vec<String> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.get(2) == Some(&number.as_str()) && !fields[0].is_empty())
        .map(|fields| fields[0].to_owned())
        .collect();
    owners.push(number);
    owners
}

/// The runs of a list that belong to one of the owners, in order, as far as a
/// sandbox has use for them.
fn extents(list: &str, owners: &[String]) -> Vec<Extent> {
    let all: Vec<Extent> = list
        .lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let owner = fields.next()?;
            let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            (owners.iter().any(|known| known == owner) && count > 0).then_some(Extent { first, count })
        })
        .collect();
    first(&all, RANGE - 1)
}

/// As many ids of these runs as asked for.
fn first(extents: &[Extent], mut count: u32) -> Vec<Extent> {
    let mut taken = Vec::new();
    for extent in extents {
        let part = extent.count.min(count);
        if part > 0 {
            taken.push(Extent { first: extent.first, count: part });
        }
        count -= part;
    }
    taken
}

fn total(extents: &[Extent]) -> u32 {
    extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.count))
}

fn run(helper: &Path, numbers: &[u32]) -> Result<(), String> {
    let name = helper.file_name().unwrap_or_default().to_string_lossy();
    let failed = |error: &dyn std::fmt::Display| format!("{name} failed: {error}");
    let mut child = Command::new(helper)
        .args(numbers.iter().map(u32::to_string))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error))?;
    if !ends_in_time(&child).map_err(|error| failed(&error))? {
        // Best effort: it is not ours to wait for any longer.
        let _ = child.kill();
        return Err(failed(&format_args!("no answer within {} s", HELPER_LIMIT.as_secs())));
    }
    let status = child.wait().map_err(|error| failed(&error))?;
    if status.success() {
        return Ok(());
    }
    let mut complaint = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(MAX_COMPLAINT_BYTES).read_to_end(&mut complaint);
    }
    Err(failed(&String::from_utf8_lossy(&complaint).trim()))
}

fn ends_in_time(child: &std::process::Child) -> std::io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: HELPER_LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    Ok(rustix::event::poll(&mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)], Some(&limit))? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n";

    #[test]
    fn lists_speak_of_users_by_name_or_number() {
        let owners = owners(PASSWD, 1000);
        assert_eq!(owners, ["ada", "1000"]);
        let list = "# none\nbob:5:5\nada:100000:10\n1000:300000:20\nada:broken\nada:7:0\n";
        let found = extents(list, &owners);
        assert_eq!(found, [Extent { first: 100_000, count: 10 }, Extent { first: 300_000, count: 20 }]);
        assert_eq!(total(&found), 30);
        assert!(extents(list, &super::owners(PASSWD, 4242)).is_empty());
    }

    #[test]
    fn no_more_is_taken_than_a_sandbox_has_use_for() {
        let owners = owners(PASSWD, 1000);
        let found = extents("ada:100000:65000\nada:900000:65536\nada:1:1\n", &owners);
        assert_eq!(total(&found), RANGE - 1);
        assert_eq!(found, [Extent { first: 100_000, count: 65_000 }, Extent { first: 900_000, count: 535 }]);
        assert_eq!(first(&found, 3), [Extent { first: 100_000, count: 3 }]);
    }
}

//! What one server has on its host: for tests that nothing is left behind.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Root of the control group hierarchies.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Which things belong to the server in question.
#[derive(Debug, Clone)]
pub struct CensusScope {
    pub server_pid: u32,
    pub data_dir: PathBuf,
    /// Name of the server's group in every hierarchy (`providers.oci.cgroup_parent`).
    pub cgroup_parent: String,
}

/// Counts of what a server and its sandboxes hold. Two that are equal prove
/// that nothing was left in between; their difference names what was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    /// The server, its children, and everything in its control groups.
    pub processes: usize,
    /// Mounts below the data directory, in any mount namespace of those.
    pub mounts: usize,
    pub cgroups: usize,
    /// Network namespaces that those processes, or single threads of them, are
    /// in besides the host's.
    pub network_namespaces: usize,
    /// Interfaces in any of those. An interface on the host that is the other
    /// end of one goes with it.
    pub interfaces: usize,
    pub directories: usize,
    /// Files that the server has open.
    pub server_files: usize,
}

impl Census {
    pub fn take(scope: &CensusScope) -> io::Result<Self> {
        let pids = processes(scope)?;
        let mut namespaces = BTreeSet::new();
        let mut mounts = BTreeSet::new();
        let mut interfaces = 0;
        let host = network_namespace_of(Path::new("/proc/thread-self"));
        let data_dir = scope.data_dir.to_string_lossy();
        for pid in &pids {
            for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                if let Some(namespace) = network_namespace_of(&thread.path())
                    && Some(&namespace) != host.as_ref()
                    && namespaces.insert(namespace)
                {
                    interfaces += interfaces_of(&thread.path());
                }
            }
            let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            mounts.extend(table.lines().filter(|line| line.contains(&*data_dir)).map(str::to_owned));
        }
        Ok(Self {
            processes: pids.len(),
            mounts: mounts.len(),
            cgroups: directories_named(Path::new(CGROUP_ROOT), &scope.cgroup_parent),
            network_namespaces: namespaces.len(),
            interfaces,
            directories: directories_below(&scope.data_dir),
            server_files: fs::read_dir(format!("/proc/{}/fd", scope.server_pid))?.count(),
        })
    }

    /// What differs, in words: `mounts 1 -> 2`.
    pub fn changes_to(&self, after: &Self) -> Vec<String> {
        let pairs = [
            ("processes", self.processes, after.processes),
            ("mounts", self.mounts, after.mounts),
            ("cgroups", self.cgroups, after.cgroups),
            ("network namespaces", self.network_namespaces, after.network_namespaces),
            ("interfaces", self.interfaces, after.interfaces),
            ("directories", self.directories, after.directories),
            ("open files of the server", self.server_files, after.server_files),
        ];
        let changed = pairs.iter().filter(|(_, before, after)| before != after);
        changed.map(|(name, before, after)| format!("{name} {before} -> {after}")).collect()
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} processes, {} mounts, {} cgroups, {} network namespaces, {} interfaces, {} directories, {} open files",
            self.processes,
            self.mounts,
            self.cgroups,
            self.network_namespaces,
            self.interfaces,
            self.directories,
            self.server_files
        )
    }
}

/// The server, what descends from it, and what is in its control groups: a
/// sandbox outlives the server that made it and is then nobody's child.
pub fn processes(scope: &CensusScope) -> io::Result<BTreeSet<u32>> {
    let mut parents = Vec::new();
    let mut found = BTreeSet::from([scope.server_pid]);
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(parent) = parent_of(pid) else { continue };
        parents.push((pid, parent));
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if groups.split(['/', '\n']).any(|part| part == scope.cgroup_parent) {
            found.insert(pid);
        }
    }
    loop {
        let more: Vec<u32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return Ok(found);
        }
        found.extend(more);
    }
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, spaces and parentheses too.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// `thread` is its directory in `/proc`.
fn network_namespace_of(thread: &Path) -> Option<PathBuf> {
    fs::read_link(thread.join("ns/net")).ok()
}

fn interfaces_of(thread: &Path) -> usize {
    // Two lines of heading.
    fs::read_to_string(thread.join("net/dev")).map_or(0, |table| table.lines().count().saturating_sub(2))
}

/// Directories of that name below `root`, with all that is below them.
fn directories_named(root: &Path, name: &str) -> usize {
    let mut count = 0;
    for path in directories(root) {
        if path.file_name().is_some_and(|found| found == name) {
            count += 1 + directories_below(&path);
        } else {
            count += directories_named(&path, name);
        }
    }
    count
}

fn directories_below(root: &Path) -> usize {
    directories(root).iter().map(|path| 1 + directories_below(path)).sum()
}

/// Directories in `root`; none when it went away meanwhile.
fn directories(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_census_sees_a_child_a_directory_and_an_open_file() {
        let data = tempfile::tempdir().unwrap();
        let scope = CensusScope {
            server_pid: std::process::id(),
            data_dir: data.path().to_owned(),
            cgroup_parent: "no-such-group".to_owned(),
        };
        let before = Census::take(&scope).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        fs::create_dir_all(data.path().join("a/b")).unwrap();
        let file = fs::File::open("/proc/self/stat").unwrap();
        let after = Census::take(&scope).unwrap();
        drop(file);
        child.kill().unwrap();
        child.wait().unwrap();
        // Other tests of this process run at the same time, so only what this
        // one made is certain.
        assert_eq!(after.directories, before.directories + 2);
        assert!(processes(&scope).unwrap().contains(&std::process::id()));
        assert_eq!((after.cgroups, after.mounts), (0, 0));
        let changed = Census { mounts: 2, ..before.clone() };
        assert_eq!(before.changes_to(&changed), ["mounts 0 -> 2"]);
        assert_eq!(before.changes_to(&before), Vec::<String>::new());
    }
}

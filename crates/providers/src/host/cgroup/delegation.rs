//! What an ordinary user may do with control groups.
//!
//! On v2 a service manager hands a subtree to a user ("delegation", kernel
//! `cgroup-v2.rst`): the group this process is in, owned by its user. A group
//! that has controllers for its children must have no process itself, so the
//! server moves into a child. On v1 the administrator may hand over our own
//! directory in a hierarchy; that needs nothing here.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// Where the server goes to make room.
const SERVER_GROUP: &str = "stacyvm-server";

/// The group of this process below a v2 mount, if it is this user's to divide.
pub(super) fn own_group(mount: &Path) -> Option<PathBuf> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    delegated(mount, &groups)
}

fn delegated(mount: &Path, groups: &str) -> Option<PathBuf> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // Started again in the place that an earlier server made for itself.
    let own = own.strip_suffix(SERVER_GROUP).unwrap_or(own).trim_end_matches('/');
    let group = mount.join(own);
    let writable = |path: PathBuf| rustix::fs::access(path, Access::WRITE_OK).is_ok();
    let is_ours =
        !own.is_empty() && ["", "cgroup.procs", "cgroup.subtree_control"].iter().all(|file| writable(group.join(file)));
    is_ours.then_some(group)
}

/// Moves this process out of `group`, so that its children can have
/// controllers. Other processes are not ours to move.
pub(super) fn vacate(group: &Path) -> io::Result<()> {
    let inside = std::fs::read_to_string(group.join("cgroup.procs"))?;
    let own = std::process::id().to_string();
    let mut processes = inside.lines();
    match (processes.next(), processes.next()) {
        (None, _) => return Ok(()),
        (Some(process), None) if process == own => {}
        _ => {
            let message = "other processes are in the server's control group";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
        }
    }
    let place = group.join(SERVER_GROUP);
    match std::fs::create_dir(&place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::fs::write(place.join("cgroup.procs"), own)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group as the kernel shows one, with these processes.
    fn group(mount: &Path, name: &str, processes: &str) -> PathBuf {
        let group = mount.join(name);
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(group.join("cgroup.procs"), processes).unwrap();
        std::fs::write(group.join("cgroup.subtree_control"), "").unwrap();
        group
    }

    #[test]
    fn the_own_group_counts_and_never_the_root() {
        let mount = tempfile::tempdir().unwrap();
        let scope = group(mount.path(), "user.slice/run.scope", "");
        let hybrid = "4:memory:/x\n0::/user.slice/run.scope\n";
        assert_eq!(delegated(mount.path(), hybrid), Some(scope.clone()));
        assert_eq!(delegated(mount.path(), "0::/user.slice/run.scope/stacyvm-server\n"), Some(scope));
        assert_eq!(delegated(mount.path(), "0::/user.slice\n"), None, "not a group we may divide");
        assert_eq!(delegated(mount.path(), "0::/\n"), None);
        assert_eq!(delegated(mount.path(), "4:memory:/x\n"), None);
    }

    #[test]
    fn only_this_process_makes_room() {
        let mount = tempfile::tempdir().unwrap();
        let own = std::process::id().to_string();
        vacate(&group(mount.path(), "empty", "")).unwrap();
        let alone = group(mount.path(), "alone", &format!("{own}\n"));
        vacate(&alone).unwrap();
        assert_eq!(std::fs::read_to_string(alone.join("stacyvm-server/cgroup.procs")).unwrap(), own);
        let shared = group(mount.path(), "shared", &format!("{own}\n1\n"));
        assert_eq!(vacate(&shared).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }
}

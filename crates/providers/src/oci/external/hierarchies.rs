//! Every control group hierarchy of the host.
//!
//! We use four controllers. Other runtimes make a group in each hierarchy there
//! is (freezer, devices, cpuset, …), all by the same path, so that all of them
//! are known beforehand and none is left when a runtime does not clean up.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// Where hierarchies are mounted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::oci) struct Hierarchies {
    v1: Vec<PathBuf>,
    v2: Vec<PathBuf>,
}

impl Hierarchies {
    /// Those of this mount namespace.
    pub(in crate::oci) fn find() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((place, kind)) = line.split_once(" - ") else { continue };
            let Some(mount) = place.split(' ').nth(4) else { continue };
            match kind.split(' ').next() {
                Some("cgroup") => found.v1.push(mount.into()),
                Some("cgroup2") => found.v2.push(mount.into()),
                _ => {}
            }
        }
        found
    }

    /// A group in each of them.
    pub(in crate::oci) fn groups(&self, path: &Path) -> Vec<PathBuf> {
        let inside = path.strip_prefix("/").unwrap_or(path);
        self.v1.iter().chain(&self.v2).map(|mount| mount.join(inside)).collect()
    }

    /// Takes empty directories away that runtimes made on the way to a group.
    pub(in crate::oci) fn remove_parents(&self, parent: &str, instance: &str) {
        for directory in self.groups(&Path::new(parent).join(instance)) {
            // Whatever is inside keeps them.
            if std::fs::remove_dir(&directory).is_ok() {
                let _ = directory.parent().map(std::fs::remove_dir);
            }
        }
    }

    /// On a host with both kinds, leaves only the first in the calling
    /// process's mount namespace: crun refuses to run with both, and no runtime
    /// limits anything by the second there. crun makes directories in its place
    /// all the same, so that place is one that goes with the namespace: in the
    /// host's they would stay for ever, and systemd keeps that read-only.
    pub(super) fn leave_one_kind(&self) -> io::Result<()> {
        if self.v1.is_empty() {
            return Ok(());
        }
        self.v2.iter().try_for_each(|mount| {
            rustix::mount::unmount(mount, UnmountFlags::DETACH)?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            Ok(rustix::mount::mount("none", mount, "tmpfs", flags, c"size=64k,mode=755")?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_group_in_every_hierarchy() {
        let found = Hierarchies::parse(
            "31 30 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             32 31 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             33 31 0:29 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw\n\
             garbage\n",
        );
        let groups = found.groups(Path::new("/stacyvm/0123/sb"));
        let expected = ["/sys/fs/cgroup/memory/stacyvm/0123/sb", "/sys/fs/cgroup/unified/stacyvm/0123/sb"];
        assert_eq!(groups, expected.map(PathBuf::from));
    }

    /// Needs root, as every host does where hierarchies can be left out.
    #[test]
    fn what_is_made_in_place_of_the_second_kind_does_not_stay() {
        let place = tempfile::tempdir().unwrap();
        let unified = place.path().join("unified");
        let group = unified.join("stacyvm/0123/sb");
        // Mounts of a thread of its own.
        let left = std::thread::spawn(move || -> io::Result<bool> {
            crate::host::sys::unshare(libc::CLONE_NEWNS)?;
            crate::oci::launch::mounts::separate_from_host()?;
            let mount = |at: &Path, flags| rustix::mount::mount("none", at, "tmpfs", flags, None);
            mount(place.path(), MountFlags::empty())?;
            std::fs::create_dir(&unified)?;
            mount(&unified, MountFlags::empty())?;
            rustix::mount::mount_remount(place.path(), MountFlags::RDONLY, "")?;
            Hierarchies { v1: vec!["/v1".into()], v2: vec![unified.clone()] }.leave_one_kind()?;
            std::fs::create_dir_all(&group)?;
            rustix::mount::unmount(&unified, UnmountFlags::DETACH)?;
            Ok(group.exists())
        });
        assert!(!left.join().unwrap().unwrap());
    }
}

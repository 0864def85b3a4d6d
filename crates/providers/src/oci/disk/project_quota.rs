//! A directory that the file system itself bounds (ext4 and XFS mounted with
//! `prjquota`).
//!
//! Everything below a sandbox's directory counts to a project. Projects are
//! numbers of the host, so a sandbox takes one out of its own range of uids,
//! which no other sandbox on this host has; and one that nothing counts to yet,
//! because files of an earlier owner may still be on their way out. A guest
//! cannot leave its project: that takes the host's user namespace.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

use super::sys::{self, ProjectLimit, ProjectUsage};
use super::{BYTES_PER_INODE, MIN_INODES};
use crate::host::ids;

pub(super) struct ProjectQuota {
    /// Any directory of the file system.
    directory: OwnedFd,
}

impl ProjectQuota {
    /// Says what is missing if the file system holds no project to its limits.
    pub(super) fn open(directory: &Path) -> Result<Self, String> {
        let directory = open_directory(directory).map_err(|error| format!("the data directory: {error}"))?;
        match sys::enforces_project_quota(directory.as_fd()) {
            Ok(true) => {}
            Ok(false) => {
                return Err("the data directory's file system counts projects, but is not mounted with prjquota".into());
            }
            Err(error) => return Err(format!("the data directory's file system has no project quota ({error})")),
        }
        // Everybody may ask for the state; numbers and limits are root's.
        match sys::project_usage(directory.as_fd(), 0) {
            Ok(_) => Ok(Self { directory }),
            Err(error) => Err(format!("project quotas are not this user's to set ({error})")),
        }
    }

    /// A project of the sandbox's own that nothing counts to.
    pub(super) fn choose_project(&self, uid_base: u32) -> io::Result<u32> {
        for project in uid_base..uid_base + ids::RANGE {
            if self.usage(project)? == ProjectUsage::default() {
                return Ok(project);
            }
        }
        Err(io::Error::new(io::ErrorKind::QuotaExceeded, "files of earlier sandboxes are in every project"))
    }

    /// Bounds a new directory and all that will be in it.
    pub(super) fn bound(&self, directory: &Path, project: u32, size_bytes: u64) -> io::Result<()> {
        sys::set_project(open_directory(directory)?.as_fd(), project)?;
        let inodes = (size_bytes / BYTES_PER_INODE).max(MIN_INODES);
        sys::limit_project(self.directory.as_fd(), project, ProjectLimit { bytes: size_bytes, inodes })
    }

    pub(super) fn usage(&self, project: u32) -> io::Result<ProjectUsage> {
        sys::project_usage(self.directory.as_fd(), project)
    }

    /// Gives the number back.
    pub(super) fn release(&self, project: u32) -> io::Result<()> {
        sys::limit_project(self.directory.as_fd(), project, ProjectLimit::default())
    }
}

fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

//! `/dev` and `/sys` of a sandbox that nobody has asked for yet.
//!
//! They depend on nothing of a sandbox but its uids and its network namespace.
//! So they are made along with these, as trees that are mounted nowhere: two
//! descriptors, and gone with them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::thread::LinkNameSpaceType;

use super::{devices, join, kernel_files, mounts, root};
use crate::host::sys;
use crate::oci::rootless::Authority;
use crate::oci::spawner::protocol::{Failure, Step};

pub(in crate::oci) struct ReadyMounts {
    pub(in crate::oci) dev: OwnedFd,
    pub(in crate::oci) sys: OwnedFd,
}

impl ReadyMounts {
    /// Makes them. Leaves the process in namespaces of its own, with `scratch`
    /// full: for a forked child.
    pub(in crate::oci) fn make(
        scratch: &Path,
        uid_base: u32,
        network: BorrowedFd<'_>,
        authority: &Authority,
    ) -> Result<Self, Failure> {
        const STEP: &str = "make mounts ahead";
        sys::unshare(libc::CLONE_NEWNS).step(STEP)?;
        join(network, LinkNameSpaceType::Network).step(STEP)?;
        root::enter_scratch(scratch)?;
        root::make_empty()?;
        for directory in ["root", "root/dev", "root/sys"] {
            mounts::make_dir(directory, 0o755).step(STEP)?;
        }
        rustix::process::chdir("root").step(STEP)?;
        devices::mount(uid_base, authority).step("mount /dev")?;
        kernel_files::mount_sys()?;
        let detached = |path: &str| mounts::detached_copy(Path::new(path), true).step(STEP);
        Ok(Self { dev: detached("dev")?, sys: detached("sys")? })
    }

    /// Puts them where they belong below the current directory.
    pub(super) fn attach(&self) -> Result<(), Failure> {
        mounts::attach(self.dev.as_fd(), "dev").step("mount /dev")?;
        mounts::attach(self.sys.as_fd(), "sys").step("mount /sys")
    }
}

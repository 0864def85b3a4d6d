//! What the runtimes that start processes on this machine themselves share:
//! its kernel's names for things, and who may use which of them.

pub(crate) mod cgroup;
pub(crate) mod channel;
pub(crate) mod claims;
pub(crate) mod ids;
pub(crate) mod obstacle;
pub(crate) mod on_disk;
pub(crate) mod process;
pub(crate) mod registry;
pub(crate) mod seccomp;
pub(crate) mod sweep;
pub(crate) mod sys;
pub(crate) mod trash;
pub(crate) mod usage;

/// Whether sandboxes are made as an ordinary user, with that user's rights.
pub(crate) fn is_ordinary_user() -> bool {
    !rustix::process::geteuid().is_root()
}

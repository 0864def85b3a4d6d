//! The user namespace that the spawner of an ordinary user lives in.

use std::io::Read;

use rustix::fs::{Gid, Uid};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::process::Pid;
use rustix::thread::LinkNameSpaceType;
use std::os::fd::{AsFd, OwnedFd};

use super::Authority;
use super::subordinate::SubordinateIds;
use crate::host::sys::{self, Forked};
use crate::oci::spawner::protocol::{Failure, FailureKind, Step};

const STEP: &str = "make namespaces as an ordinary user";

/// Moves this process, which must have no other thread, into a user namespace
/// of its own and makes it root there. The caller's children die unnoticed only
/// afterwards: helpers are waited for.
pub(in crate::oci) fn enter() -> Result<Authority, Failure> {
    let shortage = match SubordinateIds::find() {
        Ok(subordinate) => match become_root(|pid| subordinate.install(pid)) {
            Ok(()) => {
                probe_kernel_files()?;
                return Ok(Authority::User { ids: subordinate.count(), shortage: None });
            }
            Err(Refusal::Map(reason)) => reason,
            Err(Refusal::Namespace(failure)) => return Err(failure),
        },
        Err(reason) => reason,
    };
    match become_root(map_own_user) {
        Ok(()) => {}
        Err(Refusal::Map(reason)) => return Err(forbidden(&reason)),
        Err(Refusal::Namespace(failure)) => return Err(failure),
    }
    probe_kernel_files()?;
    Ok(Authority::User { ids: 1, shortage: Some(shortage) })
}

enum Refusal {
    /// There is no namespace.
    Namespace(Failure),
    /// There is one, but nobody to be in it.
    Map(String),
}

/// A child makes the namespace, so that this process is outside while the map
/// is written: from inside, no helper would be setuid any more.
fn become_root(map: impl FnOnce(Pid) -> Result<(), String>) -> Result<(), Refusal> {
    let namespace = |error: &dyn std::fmt::Display| Refusal::Namespace(forbidden(error));
    let (gate_of_child, gate) = std::io::pipe().map_err(|error| namespace(&error))?;
    match sys::fork_into(libc::CLONE_NEWUSER as u64, None).map_err(|error| namespace(&error))? {
        Forked::Child => {
            drop(gate);
            // Ends when the parent closes its end, or is gone.
            let _ = { gate_of_child }.read(&mut [0]);
            sys::exit_now(0)
        }
        Forked::Parent { pid, pidfd } => {
            let entered = map(pid).map_err(Refusal::Map).and_then(|()| join(pid).map_err(Refusal::Namespace));
            drop(gate);
            let _ = rustix::process::waitid(
                rustix::process::WaitId::PidFd(pidfd.as_fd()),
                rustix::process::WaitIdOptions::EXITED,
            );
            entered
        }
    }
}

/// The map that the kernel takes from everybody: oneself. It demands that
/// groups cannot be given up, which might be there to take rights away.
fn map_own_user(pid: Pid) -> Result<(), String> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let write = |file: &str, text: String| {
        std::fs::write(format!("/proc/{}/{file}", pid.as_raw_pid()), text).map_err(|error| format!("{file}: {error}"))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1\n"))?;
    write("gid_map", format!("0 {gid} 1\n"))
}

fn join(pid: Pid) -> Result<(), Failure> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/user", pid.as_raw_pid())).step(STEP)?;
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(|error| forbidden(&error))?;
    // Refused without subordinate ids; then the groups stay, as nobody's.
    let _ = rustix::thread::set_thread_groups(&[]);
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).step(STEP)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).step(STEP)
}

/// Whether a sandbox can have a `/proc` and a `/sys`. The kernel gives none to
/// those who see only parts of the host's own, as inside most containers.
fn probe_kernel_files() -> Result<(), Failure> {
    let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWNET;
    let (mut said, status) = std::io::pipe().step(STEP)?;
    match sys::fork_into(namespaces as u64, None).map_err(|error| forbidden(&error))? {
        Forked::Child => {
            drop(said);
            let refused = ["proc", "sysfs"].into_iter().find(|kind| detached(kind).is_err());
            let _ = refused.map(|kind| std::io::Write::write_all(&mut { status }, kind.as_bytes()));
            sys::exit_now(0)
        }
        Forked::Parent { .. } => {
            drop(status);
            let mut refused = String::new();
            said.read_to_string(&mut refused).step(STEP)?;
            if refused.is_empty() {
                return Ok(());
            }
            let message = format!("the kernel allows no {refused} file system of our own");
            Err(Failure { kind: FailureKind::KernelFilesHidden, step: STEP.into(), message })
        }
    }
}

fn detached(kind: &str) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let harmless = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, harmless)
}

fn forbidden(error: &dyn std::fmt::Display) -> Failure {
    Failure { kind: FailureKind::NamespacesForbidden, step: STEP.into(), message: error.to_string() }
}

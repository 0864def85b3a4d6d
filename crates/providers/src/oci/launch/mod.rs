//! What a forked child does to become a sandbox's first process.
//!
//! Everything that needs privileges over the host (or, for an ordinary user,
//! over the spawner's namespace) happens here, before any code of the guest
//! exists, in a process that was forked with its own pid namespace. The order
//! matters:
//!
//! ```text
//! control groups ─ own mount, ipc, uts, cgroup namespaces ─ network namespace
//!   ─ root (overlay, /dev, /proc, /sys, masks) ─ pivot_root
//!   ─ user namespace (from here on: the sandbox's root, not the host's)
//!   ─ keyring ─ workspace ─ limits ─ capabilities ─ no_new_privs ─ seccomp ─ exec
//! ```
//!
//! Namespaces other than user and network belong to the *spawner's* user
//! namespace (the host's, under root): root inside the sandbox has no power
//! over them even if a filter failed.

pub(super) mod devices;
pub(super) mod kernel_files;
pub(super) mod mounts;
mod ready;
pub(super) mod root;
pub(super) mod user;

use std::convert::Infallible;
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

pub(super) use ready::ReadyMounts;
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::LinkNameSpaceType;

use super::capabilities;
use super::rootless::Authority;
use super::spawner::protocol::{DiskPlan, Failure, LaunchPlan, Step};
use crate::host::{seccomp, sys};

/// Where the agent finds its listening socket and its boot configuration.
pub(super) const LISTENER_FD: RawFd = 3;
pub(super) const BOOT_FD: RawFd = 4;

/// Descriptors below this are the agent's; ours move above.
pub(super) const FIRST_OWN_FD: RawFd = 10;

/// Soft limit on open files, which `select` users and fd-closing loops can
/// live with; programs that want more raise it up to the hard limit.
pub(super) const SOFT_OPEN_FILES: u64 = 65_536;

/// Name of the sealed file that is the agent's program.
pub(super) const PROGRAM: &str = "stacyvm-agent";

/// What the child says once all is done but the exec.
pub(super) const READY: u8 = b'R';

/// Descriptors that come along with a launch.
pub(super) struct LaunchFds {
    pub(super) listener: OwnedFd,
    pub(super) boot: OwnedFd,
    pub(super) user_namespace: OwnedFd,
    pub(super) network_namespace: OwnedFd,
    pub(super) mounts: Option<ReadyMounts>,
    pub(super) disk: Option<OwnedFd>,
}

impl LaunchFds {
    /// Sorts the descriptors of a request; `None` when some are missing.
    pub(super) fn sort(plan: &LaunchPlan, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let sorted = Self {
            listener: fds.next()?,
            boot: fds.next()?,
            user_namespace: fds.next()?,
            network_namespace: fds.next()?,
            mounts: if plan.has_mounts { Some(ReadyMounts { dev: fds.next()?, sys: fds.next()? }) } else { None },
            disk: fds.next(),
        };
        let complete = match plan.root.disk {
            DiskPlan::Mounted => sorted.disk.is_some(),
            DiskPlan::Directory(_) | DiskPlan::Memory { .. } => true,
        };
        complete.then_some(sorted)
    }
}

/// What every sandbox of one spawner shares.
pub(super) struct Common {
    /// The agent's program, sealed.
    pub(super) program: OwnedFd,
    pub(super) seccomp: seccomp::Program,
    pub(super) authority: Authority,
}

/// Becomes the sandbox's init. Called in the forked child; never returns.
///
/// `status` takes [`READY`] and then closes by itself at the exec, or takes a
/// [`Failure`] as JSON. `gate` yields a byte once the parent has written down
/// who this process is.
pub(super) fn become_init(plan: &LaunchPlan, fds: LaunchFds, common: &Common, status: OwnedFd, gate: &OwnedFd) -> ! {
    let mut status = std::fs::File::from(status);
    let failure = match launch(plan, fds, common, &mut status, gate.as_fd()) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    // Nobody is left to tell if this fails; the exit itself says enough.
    let _ = serde_json::to_vec(&failure).map(|text| status.write_all(&text));
    sys::exit_now(1)
}

fn launch(
    plan: &LaunchPlan,
    mut fds: LaunchFds,
    common: &Common,
    status: &mut std::fs::File,
    gate: BorrowedFd<'_>,
) -> Result<Infallible, Failure> {
    // Until the exec this process dies with the spawner, so that a crash
    // leaves nothing half-made behind.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("tie the launch to the spawner")?;
    sys::reset_signals().step("reset signals")?;

    for tasks in &plan.cgroup.v1_tasks {
        // A single thread that moves itself ("0") spares the kernel the global
        // lock that moving another process takes, and us its milliseconds.
        std::fs::write(tasks, "0").step("enter the control groups")?;
    }
    hurry(plan);
    sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP)
        .step("make namespaces")?;
    join(fds.network_namespace.as_fd(), LinkNameSpaceType::Network).step("enter the network namespace")?;

    let (disk, mounts) = (fds.disk.take(), fds.mounts.take());
    root::build(plan, fds.user_namespace.as_fd(), disk, mounts, &common.authority)?;
    rustix::system::sethostname(plan.hostname.as_bytes()).step("set the host name")?;
    rustix::process::setsid().step("start a session")?;
    attach_null()?;

    enter_user_namespace(fds.user_namespace.as_fd(), &common.authority)?;
    sys::join_new_session_keyring().step("start a session keyring")?;
    user::prepare_workspace(plan, &common.authority)?;
    limit_resources().step("set resource limits")?;

    lock_down_and_execute(plan, &fds, common, status, gate)
}

/// Has the agent go before what its sandbox runs, with which it shares the
/// sandbox's processor time: a thousand processes that spin would leave it a
/// thousandth, and nobody would end them at their deadline. Its commands start
/// as usual. An ordinary user may not do this, and goes without.
pub(super) fn hurry(plan: &LaunchPlan) {
    const MOST_URGENT: i32 = -20;
    if !plan.cgroup.v1_tasks.is_empty() || plan.cgroup.v2_dir.is_some() {
        let _ = rustix::process::setpriority_process(None, MOST_URGENT);
    }
}

fn join(namespace: BorrowedFd<'_>, kind: LinkNameSpaceType) -> rustix::io::Result<()> {
    rustix::thread::move_into_link_name_space(namespace, Some(kind))
}

/// Standard streams of the agent: nothing of the server's.
pub(super) fn attach_null() -> Result<(), Failure> {
    use rustix::fs::{Mode, OFlags};
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).step("open /dev/null")?;
    for number in 0..=2 {
        sys::place(null.as_fd(), number).step("attach /dev/null")?;
    }
    Ok(())
}

/// Gives up the host's root for the sandbox's.
pub(super) fn enter_user_namespace(namespace: BorrowedFd<'_>, authority: &Authority) -> Result<(), Failure> {
    use rustix::fs::{Gid, Uid};
    const STEP: &str = "enter the user namespace";
    join(namespace, LinkNameSpaceType::User).step(STEP)?;
    if authority.sets_groups() {
        rustix::thread::set_thread_groups(&[]).step(STEP)?;
    }
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).step(STEP)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).step(STEP)?;
    // A change of user clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step(STEP)
}

fn limit_resources() -> std::io::Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, no_core)?;
    let mut files = rustix::process::getrlimit(Resource::Nofile);
    files.current = Some(files.maximum.map_or(SOFT_OPEN_FILES, |hard| hard.min(SOFT_OPEN_FILES)));
    rustix::process::setrlimit(Resource::Nofile, files)?;
    Ok(())
}

fn lock_down_and_execute(
    plan: &LaunchPlan,
    fds: &LaunchFds,
    common: &Common,
    status: &mut std::fs::File,
    gate: BorrowedFd<'_>,
) -> Result<Infallible, Failure> {
    const STEP: &str = "arrange descriptors";
    let above = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_OWN_FD);
    let (listener, boot) = (above(fds.listener.as_fd()).step(STEP)?, above(fds.boot.as_fd()).step(STEP)?);
    let program = above(common.program.as_fd()).step(STEP)?;
    *status = std::fs::File::from(above(status.as_fd()).step(STEP)?);
    let mut gate = std::fs::File::from(above(gate).step(STEP)?);
    sys::place(listener.as_fd(), LISTENER_FD).step(STEP)?;
    sys::place(boot.as_fd(), BOOT_FD).step(STEP)?;
    sys::close_on_exec_from(BOOT_FD + 1).step(STEP)?;

    let argv = [c"stacyvm-agent".to_owned(), c"serve".to_owned()];
    let env = [CString::new(plan.label.as_str()).step("label the sandbox's init")?];
    capabilities::drop_to_sandbox().step("drop capabilities")?;
    rustix::thread::set_no_new_privs(true).step("set no_new_privs")?;

    let mut go = [0];
    gate.read_exact(&mut go).step("wait for the spawner")?;
    rustix::process::set_parent_process_death_signal(None).step("outlive the spawner")?;
    sys::install_seccomp(&common.seccomp).step("install the system call filter")?;
    status.write_all(&[READY]).step("report")?;
    sys::execute(program.as_fd(), &argv, &env).step("execute the agent")
}

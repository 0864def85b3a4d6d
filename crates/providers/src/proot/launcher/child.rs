//! What the forked process does before it becomes PRoot.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};

use super::filter::Sharing;
use super::main::{Failure, InStep as _};
use super::protocol::{LaunchPlan, NamespacePlan};
use super::{filter, reach};
use crate::host::{seccomp, sys};

/// Where the agent finds what it inherits.
const LISTENER_FD: RawFd = 3;
const BOOT_FD: RawFd = 4;

/// Descriptors below this are the agent's; ours move above.
const FIRST_OWN_FD: RawFd = 10;

/// What this process says once all is done but the exec.
pub(super) const READY: u8 = b'R';

/// Giving up root's rights.
const BECOME: &str = "become the sandbox's user";

/// Between the step and the message of a failure.
const SEPARATOR: u8 = 0;

pub(super) struct Descriptors {
    pub(super) listener: OwnedFd,
    pub(super) boot: OwnedFd,
}

/// Which namespaces a sandbox gets.
pub(super) fn flags(plan: &NamespacePlan) -> u64 {
    let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if plan.own_network {
        flags |= libc::CLONE_NEWNET;
    }
    if !rustix::process::geteuid().is_root() {
        flags |= libc::CLONE_NEWUSER;
    }
    flags as u64
}

/// Sets up namespaces and ends.
pub(super) fn probe(plan: &NamespacePlan, ids: Ids, status: OwnedFd) -> ! {
    let result = enter(plan, ids);
    finish(result, status)
}

/// Becomes PRoot; never returns.
pub(super) fn become_proot(
    plan: &LaunchPlan,
    ids: Ids,
    descriptors: &Descriptors,
    status: OwnedFd,
    gate: std::fs::File,
) -> ! {
    let mut status = std::fs::File::from(status);
    let failure = match launch(plan, ids, descriptors, &mut status, gate) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    finish(Err(failure), status.into())
}

fn finish(result: Result<(), Failure>, status: OwnedFd) -> ! {
    let text = match result {
        Ok(()) => vec![READY],
        Err(Failure { step, message }) => [step.as_bytes(), &[SEPARATOR], message.as_bytes()].concat(),
    };
    // Nobody is left to tell if this fails.
    let _ = std::fs::File::from(status).write_all(&text);
    sys::exit_now(1)
}

/// The other side of [`finish`].
pub(super) fn decode(text: &[u8]) -> Failure {
    // What was said before the exec failed.
    let text = text.strip_prefix(&[READY]).unwrap_or(text);
    let text = String::from_utf8_lossy(text);
    let (step, message) = text.split_once(char::from(SEPARATOR)).unwrap_or(("", &text));
    Failure { step: "start PRoot", message: format!("{step}: {message}") }
}

fn launch(
    plan: &LaunchPlan,
    ids: Ids,
    descriptors: &Descriptors,
    status: &mut std::fs::File,
    mut gate: std::fs::File,
) -> Result<Infallible, Failure> {
    sys::reset_signals().step("reset signals")?;
    for tasks in &plan.cgroup.v1_tasks {
        std::fs::write(tasks, "0").step("enter the control groups")?;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let log = rustix::fs::open(&plan.log_file, flags, Mode::RUSR | Mode::WUSR).step("open the log")?;
    if let Some(namespaces) = &plan.namespaces {
        enter(namespaces, ids)?;
    }
    limit(plan).step("set resource limits")?;
    rustix::process::setsid().step("start a session")?;
    if let Some(id) = plan.become_id {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        rustix::thread::set_thread_groups(&[]).step(BECOME)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).step(BECOME)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).step(BECOME)?;
    }
    rustix::process::chdir("/").step("leave the directory")?;
    arrange(descriptors, log, status, &mut gate)?;

    let usual = seccomp::build().step("build the system call filter")?;
    let ours = filter::build(&Sharing {
        proot: std::process::id().cast_signed(),
        hosts_processes: plan.namespaces.is_none(),
        memory_is_watched: plan.memory_is_watched,
    });

    gate.read_exact(&mut [0]).step("wait for the launcher")?;
    rustix::thread::set_no_new_privs(true).step("set no_new_privs")?;
    reach::confine(&plan.reach).step("confine it to its files (Landlock)")?;
    // Last first: the second may forbid what installs the other.
    sys::install_seccomp(&ours).step("install the system call filter")?;
    sys::install_seccomp(&usual).step("install the system call filter")?;
    status.write_all(&[READY]).step("report")?;
    // By its path: the call that takes a descriptor is filtered from here on.
    let mut command = std::process::Command::new(&plan.program);
    command.arg0("proot").args(&plan.argv).env_clear().envs(&plan.env);
    Err(command.exec()).step("execute PRoot")
}

/// Who started the launcher. In a new user namespace the process itself can no
/// longer tell.
#[derive(Clone, Copy)]
pub(super) struct Ids {
    uid: u32,
    gid: u32,
}

impl Ids {
    pub(super) fn own() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// The new namespace knows this one user, by the same number: PRoot says
    /// inside that it is root.
    fn map(self) -> std::io::Result<()> {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{0} {0} 1", self.uid))?;
        std::fs::write("/proc/self/gid_map", format!("{0} {0} 1", self.gid))
    }
}

fn enter(plan: &NamespacePlan, ids: Ids) -> Result<(), Failure> {
    if ids.uid != 0 {
        ids.map().step("map the user")?;
    }
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .step("make mounts private")?;
    // While the old one still shows all.
    if let Some((over, shown)) = &plan.hide {
        hide(over, shown)?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", flags, None).step("mount /proc")?;
    rustix::system::sethostname(plan.hostname.as_bytes()).step("set the host name")?;
    if plan.own_network {
        sys::loopback_up().step("bring loopback up")?;
    }
    Ok(())
}

fn hide(over: &Path, shown: &Path) -> Result<(), Failure> {
    const STEP: &str = "hide the data directory";
    let kept = rustix::fs::open(shown, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).step(STEP)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("none", over, "tmpfs", flags, Some(c"mode=0711,size=64k")).step(STEP)?;
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(shown).step(STEP)?;
    rustix::mount::mount_bind(format!("/proc/self/fd/{}", kept.as_raw_fd()), shown).step(STEP)
}

fn limit(plan: &LaunchPlan) -> rustix::io::Result<()> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let to = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
    rustix::process::setrlimit(Resource::Core, to(0))?;
    if let Some(most) = plan.max_processes {
        rustix::process::setrlimit(Resource::Nproc, to(most))?;
    }
    if let Some(most) = plan.max_file_bytes {
        rustix::process::setrlimit(Resource::Fsize, to(most))?;
    }
    Ok(())
}

/// Standard streams are nothing of the server's, and the agent's descriptors
/// are at their numbers.
fn arrange(
    descriptors: &Descriptors,
    log: OwnedFd,
    status: &mut std::fs::File,
    gate: &mut std::fs::File,
) -> Result<(), Failure> {
    const STEP: &str = "arrange descriptors";
    // What is moved is closed where it was, before anything else is put there.
    let above = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_OWN_FD).step(STEP);
    let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_OWN_FD).step(STEP);
    let (listener, boot) = (copy(&descriptors.listener)?, copy(&descriptors.boot)?);
    let log = above(log)?;
    *status = rustix::io::fcntl_dupfd_cloexec(&*status, FIRST_OWN_FD).step(STEP)?.into();
    *gate = rustix::io::fcntl_dupfd_cloexec(&*gate, FIRST_OWN_FD).step(STEP)?.into();
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).step("open /dev/null")?;
    let null = above(null)?;
    for (fd, number) in [(&null, 0), (&null, 1), (&log, 2), (&listener, LISTENER_FD), (&boot, BOOT_FD)] {
        sys::place(fd.as_fd(), number).step(STEP)?;
    }
    sys::close_on_exec_from(BOOT_FD + 1).step(STEP)
}

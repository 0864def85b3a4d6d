//! The stage: what a forked child of the spawner does to have a runtime start a
//! sandbox.
//!
//! All that a runtime is to find at some path is mounted in this process's own
//! mount namespace and ends with it. Nothing of the host's is passed on but what
//! a sandbox has anyway: devices are nodes of the sandbox's own, because a
//! runtime shows those it finds in `/dev`, and some give them to the sandbox's
//! root.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::bundle::{self, NETWORK_NAMESPACE, ROOT, USER_NAMESPACE};
use super::command::read_reason;
use super::hierarchies::Hierarchies;
use crate::host::cgroup::CgroupPlan;
use crate::host::process;
use crate::host::process::Identity;
use crate::host::sys::{self, Forked};
use crate::oci::launch::{
    self, BOOT_FD, Common, FIRST_OWN_FD, LISTENER_FD, LaunchFds, READY, attach_null, devices, enter_user_namespace,
    hurry, mounts, root, user,
};
use crate::oci::spawner::protocol::{Failure, LaunchPlan, RuntimePlan, Step};
use crate::oci::state;

/// Where the agent's own program is when a runtime looks for it.
const PROGRAM_FD: RawFd = 5;
const PROGRAM_PATH: &str = "/proc/self/fd/5";

/// Descriptors from 3 on that a runtime hands over.
const HANDED_OVER: &str = "3";

/// Longest wait for the agent's program to run once it was started.
const EXECUTE_LIMIT: Duration = Duration::from_secs(2);
const EXECUTE_POLL: Duration = Duration::from_millis(1);

/// Has a runtime start a sandbox. Called in the forked child; never returns.
///
/// `status` takes [`READY`] and the sandbox's [`Identity`] as JSON, or a
/// [`Failure`] as JSON.
pub(in crate::oci) fn launch(
    plan: &LaunchPlan,
    runtime: &RuntimePlan,
    fds: LaunchFds,
    common: &Common,
    status: OwnedFd,
) -> ! {
    let mut status = std::fs::File::from(status);
    let said = match stage(plan, runtime, fds, common, &mut status) {
        Ok(identity) => serde_json::to_vec(&identity).map(|text| [&[READY], text.as_slice()].concat()),
        Err(failure) => serde_json::to_vec(&failure),
    };
    // Nobody is left to tell if this fails; the exit itself says enough.
    let _ = said.map(|said| status.write_all(&said));
    sys::exit_now(0)
}

fn stage(
    plan: &LaunchPlan,
    runtime: &RuntimePlan,
    mut fds: LaunchFds,
    common: &Common,
    status: &mut std::fs::File,
) -> Result<Identity, Failure> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("tie the launch to the spawner")?;
    sys::reset_signals().step("reset signals")?;
    // The runtime passes it on.
    hurry(plan);
    sys::unshare(libc::CLONE_NEWNS).step("make namespaces")?;
    root::assemble(plan, fds.user_namespace.as_fd(), fds.disk.take(), &common.authority)?;
    prepare_workspace(plan, fds.user_namespace.as_fd(), common)?;
    let bundle = &plan.root.scratch;
    own_devices(plan, common)?;
    name_namespaces(&fds)?;
    let groups = open_groups(&plan.cgroup)?;
    Hierarchies::find().and_then(|found| found.leave_one_kind()).step("choose the control groups")?;
    let config = bundle::describe(plan, runtime, bundle, PROGRAM_PATH).step("describe the container")?;
    std::fs::write("config.json", serde_json::to_vec(&config).step("describe the container")?)
        .step("describe the container")?;

    arrange_descriptors(&fds, common, status)?;
    let bundle = bundle.to_str().ok_or_else(|| Failure::system("name the bundle", &"it is not UTF-8"))?;
    let create = ["--bundle", bundle, "--pid-file", "pid", "--preserve-fds", HANDED_OVER];
    runtime.container.call("create", &create)?;
    let init = Init::read(Path::new("pid"))?;
    init.check(&fds)?;
    enter_groups(&groups, init.pid)?;
    runtime.container.call("start", &[])?;
    init.wait_for_agent(&runtime.container.state_dir.join("log"))?;
    state::note(&plan.identity_file, &init.identity).step("note the sandbox's init")?;
    Ok(init.identity)
}

/// Does in the tree what has to be done as the sandbox's root, in a child that
/// can see nothing else.
fn prepare_workspace(plan: &LaunchPlan, user_namespace: BorrowedFd<'_>, common: &Common) -> Result<(), Failure> {
    const STEP: &str = "prepare the workspace";
    let (said, status) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step(STEP)?;
    match sys::fork_into(libc::CLONE_NEWNS as u64, None).step(STEP)? {
        Forked::Child => {
            drop(said);
            let done = (|| {
                rustix::process::chdir(ROOT).step(STEP)?;
                root::make_root()?;
                enter_user_namespace(user_namespace, &common.authority)?;
                user::prepare_workspace(plan, &common.authority)
            })();
            let said = match done {
                Ok(()) => Ok(vec![READY]),
                Err(failure) => serde_json::to_vec(&failure),
            };
            let _ = said.map(|said| std::fs::File::from(status).write_all(&said));
            sys::exit_now(0)
        }
        Forked::Parent { pid, pidfd: _ } => {
            drop(status);
            let mut text = Vec::new();
            std::fs::File::from(said).read_to_end(&mut text).step(STEP)?;
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).step(STEP)?;
            if text == [READY] {
                return Ok(());
            }
            Err(serde_json::from_slice(&text).unwrap_or_else(|_| Failure::system(STEP, &"it ended without a word")))
        }
    }
}

/// Covers this process's `/dev`, from which runtimes take a sandbox's devices.
fn own_devices(plan: &LaunchPlan, common: &Common) -> Result<(), Failure> {
    const STEP: &str = "make devices";
    mounts::make_dir("dev", 0o755).step(STEP)?;
    devices::mount_nodes(plan.root.uid_base, &common.authority).step(STEP)?;
    mounts::bind("dev", "/dev", false).step(STEP)
}

/// Gives the two ready namespaces names, since a bundle takes no descriptors.
fn name_namespaces(fds: &LaunchFds) -> Result<(), Failure> {
    const STEP: &str = "name namespaces";
    for (name, fd) in [(USER_NAMESPACE, &fds.user_namespace), (NETWORK_NAMESPACE, &fds.network_namespace)] {
        std::fs::File::create_new(name).step(STEP)?;
        rustix::mount::mount_bind(format!("/proc/self/fd/{}", fd.as_raw_fd()), name).step(STEP)?;
    }
    Ok(())
}

/// Puts what the agent gets where it expects it; nothing else is handed over.
fn arrange_descriptors(fds: &LaunchFds, common: &Common, status: &mut std::fs::File) -> Result<(), Failure> {
    const STEP: &str = "arrange descriptors";
    let above = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_OWN_FD);
    let (listener, boot) = (above(fds.listener.as_fd()).step(STEP)?, above(fds.boot.as_fd()).step(STEP)?);
    let program = above(common.program.as_fd()).step(STEP)?;
    *status = std::fs::File::from(above(status.as_fd()).step(STEP)?);
    attach_null()?;
    for (fd, number) in [(&listener, LISTENER_FD), (&boot, BOOT_FD), (&program, PROGRAM_FD)] {
        sys::place(fd.as_fd(), number).step(STEP)?;
    }
    sys::close_on_exec_from(PROGRAM_FD + 1).step(STEP)
}

/// The first process of a container that was created but not started.
struct Init {
    pid: Pid,
    pidfd: OwnedFd,
    identity: Identity,
}

impl Init {
    fn read(pid_file: &Path) -> Result<Self, Failure> {
        const STEP: &str = "find the container's first process";
        let text = std::fs::read_to_string(pid_file).step(STEP)?;
        let pid = text.trim().parse().ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Failure::system(STEP, &"the runtime names none"))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).step(STEP)?;
        let identity = process::identify(pid).step(STEP)?;
        Ok(Self { pid, pidfd, identity })
    }

    /// Sees that the runtime did as it was told: namespaces are what everything
    /// else rests on.
    fn check(&self, fds: &LaunchFds) -> Result<(), Failure> {
        const STEP: &str = "check the container";
        for (kind, fd) in [("user", &fds.user_namespace), ("net", &fds.network_namespace)] {
            let wanted = rustix::fs::fstat(fd).step(STEP)?;
            let found = std::fs::metadata(self.namespace(kind)).step(STEP)?;
            if (found.dev(), found.ino()) != (wanted.st_dev, wanted.st_ino) {
                return Err(Failure::system(STEP, &format!("the runtime did not enter the {kind} namespace")));
            }
        }
        for kind in ["pid", "mnt", "ipc", "uts"] {
            let own = std::fs::metadata(format!("/proc/self/ns/{kind}")).step(STEP)?;
            if std::fs::metadata(self.namespace(kind)).step(STEP)?.ino() == own.ino() {
                return Err(Failure::system(STEP, &format!("the runtime made no {kind} namespace")));
            }
        }
        Ok(())
    }

    fn namespace(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.pid.as_raw_pid())
    }

    /// Waits until the agent's program runs. Runtimes report success before.
    fn wait_for_agent(&self, log: &Path) -> Result<(), Failure> {
        const STEP: &str = "execute the agent";
        let program = format!("/proc/{}/exe", self.pid.as_raw_pid());
        let end = Instant::now() + EXECUTE_LIMIT;
        loop {
            if process::has_ended(&self.pidfd).step(STEP)? {
                let reason = read_reason(log).unwrap_or_default();
                return Err(Failure::system(STEP, &format!("the container ended at once; {reason}")));
            }
            // The name of the sealed file that the spawner holds.
            let runs = std::fs::read_link(&program).is_ok_and(|path| path.to_string_lossy().contains(launch::PROGRAM));
            if runs {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Failure::system(STEP, &"the container was started, but the agent does not run"));
            }
            std::thread::sleep(EXECUTE_POLL);
        }
    }
}

/// The sandbox's groups, before some of them get out of reach.
fn open_groups(groups: &CgroupPlan) -> Result<Vec<OwnedFd>, Failure> {
    let v1 = groups.v1_tasks.iter().filter_map(|tasks| tasks.parent());
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    v1.chain(groups.v2_dir.as_deref())
        .map(|group| rustix::fs::open(group, flags, Mode::empty()).step("open the control groups"))
        .collect()
}

/// Sees that the sandbox is in each of our groups, which hold its limits. A
/// runtime leaves out those of a hierarchy that it does not know.
fn enter_groups(groups: &[OwnedFd], pid: Pid) -> Result<(), Failure> {
    const STEP: &str = "enter the control groups";
    let pid = pid.as_raw_pid().to_string();
    for group in groups {
        let members = format!("/proc/self/fd/{}/cgroup.procs", group.as_raw_fd());
        let inside = std::fs::read_to_string(&members).step(STEP)?;
        if !inside.lines().any(|member| member == pid) {
            std::fs::write(&members, &pid).step(STEP)?;
        }
    }
    Ok(())
}

//! The spawner process: one thread that forks.
//!
//! Forking from a server full of threads is not safe (a lock held by another
//! thread stays locked in the child for ever), so the server starts this
//! process once and sends it orders. It holds no state worth keeping: when the
//! server goes away it reads end-of-file and exits, and the sandboxes it
//! started live on as orphans that know what they need.

use crate::host::is_ordinary_user;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Pid;

use super::packet;
use super::protocol::{Done, Failure, Job, LaunchPlan, MAX_MESSAGE_BYTES, Reply, Request, RuntimePlan, Step};
use crate::host::process::{self, Identity};
use crate::host::sys::{self, Forked};
use crate::host::{seccomp, trash};
use crate::oci::external::{self, Container};
use crate::oci::launch::{self, Common, LaunchFds, ReadyMounts};
use crate::oci::rootless::{self, Authority};
use crate::oci::state;

/// How often to ask the kernel to seal the agent's file.
const SEAL_ATTEMPTS: u32 = 20;

/// Longest text a failing child may send.
const MAX_STATUS_BYTES: u64 = 16 * 1024;

/// How long a spawner that cannot work goes on saying so. The next one looks
/// at the host anew.
const REFUSING_TIME: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Priority (nice) of what nobody waits for.
const LEAST_URGENT: i32 = 19;

/// Runs the spawner on the socket that standard input is, until the server is
/// gone. For the host binary's hidden subcommand; call it before any thread
/// exists.
pub fn spawner_main(agent: &[u8]) -> ! {
    let status = match serve(agent) {
        Ok(()) => 0,
        Err(error) => {
            // Standard error is the server's own; there is no other channel.
            let _ = writeln!(io::stderr(), "sandbox spawner: {error}");
            1
        }
    };
    sys::exit_now(status)
}

fn serve(agent: &[u8]) -> io::Result<()> {
    let control = sys::inherited(0);
    rustix::thread::set_name(c"svm-spawner")?;
    let authority = if is_ordinary_user() { rootless::enter() } else { Ok(Authority::Root) };
    let authority = match authority {
        Ok(authority) => authority,
        Err(failure) => return refuse(&control, &failure),
    };
    sys::reap_children_automatically();
    let common = Common { program: seal(agent)?, seccomp: seccomp::build().map_err(io::Error::other)?, authority };
    let mut spawner = Spawner { control, common, pending: Vec::new() };
    loop {
        let ready = spawner.wait()?;
        // Children first: their answers have somebody waiting.
        for index in ready.children.into_iter().rev() {
            spawner.read_child(index)?;
        }
        if ready.control && !spawner.take_request()? {
            return Ok(());
        }
    }
}

/// Answers every order alike, for a while.
fn refuse(control: &OwnedFd, failure: &Failure) -> io::Result<()> {
    loop {
        match rustix::event::poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&REFUSING_TIME)) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let Some((request, _)) = packet::receive::<Request>(control)? else { return Ok(()) };
        packet::send(control, &Reply { id: request.id, result: Err(failure.clone()) }, &[])?;
    }
}

struct Spawner {
    control: OwnedFd,
    common: Common,
    pending: Vec<Pending>,
}

/// A child on its way.
struct Pending {
    id: u64,
    status: std::fs::File,
    said: Vec<u8>,
    outcome: Outcome,
}

enum Outcome {
    /// The child waits at the gate until its network namespace is opened.
    Pair {
        pid: Pid,
        user: OwnedFd,
        gate: OwnedFd,
    },
    Launch {
        pidfd: OwnedFd,
        identity: Identity,
    },
    /// The child answers for itself if it succeeds, because what it made are
    /// descriptors.
    Mounts,
    /// The child says who the init is.
    LaunchWith,
    Forget,
    Trash,
}

struct Ready {
    control: bool,
    children: Vec<usize>,
}

impl Spawner {
    fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![PollFd::new(&self.control, PollFlags::IN)];
        fds.extend(self.pending.iter().map(|child| PollFd::new(&child.status, PollFlags::IN)));
        loop {
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let children = (0..self.pending.len()).filter(|index| !fds[index + 1].revents().is_empty()).collect();
        Ok(Ready { control: !fds[0].revents().is_empty(), children })
    }

    /// Handles one order; false when the server is gone.
    fn take_request(&mut self) -> io::Result<bool> {
        let Some((request, fds)) = packet::receive::<Request>(&self.control)? else { return Ok(false) };
        let id = request.id;
        let started = match request.job {
            Job::Authority => {
                let result = Ok(Done::Authority(self.common.authority.clone()));
                packet::send(&self.control, &Reply { id, result }, &[])?;
                return Ok(true);
            }
            Job::Pair { uid_base, spare } => start_pair(id, uid_base, spare, &self.common.authority),
            Job::Mounts { scratch, uid_base } => self.start_mounting(id, &scratch, uid_base, &fds),
            Job::Launch(plan) => self.start_launch(id, &plan, fds),
            Job::LaunchWith(plan, runtime) => self.start_launch_with(id, &plan, &runtime, fds),
            Job::Forget(container) => start_forgetting(id, &container),
            Job::EmptyTrash { trash } => start_emptying(id, &trash),
        };
        match started {
            Ok(pending) => self.pending.push(pending),
            Err(failure) => packet::send(&self.control, &Reply { id, result: Err(failure) }, &[])?,
        }
        Ok(true)
    }

    fn start_launch(&self, id: u64, plan: &LaunchPlan, fds: Vec<OwnedFd>) -> Result<Pending, Failure> {
        let fds = LaunchFds::sort(plan, fds).ok_or_else(|| Failure::system("start", &"descriptors are missing"))?;
        let cgroup = match &plan.cgroup.v2_dir {
            Some(dir) => Some(open_dir(dir).step("open the control group")?),
            None => None,
        };
        let (status, status_of_child) = pipe().step("start")?;
        let (gate_of_child, gate) = pipe().step("start")?;
        let namespaces = libc::CLONE_NEWPID as u64;
        match sys::fork_into(namespaces, cgroup.as_ref().map(AsFd::as_fd)).step("fork")? {
            Forked::Child => {
                drop((status, gate));
                launch::become_init(plan, fds, &self.common, status_of_child, &gate_of_child)
            }
            Forked::Parent { pid, pidfd } => {
                // From here on an early return closes the gate, and the child
                // ends itself.
                let identity = process::identify(pid).step("identify the sandbox's init")?;
                state::note(&plan.identity_file, &identity).step("note the sandbox's init")?;
                std::fs::File::from(gate).write_all(&[1]).step("release the sandbox's init")?;
                Ok(Pending {
                    id,
                    status: status.into(),
                    said: Vec::new(),
                    outcome: Outcome::Launch { pidfd, identity },
                })
            }
        }
    }

    fn start_mounting(&self, id: u64, scratch: &Path, uid_base: u32, fds: &[OwnedFd]) -> Result<Pending, Failure> {
        const STEP: &str = "make mounts ahead";
        let network = fds.first().ok_or_else(|| Failure::system(STEP, &"a descriptor is missing"))?;
        let (status, status_of_child) = pipe().step(STEP)?;
        match sys::fork_into(0, None).step(STEP)? {
            Forked::Child => {
                drop(status);
                be_least_urgent();
                let made = ReadyMounts::make(scratch, uid_base, network.as_fd(), &self.common.authority);
                let said = made.and_then(|made| {
                    let reply = Reply { id, result: Ok(Done::Mounted) };
                    packet::send(&self.control, &reply, &[made.dev.as_fd(), made.sys.as_fd()]).step("report")
                });
                tell(status_of_child, said.map(|()| Vec::new()))
            }
            Forked::Parent { .. } => {
                Ok(Pending { id, status: status.into(), said: Vec::new(), outcome: Outcome::Mounts })
            }
        }
    }

    fn start_launch_with(
        &self,
        id: u64,
        plan: &LaunchPlan,
        runtime: &RuntimePlan,
        fds: Vec<OwnedFd>,
    ) -> Result<Pending, Failure> {
        const STEP: &str = "start";
        let fds = LaunchFds::sort(plan, fds).ok_or_else(|| Failure::system(STEP, &"descriptors are missing"))?;
        // A runtime leaves its sandbox an orphan. Those of ours become children
        // of this process, which the kernel reaps.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).step(STEP)?;
        let (status, status_of_child) = pipe().step(STEP)?;
        match sys::fork_into(0, None).step("fork")? {
            Forked::Child => {
                drop(status);
                external::launch(plan, runtime, fds, &self.common, status_of_child)
            }
            Forked::Parent { .. } => {
                Ok(Pending { id, status: status.into(), said: Vec::new(), outcome: Outcome::LaunchWith })
            }
        }
    }

    /// Takes what a child says; answers for it once it has said all.
    fn read_child(&mut self, index: usize) -> io::Result<()> {
        let child = &mut self.pending[index];
        let mut buffer = [0; 4096];
        let count = child.status.read(&mut buffer)?;
        child.said.extend_from_slice(&buffer[..count]);
        let paired = matches!(child.outcome, Outcome::Pair { .. }) && child.said == [launch::READY];
        if count > 0 && !paired && (child.said.len() as u64) < MAX_STATUS_BYTES {
            return Ok(());
        }
        let child = self.pending.swap_remove(index);
        let id = child.id;
        let (result, fds) = match child.finish() {
            Ok(None) => return Ok(()),
            Ok(Some((done, fds))) => (Ok(done), fds),
            Err(failure) => (Err(failure), Vec::new()),
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        packet::send(&self.control, &Reply { id, result }, &fds)
    }
}

impl Pending {
    /// What to answer, unless the child has.
    fn finish(self) -> Result<Option<(Done, Vec<OwnedFd>)>, Failure> {
        let said = match (self.said.strip_prefix(&[launch::READY]), &self.outcome) {
            (Some(text), Outcome::Trash | Outcome::LaunchWith) => text,
            (Some([]), _) => &[],
            (Some(text), _) => return Err(failure_from(text)),
            (None, _) => return Err(failure_from(&self.said)),
        };
        let answer = match self.outcome {
            Outcome::Mounts => return Ok(None),
            Outcome::Trash => {
                let trees = serde_json::from_slice(said).step("empty the trash")?;
                Ok((Done::TrashEmptied(trees), Vec::new()))
            }
            Outcome::Launch { pidfd, identity } => Ok((Done::Launched(identity), vec![pidfd])),
            Outcome::LaunchWith => {
                const STEP: &str = "find the sandbox's init";
                let identity: Identity = serde_json::from_slice(said).step(STEP)?;
                let pidfd = process::open(&identity).step(STEP)?;
                let pidfd = pidfd.ok_or_else(|| Failure::system(STEP, &"it has ended already"))?;
                Ok((Done::Launched(identity), vec![pidfd]))
            }
            Outcome::Forget => Ok((Done::Forgotten, Vec::new())),
            Outcome::Pair { pid, user, gate } => {
                let network = open_namespace(pid, "net").step("open a network namespace")?;
                drop(gate);
                Ok((Done::Paired { spawner: std::process::id() }, vec![user, network]))
            }
        };
        answer.map(Some)
    }
}

fn failure_from(text: &[u8]) -> Failure {
    serde_json::from_slice(text).unwrap_or_else(|_| Failure::system("start", &"the launcher ended without a word"))
}

/// Makes a user namespace with its range of uids and a network namespace owned
/// by it. They exist as long as somebody holds their descriptors.
fn start_pair(id: u64, uid_base: u32, spare: bool, authority: &Authority) -> Result<Pending, Failure> {
    const STEP: &str = "make a pair of namespaces";
    let (status, status_of_child) = pipe().step(STEP)?;
    let (gate_of_child, gate) = pipe().step(STEP)?;
    match sys::fork_into(libc::CLONE_NEWUSER as u64, None).step(STEP)? {
        Forked::Child => {
            drop((status, gate));
            if spare {
                be_least_urgent();
            }
            make_network(status_of_child, gate_of_child)
        }
        Forked::Parent { pid, pidfd: _ } => {
            let directory = format!("/proc/{}", pid.as_raw_pid());
            for kind in ["uid", "gid"] {
                let map = authority.map(kind, uid_base).step(STEP)?;
                std::fs::write(format!("{directory}/{kind}_map"), map).step(STEP)?;
            }
            let user = open_namespace(pid, "user").step(STEP)?;
            let outcome = Outcome::Pair { pid, user, gate };
            Ok(Pending { id, status: status.into(), said: Vec::new(), outcome })
        }
    }
}

fn make_network(status: OwnedFd, gate: OwnedFd) -> ! {
    let mut status = std::fs::File::from(status);
    let made = (|| {
        sys::unshare(libc::CLONE_NEWNET).step("make a network namespace")?;
        sys::loopback_up().step("bring loopback up")?;
        status.write_all(&[launch::READY]).step("report")?;
        // Stay until the parent has opened it.
        std::fs::File::from(gate).read_to_end(&mut Vec::new()).step("wait for the spawner")
    })();
    if let Err(failure) = made {
        let _ = serde_json::to_vec(&failure).map(|text| status.write_all(&text));
    }
    sys::exit_now(0)
}

/// Sandboxes that are asked for go first.
fn be_least_urgent() {
    let _ = rustix::process::setpriority_process(None, LEAST_URGENT);
}

/// A child's last words.
fn tell(status: OwnedFd, said: Result<Vec<u8>, Failure>) -> ! {
    let said = match said {
        Ok(text) => [&[launch::READY], text.as_slice()].concat(),
        Err(failure) => serde_json::to_vec(&failure).unwrap_or_default(),
    };
    let _ = std::fs::File::from(status).write_all(&said);
    sys::exit_now(0)
}

/// Removes trees in a child of its own: that may take long, and others wait.
fn start_emptying(id: u64, directory: &Path) -> Result<Pending, Failure> {
    const STEP: &str = "empty the trash";
    let (status, status_of_child) = pipe().step(STEP)?;
    match sys::fork_into(0, None).step(STEP)? {
        Forked::Child => {
            drop(status);
            tell(status_of_child, trash::empty(directory).step(STEP).map(|trees| trees.to_string().into_bytes()))
        }
        Forked::Parent { .. } => Ok(Pending { id, status: status.into(), said: Vec::new(), outcome: Outcome::Trash }),
    }
}

/// Has a runtime delete what it remembers, in a child of its own.
fn start_forgetting(id: u64, container: &Container) -> Result<Pending, Failure> {
    const STEP: &str = "delete the container";
    let (status, status_of_child) = pipe().step(STEP)?;
    match sys::fork_into(0, None).step(STEP)? {
        Forked::Child => {
            drop(status);
            tell(status_of_child, external::forget(container).map(|()| Vec::new()))
        }
        Forked::Parent { .. } => Ok(Pending { id, status: status.into(), said: Vec::new(), outcome: Outcome::Forget }),
    }
}

/// The agent as a file in memory that nobody can change any more; all
/// sandboxes share its pages.
fn seal(agent: &[u8]) -> io::Result<OwnedFd> {
    let name = launch::PROGRAM;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        // Kernels before 6.3 know no such flag and need none.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        created => created?,
    };
    let mut file = std::fs::File::from(memfd);
    file.write_all(agent)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o555))?;
    add_seals(&file)?;
    // A descriptor open for writing would make the exec fail with ETXTBSY.
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(read_only.into())
}

/// The kernel refuses while somebody holds a page of the file, which on a busy
/// machine its own bookkeeping does for a moment (`memfd_wait_for_pins`).
fn add_seals(file: &std::fs::File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    for _ in 1..SEAL_ATTEMPTS {
        match rustix::fs::fcntl_add_seals(file, seals) {
            // It has waited for them itself.
            Err(rustix::io::Errno::BUSY) => {}
            done => return Ok(done?),
        }
    }
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

fn open_namespace(pid: Pid, kind: &str) -> io::Result<OwnedFd> {
    std::fs::File::open(format!("/proc/{}/ns/{kind}", pid.as_raw_pid())).map(OwnedFd::from)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

const _: () = assert!(MAX_STATUS_BYTES < MAX_MESSAGE_BYTES as u64);

//! The launcher's own process: one thread, one job.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{Mode, OFlags};

use super::child::{self, Descriptors, Ids, READY};
use super::protocol::{Job, LaunchPlan, MAX_MESSAGE_BYTES, NamespacePlan, Reply};
use crate::host::process;
use crate::host::process::Identity;
use crate::host::sys::{self, Forked};

/// Longest text a failing child may send.
const MAX_STATUS_BYTES: u64 = 16 << 10;

/// A step that went wrong.
pub(super) struct Failure {
    pub(super) step: &'static str,
    pub(super) message: String,
}

pub(super) trait InStep<T> {
    /// Names the step that failed.
    fn step(self, step: &'static str) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> InStep<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure { step, message: error.to_string() })
    }
}

/// Does the job that comes over standard input. For the host binary's hidden
/// subcommand; call it before any thread exists.
pub fn launcher_main() -> ! {
    let mut control = UnixStream::from(sys::inherited(0));
    let reply = read_job(&mut control).and_then(|job| match job {
        Job::Launch(plan) => launch(&plan).map(Reply::Launched),
        Job::Probe => probe().map(|()| Reply::Probed),
    });
    let reply =
        reply.unwrap_or_else(|failure| Reply::Failed { step: failure.step.to_owned(), message: failure.message });
    // Without a server there is nobody to tell.
    let told = serde_json::to_vec(&reply).map_err(io::Error::from).and_then(|text| control.write_all(&text));
    sys::exit_now(i32::from(told.is_err()))
}

fn read_job(control: &mut UnixStream) -> Result<Job, Failure> {
    let mut text = Vec::new();
    control.take(MAX_MESSAGE_BYTES).read_to_end(&mut text).step("read the job")?;
    serde_json::from_slice(&text).step("understand the job")
}

/// Namespaces as a sandbox would get them, for as long as it takes to look.
fn probe() -> Result<(), Failure> {
    let plan = NamespacePlan { hostname: "probe".to_owned(), own_network: true, hide: None };
    let (mut status, theirs) = pipe()?;
    let ids = Ids::own();
    match sys::fork_into(child::flags(&plan), None).step("make namespaces")? {
        Forked::Child => {
            drop(status);
            child::probe(&plan, ids, theirs)
        }
        Forked::Parent { .. } => {
            drop(theirs);
            read_status(&mut status)
        }
    }
}

fn launch(plan: &LaunchPlan) -> Result<Identity, Failure> {
    let descriptors = Descriptors { listener: sys::inherited(1), boot: sys::inherited(2) };
    // What is opened next must not take their numbers when they are moved.
    let (mut status, theirs) = pipe()?;
    let (gate, mut opened) = pipe().map(|(read, write)| (read, std::fs::File::from(write)))?;
    let group = plan
        .cgroup
        .v2_dir
        .as_ref()
        .map(|dir| rustix::fs::open(dir, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))
        .transpose()
        .step("open the control group")?;
    let flags = plan.namespaces.as_ref().map_or(0, child::flags);
    let ids = Ids::own();
    match sys::fork_into(flags, group.as_ref().map(|group| group.as_fd())).step("start a process")? {
        Forked::Child => {
            drop((status, opened));
            child::become_proot(plan, ids, &descriptors, theirs, gate)
        }
        Forked::Parent { pid, pidfd } => {
            drop((theirs, gate, descriptors));
            let identity = process::identify(pid).step("look at the new process")?;
            let written = serde_json::to_vec(&identity).map_err(io::Error::from);
            let written = written.and_then(|text| std::fs::write(&plan.identity_file, text));
            let started = written.and_then(|()| opened.write_all(&[READY])).step("let the new process go on");
            drop(opened);
            let started = started.and_then(|()| read_status(&mut status));
            if started.is_err() {
                let _ = process::kill(&pidfd);
            }
            started.map(|()| identity)
        }
    }
}

fn pipe() -> Result<(std::fs::File, OwnedFd), Failure> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("make a pipe")?;
    Ok((read.into(), write))
}

/// A byte and then nothing is success: the rest of the pipe closes at the exec.
fn read_status(status: &mut std::fs::File) -> Result<(), Failure> {
    let mut text = Vec::new();
    status.take(MAX_STATUS_BYTES).read_to_end(&mut text).step("hear of the new process")?;
    match text.split_first() {
        Some((&READY, [])) => Ok(()),
        Some(_) => Err(child::decode(&text)),
        None => Err(Failure { step: "start a process", message: "it ended at once".to_owned() }),
    }
}

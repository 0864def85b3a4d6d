//! Orders to the spawner, from any number of tasks at once.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::packet;
use super::protocol::{Done, Failure, Job, Reply, Request};
use crate::host::sys;

/// Longest a single order may take; a launch takes a few milliseconds.
const ORDER_LIMIT: Duration = Duration::from_secs(20);

/// Longest removal of what sandboxes left: a full disk of small files.
const TRASH_LIMIT: Duration = Duration::from_mins(30);

/// How the spawner is started: a program that calls
/// [`spawner_main`](super::spawner_main) with these arguments.
#[derive(Debug, Clone)]
pub struct SpawnerCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

impl Default for SpawnerCommand {
    /// This very binary, with its hidden subcommand.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec!["sandbox-spawner".into()] }
    }
}

#[derive(Debug, thiserror::Error)]
pub(in crate::oci) enum CallError {
    #[error("the spawner cannot be started")]
    Start(#[source] io::Error),
    /// It died, or stopped answering, with the order in its hands.
    #[error("the spawner ended")]
    Lost,
    #[error("the spawner did not answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error(transparent)]
    Failed(#[from] Failure),
}

type Answer = Result<(Done, Vec<OwnedFd>), Failure>;

/// A spawner that is started when it is first needed, and again when it died.
pub(in crate::oci) struct Spawner {
    command: SpawnerCommand,
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
}

impl Spawner {
    pub(in crate::oci) fn new(command: SpawnerCommand) -> Self {
        Self { command, link: tokio::sync::Mutex::default() }
    }

    /// Has one job done.
    pub(in crate::oci) async fn call(
        &self,
        job: Job,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Done, Vec<OwnedFd>), CallError> {
        let limit = if matches!(job, Job::EmptyTrash { .. }) { TRASH_LIMIT } else { ORDER_LIMIT };
        let link = self.link().await.map_err(CallError::Start)?;
        let answer = link.order(job, fds).await?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => Err(CallError::Lost),
            Err(_) => Err(CallError::Late(limit)),
        }
    }

    /// The spawner's own process, for tests and diagnostics.
    pub(in crate::oci) async fn pid(&self) -> Option<u32> {
        self.link.lock().await.as_ref().filter(|link| link.is_up()).map(|link| link.pid)
    }

    /// Lets it go; what it started lives on.
    pub(in crate::oci) async fn stop(&self) {
        if let Some(link) = self.link.lock().await.take() {
            link.close();
        }
    }

    async fn link(&self) -> io::Result<Arc<Link>> {
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_up()) {
            return Ok(Arc::clone(link));
        }
        let link = Link::start(&self.command)?;
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        if let Some(link) = self.link.get_mut().take() {
            link.close();
        }
    }
}

/// One running spawner.
struct Link {
    socket: AsyncFd<OwnedFd>,
    pid: u32,
    /// `None` once the spawner is gone.
    waiting: Mutex<Option<Waiting>>,
}

#[derive(Default)]
struct Waiting {
    next_id: u64,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Link {
    fn start(command: &SpawnerCommand) -> io::Result<Arc<Self>> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let mut child = tokio::process::Command::new(&command.program)
            .args(&command.args)
            .env_clear()
            .current_dir("/")
            // Not in the terminal's foreground group: Ctrl-C is the server's.
            .process_group(0)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let link = Arc::new(Self {
            socket: sys::watch(ours, Interest::READABLE | Interest::WRITABLE)?,
            pid: child.id().unwrap_or_default(),
            waiting: Mutex::new(Some(Waiting::default())),
        });
        let reader = Arc::clone(&link);
        tokio::spawn(async move {
            let cause = reader.read_answers().await;
            reader.give_up();
            let status = child.wait().await;
            match cause {
                Ok(()) => tracing::debug!(?status, "sandbox spawner ended"),
                Err(error) => tracing::error!(%error, ?status, "sandbox spawner failed; it is started again"),
            }
        });
        Ok(link)
    }

    fn is_up(&self) -> bool {
        self.lock().is_some()
    }

    /// Sends an order and returns where its answer will arrive.
    async fn order(&self, job: Job, fds: &[BorrowedFd<'_>]) -> Result<oneshot::Receiver<Answer>, CallError> {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut waiting = self.lock();
            let waiting = waiting.as_mut().ok_or(CallError::Lost)?;
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.answers.insert(id, sender);
            id
        };
        let request = Request { id, job };
        let sent = self.socket.async_io(Interest::WRITABLE, |socket| packet::send(socket, &request, fds)).await;
        if let Err(error) = sent {
            tracing::warn!(%error, "the sandbox spawner does not take orders");
            if let Some(waiting) = self.lock().as_mut() {
                waiting.answers.remove(&id);
            }
            return Err(CallError::Lost);
        }
        Ok(receiver)
    }

    async fn read_answers(&self) -> io::Result<()> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, |socket| packet::receive::<Reply>(socket)).await?;
            let Some((reply, fds)) = received else { return Ok(()) };
            let sender = self.lock().as_mut().and_then(|waiting| waiting.answers.remove(&reply.id));
            // Whoever asked may have given up; dropping the descriptors then
            // frees what they stand for.
            if let Some(sender) = sender {
                let _ = sender.send(reply.result.map(|done| (done, fds)));
            }
        }
    }

    /// Shuts the socket: the spawner reads end-of-file, and so do we.
    fn close(&self) {
        let _ = rustix::net::shutdown(self.socket.get_ref().as_fd(), rustix::net::Shutdown::Both);
    }

    /// Dropping the senders tells everybody who waits.
    fn give_up(&self) {
        self.lock().take();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

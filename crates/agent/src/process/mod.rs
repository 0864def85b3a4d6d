//! Commands: starting them, keeping what they write, ending them.
//!
//! ```text
//! start ──► running ──► main process ended ──► drained ──► ended ──► forgotten
//!              │            (≤ 100 ms)                      (an hour, 256 at most)
//!              └─ deadline or SIGKILL: every descendant is killed
//! ```
//!
//! A command outlives whoever started it. What it writes goes into a bounded
//! buffer ([`output`]) from which any number of readers take at their own pace.
//! A reader that keeps taking holds the command up when the buffer is full, as a
//! pipe would; one that stops taking for [`STALL_PATIENCE`] does not: the command
//! goes on and the reader is later told how much it missed.

mod capabilities;
mod foreground;
mod kill;
mod launch;
mod mark;
mod output;
mod pid_slot;
mod reader;
mod report;
mod run;
mod supervisor;
mod terminal;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use kill::{descendant_sockets, parent, signal_everybody};
pub(crate) use output::OutputKind;
pub(crate) use reader::{Event, Reader, ReaderOptions};

use self::foreground::Typed;
use self::kill::Tree;
use self::mark::Mark;
use self::output::OutputBuffer;
use self::report::Reports;
use crate::console::Console;
use crate::{Failure, Sandbox, kernel};

/// How long after the end of its main process a command's output is still read
/// while something else holds the pipe.
const DRAIN_TIME: Duration = Duration::from_millis(100);

/// A supervisor with something to report does so within this time, unless
/// somebody inside has stopped it.
const REPORT_TIME: Duration = Duration::from_secs(1);

/// A reader that takes nothing for this long no longer holds the command up.
const STALL_PATIENCE: Duration = Duration::from_secs(5);

/// Ended commands are remembered this long, and at most this many of them.
const REMEMBERED_FOR: Duration = Duration::from_hours(1);
const MAX_REMEMBERED: usize = 256;

/// Input that waits for a command to read it, per command.
const MAX_WAITING_INPUTS: usize = 64;

/// What a caller asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct StartOptions {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub tag: Option<String>,
    pub deadline: Option<Duration>,
    pub stdin: bool,
    pub terminal: Option<TerminalSize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TerminalSize {
    pub cols: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selector {
    Pid(u32),
    Tag(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub timed_out: bool,
}

/// Where input goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputKind {
    Stdin,
    Terminal,
}

/// All commands of the sandbox.
#[derive(Default)]
pub(crate) struct Processes {
    table: Mutex<Vec<Arc<Process>>>,
    /// Commands that may run already and are not in the table yet.
    starting: AtomicUsize,
    console: Mutex<Console>,
}

/// One command.
pub(crate) struct Process {
    pub pid: u32,
    pub tag: Option<String>,
    pub argv: Vec<String>,
    /// As asked for, for listings.
    pub env: BTreeMap<String, String>,
    pub workdir: Option<String>,
    supervisor: i32,
    mark: Option<Mark>,
    is_init: bool,
    /// Closing it lets the supervisor go; whoever kills holds it open.
    reports: Mutex<Option<Arc<Reports>>>,
    stdin: tokio::sync::Mutex<Option<AsyncFd<OwnedFd>>>,
    waiting_inputs: AtomicUsize,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    state: Mutex<State>,
    /// Output or an end: for readers.
    produced: Notify,
    /// A reader took something: for pumps that are held up.
    consumed: Notify,
    phase_changed: Notify,
}

#[derive(Default)]
struct State {
    output: OutputBuffer,
    phase: Phase,
    timed_out: bool,
    exit: Option<(Exit, Instant)>,
    readers: HashMap<u64, Taking>,
    next_reader: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Running,
    /// The main process has ended: what it wrote is in the pipe and is taken out
    /// whatever readers do.
    Draining,
    /// The end has been announced. What still comes is only for the console.
    Ended,
}

/// Where a reader is.
#[derive(Debug, Clone, Copy)]
struct Taking {
    offset: u64,
    /// Since when it has left something untaken that holds the command up.
    waits_since: Option<Instant>,
}

/// Starts a command and returns it once its program runs.
pub(crate) async fn start(sandbox: &Arc<Sandbox>, options: StartOptions) -> Result<Arc<Process>, Failure> {
    let sandbox = Arc::clone(sandbox);
    // In a task of its own: a caller that goes away must not leave half of it.
    whole(async move {
        let _starting = Counted::new(&sandbox.processes.starting);
        let launched = launch::launch(&sandbox, &options).await?;
        let process = Arc::new(launched.process);
        sandbox.processes.insert(&process);
        let processes = Arc::clone(&sandbox.processes);
        tokio::spawn(run::run(Arc::clone(&process), processes, launched.pipes, options.deadline));
        Ok(process)
    })
    .await
}

/// Sends a signal to the process group; SIGKILL reaches every descendant.
pub(crate) async fn signal(process: Arc<Process>, signal: i32) -> Result<(), Failure> {
    whole(async move { process.signal(signal).await }).await
}

async fn whole<T: Send + 'static>(
    step: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::spawn(step).await {
        Ok(result) => result,
        Err(error) => Err(Failure::Internal(format!("a step failed: {error}"))),
    }
}

impl Processes {
    fn insert(&self, process: &Arc<Process>) {
        let mut table = lock(&self.table);
        // The kernel gave the number away again.
        table.retain(|other| other.pid != process.pid);
        table.push(Arc::clone(process));
        forget_old(&mut table);
    }

    /// Whether any command runs or is about to.
    pub(crate) fn are_ended(&self) -> bool {
        !self.are_starting() && self.list().iter().all(|process| process.exit().is_some())
    }

    pub(crate) fn are_starting(&self) -> bool {
        self.starting.load(Ordering::Relaxed) > 0
    }

    /// Running ones and those that ended not too long ago, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<Process>> {
        let mut table = lock(&self.table);
        forget_old(&mut table);
        table.clone()
    }

    /// A tag names the newest command that has it, a running one first.
    pub(crate) fn find(&self, selector: &Selector) -> Result<Arc<Process>, Failure> {
        let table = lock(&self.table);
        let found = match selector {
            Selector::Pid(pid) => table.iter().rev().find(|process| process.pid == *pid),
            Selector::Tag(tag) => {
                let mut tagged = table.iter().rev().filter(|process| process.tag.as_deref() == Some(tag));
                tagged.clone().find(|process| process.exit().is_none()).or_else(|| tagged.next())
            }
        };
        found.cloned().ok_or_else(|| Failure::ProcessNotFound(selector.to_string()))
    }

    /// As `find`, for what only works on a running command.
    pub(crate) fn find_running(&self, selector: &Selector) -> Result<Arc<Process>, Failure> {
        let process = self.find(selector)?;
        match process.exit() {
            None => Ok(process),
            Some(_) => Err(Failure::ProcessNotFound(selector.to_string())),
        }
    }

    fn forget_old(&self) {
        forget_old(&mut lock(&self.table));
    }

    pub(crate) fn console_lines(&self, count: usize) -> Vec<String> {
        lock(&self.console).lines(count)
    }

    /// Kills everything that runs.
    pub(crate) async fn kill_all(&self) {
        for process in self.list() {
            if process.exit().is_none() {
                process.kill().await;
            }
        }
    }
}

impl Process {
    /// How it ended, once that is known and its output is complete.
    pub(crate) fn exit(&self) -> Option<Exit> {
        lock(&self.state).exit.map(|(exit, _)| exit)
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Offset after the last byte so far.
    pub(crate) fn output_end(&self) -> u64 {
        lock(&self.state).output.end()
    }

    /// Sends a signal to the process group; SIGKILL reaches every descendant.
    async fn signal(&self, signal: i32) -> Result<(), Failure> {
        if signal == Signal::KILL.as_raw() {
            self.kill().await;
            return Ok(());
        }
        let invalid = || Failure::InvalidArgument(format!("no such signal: {signal}"));
        let signal = Signal::from_named_raw(signal).ok_or_else(invalid)?;
        let group = Pid::from_raw(self.pid as i32).ok_or_else(|| Failure::ProcessNotFound(self.pid.to_string()))?;
        match rustix::process::kill_process_group(group, signal) {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(Failure::ProcessNotFound(self.pid.to_string())),
            Err(error) => Err(Failure::Internal(format!("signal {}: {error}", self.pid))),
        }
    }

    /// Kills it with every descendant.
    pub(crate) async fn kill(&self) {
        // The open connection keeps the supervisor, and with it the tree, alive.
        let Some(reports) = lock(&self.reports).clone() else { return };
        if let Some(group) = Pid::from_raw(self.pid as i32) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        kill::kill_descendants(Tree { root: self.supervisor, mark: self.mark }, self.is_init).await;
        // It has an end to report, also when somebody inside has stopped it.
        foreground::tell(self.supervisor, Signal::CONT);
        drop(reports);
    }

    pub(crate) async fn send_input(&self, kind: InputKind, bytes: Bytes) -> Result<(), Failure> {
        let _waiting = Counted::new(&self.waiting_inputs);
        if self.waiting_inputs.load(Ordering::Relaxed) > MAX_WAITING_INPUTS {
            return Err(Failure::Busy(format!("process {} does not read its input", self.pid)));
        }
        match (kind, &self.terminal) {
            (InputKind::Terminal, Some(terminal)) => {
                let _order = self.stdin.lock().await;
                if kernel::is_gvisor() {
                    return self.type_in(terminal, bytes).await;
                }
                self.until_ended(write_all(terminal, &bytes)).await
            }
            (InputKind::Stdin, None) => {
                let mut stdin = self.stdin.lock().await;
                let Some(pipe) = stdin.as_ref() else {
                    return Err(Failure::InvalidArgument(format!("process {} has no open stdin", self.pid)));
                };
                let result = self.until_ended(write_all(pipe, &bytes)).await;
                if result.is_err() {
                    *stdin = None;
                }
                result
            }
            (InputKind::Terminal, None) => {
                Err(Failure::InvalidArgument(format!("process {} has no terminal", self.pid)))
            }
            (InputKind::Stdin, Some(_)) => {
                Err(Failure::InvalidArgument(format!("process {} has a terminal, not a stdin pipe", self.pid)))
            }
        }
    }

    /// Does for the terminal what its kernel does not.
    async fn type_in(&self, terminal: &AsyncFd<OwnedFd>, bytes: Bytes) -> Result<(), Failure> {
        for piece in foreground::take_apart(terminal.get_ref(), bytes) {
            match piece {
                Typed::Text(text) => self.until_ended(write_all(terminal, &text)).await?,
                Typed::Signal(signal) => foreground::tell(self.supervisor, signal),
            }
        }
        Ok(())
    }

    /// After what was sent before.
    pub(crate) async fn close_stdin(&self) -> Result<(), Failure> {
        if self.terminal.is_some() {
            return Err(Failure::InvalidArgument(format!("process {} has a terminal: send ^D instead", self.pid)));
        }
        *self.stdin.lock().await = None;
        Ok(())
    }

    pub(crate) fn resize(&self, size: TerminalSize) -> Result<(), Failure> {
        let Some(terminal) = &self.terminal else {
            return Err(Failure::InvalidArgument(format!("process {} has no terminal", self.pid)));
        };
        terminal::resize(terminal.get_ref(), size)
            .map_err(|error| Failure::Internal(format!("resize the terminal: {error}")))?;
        if kernel::is_gvisor() {
            foreground::tell(self.supervisor, Signal::WINCH);
        }
        Ok(())
    }

    /// A write to a command that nobody reads from ends when the command does.
    async fn until_ended(&self, write: impl Future<Output = std::io::Result<()>>) -> Result<(), Failure> {
        let ended = async {
            loop {
                let changed = self.produced.notified();
                if self.exit().is_some() {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            written = write => written.map_err(|error| match Errno::from_io_error(&error) {
                Some(Errno::PIPE) => Failure::InvalidArgument(format!("process {} has closed its stdin", self.pid)),
                _ => Failure::Internal(format!("write to process {}: {error}", self.pid)),
            }),
            () = ended => Err(Failure::ProcessNotFound(self.pid.to_string())),
        }
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "{pid}"),
            Self::Tag(tag) => f.write_str(tag),
        }
    }
}

/// One more in a count, until it is dropped: also when its caller goes away.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A panic elsewhere must not make this command unreachable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn forget_old(table: &mut Vec<Arc<Process>>) {
    let ended = |process: &Process| lock(&process.state).exit.map(|(_, at)| at);
    table.retain(|process| ended(process).is_none_or(|at| at.elapsed() < REMEMBERED_FOR));
    let remembered = table.iter().filter(|process| ended(process).is_some()).count();
    let mut surplus = remembered.saturating_sub(MAX_REMEMBERED);
    table.retain(|process| {
        let forget = surplus > 0 && ended(process).is_some();
        surplus -= usize::from(forget);
        !forget
    });
    for process in table.iter().filter(|process| ended(process).is_some()) {
        if !output::is_total_exceeded() {
            break;
        }
        lock(&process.state).output.clear();
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(Into::into)) {
            Ok(Ok(written)) => bytes = &bytes[written..],
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

//! Runs a command in a sandbox as if it ran here: input, output, signals and
//! size go through, and a server that restarts meanwhile is reconnected to.
//!
//! ```text
//!            start                       exit
//!  (nothing) ─────► running ─────────────────────► ended
//!                    │   ▲
//!   connection broke │   │ attached again, from the last offset
//!                    ▼   │
//!                  detached ── nobody answers for RECONNECT_LIMIT ──► error
//! ```

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FileType;
use stacyvm_api::{ErrorCode, ExecId, ExecRequest, ProcessStatus};
use stacyvm_client::{
    Channel, ClientError, ExecEvent, Exit, SandboxClient, Terminal, TerminalInput, TerminalOutput, TerminalSize,
};
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::output::Output;

/// How long a server may be away in the middle of a command.
const RECONNECT_LIMIT: Duration = Duration::from_secs(30);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// A connection that lasted longer than this ended one outage; the next is another.
const STEADY: Duration = Duration::from_secs(5);

/// Status of a command that was ended because nobody reads its output any more,
/// as of a program that a closed pipe ended.
const PIPE_CLOSED: i32 = 128 + 13;

/// Read from standard input at a time.
const INPUT_CHUNK_BYTES: usize = 64 * 1024;

/// Output kept by [`Capture::Collect`]; more is dropped and said.
const COLLECT_LIMIT_BYTES: usize = 64 * 1024 * 1024;

/// What the command's standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// This program's own. A runtime that takes none gets none.
    Forward,
    Closed,
}

/// Where the command's output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capture {
    /// To this program's own, as it comes.
    Print,
    /// Into the result.
    Collect,
}

/// How to run a command.
#[derive(Debug)]
pub(crate) struct Drive {
    pub(crate) request: ExecRequest,
    pub(crate) input: Input,
    pub(crate) capture: Capture,
    /// On a terminal of this size.
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) output: Output,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) truncated: bool,
}

/// Runs the command to its end. With [`CancellationToken`] cancelled it is
/// killed, and the call returns.
pub(crate) async fn drive(sandbox: &SandboxClient, how: Drive, stop: &CancellationToken) -> anyhow::Result<Ended> {
    let Drive { request, input, capture, terminal, output } = how;
    let request = if input == Input::Closed { without_input(request) } else { request };
    let Terminal { input: writer, output: reader } = sandbox.terminal(&request, terminal).await?;
    let (begin, gate) = oneshot::channel();
    let mut running = Running {
        sandbox,
        output,
        request,
        input,
        begin: Some(begin),
        denied: false,
        reader,
        pump: Pump::start(writer, read_stdin(gate)),
        exec_id: None,
        offset: 0,
        sink: Sink { capture, ended: Collected::default() },
        interrupts: 0,
        attached_at: Instant::now(),
        outage: None,
        refusal: None,
    };
    let exit = running.watch(terminal.is_some(), stop).await?;
    running.pump.stop.cancel();
    let Collected { stdout, stderr, truncated } = running.sink.ended;
    Ok(Ended { exit, stdout, stderr, truncated })
}

struct Running<'a> {
    sandbox: &'a SandboxClient,
    output: Output,
    request: ExecRequest,
    input: Input,
    /// Told once the command runs: until then no input is taken, and without
    /// input never.
    begin: Option<oneshot::Sender<()>>,
    /// The runtime takes no input, though there was some to forward.
    denied: bool,
    reader: TerminalOutput,
    pump: Pump,
    exec_id: Option<ExecId>,
    /// Position up to which output has been taken.
    offset: u64,
    sink: Sink,
    interrupts: u32,
    attached_at: Instant,
    /// Since when connections break one after the other.
    outage: Option<Instant>,
    /// What the server said last, if it was no event of the command.
    refusal: Option<ClientError>,
}

impl Running<'_> {
    async fn watch(&mut self, on_terminal: bool, stop: &CancellationToken) -> anyhow::Result<Exit> {
        // On a raw terminal Ctrl-C is a key like any other.
        let mut interrupt = listen(SignalKind::interrupt())?;
        let mut resize = listen(SignalKind::window_change())?;
        loop {
            tokio::select! {
                event = self.reader.next() => match event {
                    Ok(Some(event)) => match self.take(event) {
                        Ok(Some(exit)) => return Ok(exit),
                        Ok(None) => {}
                        Err(error) if is_closed_pipe(&error) => {
                            self.send_signal("KILL").await;
                            return Ok(Exit { code: PIPE_CLOSED, duration: None, error: None });
                        }
                        Err(error) => return Err(error),
                    },
                    // Its last word, such as that the sandbox has ended.
                    Ok(None) if self.refusal.is_some() && !self.may_come_back().await => return Err(self.refused()),
                    Ok(None) => self.attach_again(None).await?,
                    // A refusal of input, after which the command goes on; or why
                    // the connection ends now.
                    Err(error @ ClientError::Api(_)) if self.exec_id.is_some() => {
                        self.pump.stop.cancel();
                        self.refusal = Some(error);
                    }
                    Err(ClientError::Api(error))
                        if error.code == Some(ErrorCode::Unsupported)
                            && self.input == Input::Forward
                            && !on_terminal =>
                    {
                        self.start_without_input().await?;
                    }
                    Err(error @ ClientError::Transport { .. }) => self.attach_again(Some(error)).await?,
                    Err(error) => return Err(error.into()),
                },
                _ = interrupt.recv(), if !on_terminal => self.interrupt().await?,
                _ = resize.recv(), if on_terminal => self.resize().await,
                () = stop.cancelled() => {
                    self.send_signal("KILL").await;
                    anyhow::bail!("stopped");
                }
            }
        }
    }

    fn take(&mut self, event: ExecEvent) -> anyhow::Result<Option<Exit>> {
        self.refusal = None;
        match event {
            ExecEvent::Started { exec_id, .. } => {
                self.exec_id = Some(exec_id);
                self.begin_input();
            }
            ExecEvent::Output { channel, data, offset } => {
                self.offset = offset.unwrap_or(self.offset);
                self.sink.write(channel, &data)?;
            }
            ExecEvent::Dropped { bytes } => {
                self.sink.ended.truncated = true;
                self.output.note(&format!("warning: {bytes} bytes of output were not read in time and are lost"));
            }
            ExecEvent::Exit(exit) => return Ok(Some(exit)),
        }
        Ok(None)
    }

    fn begin_input(&mut self) {
        if self.denied && stdin_may_hold_something() {
            self.output.note("warning: this runtime takes no input; the command runs without it");
        }
        self.denied = false;
        if self.input == Input::Forward
            && let Some(begin) = self.begin.take()
        {
            // The reader is gone only when this program ends.
            let _ = begin.send(());
        }
    }

    /// Whether it is the input that the runtime does not have shows when the
    /// command is started without.
    async fn start_without_input(&mut self) -> anyhow::Result<()> {
        self.input = Input::Closed;
        self.denied = true;
        self.request = without_input(std::mem::take(&mut self.request));
        let Terminal { input, output } = self.sandbox.terminal(&self.request, None).await?;
        self.reader = output;
        self.pump.move_to(input).await
    }

    /// The connection ended without the command: goes on where it broke off.
    async fn attach_again(&mut self, error: Option<ClientError>) -> anyhow::Result<()> {
        let Some(exec_id) = self.exec_id.clone() else {
            return Err(error.map_or_else(
                || anyhow::anyhow!("the server closed the connection before the command started"),
                anyhow::Error::from,
            ));
        };
        if self.outage.is_none() || self.attached_at.elapsed() > STEADY {
            self.outage = Some(Instant::now());
            self.output.note("note: the connection broke; reconnecting");
        } else {
            sleep(RECONNECT_PAUSE).await;
        }
        let deadline = self.outage.unwrap_or_else(Instant::now) + RECONNECT_LIMIT;
        loop {
            if Instant::now() >= deadline {
                return Err(self.refusal.take().map_or_else(
                    || anyhow::anyhow!("the server did not come back; the command {exec_id} may still run"),
                    anyhow::Error::from,
                ));
            }
            match self.sandbox.attach(exec_id.clone(), self.offset).await {
                Ok(Terminal { input, output }) => {
                    self.reader = output;
                    self.attached_at = Instant::now();
                    return self.pump.move_to(input).await;
                }
                Err(ClientError::Connect { .. } | ClientError::Transport { .. }) => {}
                Err(error) if error.code() == Some(ErrorCode::Unavailable) => self.refusal = Some(error),
                Err(error) => return Err(error.into()),
            }
            sleep(RECONNECT_PAUSE).await;
        }
    }

    /// Whether it is the runtime that was away, rather than the command: one that
    /// the server has lost stays so.
    async fn may_come_back(&self) -> bool {
        let Some(exec_id) = &self.exec_id else { return false };
        if self.refusal.as_ref().and_then(ClientError::code) != Some(ErrorCode::Unavailable) {
            return false;
        }
        match self.sandbox.exec_log().await {
            Ok(log) => !log.iter().any(|row| row.exec_id == *exec_id && row.status == ProcessStatus::Lost),
            Err(_) => true,
        }
    }

    fn refused(&mut self) -> anyhow::Error {
        self.refusal.take().map_or_else(|| anyhow::anyhow!("the server ended the connection"), anyhow::Error::from)
    }

    /// Ctrl-C asks the command to end; again, it is killed.
    async fn interrupt(&mut self) -> anyhow::Result<()> {
        self.interrupts += 1;
        let name = if self.interrupts == 1 { "INT" } else { "KILL" };
        if let Some(exec_id) = &self.exec_id
            && let Err(error) = self.sandbox.signal(exec_id, name).await
            && error.code() == Some(ErrorCode::Unsupported)
        {
            anyhow::bail!("interrupted; this runtime takes no signals, so that the command {exec_id} may still run");
        }
        Ok(())
    }

    async fn send_signal(&self, name: &str) {
        if let Some(exec_id) = &self.exec_id {
            // It may have ended this very moment.
            let _ = self.sandbox.signal(exec_id, name).await;
        }
    }

    async fn resize(&self) {
        if let Some(exec_id) = &self.exec_id {
            let _ = self.sandbox.resize(exec_id, super::size()).await;
        }
    }
}

/// Carries input to the command, apart from the output: a command that writes
/// before it reads on must not stop either.
struct Pump {
    stop: CancellationToken,
    task: JoinHandle<mpsc::Receiver<Bytes>>,
}

impl Pump {
    fn start(mut writer: TerminalInput, mut source: mpsc::Receiver<Bytes>) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            loop {
                let chunk = tokio::select! {
                    chunk = source.recv() => chunk,
                    () = stopped.cancelled() => break,
                };
                let sent = match &chunk {
                    Some(chunk) => writer.write(chunk).await,
                    None => writer.close().await,
                };
                if sent.is_err() || chunk.is_none() {
                    // The writer lives on: closing it would end the connection.
                    stopped.cancelled().await;
                    break;
                }
            }
            source
        });
        Self { stop, task }
    }

    /// Goes on with what is left of the input on another connection.
    async fn move_to(&mut self, writer: TerminalInput) -> anyhow::Result<()> {
        self.stop.cancel();
        let source = (&mut self.task).await.context("carry the input over")?;
        *self = Self::start(writer, source);
        Ok(())
    }
}

/// The request for a command that reads nothing.
fn without_input(request: ExecRequest) -> ExecRequest {
    ExecRequest { keep_stdin_open: Some(false), ..request }
}

/// Whether something is lost when standard input is not sent: not of `/dev/null`,
/// a terminal, an empty file, or a pipe that nobody writes to any more.
fn stdin_may_hold_something() -> bool {
    let stdin = std::io::stdin();
    let Ok(stat) = rustix::fs::fstat(&stdin) else { return false };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => stat.st_size > 0,
        FileType::Fifo | FileType::Socket => {
            let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
            let looked = rustix::event::poll(&mut polled, Some(&Timespec::default()));
            looked.is_err() || polled[0].revents() != PollFlags::HUP
        }
        _ => false,
    }
}

/// Standard input in pieces, once `begun` says so. The channel closes at its end.
fn read_stdin(begun: oneshot::Receiver<()>) -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        if begun.await.is_err() {
            return;
        }
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; INPUT_CHUNK_BYTES];
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            if sender.send(Bytes::copy_from_slice(&buffer[..count])).await.is_err() {
                return;
            }
        }
    });
    receiver
}

#[derive(Debug, Default)]
struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

struct Sink {
    capture: Capture,
    ended: Collected,
}

impl Sink {
    fn write(&mut self, channel: Channel, data: &[u8]) -> anyhow::Result<()> {
        match (self.capture, channel) {
            (Capture::Print, Channel::Stdout) => print_to(std::io::stdout().lock(), data),
            (Capture::Print, Channel::Stderr) => print_to(std::io::stderr().lock(), data),
            (Capture::Collect, channel) => {
                let room = COLLECT_LIMIT_BYTES.saturating_sub(self.ended.stdout.len() + self.ended.stderr.len());
                let kept = &data[..data.len().min(room)];
                self.ended.truncated |= kept.len() < data.len();
                match channel {
                    Channel::Stdout => self.ended.stdout.extend_from_slice(kept),
                    Channel::Stderr => self.ended.stderr.extend_from_slice(kept),
                }
                Ok(())
            }
        }
    }
}

/// Whoever read this program's output has gone away.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let source = error.downcast_ref::<std::io::Error>();
    source.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn print_to(mut out: impl std::io::Write, data: &[u8]) -> anyhow::Result<()> {
    out.write_all(data).and_then(|()| out.flush()).context("write the command's output")
}

fn listen(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("listen for signals")
}

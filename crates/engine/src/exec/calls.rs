//! Starting, finding and steering commands.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use stacyvm_api::{ErrorCode, ExecId, ExecRequest, ExecResult, ProcessSummary, SandboxId};
use stacyvm_sandbox::{
    AttachRequest, ListedProcess, ProcessEvent, ProcessInput, ProcessSelector, ProcessStream, Session, SessionError,
    TerminalSize,
};

use super::command::{Command, UNKNOWN_KILLS};
use super::follow::{Follow, Follower};
use super::policy::{self, Resolved, TimeLimits, signal_number};
use super::{ExecEvent, ExecPage, OutputChannel, RunningExec, StartOptions};
use crate::page::{self, Cursor};
use crate::record::Record;
use crate::shared::{Shared, within};
use crate::store::ExecRow;
use crate::{Caller, EngineError, LimitExceeded};

/// Longest wait for a command to begin.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a call that steers a command.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Commands that run in one sandbox at the same time.
const COMMANDS_MAX: usize = 1024;
/// Piece of input sent at once.
const STDIN_PIECE_BYTES: usize = 64 * 1024;
const LOG_PAGE_DEFAULT: u32 = 100;
const LOG_PAGE_MAX: u32 = 1000;

impl Shared {
    pub(crate) async fn start_exec(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        request: ExecRequest,
        options: StartOptions,
        operation: &'static str,
    ) -> Result<RunningExec, EngineError> {
        self.check_open()?;
        let record = self.find(caller, id).inspect_err(|error| {
            self.metrics.observe(operation, "unknown", Duration::ZERO, Some(error.to_string()), self.now());
        })?;
        let text = request.command.clone();
        let started = self.try_start(caller, &record, request, options, operation).await;
        started.inspect_err(|error| self.note_unstarted(caller, &record, operation, &text, error))
    }

    async fn try_start(
        self: &Arc<Self>,
        caller: &Caller,
        record: &Arc<Record>,
        request: ExecRequest,
        options: StartOptions,
        operation: &'static str,
    ) -> Result<RunningExec, EngineError> {
        let owner = record.sandbox().owner_id.clone();
        let limits = TimeLimits {
            default: self.options.limits.default_exec_timeout,
            max: self.quotas.effective(owner.as_ref(), &self.options.limits).max_exec_timeout,
        };
        let Resolved { mut start, command: text, stdin, close_stdin } = policy::resolve(request, options, limits)?;
        if record.commands().len() >= COMMANDS_MAX {
            return Err(EngineError::Limit(LimitExceeded::Execs { max: COMMANDS_MAX }));
        }
        let session = self.session(record).await?;
        let starting = record.starting();
        let exec_id = ExecId::random();
        start.tag = Some(exec_id.to_string());
        let (terminal, deadline) = (start.terminal.is_some(), start.deadline);
        let (started_at, started) = (self.now(), Instant::now());
        let kills_before = self.kills_until_now(record).await;
        let begun = async { first_event(session.start(start).await?).await };
        let (pid, inner) = match within("start of the command", START_TIMEOUT, begun).await {
            Ok(begun) => begun,
            Err(error) => return Err(self.explain_failure(record, error).await),
        };
        let command = Arc::new(Command {
            exec_id: exec_id.clone(),
            text: crate::shared::cut(&text),
            pid,
            terminal,
            started_at,
            started: Some(started),
            deadline,
            operation,
            caller: caller.clone(),
            kills_before,
            followers: AtomicUsize::new(0),
            output: Mutex::default(),
            end: OnceLock::new(),
        });
        self.begin_command(record, &command);
        drop(starting);
        if let Some(stdin) = stdin {
            let feed = feed(Arc::clone(&session), exec_id.clone(), stdin, terminal, close_stdin && !terminal);
            self.spawn(feed);
        }
        let stream = self.follow(record, command, session, inner, 0).into_stream();
        Ok(RunningExec { exec_id, pid, stream })
    }

    /// Runs a command to its end, keeping as much output as one answer may
    /// have.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<ExecResult, EngineError> {
        let RunningExec { exec_id, mut stream, .. } =
            self.start_exec(caller, id, request, StartOptions::default(), "exec").await?;
        let mut gathered = Gathered::new(self.options.limits.max_output_bytes);
        let exit = loop {
            match stream.next().await {
                Some(Ok(ExecEvent::Exited(exit))) => break exit,
                Some(Ok(ExecEvent::Output { channel, data, .. })) => gathered.add(channel, &data),
                Some(Ok(ExecEvent::Dropped { .. })) => gathered.truncated = true,
                Some(Ok(ExecEvent::Keepalive)) => {}
                Some(Err(error)) => return Err(error),
                None => return Err(EngineError::Session(SessionError::Gone)),
            }
        };
        let result = ExecResult {
            exit_code: exit.exit_code,
            stdout: into_text(gathered.stdout),
            stderr: into_text(gathered.stderr),
            duration: exit.duration.into(),
            truncated: gathered.truncated,
            exec_id: Some(exec_id),
            error: exit.error,
            signal: exit.signal,
        };
        if exit.error == Some(ErrorCode::Timeout) {
            let timeout = exit.timeout.unwrap_or_default();
            return Err(EngineError::ExecTimeout { timeout, partial: Box::new(result) });
        }
        Ok(result)
    }

    pub(crate) async fn attach_exec(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        offset: u64,
    ) -> Result<RunningExec, EngineError> {
        let record = self.find(caller, id)?;
        let running = record.commands().get(exec_id).cloned();
        let command = if let Some(command) = running {
            command
        } else {
            self.store.writer().committed().await?;
            let row = self.store.exec(id, exec_id).await?;
            Command::from_row(&row.ok_or_else(|| exec_not_found(&record, exec_id))?)
        };
        let session = self.session(&record).await?;
        let request = AttachRequest { process: tag(exec_id), offset };
        let attached = within("attachment", START_TIMEOUT, async { first_event(session.attach(request).await?).await });
        let (pid, inner) = attached.await.map_err(|error| unknown_to_agent(error, &record, exec_id))?;
        let stream = self.follow(&record, command, session, inner, offset).into_stream();
        Ok(RunningExec { exec_id: exec_id.clone(), pid, stream })
    }

    pub(crate) async fn exec_log(
        &self,
        caller: &Caller,
        id: &SandboxId,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> Result<ExecPage, EngineError> {
        self.find(caller, id)?;
        let limit = page::limit(limit, LOG_PAGE_MAX)?.unwrap_or(LOG_PAGE_DEFAULT);
        let before = cursor.map(Cursor::parse).transpose()?;
        self.store.writer().committed().await?;
        let before = before.as_ref().map(|cursor| (cursor.at, cursor.id.as_str()));
        // One more than asked for shows whether there is a next page.
        let mut rows = self.store.execs(id, before, limit + 1).await?;
        let more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        let last = rows.last().filter(|_| more);
        let next_cursor = last.map(|row| Cursor::text(row.started_at, row.exec_id.as_str()));
        Ok(ExecPage { items: rows.iter().map(ExecRow::summary).collect(), next_cursor })
    }

    pub(crate) async fn exec_summary(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
    ) -> Result<(ProcessSummary, Option<Vec<u8>>), EngineError> {
        let record = self.find(caller, id)?;
        self.store.writer().committed().await?;
        let row = self.store.exec(id, exec_id).await?.ok_or_else(|| exec_not_found(&record, exec_id))?;
        Ok((row.summary(), row.output))
    }

    pub(crate) async fn send_input(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        data: Bytes,
    ) -> Result<(), EngineError> {
        let (record, command) = self.running(caller, id, exec_id)?;
        let input = if command.terminal { ProcessInput::Terminal(data) } else { ProcessInput::Stdin(data) };
        self.steer(&record, exec_id, |session| async move { session.send_input(&tag(exec_id), input).await }).await
    }

    pub(crate) async fn close_stdin(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
    ) -> Result<(), EngineError> {
        let (record, _) = self.running(caller, id, exec_id)?;
        self.steer(&record, exec_id, |session| async move { session.close_stdin(&tag(exec_id)).await }).await
    }

    pub(crate) async fn resize(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        size: TerminalSize,
    ) -> Result<(), EngineError> {
        let (record, _) = self.running(caller, id, exec_id)?;
        self.steer(&record, exec_id, |session| async move { session.resize(&tag(exec_id), size).await }).await
    }

    pub(crate) async fn signal(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        signal: &str,
    ) -> Result<(), EngineError> {
        let signal = signal_number(signal)?;
        let (record, _) = self.running(caller, id, exec_id)?;
        self.steer(&record, exec_id, |session| async move { session.signal(&tag(exec_id), signal).await }).await
    }

    /// Commands that an earlier process left as running.
    async fn unsettled(&self, record: &Record) -> Vec<ExecRow> {
        self.store.running_execs(&record.id).await.unwrap_or_else(|error| {
            tracing::error!(sandbox = %record.id, error = ?error, "its commands cannot be read");
            Vec::new()
        })
    }

    /// The sandbox of an earlier process is gone, and its commands with it.
    pub(crate) async fn lose_commands(&self, record: &Record) {
        for row in self.unsettled(record).await {
            self.lose_command(record, &Command::from_row(&row));
        }
    }

    /// Settles the commands that an earlier process left as running.
    pub(crate) async fn settle_commands(self: &Arc<Self>, record: &Arc<Record>) {
        let rows = self.unsettled(record).await;
        let listed = async {
            let session = self.connect(record).await?;
            let listed = within("listing of commands", CALL_TIMEOUT, session.processes()).await?;
            Ok::<_, EngineError>((session, listed))
        };
        let (session, listed) = match listed.await {
            Ok((session, listed)) => (Some(session), listed),
            Err(error) => {
                tracing::warn!(sandbox = %record.id, error = ?error, "its commands are lost");
                (None, Vec::new())
            }
        };
        let mut by_tag: HashMap<String, ListedProcess> =
            listed.into_iter().filter_map(|process| Some((process.tag.clone()?, process))).collect();
        for row in &rows {
            let command = Command::from_row(row);
            match (by_tag.remove(row.exec_id.as_str()), &session) {
                (Some(ListedProcess { exit: Some(exit), .. }), _) => {
                    self.finish_command(record, &command, exit).await;
                }
                (Some(_running), Some(session)) => self.take_over(record, command, session).await,
                (None, _) | (Some(_), None) => self.lose_command(record, &command),
            }
        }
        let Some(session) = session.filter(|_| !record.is_starting()) else { return };
        for (tag, process) in by_tag {
            self.adopt_command(record, &session, &tag, process).await;
        }
    }

    /// The log is written a moment after a command began: what began in the
    /// last moment of the earlier process is known to the agent alone.
    async fn adopt_command(
        self: &Arc<Self>,
        record: &Arc<Record>,
        session: &Arc<dyn Session>,
        tag: &str,
        process: ListedProcess,
    ) {
        let Ok(exec_id) = tag.parse::<ExecId>() else { return };
        if record.commands().contains_key(&exec_id) || !matches!(self.store.exec(&record.id, &exec_id).await, Ok(None))
        {
            return;
        }
        tracing::info!(sandbox = %record.id, exec = %exec_id, "taking up a command that is not in the log");
        let command = Arc::new(Command {
            exec_id,
            text: crate::shared::cut(&process.argv.join(" ")),
            pid: process.pid,
            terminal: process.terminal,
            // Not known; the agent holds it.
            deadline: None,
            started_at: self.now(),
            started: None,
            operation: "exec_stream",
            caller: Caller::default(),
            kills_before: UNKNOWN_KILLS,
            followers: AtomicUsize::new(0),
            output: Mutex::default(),
            end: OnceLock::new(),
        });
        self.begin_command(record, &command);
        match process.exit {
            Some(exit) => drop(self.finish_command(record, &command, exit).await),
            None => self.take_over(record, command, session).await,
        }
    }

    /// Reads along with a command that an earlier process started.
    async fn take_over(self: &Arc<Self>, record: &Arc<Record>, command: Arc<Command>, session: &Arc<dyn Session>) {
        record.commands().insert(command.exec_id.clone(), Arc::clone(&command));
        let request = AttachRequest { process: tag(&command.exec_id), offset: 0 };
        match within("attachment", START_TIMEOUT, session.attach(request)).await {
            Ok(inner) => {
                let follower = self.follow(record, command, Arc::clone(session), inner, 0);
                self.spawn(follower.drain());
            }
            Err(error) => {
                tracing::warn!(sandbox = %record.id, exec = %command.exec_id, error = ?error, "a command is lost");
                self.lose_command(record, &command);
            }
        }
    }

    fn follow(
        self: &Arc<Self>,
        record: &Arc<Record>,
        command: Arc<Command>,
        session: Arc<dyn Session>,
        inner: ProcessStream,
        offset: u64,
    ) -> Follower {
        let (shared, record) = (Arc::clone(self), Arc::clone(record));
        Follower::new(Follow { shared, record, command, session, inner, offset })
    }

    fn running(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
    ) -> Result<(Arc<Record>, Arc<Command>), EngineError> {
        let record = self.find(caller, id)?;
        let command = record.commands().get(exec_id).cloned();
        let command = command.ok_or_else(|| exec_not_found(&record, exec_id))?;
        Ok((record, command))
    }

    async fn steer<Fut>(
        &self,
        record: &Record,
        exec_id: &ExecId,
        call: impl FnOnce(Arc<dyn Session>) -> Fut,
    ) -> Result<(), EngineError>
    where
        Fut: Future<Output = Result<(), SessionError>>,
    {
        let session = self.session(record).await?;
        let steered = within("answer of the sandbox", CALL_TIMEOUT, call(session)).await;
        steered.map_err(|error| unknown_to_agent(error, record, exec_id))
    }
}

/// Output of one command for one answer.
struct Gathered {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    room: usize,
    truncated: bool,
}

impl Gathered {
    fn new(room: usize) -> Self {
        Self { stdout: Vec::new(), stderr: Vec::new(), room, truncated: false }
    }

    fn add(&mut self, channel: OutputChannel, data: &[u8]) {
        let kept = data.len().min(self.room);
        self.truncated |= kept < data.len();
        self.room -= kept;
        match channel {
            OutputChannel::Stdout | OutputChannel::Terminal => self.stdout.extend_from_slice(&data[..kept]),
            OutputChannel::Stderr => self.stderr.extend_from_slice(&data[..kept]),
        }
    }
}

/// Without a copy where the bytes are text already.
fn into_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// Waits for `Started`, which is the first event of every stream.
async fn first_event(mut stream: ProcessStream) -> Result<(u32, ProcessStream), SessionError> {
    loop {
        match stream.next().await {
            Some(Ok(ProcessEvent::Started { pid })) => return Ok((pid, stream)),
            Some(Ok(ProcessEvent::Keepalive)) => {}
            Some(Err(error)) => return Err(error),
            Some(Ok(
                ProcessEvent::Stdout(_)
                | ProcessEvent::Stderr(_)
                | ProcessEvent::Terminal(_)
                | ProcessEvent::Dropped { .. }
                | ProcessEvent::Exited(_),
            ))
            | None => return Err(SessionError::Unavailable(Some("a stream without a start".into()))),
        }
    }
}

/// Gives a command the input of its request. That it ends before it has read
/// everything is its own affair.
async fn feed(session: Arc<dyn Session>, exec_id: ExecId, mut stdin: Bytes, terminal: bool, close: bool) {
    let process = tag(&exec_id);
    while !stdin.is_empty() {
        let piece = stdin.split_to(stdin.len().min(STDIN_PIECE_BYTES));
        let input = if terminal { ProcessInput::Terminal(piece) } else { ProcessInput::Stdin(piece) };
        if let Err(error) = session.send_input(&process, input).await {
            tracing::debug!(exec = %exec_id, error = ?error, "a command did not take its input");
            return;
        }
    }
    if close && let Err(error) = session.close_stdin(&process).await {
        tracing::debug!(exec = %exec_id, error = ?error, "the input of a command could not be closed");
    }
}

fn tag(exec_id: &ExecId) -> ProcessSelector {
    ProcessSelector::Tag(exec_id.to_string())
}

fn exec_not_found(record: &Record, exec_id: &ExecId) -> EngineError {
    EngineError::ExecNotFound { id: record.id.clone(), exec_id: exec_id.clone() }
}

/// The agent forgets a command some time after its end.
fn unknown_to_agent(error: EngineError, record: &Record, exec_id: &ExecId) -> EngineError {
    match error {
        EngineError::Session(SessionError::ProcessNotFound(_)) => exec_not_found(record, exec_id),
        other => other,
    }
}

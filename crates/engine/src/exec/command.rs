//! What is known of one command, and how its end is found out and recorded.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use stacyvm_api::{ErrorCode, EventKind, ExecId, ProcessStatus, Timestamp};
use stacyvm_sandbox::{Exit, LimitKills, ProviderError, SessionError};

use super::ExecExit;
use crate::record::Record;
use crate::shared::{Operation, Shared, failure_data};
use crate::store::ExecRow;
use crate::{Caller, EngineError};

/// Longest wait for a reading that only explains an end.
const USAGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Between a broken connection and the news that its sandbox has ended.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
const SIGKILL: i32 = 9;
/// Status of a shell whose child was killed.
const SHELL_SIGKILL: i32 = SHELL_SIGNAL_BASE + SIGKILL;
const SHELL_SIGNAL_BASE: i32 = 128;
const SIGXFSZ: i32 = 25;

#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) exec_id: ExecId,
    /// As the log shows it.
    pub(crate) text: String,
    pub(crate) pid: u32,
    pub(crate) terminal: bool,
    pub(crate) started_at: Timestamp,
    /// `None` for a command of an earlier process.
    pub(crate) started: Option<Instant>,
    pub(crate) deadline: Option<Duration>,
    /// `exec`, or `exec_stream` where the caller reads along.
    pub(crate) operation: &'static str,
    pub(crate) caller: Caller,
    /// Kills by limits that were known of when it began.
    pub(crate) kills_before: LimitKills,
    /// Who reads along and would see its end.
    pub(crate) followers: AtomicUsize,
    pub(crate) output: Mutex<Vec<u8>>,
    pub(crate) end: OnceLock<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exited(ExecExit),
    /// Nobody saw it: the sandbox went away first.
    Lost,
}

/// Of a command that began before anybody counted: no kill is its own.
pub(crate) const UNKNOWN_KILLS: LimitKills = LimitKills { memory: u64::MAX, pids: u64::MAX, disk: u64::MAX };

/// Whether a file became longer than the kernel lets it be (`RLIMIT_FSIZE`).
fn is_file_limit(exit: Exit) -> bool {
    exit.signal == Some(SIGXFSZ) || exit.code == Some(SHELL_SIGNAL_BASE + SIGXFSZ)
}

impl Command {
    /// A command of the log, after a restart or after its end.
    pub(crate) fn from_row(row: &ExecRow) -> Arc<Self> {
        let deadline = row.deadline_at.map(|at| at.since(row.started_at));
        let end = match row.status {
            ProcessStatus::Running => None,
            ProcessStatus::Lost => Some(End::Lost),
            ProcessStatus::Exited | ProcessStatus::TimedOut => {
                let timed_out = row.status == ProcessStatus::TimedOut;
                Some(End::Exited(ExecExit {
                    exit_code: row.exit_code.unwrap_or(SHELL_SIGKILL),
                    signal: None,
                    error: timed_out.then_some(ErrorCode::Timeout),
                    timeout: deadline.filter(|_| timed_out),
                    duration: row.duration.unwrap_or_default(),
                }))
            }
        };
        Arc::new(Self {
            exec_id: row.exec_id.clone(),
            text: row.command.clone(),
            pid: row.pid.unwrap_or(0),
            terminal: row.terminal,
            started_at: row.started_at,
            started: None,
            deadline,
            operation: "exec_stream",
            caller: Caller::default(),
            kills_before: UNKNOWN_KILLS,
            followers: AtomicUsize::new(0),
            output: Mutex::new(row.output.clone().unwrap_or_default()),
            end: end.map(OnceLock::from).unwrap_or_default(),
        })
    }

    pub(crate) fn elapsed(&self, now: Timestamp) -> Duration {
        self.started.map_or_else(|| now.since(self.started_at), |started| started.elapsed())
    }

    /// Keeps the beginning of the output, as far as the log wants it.
    pub(crate) fn keep_output(&self, bytes: &[u8], max: usize) {
        if max == 0 {
            return;
        }
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let room = max.saturating_sub(output.len()).min(bytes.len());
        output.extend_from_slice(&bytes[..room]);
    }

    fn to_row(&self, record: &Record, status: ProcessStatus, exit: Option<&ExecExit>, now: Timestamp) -> ExecRow {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ExecRow {
            exec_id: self.exec_id.clone(),
            sandbox_id: record.id.clone(),
            command: self.text.clone(),
            status,
            pid: Some(self.pid),
            exit_code: exit.map(|exit| exit.exit_code),
            started_at: self.started_at,
            duration: (status != ProcessStatus::Running)
                .then(|| exit.map_or_else(|| self.elapsed(now), |exit| exit.duration)),
            deadline_at: self.deadline.map(|deadline| self.started_at + deadline),
            terminal: self.terminal,
            output: (!output.is_empty()).then_some(output),
        }
    }
}

impl Shared {
    /// A command that just started: log, event, and the list of running ones.
    pub(crate) fn begin_command(&self, record: &Record, command: &Arc<Command>) {
        record.commands().insert(command.exec_id.clone(), Arc::clone(command));
        self.store.writer().save_exec(command.to_row(record, ProcessStatus::Running, None, self.now()));
        self.emit_about(record, EventKind::ExecStarted, exec_data(&command.exec_id));
    }

    /// The command ended. The first one to see it records it; all get the same
    /// answer.
    pub(crate) async fn finish_command(&self, record: &Record, command: &Arc<Command>, exit: Exit) -> ExecExit {
        if let Some(End::Exited(exit)) = command.end.get() {
            return *exit;
        }
        let duration = command.elapsed(self.now());
        let killed = exit.signal == Some(SIGKILL) || exit.code == Some(SHELL_SIGKILL);
        let error = if exit.timed_out {
            Some(ErrorCode::Timeout)
        } else if killed || is_file_limit(exit) {
            self.limit_that_killed(record, command, exit).await
        } else {
            None
        };
        let exit = ExecExit {
            exit_code: exit.shell_code(),
            signal: exit.signal,
            error,
            timeout: command.deadline.filter(|_| exit.timed_out),
            duration,
        };
        match command.end.set(End::Exited(exit)) {
            Ok(()) => {
                self.record_end(record, command, Some(&exit));
                exit
            }
            Err(_) => match command.end.get() {
                Some(End::Exited(first)) => *first,
                Some(End::Lost) | None => exit,
            },
        }
    }

    /// The sandbox went away before the command's end was seen.
    pub(crate) fn lose_command(&self, record: &Record, command: &Arc<Command>) {
        if command.end.set(End::Lost).is_ok() {
            self.record_end(record, command, None);
        }
    }

    /// A command that could not be started.
    pub(crate) fn note_unstarted(
        &self,
        caller: &Caller,
        record: &Record,
        operation: &'static str,
        text: &str,
        error: &EngineError,
    ) {
        let provider = record.provider.name();
        self.metrics.observe(operation, provider, Duration::ZERO, Some(error.to_string()), self.now());
        self.log_operation(
            caller,
            &Operation {
                action: "exec",
                sandbox: Some(&record.id),
                provider,
                resource: text,
                error: Some(error),
                took: Duration::ZERO,
            },
        );
        let limited = matches!(error, EngineError::Limit(_));
        let kind = if limited { EventKind::ResourceLimit } else { EventKind::ExecFailed };
        self.emit_failure(record, kind, operation, error);
    }

    /// What the sandbox's kill counters are when this process first sees it.
    pub(crate) async fn note_kills(&self, record: &Record) {
        if let Ok(Ok(usage)) = tokio::time::timeout(USAGE_TIMEOUT, record.provider.usage(&record.id)).await {
            record.saw_kills(usage.kills());
        }
    }

    /// What limits have killed until now, for a command that is about to begin:
    /// kills that no command's end has shown, such as that of a child, are not
    /// its own.
    pub(crate) async fn kills_until_now(&self, record: &Record) -> LimitKills {
        if let Ok(Ok(kills)) = tokio::time::timeout(USAGE_TIMEOUT, record.provider.kills(&record.id)).await {
            record.saw_kills(kills);
        }
        record.kills()
    }

    /// What a failure means where the sandbox ended meanwhile: that it used up its
    /// memory is known a moment after its connections broke.
    pub(crate) async fn explain_failure(&self, record: &Record, error: EngineError) -> EngineError {
        let may_be = matches!(
            error,
            EngineError::Session(SessionError::Gone | SessionError::Unavailable(_) | SessionError::Failed { .. })
                | EngineError::Provider(ProviderError::NotFound(_))
        );
        if may_be && record.provider.capabilities().oom_ends_sandbox {
            let _in_time = tokio::time::timeout(ENDING_PATIENCE, record.ended.cancelled()).await;
            if record.ran_out_of_memory.load(Ordering::Relaxed) {
                return SessionError::MemoryExhausted.into();
            }
        }
        error
    }

    /// Why a command was killed, if it was by a limit of its sandbox.
    async fn limit_that_killed(&self, record: &Record, command: &Command, exit: Exit) -> Option<ErrorCode> {
        let usage = tokio::time::timeout(USAGE_TIMEOUT, record.provider.usage(&record.id)).await.ok()?.ok()?;
        let (before, now) = (command.kills_before, usage.kills());
        record.saw_kills(now);
        // A command may bound its own files, on a disk that has room.
        let is_full = || usage.disk_limit_bytes > 0 && usage.disk_bytes >= Some(usage.disk_limit_bytes);
        if is_file_limit(exit) {
            is_full().then_some(ErrorCode::SandboxDiskFull)
        } else if now.memory > before.memory {
            Some(ErrorCode::SandboxOom)
        } else if now.disk > before.disk {
            Some(ErrorCode::SandboxDiskFull)
        } else if now.pids > before.pids {
            Some(ErrorCode::SandboxPidsExhausted)
        } else {
            None
        }
    }

    fn record_end(&self, record: &Record, command: &Arc<Command>, exit: Option<&ExecExit>) {
        let now = self.now();
        record.commands().remove(&command.exec_id);
        let (status, kind) = match exit.map(|exit| exit.error) {
            None => (ProcessStatus::Lost, EventKind::ExecFailed),
            Some(Some(ErrorCode::Timeout)) => (ProcessStatus::TimedOut, EventKind::ExecTimeout),
            Some(Some(_)) => (ProcessStatus::Exited, EventKind::ExecFailed),
            Some(None) => (ProcessStatus::Exited, EventKind::ExecCompleted),
        };
        self.store.writer().save_exec(command.to_row(record, status, exit, now));
        let took = exit.map_or_else(|| command.elapsed(now), |exit| exit.duration);
        let error = match exit.map(|exit| (exit.error, exit.timeout)) {
            None if record.ran_out_of_memory.load(Ordering::Relaxed) => {
                Some(EngineError::Session(SessionError::MemoryExhausted))
            }
            None => Some(EngineError::Session(SessionError::Gone)),
            Some((Some(ErrorCode::Timeout), timeout)) => {
                Some(EngineError::ExecTimeout { timeout: timeout.unwrap_or_default(), partial: Box::default() })
            }
            Some((Some(ErrorCode::SandboxDiskFull), _)) => Some(EngineError::Session(SessionError::DiskFull)),
            Some((Some(ErrorCode::SandboxPidsExhausted), _)) => Some(EngineError::Session(SessionError::PidsExhausted)),
            Some((Some(_), _)) => Some(EngineError::Session(SessionError::MemoryExhausted)),
            Some((None, _)) => None,
        };
        let provider = record.provider.name();
        let message = error.as_ref().map(ToString::to_string);
        self.metrics.observe(command.operation, provider, took, message.clone(), now);
        let mut data = exec_data(&command.exec_id);
        if let Some(message) = message {
            data.extend(failure_data(command.operation, provider, &message));
        }
        self.emit_about(record, kind, data);
        self.log_operation(
            &command.caller,
            &Operation {
                action: "exec",
                sandbox: Some(&record.id),
                provider,
                resource: &command.text,
                error: error.as_ref(),
                took,
            },
        );
    }
}

fn exec_data(exec_id: &ExecId) -> Map<String, Value> {
    Map::from_iter([("exec_id".to_owned(), Value::from(exec_id.as_str()))])
}

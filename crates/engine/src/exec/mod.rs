//! Commands: what a request means ([`policy`]), what is known of a command
//! ([`command`]), reading along until its end ([`follow`]), and the calls that
//! start, find and steer them ([`calls`]).

mod calls;
mod command;
mod follow;
mod policy;

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use stacyvm_api::{ErrorCode, ExecId, ProcessSummary};
use stacyvm_sandbox::TerminalSize;

use crate::EngineError;

pub(crate) use command::Command;

/// How to start a command beyond what its request says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartOptions {
    /// Run it on a terminal of this size.
    pub terminal: Option<TerminalSize>,
    /// Keep standard input open for `send_input`. A request with `stdin` text
    /// is given that text first; without this option its input then ends.
    pub keep_stdin_open: bool,
}

/// A command that was started, or attached to.
pub struct RunningExec {
    pub exec_id: ExecId,
    pub pid: u32,
    /// Dropping it leaves the command running and its end still recorded.
    pub stream: ExecStream,
}

/// What a command writes, then how it ended. After `Exited` or an error the
/// stream ends.
pub struct ExecStream {
    inner: Pin<Box<dyn Stream<Item = Result<ExecEvent, EngineError>> + Send>>,
}

impl ExecStream {
    fn new(inner: impl Stream<Item = Result<ExecEvent, EngineError>> + Send + 'static) -> Self {
        Self { inner: Box::pin(inner) }
    }
}

impl Stream for ExecStream {
    type Item = Result<ExecEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(context)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    Output {
        channel: OutputChannel,
        data: Bytes,
        /// Position of the end of `data` in the command's output, all channels
        /// together: pass it to `attach_exec` to go on from here.
        offset: u64,
    },
    /// Output that was written but is no longer kept; `offset` is behind it.
    Dropped {
        bytes: u64,
        offset: u64,
    },
    /// Nothing happened for a while and the command still runs.
    Keepalive,
    Exited(ExecExit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputChannel {
    Stdout,
    Stderr,
    /// Both, as a terminal shows them.
    Terminal,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecExit {
    /// The exit status, or 128 + N for a command ended by signal N.
    pub exit_code: i32,
    pub signal: Option<i32>,
    /// `TIMEOUT`, `SANDBOX_OOM`, `SANDBOX_DISK_FULL` or `SANDBOX_PIDS_EXHAUSTED`
    /// when something other than the command itself ended it.
    pub error: Option<ErrorCode>,
    /// The deadline that killed it, with `TIMEOUT`.
    pub timeout: Option<Duration>,
    pub duration: Duration,
}

/// A page of the exec log, newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecPage {
    pub items: Vec<ProcessSummary>,
    pub next_cursor: Option<String>,
}

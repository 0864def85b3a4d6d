//! Commands: buffered, streamed, and interactive over a WebSocket.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ContentEncoding, Duration, ErrorCode, ExecId, Timestamp};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExecMode {
    /// `sh -c` with the command text; arguments are quoted and appended.
    #[default]
    Shell,
    /// The command and its arguments as they are, without a shell.
    Argv,
}

/// `POST /sandboxes/{id}/exec`, and the first message on `/exec/ws`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ExecRequest {
    pub command: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// `shell` (also when blank) or `argv`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// User (name or uid) instead of the sandbox's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Deadline; every process of the command is killed when it passes. `0s`
    /// means the largest that is allowed.
    #[serde(deserialize_with = "crate::duration::blank_is_none", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// Text given to the command's standard input, which is then closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Leave standard input open after `stdin`, for `POST …/exec/{exec_id}/stdin`.
    /// A `start` over the WebSocket leaves it open unless this is `false`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_stdin_open: Option<bool>,
    /// Encoding of `stdin`, and in streams of the output (`data_b64`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// Answer with newline-delimited chunks while the command runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// End the stream with `{"stream":"exit",…}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_exit: Option<bool>,
    /// Start the command and answer at once with its `exec_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background: Option<bool>,
}

/// A finished command. A non-zero exit is a success of the call.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// The exit status; 128 + N for a command ended by signal N.
    pub exit_code: i32,
    pub stdout: String,
    pub stderr: String,
    pub duration: Duration,
    /// The output was longer than the server returns in one answer; the rest
    /// was dropped. Use `stream` for long output.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<ExecId>,
    /// Set when something other than the command itself ended it:
    /// `SANDBOX_OOM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorCode>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
}

/// One line of a streamed exec. Published SDKs read `stream` and `data` and
/// ignore the rest; `stream` is `stdout`, `stderr`, and when asked for `exit`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StreamChunk {
    pub stream: String,
    #[serde(default)]
    pub data: String,
    /// The exact bytes, when `encoding` was `base64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_b64: Option<String>,
    /// Position of the end of this chunk in the command's output: pass it as
    /// `offset` to go on from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Bytes lost before this chunk because nobody read them in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorCode>,
}

/// What a client sends on `/exec/ws` after a first message of type `start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalClientMessage {
    Start {
        #[serde(flatten)]
        request: ExecRequest,
        /// A terminal of this size; without it, plain pipes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cols: Option<u16>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rows: Option<u16>,
    },
    /// Go on with a command that was started before.
    Attach {
        exec_id: ExecId,
        #[serde(default)]
        offset: u64,
        /// `base64` for the exact bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encoding: Option<ContentEncoding>,
    },
    /// Input as text, or as base64 in `data_b64`.
    Stdin {
        #[serde(default)]
        data: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_b64: Option<String>,
    },
    CloseStdin,
    Resize {
        cols: u16,
        rows: u16,
    },
    Signal {
        signal: String,
    },
    Ping,
}

/// What the server sends on `/exec/ws` after `start` or `attach`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalServerMessage {
    Started {
        exec_id: ExecId,
        pid: u32,
    },
    Stdout {
        data: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_b64: Option<String>,
        offset: u64,
    },
    Stderr {
        data: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_b64: Option<String>,
        offset: u64,
    },
    /// Output that nobody read in time and that is gone.
    Dropped {
        bytes: u64,
    },
    Exit {
        exit_code: i32,
        duration: Duration,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<ErrorCode>,
    },
    Error {
        code: ErrorCode,
        message: String,
        /// What to do about it, where there is something to do.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
    Pong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcessStatus {
    Running,
    Exited,
    /// Killed at its deadline.
    TimedOut,
    /// Its end was not seen: the sandbox went away first.
    Lost,
}

/// One entry of the exec log: `GET /sandboxes/{id}/exec`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessSummary {
    pub exec_id: ExecId,
    pub command: String,
    pub status: ProcessStatus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Duration>,
}

/// `POST /sandboxes/{id}/exec/{exec_id}/signal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SignalRequest {
    /// A name (`TERM`, `SIGINT`) or a number.
    pub signal: String,
}

/// `POST /sandboxes/{id}/exec/{exec_id}/stdin`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct StdinRequest {
    /// Input as text, or as base64 in `data_b64`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_b64: Option<String>,
    /// End the input after this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub close: Option<bool>,
}

/// `POST /sandboxes/{id}/exec/{exec_id}/resize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResizeRequest {
    pub cols: u16,
    pub rows: u16,
}

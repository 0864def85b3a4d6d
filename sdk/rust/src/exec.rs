//! Commands: buffered, streamed, in the background, and the log of them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use reqwest::Method;
use reqwest::header::HeaderName;
use stacyvm_api::{
    ContentEncoding, Duration, ErrorCode, ExecId, ExecRequest, ExecResult, ProcessSummary, ResizeRequest,
    SignalRequest, StdinRequest, StreamChunk,
};

use crate::lines::Lines;
use crate::{ClientError, SandboxClient, TerminalSize};

const EXEC_ID: HeaderName = HeaderName::from_static("x-exec-id");

/// Where output was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Stdout,
    Stderr,
}

/// The end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The exit status; 128 + N for a command ended by signal N.
    pub code: i32,
    pub duration: Option<Duration>,
    /// What ended the command, when it was not the command itself.
    pub error: Option<ErrorCode>,
}

/// What a running command reports, streamed or interactive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs, and can be attached to by this id.
    Started {
        exec_id: ExecId,
        pid: u32,
    },
    Output {
        channel: Channel,
        data: Bytes,
        /// Position of the end of `data` in the command's output.
        offset: Option<u64>,
    },
    /// Output that nobody read in time and that is gone.
    Dropped {
        bytes: u64,
    },
    Exit(Exit),
}

/// A command's output while it runs. Dropping it leaves the command running.
#[derive(Debug)]
pub struct ExecStream {
    exec_id: Option<ExecId>,
    lines: Lines,
    /// One line can say two things: that something was lost, and what follows.
    pending: Option<ExecEvent>,
}

impl SandboxClient {
    /// Runs a command to its end. A non-zero exit is a success of the call.
    pub async fn exec(&self, request: &ExecRequest) -> Result<ExecResult, ClientError> {
        self.client.call(Method::POST, &["sandboxes", self.id.as_str(), "exec"], request).await
    }

    /// Runs a command and delivers its output, byte for byte, as it comes.
    pub async fn exec_stream(&self, request: &ExecRequest) -> Result<ExecStream, ClientError> {
        let request = ExecRequest {
            stream: Some(true),
            stream_exit: Some(true),
            encoding: Some(ContentEncoding::Base64),
            stdin: request.stdin.as_ref().map(|text| BASE64.encode(text)),
            ..request.clone()
        };
        let post = self.client.request(Method::POST, &["sandboxes", self.id.as_str(), "exec"])?.json(&request);
        let response = self.client.send(post).await?;
        let exec_id = response.headers().get(EXEC_ID).and_then(|id| id.to_str().ok()?.parse().ok());
        Ok(ExecStream { exec_id, lines: Lines::new(self.client.server().to_owned(), response), pending: None })
    }

    /// Starts a command and comes back at once; `exec_id` of the answer is for
    /// [`SandboxClient::attach`] and [`SandboxClient::signal`].
    pub async fn exec_background(&self, request: &ExecRequest) -> Result<ExecResult, ClientError> {
        self.exec(&ExecRequest { background: Some(true), ..request.clone() }).await
    }

    /// Commands that run or ran in this sandbox, newest first.
    pub async fn exec_log(&self) -> Result<Vec<ProcessSummary>, ClientError> {
        self.client.get(&["sandboxes", self.id.as_str(), "exec"]).await
    }

    /// Sends a signal, by name (`TERM`) or number.
    pub async fn signal(&self, exec_id: &ExecId, signal: &str) -> Result<(), ClientError> {
        self.exec_call(exec_id, "signal", &SignalRequest { signal: signal.to_owned() }).await
    }

    /// Writes to the standard input, or the terminal, of a command that was
    /// started with its input open.
    pub async fn write_stdin(&self, exec_id: &ExecId, data: &[u8]) -> Result<(), ClientError> {
        let body = StdinRequest { data_b64: Some(BASE64.encode(data)), ..StdinRequest::default() };
        self.exec_call(exec_id, "stdin", &body).await
    }

    /// Ends a command's standard input.
    pub async fn close_stdin(&self, exec_id: &ExecId) -> Result<(), ClientError> {
        self.exec_call(exec_id, "stdin", &StdinRequest { close: Some(true), ..StdinRequest::default() }).await
    }

    /// Resizes the terminal that a command runs on.
    pub async fn resize(&self, exec_id: &ExecId, size: TerminalSize) -> Result<(), ClientError> {
        self.exec_call(exec_id, "resize", &ResizeRequest { cols: size.cols, rows: size.rows }).await
    }

    async fn exec_call<B: serde::Serialize>(&self, exec_id: &ExecId, what: &str, body: &B) -> Result<(), ClientError> {
        let path = ["sandboxes", self.id.as_str(), "exec", exec_id.as_str(), what];
        self.client.send(self.client.request(Method::POST, &path)?.json(body)).await.map(drop)
    }
}

impl ExecStream {
    /// For [`SandboxClient::attach`], should the connection break.
    pub fn exec_id(&self) -> Option<&ExecId> {
        self.exec_id.as_ref()
    }

    /// The next event; `None` after the last one. A stream that ends without an
    /// [`ExecEvent::Exit`] was cut off.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, ClientError> {
        if let Some(event) = self.pending.take() {
            return Ok(Some(event));
        }
        while let Some(line) = self.lines.next().await? {
            if line.is_empty() {
                continue;
            }
            let chunk: StreamChunk = serde_json::from_slice(&line)
                .map_err(|error| ClientError::Protocol(format!("a line of output: {error}")))?;
            let dropped = chunk.dropped.filter(|bytes| *bytes > 0);
            let event = event_of(chunk)?;
            if let Some(bytes) = dropped {
                self.pending = event;
                return Ok(Some(ExecEvent::Dropped { bytes }));
            }
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }
}

/// Bytes of a message that carries them as text or exactly, in base64.
pub(crate) fn exact_bytes(data: String, data_b64: Option<String>) -> Result<Bytes, ClientError> {
    match data_b64 {
        None => Ok(Bytes::from(data)),
        Some(text) => match BASE64.decode(text) {
            Ok(bytes) => Ok(Bytes::from(bytes)),
            Err(error) => Err(ClientError::Protocol(format!("output is not base64: {error}"))),
        },
    }
}

fn event_of(chunk: StreamChunk) -> Result<Option<ExecEvent>, ClientError> {
    let channel = match chunk.stream.as_str() {
        "stdout" => Channel::Stdout,
        "stderr" => Channel::Stderr,
        "exit" => {
            let code = chunk.exit_code.ok_or_else(|| ClientError::Protocol("an exit without its code".to_owned()))?;
            return Ok(Some(ExecEvent::Exit(Exit { code, duration: chunk.duration, error: chunk.error })));
        }
        // Kinds of a newer server.
        _ => return Ok(None),
    };
    let data = exact_bytes(chunk.data, chunk.data_b64)?;
    Ok((!data.is_empty()).then_some(ExecEvent::Output { channel, data, offset: chunk.offset }))
}

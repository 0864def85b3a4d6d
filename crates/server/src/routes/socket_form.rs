//! How output looks on a WebSocket: in the interactive protocol and in the
//! one-shot form. Without I/O, so that every case can be tested.

use axum::extract::ws::close_code;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use stacyvm_api::{SandboxId, TerminalServerMessage};
use stacyvm_engine::{EngineError, ExecEvent, ExecExit, OutputChannel, RunningExec};

use crate::error::ApiError;
use crate::routes::exec_stream::{ChunkForm, ChunkWriter};
use crate::utf8::Utf8Decoder;

/// Turns what a command does into text messages.
pub(super) trait OutputForm {
    /// Whether the client may say anything after its first message.
    const INTERACTIVE: bool;
    /// How a connection closes whose command was lost from sight.
    const FAILED_CODE: u16;

    fn opening(&mut self, running: &RunningExec) -> Vec<String>;
    fn event(&mut self, event: ExecEvent) -> Vec<String>;
    fn exited(&mut self, exit: &ExecExit) -> Vec<String>;
    fn failed(&mut self, error: &EngineError) -> Vec<String>;
}

/// One request and its output, as the reference has it.
pub(super) struct OneShot {
    writer: ChunkWriter,
}

impl OneShot {
    pub(super) fn new(id: &SandboxId, base64: bool) -> Self {
        Self { writer: ChunkWriter::new(id, ChunkForm { base64, extended: false }) }
    }
}

impl OutputForm for OneShot {
    const INTERACTIVE: bool = false;
    const FAILED_CODE: u16 = close_code::NORMAL;

    fn opening(&mut self, _running: &RunningExec) -> Vec<String> {
        Vec::new()
    }

    fn event(&mut self, event: ExecEvent) -> Vec<String> {
        self.writer.event(event).map(text).into_iter().collect()
    }

    fn exited(&mut self, exit: &ExecExit) -> Vec<String> {
        let mut messages: Vec<String> = self.writer.exited(exit).map(text).collect();
        messages.push(format!(r#"{{"type":"done","exit_code":{}}}"#, exit.exit_code));
        messages
    }

    fn failed(&mut self, error: &EngineError) -> Vec<String> {
        let mut messages: Vec<String> = self.writer.failed(error).map(text).collect();
        messages.push(r#"{"type":"done"}"#.to_owned());
        messages
    }
}

/// The documented protocol.
pub(super) struct Interactive {
    base64: bool,
    offset: u64,
    stdout: Utf8Decoder,
    stderr: Utf8Decoder,
}

impl Interactive {
    pub(super) fn new(base64: bool) -> Self {
        Self { base64, offset: 0, stdout: Utf8Decoder::default(), stderr: Utf8Decoder::default() }
    }

    fn chunk(&mut self, channel: OutputChannel, bytes: &[u8]) -> Option<TerminalServerMessage> {
        if self.base64 {
            return Some(self.message(channel, String::new(), Some(BASE64.encode(bytes))));
        }
        let decoder = match channel {
            OutputChannel::Stdout | OutputChannel::Terminal => &mut self.stdout,
            OutputChannel::Stderr => &mut self.stderr,
        };
        let text = decoder.push(bytes).into_owned();
        // Whoever goes on from here must get a held back character's beginning
        // again.
        self.offset -= decoder.pending_len().min(self.offset);
        (!text.is_empty()).then(|| self.message(channel, text, None))
    }

    /// Characters that were begun and never finished.
    fn tails(&mut self) -> Vec<TerminalServerMessage> {
        let tails = [(OutputChannel::Stdout, self.stdout.finish()), (OutputChannel::Stderr, self.stderr.finish())];
        tails.into_iter().filter_map(|(channel, tail)| Some(self.message(channel, tail?, None))).collect()
    }

    fn message(&self, channel: OutputChannel, data: String, data_b64: Option<String>) -> TerminalServerMessage {
        let offset = self.offset;
        match channel {
            OutputChannel::Stdout | OutputChannel::Terminal => TerminalServerMessage::Stdout { data, data_b64, offset },
            OutputChannel::Stderr => TerminalServerMessage::Stderr { data, data_b64, offset },
        }
    }
}

impl OutputForm for Interactive {
    const INTERACTIVE: bool = true;
    const FAILED_CODE: u16 = close_code::ERROR;

    fn opening(&mut self, running: &RunningExec) -> Vec<String> {
        vec![json(&TerminalServerMessage::Started { exec_id: running.exec_id.clone(), pid: running.pid })]
    }

    fn event(&mut self, event: ExecEvent) -> Vec<String> {
        let message = match event {
            ExecEvent::Output { channel, data, offset } => {
                self.offset = offset;
                self.chunk(channel, &data)
            }
            ExecEvent::Dropped { bytes, offset } => {
                self.offset = offset;
                Some(TerminalServerMessage::Dropped { bytes })
            }
            ExecEvent::Keepalive | ExecEvent::Exited(_) => None,
        };
        message.as_ref().map(json).into_iter().collect()
    }

    fn exited(&mut self, exit: &ExecExit) -> Vec<String> {
        let mut messages = self.tails();
        messages.push(TerminalServerMessage::Exit {
            exit_code: exit.exit_code,
            duration: exit.duration.into(),
            error: exit.error,
        });
        messages.iter().map(json).collect()
    }

    fn failed(&mut self, error: &EngineError) -> Vec<String> {
        let mut messages = self.tails();
        messages.push(TerminalServerMessage::Error {
            code: error.code(),
            message: error.to_string(),
            hint: error.hint(),
        });
        messages.iter().map(json).collect()
    }
}

pub(super) fn error_message(failure: &ApiError) -> TerminalServerMessage {
    TerminalServerMessage::Error {
        code: failure.code(),
        message: failure.message().to_owned(),
        hint: failure.hint_text().map(str::to_owned),
    }
}

fn json(message: &TerminalServerMessage) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

#[expect(clippy::needless_pass_by_value, reason = "used with map")]
fn text(line: Bytes) -> String {
    String::from_utf8_lossy(&line).into_owned()
}

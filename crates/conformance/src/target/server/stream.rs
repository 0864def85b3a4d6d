//! The events of a command that runs behind a WebSocket.

use std::collections::VecDeque;

use futures_util::stream;
use stacyvm_api::ErrorCode;
use stacyvm_client::{Channel, ClientError, ExecEvent, Exit as ApiExit, TerminalOutput};
use stacyvm_sandbox::{Exit, ProcessEvent, ProcessStream, SessionError};

use super::session_error;

/// A shell reports a signal's number above this.
const SIGNAL_BASE: i32 = 128;
const SIGNAL_MAX: i32 = 64;

/// What the WebSocket carries as standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputKind {
    Pipes,
    Terminal,
}

/// Our events from the API's. `first` is what was already taken off the socket.
pub(super) fn events(output: TerminalOutput, kind: OutputKind, first: Vec<ProcessEvent>) -> ProcessStream {
    let state = (output, VecDeque::from(first), kind);
    Box::pin(stream::unfold(state, |(mut output, mut pending, kind)| async move {
        if let Some(event) = pending.pop_front() {
            return Some((Ok(event), (output, pending, kind)));
        }
        match output.next().await {
            Ok(Some(event)) => Some((translated(event, kind), (output, pending, kind))),
            Ok(None) => None,
            Err(error) => Some((Err(session_error(error, "read output")), (output, pending, kind))),
        }
    }))
}

fn translated(event: ExecEvent, kind: OutputKind) -> Result<ProcessEvent, SessionError> {
    Ok(match event {
        ExecEvent::Started { pid, .. } => ProcessEvent::Started { pid },
        ExecEvent::Output { channel: Channel::Stdout, data, .. } => match kind {
            OutputKind::Pipes => ProcessEvent::Stdout(data),
            OutputKind::Terminal => ProcessEvent::Terminal(data),
        },
        ExecEvent::Output { channel: Channel::Stderr, data, .. } => ProcessEvent::Stderr(data),
        ExecEvent::Dropped { bytes } => ProcessEvent::Dropped { bytes },
        ExecEvent::Exit(exit) => ProcessEvent::Exited(exit_of(&exit)?),
    })
}

fn exit_of(exit: &ApiExit) -> Result<Exit, SessionError> {
    match exit.error {
        None | Some(ErrorCode::Timeout | ErrorCode::SandboxOom) => {}
        Some(code) => {
            let cause = ClientError::Protocol(format!("the command ended with {code}"));
            return Err(SessionError::Failed { operation: "run the command", cause: Box::new(cause) });
        }
    }
    let timed_out = exit.error == Some(ErrorCode::Timeout);
    // The API tells a signal as a shell does.
    let signal = exit.code - SIGNAL_BASE;
    if (1..=SIGNAL_MAX).contains(&signal) {
        return Ok(Exit { code: None, signal: Some(signal), timed_out });
    }
    Ok(Exit { code: Some(exit.code), signal: None, timed_out })
}

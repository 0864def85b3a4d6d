//! From an agent's failures to ours. Whatever the agent says is hostile input:
//! texts are shortened and cleaned before anybody sees them.

use std::error::Error;
use std::io;

use base64::Engine as _;
use connectrpc::{ConnectError, ErrorCode};
use stacyvm_envd::agent::{FAILURE_TYPE, Failure, Reason};
use stacyvm_envd::decode;

use super::transport::TransportError;
use crate::SessionError;

/// Longest text of an agent that is passed on, in characters.
const MAX_TEXT: usize = 512;

/// A failed call.
pub(super) fn from_call(operation: &'static str, error: &ConnectError) -> SessionError {
    if let Some(transport) = find_transport(error) {
        return from_transport(transport, error.source_arc().map(|source| Box::new(source) as _));
    }
    let message = error.message.clone().unwrap_or_default();
    match error.details.iter().find(|detail| detail.type_url.ends_with(FAILURE_TYPE)) {
        Some(detail) => {
            let bytes = detail.value.as_deref().and_then(|text| {
                base64::engine::general_purpose::STANDARD_NO_PAD.decode(text.trim_end_matches('=')).ok()
            });
            let failure: Failure = bytes.and_then(|bytes| decode(&bytes)).unwrap_or_default();
            from_reason(operation, failure.reason.as_known(), &message, &failure.subject)
        }
        None => from_code(operation, error.code, &message),
    }
}

/// What an agent says went wrong.
pub(super) fn from_reason(
    operation: &'static str,
    reason: Option<Reason>,
    message: &str,
    subject: &str,
) -> SessionError {
    let message = clean(message);
    let subject = clean(subject);
    match reason {
        Some(Reason::REASON_FILE_NOT_FOUND) => SessionError::FileNotFound(subject),
        Some(Reason::REASON_FILE_CONFLICT) => SessionError::FileConflict(message),
        Some(Reason::REASON_FILE_FORBIDDEN) => SessionError::FileForbidden(subject),
        Some(Reason::REASON_PROCESS_NOT_FOUND) => SessionError::ProcessNotFound(subject),
        Some(Reason::REASON_COMMAND_NOT_FOUND) => SessionError::CommandNotFound(message),
        Some(Reason::REASON_USER_NOT_FOUND) => SessionError::UserNotFound(subject),
        Some(Reason::REASON_PIDS_EXHAUSTED) => SessionError::PidsExhausted,
        Some(Reason::REASON_MEMORY_EXHAUSTED) => SessionError::MemoryExhausted,
        Some(Reason::REASON_DISK_FULL) => SessionError::DiskFull,
        Some(Reason::REASON_PORT_CLOSED) => SessionError::PortClosed(subject),
        Some(Reason::REASON_DEADLINE_EXCEEDED) => SessionError::DeadlineExceeded,
        // A limit of the agent: the request as it is cannot be done.
        Some(Reason::REASON_INVALID_ARGUMENT | Reason::REASON_BUSY) => SessionError::InvalidArgument(message),
        Some(Reason::REASON_INTERNAL | Reason::REASON_UNSPECIFIED) | None => {
            SessionError::Failed { operation, cause: message.into() }
        }
    }
}

pub(super) fn from_transport(error: &TransportError, cause: Option<Box<dyn Error + Send + Sync>>) -> SessionError {
    match error {
        // Nobody listens where the agent did.
        TransportError::Open(error) if is_gone(error) => SessionError::Gone,
        TransportError::Open(_) | TransportError::Broken(_) | TransportError::Crowded => {
            SessionError::Unavailable(cause)
        }
    }
}

/// The agent answered with something that is not its protocol.
pub(super) fn malformed(what: &'static str) -> SessionError {
    SessionError::Unavailable(Some(format!("malformed answer: {what}").into()))
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// An agent without our details (another envd).
fn from_code(operation: &'static str, code: ErrorCode, message: &str) -> SessionError {
    let message = clean(message);
    match code {
        ErrorCode::InvalidArgument | ErrorCode::OutOfRange | ErrorCode::FailedPrecondition => {
            SessionError::InvalidArgument(message)
        }
        ErrorCode::NotFound => SessionError::FileNotFound(message),
        ErrorCode::AlreadyExists => SessionError::FileConflict(message),
        ErrorCode::PermissionDenied => SessionError::FileForbidden(message),
        ErrorCode::DeadlineExceeded => SessionError::DeadlineExceeded,
        ErrorCode::Unimplemented => SessionError::Unsupported(operation),
        ErrorCode::Unauthenticated
        | ErrorCode::Unavailable
        | ErrorCode::Canceled
        | ErrorCode::Aborted
        // Its answer was larger than any of ours, or came damaged.
        | ErrorCode::ResourceExhausted
        | ErrorCode::DataLoss => SessionError::Unavailable(Some(message.into())),
        _ => SessionError::Failed { operation, cause: message.into() },
    }
}

fn find_transport(error: &ConnectError) -> Option<&TransportError> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref::<TransportError>() {
            return Some(found);
        }
        source = error.source();
    }
    None
}

fn clean(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_cannot_write_into_our_terminal() {
        let shown = from_reason("stat", Some(Reason::REASON_FILE_NOT_FOUND), "", "a\x1b[2Jb\n").to_string();
        assert_eq!(shown, "no such file or directory: a\u{fffd}[2Jb\u{fffd}");
        assert!(clean(&"x".repeat(5000)).len() == MAX_TEXT);
    }

    #[test]
    fn a_detail_decides_and_the_code_is_the_fallback() {
        let error = ConnectError::not_found("gone");
        assert!(matches!(from_call("stat", &error), SessionError::FileNotFound(_)));
        let too_long = ConnectError::resource_exhausted("message too large");
        assert!(matches!(from_call("ping", &too_long), SessionError::Unavailable(_)));

        let detail = Failure { reason: Reason::REASON_PIDS_EXHAUSTED.into(), ..Default::default() };
        let detail = connectrpc::ErrorDetail::from_message(FAILURE_TYPE, &detail);
        let error = ConnectError::resource_exhausted("no").with_detail(detail);
        assert!(matches!(from_call("start", &error), SessionError::PidsExhausted));
    }
}

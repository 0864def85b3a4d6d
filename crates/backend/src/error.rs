//! One place that turns failures into answers.

use axum::Json;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use stacyvm_api::backend::{Code, Failure, StreamLine};
use stacyvm_sandbox::{ProviderError, SessionError};

/// What the HTTP library says of a request, at most.
const REASON_BYTES_MAX: usize = 4 << 10;

#[derive(Debug)]
pub(crate) struct Refusal {
    status: u16,
    pub(crate) failure: Failure,
}

pub(crate) type Answer<T> = Result<T, Refusal>;

impl Refusal {
    pub(crate) fn new(status: u16, code: Code, message: impl Into<String>) -> Self {
        Self { status, failure: Failure { code, message: message.into(), hint: None } }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, Code::BadRequest, message)
    }

    /// As the last line of a stream.
    pub(crate) fn line(self) -> StreamLine {
        let Failure { code, message, .. } = self.failure;
        let stream = "error".to_owned();
        StreamLine { stream, code: Some(code), message: Some(message), ..StreamLine::default() }
    }

    pub(crate) fn not_found() -> Self {
        Self::new(404, Code::NotFound, "there is no such sandbox")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.failure)).into_response()
    }
}

/// What the HTTP library refuses by itself (no such route, no such method, a
/// body or a query that cannot be read) gets the one form of failures, too.
pub(crate) async fn typed(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_typed = response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value == "application/json");
    if is_typed || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let said = to_bytes(body, REASON_BYTES_MAX).await.unwrap_or_default();
    let mut refused = untyped(status, String::from_utf8_lossy(&said).trim()).into_response();
    for name in [header::CONTENT_TYPE, header::CONTENT_LENGTH] {
        head.headers.remove(name);
    }
    refused.headers_mut().extend(head.headers);
    refused
}

fn untyped(status: StatusCode, said: &str) -> Refusal {
    let reason = |otherwise: &str| if said.is_empty() { otherwise.to_owned() } else { said.to_owned() };
    let (code, message) = match status {
        // Not the code of a sandbox that is gone.
        StatusCode::NOT_FOUND => (Code::Unsupported, reason("there is no such route")),
        StatusCode::METHOD_NOT_ALLOWED => (Code::Unsupported, reason("this route does not have that method")),
        status if status.is_client_error() => (Code::BadRequest, reason("the request cannot be read")),
        _ => (Code::InternalError, "the backend failed to handle the request".to_owned()),
    };
    Refusal::new(status.as_u16(), code, message)
}

impl From<SessionError> for Refusal {
    fn from(error: SessionError) -> Self {
        let (status, code) = match &error {
            SessionError::Gone => return Self::not_found(),
            SessionError::InvalidArgument(_) => (400, Code::BadRequest),
            SessionError::FileNotFound(_) => (404, Code::FileNotFound),
            SessionError::FileConflict(_) => (409, Code::FileConflict),
            SessionError::FileForbidden(_) => (409, Code::FileForbidden),
            SessionError::ProcessNotFound(_) => (404, Code::ProcessNotFound),
            SessionError::CommandNotFound(_) => (400, Code::CommandNotFound),
            SessionError::UserNotFound(_) => (400, Code::UserNotFound),
            SessionError::DeadlineExceeded => (408, Code::Timeout),
            SessionError::PidsExhausted => (409, Code::SandboxPidsExhausted),
            SessionError::MemoryExhausted => (409, Code::SandboxOom),
            SessionError::DiskFull => (507, Code::SandboxDiskFull),
            SessionError::Limited(_) => (429, Code::ResourceLimit),
            SessionError::Unsupported(_) => (501, Code::Unsupported),
            SessionError::PortClosed(_) => (409, Code::PortClosed),
            SessionError::Unavailable(_) => (503, Code::Unavailable),
            SessionError::BadAnswer { .. } | SessionError::Failed { .. } => (500, Code::InternalError),
        };
        if status >= 500 {
            tracing::warn!(error = &error as &dyn std::error::Error, "a call failed");
        }
        Self::new(status, code, error.to_string())
    }
}

impl From<ProviderError> for Refusal {
    fn from(error: ProviderError) -> Self {
        let (status, code) = match &error {
            ProviderError::NotFound(_) => return Self::not_found(),
            ProviderError::Unsupported { .. } => (501, Code::Unsupported),
            ProviderError::InvalidSpec { .. } => (400, Code::BadRequest),
            ProviderError::LimitUnsupported { .. } => (400, Code::LimitUnsupported),
            ProviderError::Image { .. } => (400, Code::ImageNotFound),
            ProviderError::RegistryUnavailable { .. } => (503, Code::RegistryUnavailable),
            ProviderError::Exhausted { .. } => (429, Code::ResourceLimit),
            ProviderError::Unavailable { .. } => (503, Code::Unavailable),
            ProviderError::BadAnswer { .. } | ProviderError::Failed { .. } => (500, Code::InternalError),
        };
        if status >= 500 {
            tracing::warn!(error = &error as &dyn std::error::Error, "a call failed");
        }
        let text = error.to_string();
        // What the other side puts around the reason is not sent along.
        let (message, hint) = match error {
            ProviderError::Image { message, hint, .. } => (message, hint),
            ProviderError::Exhausted { message } => (message, None),
            ProviderError::LimitUnsupported { hint, .. }
            | ProviderError::RegistryUnavailable { hint, .. }
            | ProviderError::BadAnswer { hint, .. } => (text, Some(hint)),
            ProviderError::Unavailable { hint, .. } => (text, hint),
            ProviderError::NotFound(_)
            | ProviderError::Unsupported { .. }
            | ProviderError::InvalidSpec { .. }
            | ProviderError::Failed { .. } => (text, None),
        };
        let refusal = Self::new(status, code, message);
        Self { failure: Failure { hint, ..refusal.failure }, ..refusal }
    }
}

//! The one place where a failure becomes a response.
//!
//! Handlers return [`ApiError`]. It travels to the outermost layer as a
//! response extension, because only there the request id is known; that layer
//! writes the body. Responses that the HTTP library made itself (an unknown
//! method, a malformed upgrade) get the same envelope there.

use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::{Map, Value};
use stacyvm_api::{ErrorBody, ErrorCode};
use stacyvm_engine::EngineError;

/// Under which a request is logged and its failure reported.
pub(crate) const REQUEST_ID: &str = "x-request-id";

/// A failed call: what the caller sees, and the cause for the log.
#[derive(Debug, Clone)]
pub(crate) struct ApiError(Box<Failure>);

#[derive(Debug, Clone)]
struct Failure {
    code: ErrorCode,
    message: String,
    hint: Option<String>,
    /// More keys of the body, such as the output of a command that was killed.
    extra: Map<String, Value>,
    headers: HeaderMap,
    /// Only for the log.
    cause: Option<String>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(flatten)]
    body: ErrorBody,
    #[serde(flatten)]
    extra: &'a Map<String, Value>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Box::new(Failure {
            code,
            message: message.into(),
            hint: None,
            extra: Map::new(),
            headers: HeaderMap::new(),
            cause: None,
        }))
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.insert(name, value);
        self
    }

    /// What is behind it, for the log only.
    pub(crate) fn because(mut self, cause: &(dyn std::error::Error + 'static)) -> Self {
        self.0.cause = Some(chain(cause));
        self
    }

    pub(crate) fn extra(mut self, key: &str, value: impl Serialize) -> Self {
        if let Ok(value) = serde_json::to_value(value) {
            self.0.extra.insert(key.to_owned(), value);
        }
        self
    }

    pub(crate) fn code(&self) -> ErrorCode {
        self.0.code
    }

    pub(crate) fn message(&self) -> &str {
        &self.0.message
    }

    pub(crate) fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    pub(crate) fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// The envelope for a response that nobody gave a body of ours.
    pub(crate) fn for_status(status: StatusCode) -> Self {
        let (code, message) = match status.as_u16() {
            401 => (ErrorCode::Unauthorized, "credentials are required"),
            403 => (ErrorCode::Forbidden, "the request was refused"),
            404 => (ErrorCode::NotFound, "no such route"),
            405 => (ErrorCode::MethodNotAllowed, "this route does not have that method"),
            408 => (ErrorCode::Timeout, "the request took too long to arrive"),
            413 => (ErrorCode::PayloadTooLarge, "the request body is too large"),
            415 => (ErrorCode::UnsupportedMediaType, "the request body has the wrong content type"),
            416 => (ErrorCode::RangeNotSatisfiable, "the range lies outside of the file"),
            426 => (ErrorCode::UpgradeRequired, "this route speaks WebSocket"),
            400..=499 => (ErrorCode::BadRequest, "the request is malformed"),
            _ => (ErrorCode::InternalError, "the server failed to handle the request"),
        };
        Self::new(code, message)
    }

    /// The response's body; `request_id` is the one of the request.
    pub(crate) fn body(&self, request_id: &str) -> Vec<u8> {
        let body = ErrorBody {
            code: self.0.code,
            message: self.0.message.clone(),
            hint: self.0.hint.clone(),
            request_id: Some(request_id.to_owned()),
        };
        let mut bytes = serde_json::to_vec(&Envelope { body, extra: &self.0.extra })
            .unwrap_or_else(|_| br#"{"code":"INTERNAL_ERROR","message":"the error could not be written"}"#.to_vec());
        bytes.push(b'\n');
        bytes
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = status(self.0.code).into_response();
        response.headers_mut().extend(self.0.headers.clone());
        if self.0.code == ErrorCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("X-API-Key"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let mut failure = Self::new(error.code(), error.to_string());
        failure.0.hint = error.hint();
        failure.0.cause = std::error::Error::source(&error).map(chain);
        if let EngineError::ExecTimeout { partial, .. } = error {
            failure = failure
                .extra("exit_code", partial.exit_code)
                .extra("stdout", partial.stdout)
                .extra("stderr", partial.stderr)
                .extra("duration", partial.duration)
                .extra("exec_id", partial.exec_id)
                .extra("truncated", partial.truncated);
        }
        failure
    }
}

/// The status of every code.
pub(crate) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden | ErrorCode::FileForbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound | ErrorCode::FileNotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::Timeout => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::Conflict | ErrorCode::FileConflict => StatusCode::CONFLICT,
        ErrorCode::PayloadTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        ErrorCode::RangeNotSatisfiable => StatusCode::RANGE_NOT_SATISFIABLE,
        // Not 404: the published SDKs turn every 404 into "sandbox not found".
        ErrorCode::LimitUnsupported | ErrorCode::ImageNotFound => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::UpgradeRequired => StatusCode::UPGRADE_REQUIRED,
        // The sandbox's own limits, used up by what runs in it.
        ErrorCode::ResourceLimit
        | ErrorCode::SandboxPidsExhausted
        | ErrorCode::SandboxOom
        | ErrorCode::SandboxDiskFull => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorCode::PortClosed | ErrorCode::BadGateway => StatusCode::BAD_GATEWAY,
        ErrorCode::GatewayTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::RegistryUnavailable | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::InternalError => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_code_and_message_first_and_ends_in_a_newline() {
        let failure = ApiError::bad_request("no").hint("do").extra("stdout", "partial");
        let body = String::from_utf8(failure.body("r-1")).unwrap();
        assert_eq!(
            body,
            "{\"code\":\"BAD_REQUEST\",\"message\":\"no\",\"hint\":\"do\",\"request_id\":\"r-1\",\"stdout\":\"partial\"}\n"
        );
    }

    #[test]
    fn every_code_that_stands_for_a_status_maps_back_to_it() {
        for code in [400, 401, 403, 404, 405, 408, 413, 415, 416, 426, 500] {
            let code = StatusCode::from_u16(code).unwrap();
            assert_eq!(status(ApiError::for_status(code).code()), code);
        }
    }
}

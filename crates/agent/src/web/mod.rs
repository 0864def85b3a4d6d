//! The plain HTTP part: bytes that are too many for messages.

pub(crate) mod archive;
pub(crate) mod dial;
pub(crate) mod files;
pub(crate) mod info;
mod relay;
mod upload;

pub(crate) use upload::Upload;

use std::borrow::Cow;

use base64::Engine as _;
use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Full};
use stacyvm_envd::http::{ErrorBody, FileHeader};

use crate::Failure;
use crate::files::entry::Entry;
use crate::serve::Body;

pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response
}

pub(crate) fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => json_bytes(StatusCode::OK, body),
        Err(error) => failure(&Failure::Internal(error.to_string())),
    }
}

pub(crate) fn unauthorized() -> Response<Body> {
    let body =
        ErrorBody { code: 401, message: "the access token is missing or wrong".to_owned(), ..Default::default() };
    json_bytes(StatusCode::UNAUTHORIZED, serde_json::to_vec(&body).unwrap_or_default())
}

pub(crate) fn failure(failure: &Failure) -> Response<Body> {
    let status = match failure {
        Failure::InvalidArgument(_) | Failure::CommandNotFound(_) | Failure::FileConflict(_) => StatusCode::BAD_REQUEST,
        Failure::FileNotFound(_) | Failure::ProcessNotFound(_) => StatusCode::NOT_FOUND,
        Failure::FileExists(_) => StatusCode::CONFLICT,
        Failure::FileForbidden(_) => StatusCode::FORBIDDEN,
        Failure::UserNotFound(_) => StatusCode::UNAUTHORIZED,
        Failure::PidsExhausted | Failure::MemoryExhausted | Failure::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
        Failure::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        Failure::PortClosed(_) => StatusCode::BAD_GATEWAY,
        Failure::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Failure::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let body = ErrorBody {
        code: status.as_u16(),
        message: failure.to_string(),
        reason: failure.reason() as i32,
        subject: failure.subject().to_owned(),
    };
    json_bytes(status, serde_json::to_vec(&body).unwrap_or_default())
}

fn json_bytes(status: StatusCode, body: Vec<u8>) -> Response<Body> {
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// An entry as the value of a header: JSON in base64, because names are any text.
fn entry_header(entry: &Entry) -> Option<header::HeaderValue> {
    let described = FileHeader {
        path: entry.path.clone(),
        size: entry.size,
        mode: entry.mode,
        owner: entry.owner.clone(),
        group: entry.group.clone(),
        modified_unix_ms: entry.modified_seconds * 1000 + i64::from(entry.modified_nanos / 1_000_000),
    };
    let json = serde_json::to_vec(&described).ok()?;
    header::HeaderValue::try_from(base64::engine::general_purpose::STANDARD.encode(json)).ok()
}

/// One parameter of a query string.
fn query_value<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    form_urlencoded::parse(query?.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value)
}

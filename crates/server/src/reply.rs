//! Successful answers: compact JSON with a newline, and endless NDJSON.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body::Frame;
use http_body_util::StreamBody;
use serde::Serialize;
use stacyvm_api::ErrorCode;

use crate::error::ApiError;
use crate::table::NO_STORE;

/// Where the next page of a list begins.
pub(crate) const NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");

/// A JSON answer.
pub(crate) struct Reply<T> {
    status: StatusCode,
    headers: HeaderMap,
    value: T,
}

impl<T: Serialize> Reply<T> {
    pub(crate) fn ok(value: T) -> Self {
        Self::with(StatusCode::OK, value)
    }

    pub(crate) fn created(value: T) -> Self {
        Self::with(StatusCode::CREATED, value)
    }

    pub(crate) fn accepted(value: T) -> Self {
        Self::with(StatusCode::ACCEPTED, value)
    }

    pub(crate) fn with(status: StatusCode, value: T) -> Self {
        Self { status, headers: HeaderMap::new(), value }
    }

    /// Where the next page of a list begins.
    pub(crate) fn next_cursor(mut self, cursor: Option<&str>) -> Self {
        if let Some(value) = cursor.and_then(|cursor| HeaderValue::from_str(cursor).ok()) {
            self.headers.insert(NEXT_CURSOR, value);
        }
        self
    }
}

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        let Ok(mut bytes) = serde_json::to_vec(&self.value) else {
            return ApiError::new(ErrorCode::InternalError, "the answer could not be written").into_response();
        };
        bytes.push(b'\n');
        let mut response = (self.status, bytes).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::CACHE_CONTROL, NO_STORE);
        headers.extend(self.headers);
        response
    }
}

/// One JSON value and a newline.
pub(crate) fn line(value: &impl Serialize) -> Bytes {
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes.into()
}

/// A blank line: every client's parser skips it, and a client that waits for
/// data sees that the connection lives.
pub(crate) const HEARTBEAT_LINE: Bytes = Bytes::from_static(b"\n");

/// The head goes out at once, each frame as it comes.
pub(crate) fn ndjson(frames: impl Stream<Item = Frame<Bytes>> + Send + 'static) -> Response {
    let body = Body::new(StreamBody::new(frames.map(Ok::<_, std::convert::Infallible>)));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would hold back what is meant to arrive live.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

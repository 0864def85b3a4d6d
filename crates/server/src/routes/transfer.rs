//! Files and trees as streams of bytes, in both directions and at any size.
//! Nothing is buffered whole: a slow side holds up the other.

use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use stacyvm_api::{ErrorCode, FileInfo, StatusBody};
use stacyvm_engine::{EngineError, FileOperation, FileOperationKind};
use stacyvm_sandbox::{ByteStream, SessionError, WriteOptions};
use tokio::time::timeout;

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Query, Sandbox};
use crate::reply::Reply;
use crate::routes::file::{PathQuery, file_info, mode, sandbox_path};
use crate::table::NO_STORE;

/// What no file system holds is no length: the HTTP library would close the
/// connection over the largest of them without an answer.
const LENGTH_MAX: u64 = i64::MAX as u64;
/// An upload that stops for this long is given up.
const UPLOAD_SILENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct UploadQuery {
    /// Absolute, or relative to `/workspace`. Missing parents are made.
    #[param(required = true)]
    path: String,
    /// Octal permission bits; `0644` unless given.
    mode: Option<String>,
}

pub(super) async fn upload(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<UploadQuery>,
    request: Request,
) -> Result<Reply<FileInfo>, ApiError> {
    let path = sandbox_path(&query.path, "path")?;
    let options = WriteOptions { mode: query.mode.as_deref().map(mode).transpose()?.flatten(), user: None };
    let content = upload_stream(request.into_body());
    let operation = FileOperation { kind: FileOperationKind::Write, path: path.clone() };
    let entry = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.write(&path, content, options).await })
        .await?;
    Ok(Reply::ok(file_info(entry)))
}

pub(super) async fn upload_archive(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<PathQuery>,
    request: Request,
) -> Result<Reply<StatusBody>, ApiError> {
    let path = sandbox_path(&query.path, "path")?;
    let archive = upload_stream(request.into_body());
    let operation = FileOperation { kind: FileOperationKind::Extract, path: path.clone() };
    app.engine
        .file_operation(&caller, &id, operation, |session| async move { session.extract(&path, archive).await })
        .await?;
    Ok(Reply::ok(StatusBody::new("extracted")))
}

pub(super) async fn download(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<PathQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let path = sandbox_path(&query.path, "path")?;
    let wanted = wanted_range(&headers);
    let operation = FileOperation { kind: FileOperationKind::Read, path: path.clone() };
    let content = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move {
            let range = match wanted {
                None => None,
                Some(Wanted::From { first, last }) => Some(first..last.map_or(u64::MAX, |last| last.saturating_add(1))),
                Some(Wanted::Last(bytes)) => {
                    let size = session.stat(&path).await?.size;
                    Some(size.saturating_sub(bytes)..size)
                }
            };
            session.read(&path, range).await
        })
        .await?;

    let size = content.entry.size;
    let length = length(&content.range)?;
    if wanted.is_some() && length == 0 {
        return Err(not_satisfiable(size));
    }
    let mut response = Body::from_stream(begun(content.stream).await?).into_response();
    let response_headers = response.headers_mut();
    octets(response_headers, "application/octet-stream");
    response_headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    response_headers.insert(header::CONTENT_LENGTH, length.into());
    if wanted.is_some() {
        response_headers.extend([(header::CONTENT_RANGE, content_range(&content.range, size)?)]);
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

pub(super) async fn download_archive(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<PathQuery>,
) -> Result<Response, ApiError> {
    let path = sandbox_path(&query.path, "path")?;
    let operation = FileOperation { kind: FileOperationKind::Archive, path: path.clone() };
    let archive = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.archive(&path).await })
        .await?;
    let mut response = Body::from_stream(begun(archive).await?).into_response();
    octets(response.headers_mut(), "application/x-tar");
    Ok(response)
}

/// A stream whose first piece is there: until then a failure can be told, and
/// after that a connection can only break off.
async fn begun(mut content: ByteStream) -> Result<ByteStream, ApiError> {
    match content.next().await {
        None => Ok(stream::empty().boxed()),
        Some(Ok(first)) => Ok(stream::iter([Ok(first)]).chain(content).boxed()),
        Some(Err(error @ SessionError::Unavailable(_))) => {
            let message = "the sandbox's runtime promised content and broke off before any of it";
            Err(ApiError::new(ErrorCode::BadGateway, message)
                .hint("try again; `stacyvm providers` says whether its runtime works")
                .because(&error))
        }
        Some(Err(error)) => Err(EngineError::from(error).into()),
    }
}

/// What a `Range` header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    From {
        first: u64,
        last: Option<u64>,
    },
    /// So many bytes before the end.
    Last(u64),
}

/// One range of bytes (RFC 9110 14.2). Several ranges, other units and text
/// that makes no sense are ignored, as the RFC has it: the whole file follows.
fn wanted_range(headers: &HeaderMap) -> Option<Wanted> {
    let spec = headers.get(header::RANGE)?.to_str().ok()?.trim().strip_prefix("bytes=")?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    match spec.split_once('-')? {
        ("", last) => number(last).map(Wanted::Last),
        (first, "") => number(first).map(|first| Wanted::From { first, last: None }),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Wanted::From { first, last: Some(last) })
        }
    }
}

fn length(range: &Range<u64>) -> Result<u64, ApiError> {
    let length = range.end.saturating_sub(range.start);
    let implausible = || ApiError::new(ErrorCode::InternalError, "the sandbox reports a size that no file has");
    if length > LENGTH_MAX { Err(implausible()) } else { Ok(length) }
}

fn content_range(range: &Range<u64>, size: u64) -> Result<HeaderValue, ApiError> {
    HeaderValue::from_str(&format!("bytes {}-{}/{size}", range.start, range.end.saturating_sub(1)))
        .map_err(|_| ApiError::new(ErrorCode::InternalError, "the range could not be written"))
}

fn not_satisfiable(size: u64) -> ApiError {
    let failure = ApiError::new(ErrorCode::RangeNotSatisfiable, format!("the file has {size} bytes"));
    match HeaderValue::from_str(&format!("bytes */{size}")) {
        Ok(value) => failure.header(header::CONTENT_RANGE, value),
        Err(_) => failure,
    }
}

/// No charset: published clients decode as UTF-8 when none is given.
fn octets(headers: &mut HeaderMap, content_type: &'static str) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, NO_STORE);
}

/// The request body as it comes. A client that breaks off or falls silent ends
/// it with an error, so that half a file never replaces a whole one.
fn upload_stream(body: Body) -> ByteStream {
    let chunks = body.into_data_stream().map_err(|_| SessionError::InvalidArgument("the upload broke off".to_owned()));
    stream::unfold(Some(chunks), |chunks| async move {
        let mut chunks = chunks?;
        match timeout(UPLOAD_SILENCE, chunks.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(chunks))),
            Ok(Some(Err(error))) => Some((Err(error), None)),
            Ok(None) => None,
            Err(_) => Some((Err(SessionError::InvalidArgument("the upload stopped".to_owned())), None)),
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_no_file_has_is_refused() {
        assert_eq!(length(&(2..5)).unwrap(), 3);
        assert_eq!(length(&(0..u64::MAX)).unwrap_err().into_response().status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[tokio::test]
    async fn content_that_breaks_off_at_once_is_a_failure_that_can_be_told() {
        let refused = |error| async { begun(stream::iter([Err(error)]).boxed()).await.err().unwrap().into_response() };
        assert_eq!(refused(SessionError::Unavailable(None)).await.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(refused(SessionError::Gone).await.status(), StatusCode::NOT_FOUND);
        let pieces = stream::iter([Ok("a".into()), Ok("b".into()), Err(SessionError::Gone)]).boxed();
        let whole: Vec<_> = begun(pieces).await.unwrap().collect().await;
        assert!(matches!(whole.as_slice(), [Ok(a), Ok(b), Err(SessionError::Gone)] if a == "a" && b == "b"));
        assert!(begun(stream::empty().boxed()).await.unwrap().next().await.is_none());
    }

    #[test]
    fn one_range_of_bytes_is_understood_and_the_rest_ignored() {
        let range = |text: &str| wanted_range(&[(header::RANGE, text.parse().unwrap())].into_iter().collect());
        assert_eq!(range("bytes=0-0"), Some(Wanted::From { first: 0, last: Some(0) }));
        assert_eq!(range("bytes=5-"), Some(Wanted::From { first: 5, last: None }));
        assert_eq!(range("bytes=-5"), Some(Wanted::Last(5)));
        for ignored in
            ["bytes=", "bytes=-", "bytes=5-4", "bytes=0-1,3-4", "lines=1-2", "bytes=+1-2", "bytes=a-b", "0-1"]
        {
            assert_eq!(range(ignored), None, "{ignored}");
        }
    }
}

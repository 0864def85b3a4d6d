//! `/files`: the bytes of files, as envd's clients and ours read and write them.

use std::path::PathBuf;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use serde::Serialize;
use stacyvm_envd::http::{ENTRY_HEADER, MODE, PATH, USERNAME};

use super::upload::Upload;
use super::{empty, entry_header, json, query_value};
use crate::files::content::{PIECE_BYTES, Reading, WriteOptions, Writing};
use crate::files::entry::Entry;
use crate::heap::Passing;
use crate::serve::Body;
use crate::user::Identity;
use crate::{Failure, Sandbox};

/// Parts of one multipart upload.
const MAX_PARTS: usize = 1000;

/// Written file, in envd's words.
#[derive(Serialize)]
struct Written {
    path: String,
    name: String,
    r#type: &'static str,
}

pub(crate) async fn download(sandbox: &Sandbox, request: &Request<Upload>) -> Result<Response<Body>, Failure> {
    let query = request.uri().query();
    let identity = sandbox.identity(query_value(query, USERNAME).as_deref())?;
    let path = identity.resolve_path(&query_value(query, PATH).unwrap_or_default())?;
    let reading = Reading::open(path).await?;
    let size = reading.entry.size;
    let described = entry_header(&reading.entry);
    let range = match request.headers().get(header::RANGE).and_then(|value| value.to_str().ok()) {
        Some(text) => Range::parse(text, size),
        None => Range::Whole,
    };
    let (start, end, status) = match range {
        Range::Whole => (0, size, StatusCode::OK),
        Range::Part { start, end } => (start, end, StatusCode::PARTIAL_CONTENT),
        Range::Unsatisfiable => {
            let mut response = empty(StatusCode::RANGE_NOT_SATISFIABLE);
            insert(&mut response, header::CONTENT_RANGE, &format!("bytes */{size}"));
            return Ok(response);
        }
    };
    let passing = Passing::begin();
    let body = reading.stream(start, end).map_err(Into::into).map_ok(move |piece| {
        let _held = &passing;
        Frame::data(piece)
    });
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    *response.status_mut() = status;
    insert(&mut response, header::CONTENT_TYPE, "application/octet-stream");
    insert(&mut response, header::CONTENT_LENGTH, &(end - start).to_string());
    insert(&mut response, header::ACCEPT_RANGES, "bytes");
    if status == StatusCode::PARTIAL_CONTENT {
        insert(&mut response, header::CONTENT_RANGE, &format!("bytes {start}-{}/{size}", end - 1));
    }
    if let Some(described) = described {
        response.headers_mut().insert(ENTRY_HEADER, described);
    }
    Ok(response)
}

pub(crate) async fn upload(sandbox: &Sandbox, request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let _passing = Passing::begin();
    let (request, body) = request.into_parts();
    let pieces = body.pieces();
    let query = request.uri.query();
    let identity = sandbox.identity(query_value(query, USERNAME).as_deref())?;
    let mode = query_value(query, MODE).map(|text| parse_mode(&text)).transpose()?;
    let path = query_value(query, PATH).map(|path| identity.resolve_path(&path)).transpose()?;
    let content_type = request.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let boundary = content_type.and_then(|text| multer::parse_boundary(text).ok());
    if request.headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Failure::InvalidArgument("compressed uploads are not supported".to_owned()));
    }
    let Some(boundary) = boundary else {
        let path = path.ok_or_else(|| Failure::InvalidArgument("`path` is missing".to_owned()))?;
        let entry = store(path, pieces, identity, mode).await?;
        let described = entry_header(&entry);
        let mut response = json(&[written(&entry)]);
        if let Some(described) = described {
            response.headers_mut().insert(ENTRY_HEADER, described);
        }
        return Ok(response);
    };
    let written = store_parts(multer::Multipart::new(pieces, boundary), path, &identity, mode).await?;
    Ok(json(&written))
}

async fn store_parts(
    mut parts: multer::Multipart<'_>,
    path: Option<PathBuf>,
    identity: &Identity,
    mode: Option<u32>,
) -> Result<Vec<Written>, Failure> {
    let broken = |error: multer::Error| Failure::InvalidArgument(format!("the upload is not understood: {error}"));
    let mut all = Vec::new();
    while let Some(part) = parts.next_field().await.map_err(broken)? {
        if part.name() != Some("file") {
            continue;
        }
        if all.len() == MAX_PARTS {
            return Err(Failure::InvalidArgument(format!("more than {MAX_PARTS} files in one upload")));
        }
        let named = part.file_name().map(|name| identity.resolve_path(name)).transpose()?;
        let path = path.clone().or(named);
        let path = path.ok_or_else(|| Failure::InvalidArgument("a part has no file name".to_owned()))?;
        let entry = store(path, part.map_err(broken), identity.clone(), mode).await?;
        all.push(written(&entry));
    }
    if all.is_empty() {
        return Err(Failure::InvalidArgument("the upload has no part named `file`".to_owned()));
    }
    Ok(all)
}

/// Writes while the next piece is on its way.
async fn store(
    path: PathBuf,
    pieces: impl Stream<Item = Result<Bytes, Failure>>,
    owner: Identity,
    mode: Option<u32>,
) -> Result<Entry, Failure> {
    let mut writing = Writing::create(path, WriteOptions { owner, mode }).await?;
    let mut pieces = std::pin::pin!(pieces);
    let mut batch = next_batch(&mut pieces).await?;
    while !batch.is_empty() {
        let (written, next) = futures_util::future::join(writing.write(batch), next_batch(&mut pieces)).await;
        written?;
        batch = next?;
    }
    writing.finish().await
}

/// Enough bytes for one write; empty at the end.
async fn next_batch(pieces: &mut (impl Stream<Item = Result<Bytes, Failure>> + Unpin)) -> Result<Vec<Bytes>, Failure> {
    let mut batch = Vec::new();
    let mut length = 0;
    while length < PIECE_BYTES {
        let Some(piece) = pieces.next().await else { break };
        let piece = piece?;
        length += piece.len();
        if !piece.is_empty() {
            batch.push(piece);
        }
    }
    Ok(batch)
}

fn written(entry: &Entry) -> Written {
    Written { path: entry.path.clone(), name: entry.name.clone(), r#type: "file" }
}

fn insert(response: &mut Response<Body>, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(name, value);
    }
}

fn parse_mode(text: &str) -> Result<u32, Failure> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| Failure::InvalidArgument(format!("not octal permission bits: {text}")))
}

/// Which bytes are asked for; the end is exclusive.
#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part { start: u64, end: u64 },
    Unsatisfiable,
}

impl Range {
    /// RFC 9110, section 14: what is not understood, and several ranges, mean
    /// the whole.
    fn parse(text: &str, size: u64) -> Self {
        let Some((first, last)) = text.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
            return Self::Whole;
        };
        let (start, end) = match (first.trim(), last.trim()) {
            ("", suffix) => match suffix.parse::<u64>() {
                Ok(length) => (size.saturating_sub(length), size),
                Err(_) => return Self::Whole,
            },
            (first, last) => match (first.parse::<u64>(), last) {
                (Ok(start), "") => (start, size),
                (Ok(start), last) => match last.parse::<u64>() {
                    Ok(last) if last >= start => (start, last.saturating_add(1).min(size)),
                    _ => return Self::Whole,
                },
                (Err(_), _) => return Self::Whole,
            },
        };
        if start >= size || start >= end { Self::Unsatisfiable } else { Self::Part { start, end } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_the_rfc() {
        for (text, expected) in [
            ("bytes=0-3", Range::Part { start: 0, end: 4 }),
            ("bytes=8-", Range::Part { start: 8, end: 10 }),
            ("bytes=-4", Range::Part { start: 6, end: 10 }),
            ("bytes=-99", Range::Part { start: 0, end: 10 }),
            ("bytes=5-99", Range::Part { start: 5, end: 10 }),
            ("bytes=10-", Range::Unsatisfiable),
            ("bytes=-0", Range::Unsatisfiable),
            ("bytes=4-2", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("lines=1-2", Range::Whole),
        ] {
            assert_eq!(Range::parse(text, 10), expected, "{text}");
        }
        assert_eq!(Range::parse("bytes=0-", 0), Range::Unsatisfiable);
    }
}

//! Files: text as published, and bytes as they are.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use stacyvm_api::backend::{File, MoveRequest, PathRequest, WriteRequest};
use stacyvm_sandbox::{ByteStream, EntryKind, FileEntry, RemoveOptions, SessionError, WriteOptions};

use tokio::sync::Mutex;

use crate::error::{Answer, Refusal};
use crate::state::App;

const DRAIN_BYTES_MAX: usize = 64 << 20;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
pub(super) struct FileQuery {
    sandbox_id: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    pattern: String,
    #[serde(default)]
    details: bool,
    mode: Option<String>,
    user: Option<String>,
}

pub(super) async fn read(State(app): State<App>, Query(query): Query<FileQuery>) -> Answer<Response> {
    let content = app.session(&query.sandbox_id).await?.read(&query.path, None).await?;
    Ok(bytes(content.stream))
}

pub(super) async fn write(State(app): State<App>, Json(request): Json<WriteRequest>) -> Answer<StatusCode> {
    let options = WriteOptions { mode: mode(request.mode.as_deref())?, user: None };
    let content = stream::iter([Ok(request.content.into())]).boxed();
    app.session(&request.sandbox_id).await?.write(&request.path, content, options).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn upload(State(app): State<App>, Query(query): Query<FileQuery>, body: Body) -> Answer<StatusCode> {
    let options = WriteOptions { mode: mode(query.mode.as_deref())?, user: query.user };
    let body = Upload::new(body);
    let written = match app.session(&query.sandbox_id).await {
        Ok(session) => session.write(&query.path, body.stream(), options).await.map_err(Refusal::from),
        Err(refusal) => Err(refusal),
    };
    body.drain().await;
    written.map(|_| StatusCode::NO_CONTENT)
}

pub(super) async fn remove(State(app): State<App>, Json(request): Json<PathRequest>) -> Answer<StatusCode> {
    let options = RemoveOptions { recursive: request.recursive.unwrap_or(false) };
    app.session(&request.sandbox_id).await?.remove(&request.path, options).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn list(State(app): State<App>, Query(query): Query<FileQuery>) -> Answer<Json<Vec<File>>> {
    let entries = app.session(&query.sandbox_id).await?.list(&query.path, 1).await?;
    Ok(Json(entries.into_iter().map(|entry| file(entry, query.details)).collect()))
}

pub(super) async fn stat(State(app): State<App>, Query(query): Query<FileQuery>) -> Answer<Json<File>> {
    let entry = app.session(&query.sandbox_id).await?.stat(&query.path).await?;
    Ok(Json(file(entry, query.details)))
}

pub(super) async fn glob(State(app): State<App>, Query(query): Query<FileQuery>) -> Answer<Json<Vec<String>>> {
    Ok(Json(app.session(&query.sandbox_id).await?.glob(&query.pattern).await?))
}

pub(super) async fn rename(State(app): State<App>, Json(request): Json<MoveRequest>) -> Answer<StatusCode> {
    app.session(&request.sandbox_id).await?.rename(&request.old_path, &request.new_path).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn chmod(State(app): State<App>, Json(request): Json<PathRequest>) -> Answer<StatusCode> {
    let mode = mode(request.mode.as_deref())?.ok_or_else(|| Refusal::bad_request("a mode is required"))?;
    app.session(&request.sandbox_id).await?.chmod(&request.path, mode).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn mkdir(State(app): State<App>, Json(request): Json<PathRequest>) -> Answer<StatusCode> {
    app.session(&request.sandbox_id).await?.make_dir(&request.path).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn archive(State(app): State<App>, Query(query): Query<FileQuery>) -> Answer<Response> {
    Ok(bytes(app.session(&query.sandbox_id).await?.archive(&query.path).await?))
}

pub(super) async fn extract(State(app): State<App>, Query(query): Query<FileQuery>, body: Body) -> Answer<StatusCode> {
    let body = Upload::new(body);
    let unpacked = match app.session(&query.sandbox_id).await {
        Ok(session) => session.extract(&query.path, body.stream()).await.map_err(Refusal::from),
        Err(refusal) => Err(refusal),
    };
    body.drain().await;
    unpacked.map(|()| StatusCode::NO_CONTENT)
}

fn bytes(stream: ByteStream) -> Response {
    ([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(stream)).into_response()
}

/// What a client sends. It is still sending when an archive has ended or the
/// call has failed: it would see a broken connection instead of the answer, so
/// the rest is read first, within limits.
struct Upload(Arc<Mutex<BodyDataStream>>);

impl Upload {
    fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(body.into_data_stream())))
    }

    /// A body that breaks off is an error, so that nothing is written from half.
    fn stream(&self) -> ByteStream {
        let broke = |error: axum::Error| SessionError::Failed { operation: "receive the content", cause: error.into() };
        Box::pin(stream::unfold(Arc::clone(&self.0), move |body| async move {
            let piece = body.lock().await.next().await?;
            Some((piece.map_err(broke), body))
        }))
    }

    async fn drain(self) {
        let rest = async {
            let mut left = DRAIN_BYTES_MAX;
            while let Some(Ok(piece)) = self.0.lock().await.next().await {
                left = left.saturating_sub(piece.len());
                if left == 0 {
                    break;
                }
            }
        };
        // Whoever sends more, or too slowly, sees the connection end.
        drop(tokio::time::timeout(DRAIN_TIME_MAX, rest).await);
    }
}

fn mode(text: Option<&str>) -> Answer<Option<u32>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(Some(mode)),
        _ => Err(Refusal::bad_request("a mode is octal, such as 0644")),
    }
}

/// Published clients know five fields; the others are for who asks.
fn file(entry: FileEntry, details: bool) -> File {
    let plain = File {
        path: entry.path,
        size: entry.size,
        mode: format!("{:04o}", entry.mode),
        is_dir: entry.kind == EntryKind::Directory,
        mod_time: entry.modified_at.to_whole_seconds(),
        ..File::default()
    };
    if !details {
        return plain;
    }
    let kind = match entry.kind {
        EntryKind::File => "file",
        EntryKind::Directory => "directory",
        EntryKind::Symlink => "symlink",
        EntryKind::Other => "other",
    };
    File {
        kind: Some(kind.to_owned()),
        owner: Some(entry.owner),
        group: Some(entry.group),
        symlink_target: entry.symlink_target,
        ..plain
    }
}

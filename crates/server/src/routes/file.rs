//! Files as JSON calls: write, list, look, find, move, delete, watch. Streams
//! of bytes are in [`transfer`](super::transfer).

use axum::extract::State;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body::Frame;
use serde::Deserialize;
use stacyvm_api::{
    ChmodRequest, ContentEncoding, FileInfo, FileKind, MakeDirRequest, MoveRequest, StatusBody, WatchEvent,
    WriteRequest,
};
use stacyvm_engine::{FileOperation, FileOperationKind};
use stacyvm_sandbox::{EntryKind, FileEntry, RemoveOptions, WatchStream, WriteOptions};
use tokio_util::sync::CancellationToken;

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Json, Query, Sandbox};
use crate::reply::{HEARTBEAT_LINE, Reply, line, ndjson};
use crate::routes::exec_stream::HEARTBEAT;

/// Where relative paths begin, as for commands.
const WORKDIR: &str = "/workspace/";

/// Longest path (Linux PATH_MAX).
const MAX_PATH_BYTES: usize = 4096;

/// Deepest listing.
const MAX_LIST_DEPTH: u32 = 64;

const PERMISSION_BITS: u32 = 0o7777;

type Answer<T> = Result<Reply<T>, ApiError>;

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct PathQuery {
    /// Absolute, or relative to `/workspace`.
    #[param(required = true)]
    pub(super) path: String,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct RemoveQuery {
    #[param(required = true)]
    path: String,
    /// `true` deletes a directory with all that is in it.
    #[param(value_type = Option<bool>)]
    recursive: Option<String>,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// `/` unless given.
    path: Option<String>,
    /// How deep to look; 1 unless given.
    depth: Option<u32>,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct GlobQuery {
    /// `*`, `?` and `[…]` within a name, `**` across directories.
    #[param(required = true)]
    pattern: String,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct WatchQuery {
    #[param(required = true)]
    path: String,
    /// Directories below too.
    #[param(value_type = Option<bool>)]
    recursive: Option<String>,
}

pub(super) async fn write(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Json(request): Json<WriteRequest>,
) -> Answer<StatusBody> {
    let path = sandbox_path(&request.path, "path")?;
    let options = WriteOptions { mode: request.mode.as_deref().map(mode).transpose()?.flatten(), user: None };
    let content: Bytes = match request.encoding.unwrap_or_default() {
        ContentEncoding::Utf8 => request.content.into(),
        ContentEncoding::Base64 => BASE64
            .decode(&request.content)
            .map_err(|error| ApiError::bad_request(format!("field `content`: {error}")))?
            .into(),
    };
    let operation = FileOperation { kind: FileOperationKind::Write, path: path.clone() };
    app.engine
        .file_operation(&caller, &id, operation, |session| async move {
            session.write(&path, stream::iter([Ok(content)]).boxed(), options).await
        })
        .await?;
    Ok(Reply::ok(StatusBody::new("written")))
}

pub(super) async fn remove(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<RemoveQuery>,
) -> Answer<StatusBody> {
    let path = sandbox_path(&query.path, "path")?;
    let options = RemoveOptions { recursive: is_true(query.recursive.as_deref()) };
    let operation = FileOperation { kind: FileOperationKind::Delete, path: path.clone() };
    app.engine
        .file_operation(&caller, &id, operation, |session| async move { session.remove(&path, options).await })
        .await?;
    Ok(Reply::ok(StatusBody::new("deleted")))
}

pub(super) async fn list(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<ListQuery>,
) -> Answer<Vec<FileInfo>> {
    let path = sandbox_path(query.path.as_deref().unwrap_or("/"), "path")?;
    let depth = query.depth.unwrap_or(1);
    if depth == 0 || depth > MAX_LIST_DEPTH {
        return Err(ApiError::bad_request(format!("query: depth must be 1 to {MAX_LIST_DEPTH}")));
    }
    let operation = FileOperation { kind: FileOperationKind::List, path: path.clone() };
    let entries = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.list(&path, depth).await })
        .await?;
    Ok(Reply::ok(entries.into_iter().map(file_info).collect()))
}

pub(super) async fn stat(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<PathQuery>,
) -> Answer<FileInfo> {
    let path = sandbox_path(&query.path, "path")?;
    let operation = FileOperation { kind: FileOperationKind::Stat, path: path.clone() };
    let entry =
        app.engine.file_operation(&caller, &id, operation, |session| async move { session.stat(&path).await }).await?;
    Ok(Reply::ok(file_info(entry)))
}

pub(super) async fn glob(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<GlobQuery>,
) -> Answer<Vec<String>> {
    let pattern = sandbox_path(&query.pattern, "pattern")?;
    let operation = FileOperation { kind: FileOperationKind::Glob, path: pattern.clone() };
    let paths = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.glob(&pattern).await })
        .await?;
    Ok(Reply::ok(paths))
}

pub(super) async fn rename(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Json(request): Json<MoveRequest>,
) -> Answer<StatusBody> {
    let old_path = sandbox_path(&request.old_path, "old_path")?;
    let new_path = sandbox_path(&request.new_path, "new_path")?;
    let operation = FileOperation { kind: FileOperationKind::Move, path: old_path.clone() };
    app.engine
        .file_operation(&caller, &id, operation, |session| async move { session.rename(&old_path, &new_path).await })
        .await?;
    Ok(Reply::ok(StatusBody::new("moved")))
}

pub(super) async fn chmod(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Json(request): Json<ChmodRequest>,
) -> Answer<StatusBody> {
    let path = sandbox_path(&request.path, "path")?;
    let mode = mode(&request.mode)?.ok_or_else(|| ApiError::bad_request("field `mode` is missing"))?;
    let operation = FileOperation { kind: FileOperationKind::Chmod, path: path.clone() };
    app.engine
        .file_operation(&caller, &id, operation, |session| async move { session.chmod(&path, mode).await })
        .await?;
    Ok(Reply::ok(StatusBody::new("chmod applied")))
}

pub(super) async fn make_dir(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Json(request): Json<MakeDirRequest>,
) -> Answer<FileInfo> {
    let path = sandbox_path(&request.path, "path")?;
    let operation = FileOperation { kind: FileOperationKind::MakeDir, path: path.clone() };
    let entry = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.make_dir(&path).await })
        .await?;
    Ok(Reply::ok(file_info(entry)))
}

/// Changes as they happen, with blank lines while nothing does.
pub(super) async fn watch(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<WatchQuery>,
) -> Result<Response, ApiError> {
    let path = sandbox_path(&query.path, "path")?;
    let recursive = is_true(query.recursive.as_deref());
    let operation = FileOperation { kind: FileOperationKind::Watch, path: path.clone() };
    let changes = app
        .engine
        .file_operation(&caller, &id, operation, |session| async move { session.watch(&path, recursive).await })
        .await?;
    Ok(ndjson(stream::unfold((changes, app.closing.clone()), next_change)))
}

async fn next_change(
    (mut changes, closing): (WatchStream, CancellationToken),
) -> Option<(Frame<Bytes>, (WatchStream, CancellationToken))> {
    let frame = tokio::select! {
        change = changes.next() => match change? {
            Ok(change) => line(&WatchEvent { name: change.name, kind: change.kind }),
            Err(_ended) => return None,
        },
        () = tokio::time::sleep(HEARTBEAT) => HEARTBEAT_LINE,
        () = closing.cancelled() => return None,
    };
    Some((Frame::data(frame), (changes, closing)))
}

/// A path as the session takes it: absolute, and nothing that no file can have.
pub(super) fn sandbox_path(text: &str, field: &str) -> Result<String, ApiError> {
    if text.trim().is_empty() {
        return Err(ApiError::bad_request(format!("`{field}` is missing")));
    }
    if text.len() > MAX_PATH_BYTES {
        return Err(ApiError::bad_request(format!("`{field}` is longer than {MAX_PATH_BYTES} bytes")));
    }
    if text.contains('\0') {
        return Err(ApiError::bad_request(format!("`{field}` contains a NUL character")));
    }
    Ok(if text.starts_with('/') { text.to_owned() } else { format!("{WORKDIR}{text}") })
}

/// Octal permission bits; blank text is none.
pub(super) fn mode(text: &str) -> Result<Option<u32>, ApiError> {
    let digits = text.trim();
    if digits.is_empty() {
        return Ok(None);
    }
    let digits = digits.strip_prefix("0o").unwrap_or(digits);
    let octal = digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if octal && mode <= PERMISSION_BITS => Ok(Some(mode)),
        _ => Err(ApiError::bad_request(format!("mode `{text}` is not octal permission bits; write for example 0644"))),
    }
}

/// Only the exact text `true` counts, as published.
fn is_true(text: Option<&str>) -> bool {
    text == Some("true")
}

pub(super) fn file_info(entry: FileEntry) -> FileInfo {
    let kind = match entry.kind {
        EntryKind::File => FileKind::File,
        EntryKind::Directory => FileKind::Directory,
        EntryKind::Symlink => FileKind::Symlink,
        EntryKind::Other => FileKind::Other,
    };
    FileInfo {
        name: entry.name,
        path: entry.path,
        size: entry.size,
        mode: format!("{:04o}", entry.mode & PERMISSION_BITS),
        is_dir: kind == FileKind::Directory,
        mod_time: entry.modified_at.to_whole_seconds(),
        kind,
        owner: Some(entry.owner).filter(|name| !name.is_empty()),
        group: Some(entry.group).filter(|name| !name.is_empty()),
        symlink_target: entry.symlink_target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_permission_bits() {
        for (text, bits) in [("0644", 0o644), ("755", 0o755), ("0o600", 0o600), ("4755", 0o4755), ("0", 0)] {
            assert_eq!(mode(text).ok().flatten(), Some(bits), "{text}");
        }
        assert_eq!(mode(" ").ok(), Some(None));
        for text in ["9", "rwx", "-1", "+7", "17777", "0x1", "executable"] {
            assert!(mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn paths_are_absolute_afterwards() {
        assert_eq!(sandbox_path("a b", "path").ok().as_deref(), Some("/workspace/a b"));
        assert_eq!(sandbox_path("/etc/../x", "path").ok().as_deref(), Some("/etc/../x"));
        for text in ["", " ", "a\0b", &"x".repeat(4097)] {
            assert!(sandbox_path(text, "path").is_err(), "{text:?}");
        }
    }
}

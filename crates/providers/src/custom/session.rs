//! The inside of a backend's sandbox that has no agent of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::{StreamExt as _, TryStreamExt as _};
use reqwest::{Body, Method, RequestBuilder};
use stacyvm_api::Timestamp;
use stacyvm_api::backend::{
    DeadlineRequest, ExecRequest, ExecResult, Feature, File, MoveRequest, PathRequest, Status, TerminalControl,
    WriteRequest,
};
use stacyvm_sandbox::{
    AgentIo, AttachRequest, ByteStream, DialTarget, EntryKind, FileContent, FileEntry, ListedProcess, ProcessInput,
    ProcessSelector, ProcessStream, RemoveOptions, Session, SessionError, StartRequest, TerminalSize, WatchStream,
    WriteOptions,
};

use super::error::{About, CallError};
use super::http::{self, Http};
use super::inside::Inside;
use super::terminal::Input;
use super::tunnel::Raw;

/// Text that is written in one call, where a backend takes no bytes.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Entries of one listing, with all below.
const ENTRIES_MAX: usize = 1_000_000;
/// What no file system can hold, and no answer of HTTP announce, is a lie.
const FILE_SIZE_MAX: u64 = i64::MAX as u64;
const DEFAULT_MODE: u32 = 0o644;

#[derive(Clone)]
pub(super) struct BackendSession {
    pub(super) http: Http,
    pub(super) backend_id: String,
    pub(super) features: Arc<BTreeSet<Feature>>,
    /// Of the sandbox, where the backend cannot keep it.
    pub(super) env: BTreeMap<String, String>,
    pub(super) inside: Arc<Inside>,
}

impl BackendSession {
    pub(super) fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }

    fn need(&self, feature: Feature, what: &'static str) -> Result<(), SessionError> {
        if self.has(feature) { Ok(()) } else { Err(SessionError::Unsupported(what)) }
    }

    /// What a failure means. A published backend answers 404 for a missing file
    /// and for a missing sandbox alike; its status tells which.
    pub(super) async fn judged(&self, error: CallError, about: About<'_>, operation: &'static str) -> SessionError {
        if error.is_ambiguous() && !matches!(about, About::Sandbox) && self.state().await.is_err_and(|it| it.is_gone())
        {
            return SessionError::Gone;
        }
        error.of_session(about, operation)
    }

    async fn state(&self) -> Result<Status, CallError> {
        self.http.json(self.http.get(&["status", &self.backend_id], &[])).await
    }

    async fn on_path<T>(
        &self,
        path: &str,
        operation: &'static str,
        call: impl Future<Output = Result<T, CallError>> + Send,
    ) -> Result<T, SessionError> {
        checked(path)?;
        match call.await {
            Ok(value) => Ok(value),
            Err(error) => Err(self.judged(error, About::Path(path), operation).await),
        }
    }

    fn files(&self, below: &[&str], path: (&str, &str)) -> RequestBuilder {
        let route: Vec<&str> = [&["files"], below].concat();
        let mut query = vec![("sandbox_id", self.backend_id.as_str()), path];
        if self.has(Feature::Details) {
            query.push(("details", "true"));
        }
        self.http.get(&route, &query)
    }

    fn put(&self, below: &[&str], query: &[(&str, &str)], content: ByteStream) -> RequestBuilder {
        let route: Vec<&str> = [&["files"], below].concat();
        let query: Vec<_> = [&[("sandbox_id", self.backend_id.as_str())], query].concat();
        let request = self.http.request(Method::PUT, &route, &query);
        // A backend may refuse before it read everything, and then hangs up: no
        // other call may be waiting for that connection.
        request
            .header("connection", "close")
            .header("content-type", "application/octet-stream")
            .body(Body::wrap_stream(content))
    }

    fn path_request(&self, path: &str) -> PathRequest {
        PathRequest { sandbox_id: self.backend_id.clone(), path: path.to_owned(), ..PathRequest::default() }
    }

    /// An upload lasts as long as its content; only its answer has a limit, and
    /// that is what the caller's own deadline is for.
    async fn upload(&self, request: RequestBuilder) -> Result<(), CallError> {
        self.http.begin_unbounded(request).await.map(drop)
    }

    async fn write_text(&self, path: &str, mut content: ByteStream, mode: u32) -> Result<(), SessionError> {
        let mut bytes = BytesMut::new();
        while let Some(piece) = content.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() > TEXT_BYTES_MAX {
                return Err(SessionError::InvalidArgument("this backend takes no file of more than 64 MiB".to_owned()));
            }
        }
        let text = String::from_utf8(bytes.into());
        let text = text.map_err(|_| SessionError::Unsupported("writing a file that is not UTF-8 text"))?;
        let body = WriteRequest {
            sandbox_id: self.backend_id.clone(),
            path: path.to_owned(),
            content: text,
            mode: Some(octal(mode)),
        };
        self.on_path(path, "write the file", self.http.done(self.http.post(&["files"], &body))).await
    }

    async fn collect(&self, path: &str, depth: u32, into: &mut Vec<FileEntry>) -> Result<(), SessionError> {
        let call = async {
            let files: Vec<File> = self.http.json(self.files(&["list"], ("path", path))).await?;
            files.into_iter().map(plausible).collect::<Result<Vec<_>, _>>()
        };
        let mut files: Vec<FileEntry> =
            self.on_path(path, "list the directory", call).await?.into_iter().map(|file| entry(file, path)).collect();
        files.sort_by(|one, other| one.path.cmp(&other.path));
        for file in files {
            let below = (file.kind == EntryKind::Directory && depth > 1).then(|| file.path.clone());
            into.push(file);
            if into.len() > ENTRIES_MAX {
                return Err(SessionError::InvalidArgument("the directory holds too much to list".to_owned()));
            }
            if let Some(below) = below {
                Box::pin(self.collect(&below, depth - 1, into)).await?;
            }
        }
        Ok(())
    }

    async fn tell(&self, process: &ProcessSelector, input: Input) -> Result<(), SessionError> {
        let command = self.inside.find(process)?;
        let closed = || SessionError::InvalidArgument("the command's standard input is closed".to_owned());
        let sender = command.input.ok_or(SessionError::Unsupported("input and signals for this command"))?;
        if command.process.is_over() {
            return Err(match input {
                Input::Control(TerminalControl::Signal { .. }) => {
                    SessionError::ProcessNotFound(command.process.pid.to_string())
                }
                _ => closed(),
            });
        }
        sender.send(input).await.map_err(|_| closed())
    }
}

#[async_trait]
impl Session for BackendSession {
    async fn start(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        if self.has(Feature::Terminal) {
            return self.open_terminal(request).await;
        }
        if request.stdin || request.terminal.is_some() {
            return Err(SessionError::Unsupported("a command with input or a terminal"));
        }
        self.exec(request).await
    }

    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError> {
        Ok(self.inside.find(&request.process)?.process.stream(request.offset))
    }

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError> {
        self.ping().await?;
        Ok(self.inside.list())
    }

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError> {
        let (ProcessInput::Stdin(bytes) | ProcessInput::Terminal(bytes)) = input;
        self.tell(process, Input::Bytes(bytes)).await
    }

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError> {
        self.tell(process, Input::Control(TerminalControl::CloseStdin)).await
    }

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError> {
        if !self.inside.find(process)?.process.terminal {
            return Err(SessionError::InvalidArgument("the command has no terminal".to_owned()));
        }
        self.tell(process, Input::Control(TerminalControl::Resize { cols: size.cols, rows: size.rows })).await
    }

    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError> {
        self.tell(process, Input::Control(TerminalControl::Signal { signal })).await
    }

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        let call = async { plausible(self.http.json(self.files(&["stat"], ("path", path))).await?) };
        let file = self.on_path(path, "look at the file", call).await?;
        Ok(entry(File { path: path.to_owned(), ..file }, "/"))
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        let mut entries = Vec::new();
        self.collect(path, depth, &mut entries).await?;
        Ok(entries)
    }

    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError> {
        let entry = self.stat(path).await?;
        if entry.kind == EntryKind::Directory {
            return Err(SessionError::FileConflict(format!("{path} is a directory")));
        }
        let call = self.http.begin(self.files(&[], ("path", path)));
        let response = self.on_path(path, "read the file", call).await?;
        let broke = |error: CallError| SessionError::Unavailable(Some(error.into()));
        let whole = Box::pin(http::body(response).map_err(broke));
        let Some(range) = range else {
            let range = 0..entry.size;
            return Ok(FileContent { entry, range, stream: whole });
        };
        let start = range.start.min(entry.size);
        let range = start..range.end.clamp(start, entry.size);
        Ok(FileContent { stream: cut(whole, range.clone()), entry, range })
    }

    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError> {
        checked(path)?;
        if options.user.is_some() && !self.has(Feature::Bytes) {
            return Err(SessionError::Unsupported("writing as another user"));
        }
        let mode = options.mode.unwrap_or(DEFAULT_MODE);
        if self.has(Feature::Bytes) {
            let mode = octal(mode);
            let mut query = vec![("path", path), ("mode", mode.as_str())];
            query.extend(options.user.as_deref().map(|user| ("user", user)));
            let call = self.upload(self.put(&[], &query, content));
            self.on_path(path, "write the file", call).await?;
        } else {
            self.write_text(path, content, mode).await?;
        }
        self.stat(path).await
    }

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError> {
        const OPERATION: &str = "make the directory";
        if self.has(Feature::Details) {
            let call = self.http.done(self.http.post(&["files", "mkdir"], &self.path_request(path)));
            self.on_path(path, OPERATION, call).await?;
            return self.stat(path).await;
        }
        // The published protocol has no call for it, but commands.
        let exec = ExecRequest {
            sandbox_id: self.backend_id.clone(),
            command: "mkdir".to_owned(),
            args: ["-p", "--", path].map(str::to_owned).into(),
            mode: Some("argv".to_owned()),
            ..ExecRequest::default()
        };
        let call = self.http.json::<ExecResult>(self.http.post(&["exec"], &exec));
        if self.on_path(path, OPERATION, call).await?.exit_code != 0 {
            return Err(SessionError::FileConflict(format!("{path} cannot be made a directory")));
        }
        self.stat(path).await
    }

    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError> {
        checked(new_path)?;
        let body = MoveRequest {
            sandbox_id: self.backend_id.clone(),
            old_path: old_path.to_owned(),
            new_path: new_path.to_owned(),
        };
        let call = self.http.done(self.http.post(&["files", "move"], &body));
        self.on_path(old_path, "move the file", call).await
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError> {
        let body = PathRequest { recursive: Some(options.recursive), ..self.path_request(path) };
        let call = self.http.done(self.http.request(Method::DELETE, &["files"], &[]).json(&body));
        self.on_path(path, "remove the file", call).await
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        let body = PathRequest { mode: Some(octal(mode)), ..self.path_request(path) };
        let call = self.http.done(self.http.post(&["files", "chmod"], &body));
        self.on_path(path, "change the mode", call).await
    }

    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError> {
        let call = self.http.json::<Vec<String>>(self.files(&["glob"], ("pattern", pattern)));
        let mut found = self.on_path(pattern, "find files", call).await?;
        found.sort();
        Ok(found)
    }

    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError> {
        self.need(Feature::Archive, "a tree as an archive")?;
        let call = self.http.begin(self.files(&["archive"], ("path", path)));
        let response = self.on_path(path, "read the tree", call).await?;
        Ok(Box::pin(http::body(response).map_err(|error| SessionError::Unavailable(Some(error.into())))))
    }

    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        self.need(Feature::Archive, "a tree as an archive")?;
        let call = self.upload(self.put(&["archive"], &[("path", path)], archive));
        self.on_path(path, "unpack the tree", call).await
    }

    async fn watch(&self, _path: &str, _recursive: bool) -> Result<WatchStream, SessionError> {
        Err(SessionError::Unsupported("watching files"))
    }

    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        self.need(Feature::Dial, "reaching a port")?;
        let path = ["sandboxes", self.backend_id.as_str(), "dial"];
        let (name, value) = match &target {
            DialTarget::Port(port) => ("port", port.to_string()),
            DialTarget::Unix(socket) => ("socket", socket.clone()),
        };
        let opened = self.http.stream(&path, &[(name, &value)]).await;
        let about = match &target {
            DialTarget::Port(port) => About::Port(*port),
            DialTarget::Unix(socket) => About::Path(socket),
        };
        let stream = opened.map_err(|error| error.of_session(about, "connect to"))?;
        Ok(Box::new(Raw(stream)))
    }

    async fn ports(&self) -> Result<Vec<u16>, SessionError> {
        self.need(Feature::Dial, "listing ports")?;
        let call = self.http.json(self.http.get(&["sandboxes", &self.backend_id, "ports"], &[])).await;
        call.map_err(|error| error.of_session(About::Sandbox, "list ports"))
    }

    async fn set_deadline(&self, expires_at: Timestamp) -> Result<(), SessionError> {
        self.need(Feature::Spec, "a deadline at the backend")?;
        let path = ["sandboxes", self.backend_id.as_str(), "deadline"];
        let call = self.http.done(self.http.post(&path, &DeadlineRequest { expires_at })).await;
        call.map_err(|error| error.of_session(About::Sandbox, "set the deadline"))
    }

    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError> {
        if !self.has(Feature::Logs) {
            self.ping().await?;
            return Ok(self.inside.console(lines));
        }
        let count = lines.to_string();
        let request = self.http.get(&["sandboxes", &self.backend_id, "logs"], &[("lines", &count)]);
        self.http.json(request).await.map_err(|error| error.of_session(About::Sandbox, "read the console"))
    }

    async fn ping(&self) -> Result<(), SessionError> {
        let status = self.state().await.map_err(|error| error.of_session(About::Sandbox, "answer"))?;
        match status.state.as_deref() {
            Some("destroyed" | "stopped" | "error" | "dead") => Err(SessionError::Gone),
            _ => Ok(()),
        }
    }
}

/// What no backend should have to judge.
fn checked(path: &str) -> Result<(), SessionError> {
    if path.is_empty() || path.contains('\0') {
        return Err(SessionError::InvalidArgument("a path is required, without NUL".to_owned()));
    }
    Ok(())
}

fn octal(mode: u32) -> String {
    format!("{mode:04o}")
}

fn plausible(file: File) -> Result<File, CallError> {
    if file.size > FILE_SIZE_MAX { Err(CallError::Garbage("no file is that large")) } else { Ok(file) }
}

/// One form of a file, whatever the backend wrote: absolute paths, permission
/// bits, a time.
fn entry(file: File, directory: &str) -> FileEntry {
    let path = if file.path.starts_with('/') {
        file.path
    } else {
        // A bare name, or a path without its first slash.
        let name = file.path.rsplit('/').next().unwrap_or_default();
        format!("{}/{name}", directory.trim_end_matches('/'))
    };
    let kind = match file.kind.as_deref() {
        Some("directory") => EntryKind::Directory,
        Some("symlink") => EntryKind::Symlink,
        Some("other") => EntryKind::Other,
        _ if file.is_dir => EntryKind::Directory,
        _ => EntryKind::File,
    };
    FileEntry {
        name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        kind,
        size: file.size,
        mode: mode_of(&file.mode),
        owner: file.owner.unwrap_or_default(),
        group: file.group.unwrap_or_default(),
        modified_at: file.mod_time.parse().unwrap_or(Timestamp::from_unix_ms(0)),
        symlink_target: file.symlink_target,
        path,
    }
}

/// Octal in any width, or as `ls` writes it.
fn mode_of(text: &str) -> u32 {
    if let Ok(mode) = u32::from_str_radix(text.trim(), 8) {
        return mode & 0o7777;
    }
    let bits = text.chars().rev().take(9).enumerate();
    bits.fold(0, |mode, (at, letter)| if letter == '-' { mode } else { mode | 1 << at })
}

/// The bytes of a range of a stream that begins at the file's beginning.
fn cut(stream: ByteStream, range: Range<u64>) -> ByteStream {
    let state = (stream, 0_u64, range);
    Box::pin(futures_util::stream::unfold(state, |(mut stream, mut at, range)| async move {
        while at < range.end {
            let mut piece = match stream.next().await? {
                Ok(piece) => piece,
                Err(error) => return Some((Err(error), (stream, range.end, range))),
            };
            let start = at;
            at += piece.len() as u64;
            if at > range.end {
                piece.truncate((range.end - start) as usize);
            }
            if at > range.start {
                let skip = range.start.saturating_sub(start) as usize;
                return Some((Ok(piece.split_off(skip.min(piece.len()))), (stream, at, range)));
            }
        }
        None
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_published_form_of_a_file_becomes_ours() {
        let file = |path: &str, mode: &str| File { path: path.to_owned(), mode: mode.to_owned(), ..File::default() };
        for (given, path, mode) in [
            (file("/workspace/a", "0644"), "/workspace/a", 0o644),
            (file("workspace/a", "-rw-r--r--"), "/workspace/a", 0o644),
            (file("a", "644"), "/workspace/a", 0o644),
            (file("a", "20000000755"), "/workspace/a", 0o755),
            (file("a", "drwxr-x--x"), "/workspace/a", 0o751),
        ] {
            let entry = entry(given, "/workspace/");
            assert_eq!((entry.path.as_str(), entry.mode, entry.name.as_str()), (path, mode, "a"));
        }
    }

    #[tokio::test]
    async fn a_range_is_cut_out_wherever_the_pieces_end() {
        for (range, expected) in [(0..3, "abc"), (2..7, "cdefg"), (4..5, "e"), (8..9, "i"), (3..3, "")] {
            let pieces = ["abc", "def", "ghi"].map(|piece| Ok(bytes::Bytes::from_static(piece.as_bytes())));
            let stream = cut(Box::pin(futures_util::stream::iter(pieces)), range);
            let got: Vec<_> = stream.try_collect().await.unwrap();
            assert_eq!(got.concat(), expected.as_bytes());
        }
    }
}

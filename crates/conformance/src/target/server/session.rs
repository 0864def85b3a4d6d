//! A [`Session`] over the REST API, so that the checks need not know.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use stacyvm_api::{ExecId, ExecRequest, FileInfo, FileKind, ProcessStatus, Timestamp};
use stacyvm_client::{ClientError, ExecEvent, SandboxClient, TerminalOutput, UploadOptions, WatchOptions};
use stacyvm_sandbox::{
    AgentIo, AttachRequest, ByteStream, DialTarget, EntryKind, Exit, FileContent, FileEntry, ListedProcess,
    ProcessEvent, ProcessInput, ProcessSelector, ProcessStream, RemoveOptions, Session, SessionError, StartRequest,
    TerminalSize, WatchChange, WatchStream, WriteOptions,
};
use tokio_util::io::StreamReader;

use super::session_error;
use super::stream::{OutputKind, events};

pub(super) struct ServerSession {
    sandbox: SandboxClient,
    /// The API selects commands by their id, sessions by pid.
    commands: Mutex<BTreeMap<u32, (ExecId, OutputKind)>>,
}

impl ServerSession {
    pub(super) fn new(sandbox: SandboxClient) -> Self {
        Self { sandbox, commands: Mutex::default() }
    }

    async fn command(&self, process: &ProcessSelector) -> Result<(ExecId, OutputKind), SessionError> {
        let ProcessSelector::Pid(pid) = process else {
            return Err(SessionError::Unsupported("selecting a command by tag over the REST API"));
        };
        let known = self.commands.lock().unwrap_or_else(PoisonError::into_inner).get(pid).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let log = self.sandbox.exec_log().await.map_err(failed("list commands"))?;
        match log.into_iter().find(|entry| entry.pid == Some(*pid)) {
            Some(entry) => Ok((entry.exec_id, OutputKind::Pipes)),
            None => Err(SessionError::ProcessNotFound(pid.to_string())),
        }
    }

    /// Reads up to the start, remembers the command, and gives all its events.
    async fn begun(&self, mut output: TerminalOutput, kind: OutputKind) -> Result<ProcessStream, SessionError> {
        match output.next().await.map_err(failed("start a command"))? {
            Some(ExecEvent::Started { exec_id, pid }) => {
                self.commands.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, (exec_id, kind));
                Ok(events(output, kind, vec![ProcessEvent::Started { pid }]))
            }
            other => {
                let cause = ClientError::Protocol(format!("the first event was {other:?}, not `started`"));
                Err(SessionError::Failed { operation: "start a command", cause: Box::new(cause) })
            }
        }
    }

    async fn listed(&self, path: &str, depth: u32, into: &mut Vec<FileEntry>) -> Result<(), SessionError> {
        for info in self.sandbox.list_files(path).await.map_err(failed("list a directory"))? {
            let entry = entry_of(info)?;
            let below = (entry.kind == EntryKind::Directory && depth > 1).then(|| entry.path.clone());
            into.push(entry);
            if let Some(below) = below {
                Box::pin(self.listed(&below, depth - 1, into)).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Session for ServerSession {
    async fn start(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        let mut argv = request.argv.into_iter();
        let exec = ExecRequest {
            command: argv.next().unwrap_or_default(),
            args: Some(argv.collect()),
            mode: Some("argv".to_owned()),
            env: (!request.env.is_empty()).then_some(request.env),
            workdir: request.workdir,
            user: request.user,
            timeout: request.deadline.map(Into::into),
            keep_stdin_open: Some(request.stdin),
            ..ExecRequest::default()
        };
        let size = request.terminal.map(client_size);
        let terminal = self.sandbox.terminal(&exec, size).await.map_err(failed("start a command"))?;
        let kind = if size.is_some() { OutputKind::Terminal } else { OutputKind::Pipes };
        self.begun(terminal.output, kind).await
    }

    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError> {
        let (exec_id, kind) = self.command(&request.process).await?;
        let terminal = self.sandbox.attach(exec_id, request.offset).await.map_err(failed("attach to a command"))?;
        self.begun(terminal.output, kind).await
    }

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError> {
        let log = self.sandbox.exec_log().await.map_err(failed("list commands"))?;
        let listed = log.into_iter().filter_map(|entry| {
            let code = entry.exit_code;
            let exit = match entry.status {
                ProcessStatus::Running => None,
                ProcessStatus::Exited | ProcessStatus::Lost => Some(Exit { code, signal: None, timed_out: false }),
                ProcessStatus::TimedOut => Some(Exit { code, signal: None, timed_out: true }),
            };
            // The API's list does not tell; nothing here asks.
            Some(ListedProcess { pid: entry.pid?, tag: None, argv: vec![entry.command], exit, terminal: false })
        });
        Ok(listed.collect())
    }

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError> {
        let (exec_id, _) = self.command(process).await?;
        let (ProcessInput::Stdin(data) | ProcessInput::Terminal(data)) = input;
        self.sandbox.write_stdin(&exec_id, &data).await.map_err(failed("send input"))
    }

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError> {
        let (exec_id, _) = self.command(process).await?;
        self.sandbox.close_stdin(&exec_id).await.map_err(failed("close the input"))
    }

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError> {
        let (exec_id, _) = self.command(process).await?;
        self.sandbox.resize(&exec_id, client_size(size)).await.map_err(failed("resize a terminal"))
    }

    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError> {
        let (exec_id, _) = self.command(process).await?;
        self.sandbox.signal(&exec_id, &signal.to_string()).await.map_err(failed("send a signal"))
    }

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        entry_of(self.sandbox.stat(path).await.map_err(failed("look at a file"))?)
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        let mut entries = Vec::new();
        self.listed(path, depth, &mut entries).await?;
        Ok(entries)
    }

    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError> {
        let inclusive = range.clone().map(|range| range.start..=range.end.saturating_sub(1));
        let download = self.sandbox.download(path, inclusive).await.map_err(failed("read a file"))?;
        let entry = self.stat(path).await?;
        let whole = 0..entry.size;
        let range = range.map_or(whole, |range| range.start.min(entry.size)..range.end.min(entry.size));
        let stream = Box::pin(download.into_stream().map_err(failed("read a file")));
        Ok(FileContent { entry, range, stream })
    }

    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError> {
        if options.user.is_some() {
            return Err(SessionError::Unsupported("writing as another user over the REST API"));
        }
        let upload = UploadOptions { mode: options.mode.map(octal), size_bytes: None };
        let source = StreamReader::new(content.map_err(std::io::Error::other));
        self.sandbox.upload(path, source, &upload).await.map_err(failed("write a file"))?;
        self.stat(path).await
    }

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError> {
        entry_of(self.sandbox.make_dir(path).await.map_err(failed("make a directory"))?)
    }

    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError> {
        self.sandbox.move_file(old_path, new_path).await.map_err(failed("move a file"))
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError> {
        let removed =
            if options.recursive { self.sandbox.remove_all(path).await } else { self.sandbox.remove(path).await };
        removed.map_err(failed("remove a file"))
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        self.sandbox.chmod(path, &octal(mode)).await.map_err(failed("change a mode"))
    }

    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError> {
        self.sandbox.glob(pattern).await.map_err(failed("find files"))
    }

    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError> {
        let download = self.sandbox.download_archive(path).await.map_err(failed("read a tree"))?;
        Ok(Box::pin(download.into_stream().map_err(failed("read a tree"))))
    }

    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        let source = StreamReader::new(archive.map_err(std::io::Error::other));
        self.sandbox.upload_archive(path, source).await.map_err(failed("unpack a tree"))
    }

    async fn watch(&self, path: &str, recursive: bool) -> Result<WatchStream, SessionError> {
        let watch = self.sandbox.watch(path, &WatchOptions { recursive }).await.map_err(failed("watch a directory"))?;
        let changes = stream::try_unfold(watch, |mut watch| async {
            let event = watch.next().await.map_err(failed("watch a directory"))?;
            Ok(event.map(|event| (WatchChange { name: event.name, kind: event.kind }, watch)))
        });
        Ok(changes.boxed())
    }

    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        match target {
            DialTarget::Port(port) => Ok(Box::new(self.sandbox.forward(port).await.map_err(failed("dial a port"))?)),
            DialTarget::Unix(_) => Err(SessionError::Unsupported("dialing a unix socket over the REST API")),
        }
    }

    async fn ports(&self) -> Result<Vec<u16>, SessionError> {
        let ports = self.sandbox.ports().await.map_err(failed("list ports"))?;
        Ok(ports.into_iter().map(|port| port.port).collect())
    }

    async fn set_deadline(&self, _expires_at: Timestamp) -> Result<(), SessionError> {
        Err(SessionError::Unsupported("setting the agent's deadline over the REST API"))
    }

    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError> {
        let lines = u32::try_from(lines).unwrap_or(u32::MAX);
        self.sandbox.logs(lines).await.map_err(failed("read the console"))
    }

    async fn ping(&self) -> Result<(), SessionError> {
        self.sandbox.get().await.map(drop).map_err(failed("look at the sandbox"))
    }
}

fn failed(operation: &'static str) -> impl Fn(ClientError) -> SessionError {
    move |error| session_error(error, operation)
}

fn client_size(size: TerminalSize) -> stacyvm_client::TerminalSize {
    stacyvm_client::TerminalSize { cols: size.cols, rows: size.rows }
}

fn octal(mode: u32) -> String {
    format!("{mode:04o}")
}

fn entry_of(info: FileInfo) -> Result<FileEntry, SessionError> {
    let malformed = |what: &str, text: &str| SessionError::Failed {
        operation: "describe a file",
        cause: Box::new(ClientError::Protocol(format!("its {what} is `{text}`"))),
    };
    let mode = u32::from_str_radix(&info.mode, 8).map_err(|_| malformed("mode", &info.mode))?;
    if info.mode.len() != 4 {
        return Err(malformed("mode", &info.mode));
    }
    let modified_at = info.mod_time.parse().map_err(|_| malformed("time", &info.mod_time))?;
    let kind = match info.kind {
        FileKind::File => EntryKind::File,
        FileKind::Directory => EntryKind::Directory,
        FileKind::Symlink => EntryKind::Symlink,
        FileKind::Other => EntryKind::Other,
    };
    if info.is_dir != (kind == EntryKind::Directory) {
        return Err(malformed("kind", if info.is_dir { "is_dir but no directory" } else { "a directory, not is_dir" }));
    }
    Ok(FileEntry {
        name: info.name,
        path: info.path,
        kind,
        size: info.size,
        mode,
        owner: info.owner.unwrap_or_default(),
        group: info.group.unwrap_or_default(),
        modified_at,
        symlink_target: info.symlink_target,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_contradicts_itself_is_refused() {
        let info = FileInfo {
            name: "a".to_owned(),
            path: "/a".to_owned(),
            size: 1,
            mode: "0644".to_owned(),
            is_dir: false,
            mod_time: "2026-01-02T03:04:05Z".to_owned(),
            kind: FileKind::File,
            owner: None,
            group: None,
            symlink_target: None,
        };
        assert_eq!(entry_of(info.clone()).unwrap().mode, 0o644);
        assert!(entry_of(FileInfo { mode: "644".to_owned(), ..info.clone() }).is_err());
        assert!(entry_of(FileInfo { mode: "rwxr".to_owned(), ..info.clone() }).is_err());
        assert!(entry_of(FileInfo { mod_time: "yesterday".to_owned(), ..info.clone() }).is_err());
        assert!(entry_of(FileInfo { is_dir: true, ..info }).is_err());
    }
}

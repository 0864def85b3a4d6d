//! The inside of a mock sandbox, as a native session.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use stacyvm_api::Timestamp;
use stacyvm_sandbox::{
    AgentIo, AttachRequest, ByteStream, DialTarget, Exit, FileContent, FileEntry, ListedProcess, ProcessInput,
    ProcessSelector, ProcessStream, RemoveOptions, Session, SessionError, StartRequest, TerminalSize, WatchChange,
    WatchStream, WriteOptions,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;

use super::faults::{Fault, MockOperation};
use super::sandbox::{MockSandbox, MockService};
use super::shell::Shell;
use super::tree::as_prefix;
use super::{Shared, archive, pattern, program};
use crate::process::{Channel, NewProcess, Process};

/// Largest file the mock keeps.
const FILE_BYTES_MAX: usize = 256 << 20;
/// Piece of a file handed out at once.
const READ_CHUNK_BYTES: usize = 64 * 1024;
/// Bytes in flight on a dialed connection.
const DIAL_BUFFER_BYTES: usize = 64 * 1024;
const USERS: [&str; 5] = ["root", "user", "nobody", "0", "1000"];
const SIGKILL: i32 = 9;

pub(super) struct MockSession {
    pub(super) sandbox: Arc<MockSandbox>,
    pub(super) shared: Arc<Shared>,
}

/// Number of a signal by name, with or without `SIG`, or by number.
pub(super) fn signal_number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (0..=64).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let known = [("HUP", 1), ("INT", 2), ("QUIT", 3), ("KILL", 9), ("USR1", 10), ("USR2", 12), ("TERM", 15)];
    known.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

impl MockSession {
    /// Runs one call as the faults of the test want it.
    async fn call<T>(
        &self,
        operation: MockOperation,
        run: impl Future<Output = Result<T, SessionError>> + Send,
    ) -> Result<T, SessionError> {
        let counted = self.shared.counters.begin(operation);
        let fault = self.shared.faults.take(operation);
        let failed = |message: String| SessionError::Failed { operation: "answer", cause: message.into() };
        match &fault {
            Some(Fault::Fail(message)) => return Err(failed(message.clone())),
            Some(Fault::MissingImage) => return Err(failed("missing image".to_owned())),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Delay(span)) => tokio::time::sleep(*span).await,
            Some(Fault::FailAfter(_)) | None => {}
        }
        if !self.sandbox.is_alive() {
            return Err(SessionError::Gone);
        }
        let value = tokio::select! {
            value = run => value?,
            () = self.sandbox.ended.cancelled() => return Err(SessionError::Gone),
        };
        if let Some(Fault::FailAfter(message)) = fault {
            return Err(failed(message));
        }
        counted.succeeded();
        Ok(value)
    }

    fn owner(&self, user: Option<&str>) -> Result<String, SessionError> {
        let user = user.unwrap_or(self.sandbox.user());
        if USERS.contains(&user) { Ok(user.to_owned()) } else { Err(SessionError::UserNotFound(user.to_owned())) }
    }

    fn start_now(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        let sandbox = &self.sandbox;
        let Some(program) = request.argv.first().filter(|program| !program.trim().is_empty()) else {
            return Err(SessionError::InvalidArgument("a command is required".to_owned()));
        };
        if sandbox.pids_exhausted.load(Ordering::Relaxed) {
            return Err(SessionError::PidsExhausted);
        }
        let user = self.owner(request.user.as_deref())?;
        let directory = sandbox.directory(request.workdir.as_deref().unwrap_or("/workspace"))?;
        if !program::exists(program) {
            return Err(SessionError::CommandNotFound(format!("{program}: command not found")));
        }
        let process = sandbox.add_process(|pid| NewProcess {
            pid,
            tag: request.tag.clone(),
            argv: request.argv.clone(),
            terminal: request.terminal,
            stdin_open: request.stdin,
        });
        let stream = process.stream(0);
        let environment = self.environment(&user, &directory, &request.env);
        let shell = Shell::new(Arc::clone(sandbox), Arc::clone(&process), environment, directory, user);
        tokio::spawn(run_to_end(shell, process, request));
        Ok(stream)
    }

    fn environment(&self, user: &str, directory: &str, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let home = if user == "root" { "/root".to_owned() } else { format!("/home/{user}") };
        let base = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", home.as_str()),
            ("PWD", directory),
        ];
        let mut environment: BTreeMap<String, String> =
            base.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        environment.extend(self.sandbox.spec.env.clone());
        environment.extend(own.clone());
        environment
    }

    async fn write_now(
        &self,
        path: &str,
        mut content: ByteStream,
        options: WriteOptions,
    ) -> Result<FileEntry, SessionError> {
        let owner = self.owner(options.user.as_deref())?;
        // A bad path fails before the body is read.
        self.sandbox.tree().resolve(path)?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = content.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() > FILE_BYTES_MAX {
                return Err(SessionError::DiskFull);
            }
        }
        self.sandbox.tree_for_writing()?.write(path, bytes.freeze(), options.mode, &owner)
    }
}

async fn run_to_end(mut shell: Shell, process: Arc<Process>, request: StartRequest) {
    let group = process.group.clone();
    let deadline = async {
        match request.deadline {
            Some(deadline) => tokio::time::sleep(deadline).await,
            None => std::future::pending().await,
        }
    };
    let exit = tokio::select! {
        biased;
        () = group.cancelled() => None,
        status = shell.run(request.argv) => Some(Exit { code: Some(status), signal: None, timed_out: false }),
        () = deadline => {
            process.kill(Exit { code: None, signal: Some(SIGKILL), timed_out: true });
            None
        }
    };
    let killed = process.killed().unwrap_or(Exit { code: None, signal: Some(SIGKILL), timed_out: false });
    process.finish(exit.unwrap_or(killed));
}

#[async_trait]
impl Session for MockSession {
    async fn start(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        self.call(MockOperation::Start, async { self.start_now(request) }).await
    }

    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError> {
        let find = async { Ok(self.sandbox.process(&request.process)?.stream(request.offset)) };
        self.call(MockOperation::Attach, find).await
    }

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError> {
        let list = async {
            let processes = self.sandbox.processes();
            Ok(processes
                .into_iter()
                .map(|process| ListedProcess {
                    pid: process.pid,
                    tag: process.tag.clone(),
                    argv: process.argv.clone(),
                    exit: process.exit(),
                    terminal: process.terminal,
                })
                .collect())
        };
        self.call(MockOperation::Attach, list).await
    }

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError> {
        let send = async {
            let process = self.sandbox.process(process)?;
            match input {
                ProcessInput::Stdin(bytes) => process.write_stdin(&bytes),
                ProcessInput::Terminal(bytes) => {
                    if !process.terminal {
                        return Err(SessionError::InvalidArgument("the command has no terminal".to_owned()));
                    }
                    type_on_terminal(&process, &bytes).await
                }
            }
        };
        self.call(MockOperation::Input, send).await
    }

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError> {
        let close = async {
            self.sandbox.process(process)?.close_stdin();
            Ok(())
        };
        self.call(MockOperation::Input, close).await
    }

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError> {
        let resize = async {
            let process = self.sandbox.process(process)?;
            if !process.terminal {
                return Err(SessionError::InvalidArgument("the command has no terminal".to_owned()));
            }
            process.resize(size);
            Ok(())
        };
        self.call(MockOperation::Input, resize).await
    }

    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError> {
        let send = async {
            let process = self.sandbox.process(process)?;
            if process.exit().is_some() {
                return Err(SessionError::ProcessNotFound(process.pid.to_string()));
            }
            if signal != 0 {
                process.kill(Exit { code: None, signal: Some(signal), timed_out: false });
            }
            Ok(())
        };
        self.call(MockOperation::Input, send).await
    }

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        self.call(MockOperation::File, async { self.sandbox.tree().stat(path) }).await
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        self.call(MockOperation::File, async { self.sandbox.tree().list(path, depth) }).await
    }

    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError> {
        let (entry, bytes) = self.call(MockOperation::File, async { self.sandbox.tree().read(path) }).await?;
        let length = bytes.len() as u64;
        let range = range.map_or(0..length, |range| range.start.min(length)..range.end.min(length));
        let range = range.start..range.end.max(range.start);
        let part = bytes.slice(range.start as usize..range.end as usize);
        Ok(FileContent { entry, range, stream: in_pieces(part) })
    }

    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError> {
        self.call(MockOperation::File, self.write_now(path, content, options)).await
    }

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError> {
        self.call(MockOperation::File, async { self.sandbox.make_dir(path, self.sandbox.user()) }).await
    }

    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError> {
        self.call(MockOperation::File, async { self.sandbox.rename(old_path, new_path) }).await
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError> {
        self.call(MockOperation::File, async { self.sandbox.remove(path, options.recursive) }).await
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        self.call(MockOperation::File, async { self.sandbox.chmod(path, mode) }).await
    }

    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError> {
        let matched = async {
            let pattern = pattern::Pattern::parse(pattern)?;
            let tree = self.sandbox.tree();
            Ok(tree.paths().filter(|path| pattern.matches(path)).cloned().collect())
        };
        self.call(MockOperation::File, matched).await
    }

    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError> {
        let packed = self.call(MockOperation::File, archive::pack(&self.sandbox, path)).await?;
        Ok(in_pieces(packed))
    }

    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        self.call(MockOperation::File, archive::unpack(&self.sandbox, path, archive)).await
    }

    async fn watch(&self, path: &str, recursive: bool) -> Result<WatchStream, SessionError> {
        let begin = async {
            let tree = self.sandbox.tree();
            let directory = tree.resolve(path)?;
            tree.stat(&directory)?;
            if !tree.is_directory(&directory)? {
                return Err(SessionError::FileConflict(format!("{path} is not a directory")));
            }
            Ok((as_prefix(&directory), tree.subscribe()))
        };
        let (prefix, changes) = self.call(MockOperation::File, begin).await?;
        let ended = self.sandbox.ended.clone();
        Ok(Box::pin(stream::unfold((changes, prefix, ended), move |(mut changes, prefix, ended)| async move {
            loop {
                let change = tokio::select! {
                    change = changes.recv() => change,
                    () = ended.cancelled() => return None,
                };
                match change {
                    Ok(change) => {
                        let Some(name) = change.path.strip_prefix(&prefix) else { continue };
                        if name.is_empty() || (!recursive && name.contains('/')) {
                            continue;
                        }
                        let change = WatchChange { name: name.to_owned(), kind: change.kind };
                        return Some((Ok(change), (changes, prefix, ended)));
                    }
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        })))
    }

    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        let find = async {
            match target {
                DialTarget::Port(port) => {
                    self.sandbox.service(port).ok_or_else(|| SessionError::PortClosed(format!("port {port}")))
                }
                DialTarget::Unix(path) => Err(SessionError::PortClosed(path)),
            }
        };
        let service = self.call(MockOperation::Dial, find).await?;
        let (ours, theirs) = tokio::io::duplex(DIAL_BUFFER_BYTES);
        let ended = self.sandbox.ended.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                _closed = serve(service, theirs) => {}
            }
        });
        Ok(Box::new(ours))
    }

    async fn ports(&self) -> Result<Vec<u16>, SessionError> {
        self.call(MockOperation::File, async { Ok(self.sandbox.ports()) }).await
    }

    async fn set_deadline(&self, expires_at: Timestamp) -> Result<(), SessionError> {
        let set = async {
            self.sandbox.set_deadline(expires_at);
            Ok(())
        };
        self.call(MockOperation::SetDeadline, set).await
    }

    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError> {
        self.call(MockOperation::Attach, async { Ok(self.sandbox.console(lines)) }).await
    }

    async fn ping(&self) -> Result<(), SessionError> {
        self.call(MockOperation::Ping, async { Ok(()) }).await
    }
}

/// The line discipline of a terminal: echo, carriage return as newline,
/// interrupt and end of input.
async fn type_on_terminal(process: &Process, bytes: &[u8]) -> Result<(), SessionError> {
    const INTERRUPT: u8 = 3;
    const END_OF_INPUT: u8 = 4;
    const SIGINT: i32 = 2;
    let (mut typed, mut shown) = (Vec::new(), Vec::new());
    for byte in bytes {
        match *byte {
            INTERRUPT => {
                shown.extend_from_slice(b"^C\r\n");
                process.emit(Channel::Terminal, shown.into()).await;
                process.kill(Exit { code: None, signal: Some(SIGINT), timed_out: false });
                return Ok(());
            }
            END_OF_INPUT => {
                process.write_stdin(&typed)?;
                process.close_stdin();
                return Ok(());
            }
            b'\r' | b'\n' => {
                typed.push(b'\n');
                shown.extend_from_slice(b"\r\n");
            }
            byte => {
                typed.push(byte);
                shown.push(byte);
            }
        }
    }
    process.emit(Channel::Terminal, shown.into()).await;
    process.write_stdin(&typed)
}

async fn serve(service: MockService, mut io: DuplexStream) -> std::io::Result<()> {
    const HEAD_BYTES_MAX: usize = 64 * 1024;
    match service {
        MockService::Echo => {
            let (mut reader, mut writer) = tokio::io::split(io);
            tokio::io::copy(&mut reader, &mut writer).await?;
            writer.shutdown().await
        }
        MockService::At(address) => {
            let mut server = TcpStream::connect(address).await?;
            tokio::io::copy_bidirectional(&mut io, &mut server).await.map(drop)
        }
        MockService::Http(text) => {
            let mut head = Vec::new();
            let mut piece = [0; 4096];
            while !head.windows(4).any(|window| window == b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
                let count = io.read(&mut piece).await?;
                if count == 0 {
                    return Ok(());
                }
                head.extend_from_slice(&piece[..count]);
            }
            let body = format!("{text}\n{}", String::from_utf8_lossy(&head));
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\n";
            let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
            io.write_all(answer.as_bytes()).await?;
            io.shutdown().await
        }
    }
}

fn in_pieces(bytes: Bytes) -> ByteStream {
    Box::pin(stream::unfold(bytes, |mut bytes| async move {
        if bytes.is_empty() {
            return None;
        }
        let piece = bytes.split_to(bytes.len().min(READ_CHUNK_BYTES));
        Some((Ok(piece), bytes))
    }))
}

//! A session with our agent, over any byte stream.

mod bulk;
mod error;
mod events;
mod transport;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientConfig};
use futures_util::stream;
use http::HeaderValue;
use stacyvm_api::Timestamp;
use stacyvm_envd::agent::{self, AgentClient, selector};
use stacyvm_envd::filesystem::{self, FileType, FilesystemClient};
use stacyvm_envd::http::TOKEN_HEADER;
use stacyvm_envd::process::{self, ProcessClient, process_input, process_selector};

use self::bulk::Bulk;
use self::error::{from_call, malformed};
use self::transport::Transport;
use crate::{
    AgentChannel, AgentIo, AttachRequest, ByteStream, DialTarget, EntryKind, FileContent, FileEntry, ListedProcess,
    ProcessInput, ProcessSelector, ProcessStream, RemoveOptions, Session, SessionError, StartRequest, TerminalSize,
    WatchStream, WriteOptions,
};

/// One answer of an agent, at most: a listing of very many files.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// One message of a stream, or an answer that lists nothing, at most. At its
/// start a server pings many agents at once, whatever they then say.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// A call that only looks at something.
const QUICK: Duration = Duration::from_secs(15);

/// A call that may have to walk a large tree.
const SLOW: Duration = Duration::from_mins(5);

/// Input is sent in pieces of this size, so that none exceeds what one message
/// may carry.
const INPUT_PIECE_BYTES: usize = 1 << 20;

/// Speaks the agent protocol (`crates/envd`) with one sandbox.
///
/// Everything that comes back is taken as hostile: sizes and counts are bounded,
/// texts cleaned.
pub struct EnvdSession {
    transport: Transport,
    agent: AgentClient<Transport>,
    process: ProcessClient<Transport>,
    filesystem: FilesystemClient<Transport>,
    token: HeaderValue,
}

impl EnvdSession {
    /// A session that shows `token` on every request. Needs a tokio runtime: whoever
    /// asks for a session is about to call, so a connection is opened meanwhile.
    pub fn connect(channel: Arc<dyn AgentChannel>, token: String) -> Result<Self, SessionError> {
        let mut token = HeaderValue::try_from(token)
            .map_err(|_| SessionError::InvalidArgument("the agent's token is not a header value".to_owned()))?;
        token.set_sensitive(true);
        let transport = Transport::new(channel);
        transport.open_ahead();
        let config = ClientConfig::new(http::Uri::from_static("http://agent"))
            .with_default_header(TOKEN_HEADER, token.clone())
            .with_default_max_message_size(MAX_ANSWER_BYTES)
            .with_default_element_memory_limit(MAX_ANSWER_BYTES);
        Ok(Self {
            agent: AgentClient::new(transport.clone(), config.clone()),
            process: ProcessClient::new(transport.clone(), config.clone()),
            filesystem: FilesystemClient::new(transport.clone(), config),
            transport,
            token,
        })
    }

    async fn call<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, ConnectError>> + Send,
    ) -> Result<T, SessionError> {
        let answered = Box::pin(async {
            match call.await {
                Ok(answer) => Ok(answer),
                Err(error) => Err(self.transport.judge(from_call(operation, &error)).await),
            }
        });
        self.transport.while_alive(answered).await
    }

    fn bulk(&self) -> Bulk<'_> {
        Bulk { transport: &self.transport, token: &self.token }
    }

    fn quick() -> CallOptions {
        CallOptions::default().with_timeout(QUICK).with_max_message_size(MAX_EVENT_BYTES)
    }

    fn listing() -> CallOptions {
        CallOptions::default().with_timeout(QUICK)
    }

    fn slow() -> CallOptions {
        CallOptions::default().with_timeout(SLOW)
    }

    /// A stream lasts as long as it lasts.
    fn streaming() -> CallOptions {
        CallOptions::default().with_max_message_size(MAX_EVENT_BYTES)
    }
}

#[async_trait]
impl Session for EnvdSession {
    async fn start(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        let request = agent::StartRequest {
            argv: request.argv,
            env: request.env.into_iter().collect(),
            workdir: request.workdir,
            user: request.user,
            tag: request.tag,
            deadline_ms: request.deadline.map(|deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX)),
            stdin: request.stdin,
            terminal: request.terminal.map(terminal).into(),
        };
        let started = self.agent.start_with_options(request, Self::streaming());
        events::processes(self.call("start a command", started).await?, &self.transport, "start a command").await
    }

    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError> {
        let request = agent::AttachRequest { process: own_selector(&request.process).into(), offset: request.offset };
        let attached = self.agent.attach_with_options(request, Self::streaming());
        events::processes(self.call("attach to a command", attached).await?, &self.transport, "attach to a command")
            .await
    }

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError> {
        let request = agent::ListRequest::default();
        let answer = self.agent.list_with_options(request, Self::listing());
        let answer = self.call("list commands", answer).await?.into_owned();
        Ok(answer
            .processes
            .into_iter()
            .map(|process| ListedProcess {
                pid: process.pid,
                tag: process.tag,
                argv: process.argv,
                exit: process.exit.as_option().map(events::exit),
                terminal: process.terminal,
            })
            .collect())
    }

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError> {
        let (mut bytes, is_terminal) = match input {
            ProcessInput::Stdin(bytes) => (bytes, false),
            ProcessInput::Terminal(bytes) => (bytes, true),
        };
        loop {
            let piece = bytes.split_to(bytes.len().min(INPUT_PIECE_BYTES));
            let input = if is_terminal { process_input::Input::Pty(piece) } else { process_input::Input::Stdin(piece) };
            let request = process::SendInputRequest {
                process: envd_selector(process).into(),
                input: process::ProcessInput { input: Some(input) }.into(),
            };
            // No timeout: a command reads when it wants to.
            let sent = self.process.send_input_with_options(request, CallOptions::default());
            self.call("send input", sent).await?;
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError> {
        let request = process::CloseStdinRequest { process: envd_selector(process).into() };
        let closed = self.process.close_stdin_with_options(request, Self::slow());
        self.call("close stdin", closed).await.map(drop)
    }

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError> {
        let size = process::pty::Size { cols: size.cols.into(), rows: size.rows.into() };
        let request = process::UpdateRequest {
            process: envd_selector(process).into(),
            pty: process::PTY { size: size.into() }.into(),
        };
        let resized = self.process.update_with_options(request, Self::quick());
        self.call("resize a terminal", resized).await.map(drop)
    }

    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError> {
        let request = agent::SignalRequest { process: own_selector(process).into(), signal };
        let sent = self.agent.signal_with_options(request, Self::quick());
        self.call("send a signal", sent).await.map(drop)
    }

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        let request = filesystem::StatRequest { path: path.to_owned() };
        let answer = self.filesystem.stat_with_options(request, Self::quick());
        let answer = self.call("look at a file", answer).await?.into_owned();
        entry(answer.entry.into_option())
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        let request = filesystem::ListDirRequest { path: path.to_owned(), depth };
        let answer = self.filesystem.list_dir_with_options(request, Self::slow());
        let answer = self.call("list a directory", answer).await?.into_owned();
        answer.entries.into_iter().map(|found| entry(Some(found))).collect()
    }

    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError> {
        if let Some(content) = self.bulk().read(path, range.clone()).await? {
            return Ok(content);
        }
        // None of the wanted bytes exist.
        let entry = self.stat(path).await?;
        let at = range.map_or(0, |range| range.start);
        Ok(FileContent { entry, range: at..at, stream: Box::pin(stream::empty()) })
    }

    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError> {
        self.bulk().write(path, content, options).await
    }

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError> {
        let request = filesystem::MakeDirRequest { path: path.to_owned() };
        let answer = self.filesystem.make_dir_with_options(request, Self::quick());
        let answer = self.call("make a directory", answer).await?.into_owned();
        entry(answer.entry.into_option())
    }

    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError> {
        let request = filesystem::MoveRequest { source: old_path.to_owned(), destination: new_path.to_owned() };
        let moved = self.filesystem.r#move_with_options(request, Self::slow());
        self.call("move a file", moved).await.map(drop)
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError> {
        let request = agent::RemoveRequest { path: path.to_owned(), recursive: options.recursive };
        let removed = self.agent.remove_with_options(request, Self::slow());
        self.call("remove a file", removed).await.map(drop)
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        let request = agent::ChmodRequest { path: path.to_owned(), mode };
        let changed = self.agent.chmod_with_options(request, Self::quick());
        self.call("change permissions", changed).await.map(drop)
    }

    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError> {
        let request = agent::GlobRequest { pattern: pattern.to_owned() };
        let answer = self.agent.glob_with_options(request, Self::slow());
        Ok(self.call("find files", answer).await?.into_owned().paths)
    }

    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError> {
        self.bulk().archive(path).await
    }

    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        self.bulk().extract(path, archive).await
    }

    async fn watch(&self, path: &str, recursive: bool) -> Result<WatchStream, SessionError> {
        let request = filesystem::WatchDirRequest { path: path.to_owned(), recursive, ..Default::default() };
        let watched = self.filesystem.watch_dir_with_options(request, Self::streaming());
        events::changes(self.call("watch a directory", watched).await?, &self.transport).await
    }

    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        self.bulk().dial(target).await
    }

    async fn ports(&self) -> Result<Vec<u16>, SessionError> {
        let answer = self.agent.ports_with_options(agent::PortsRequest::default(), Self::quick());
        let ports = self.call("list ports", answer).await?.into_owned().ports;
        ports.into_iter().map(|port| u16::try_from(port).map_err(|_| malformed("a port"))).collect()
    }

    async fn set_deadline(&self, expires_at: Timestamp) -> Result<(), SessionError> {
        let request = agent::SetDeadlineRequest { expires_at_unix_ms: expires_at.unix_ms() };
        let set = self.agent.set_deadline_with_options(request, Self::quick());
        self.call("set the deadline", set).await.map(drop)
    }

    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError> {
        let lines = u32::try_from(lines).unwrap_or(u32::MAX);
        let request = agent::ConsoleRequest { lines };
        let answer = self.agent.console_with_options(request, Self::listing());
        Ok(self.call("read the console", answer).await?.into_owned().lines)
    }

    async fn ping(&self) -> Result<(), SessionError> {
        let answer = self.agent.ping_with_options(agent::PingRequest::default(), Self::quick());
        self.call("ping", answer).await.map(drop)
    }
}

fn terminal(size: TerminalSize) -> agent::TerminalSize {
    agent::TerminalSize { cols: size.cols.into(), rows: size.rows.into() }
}

fn own_selector(process: &ProcessSelector) -> agent::Selector {
    let selector = match process {
        ProcessSelector::Pid(pid) => selector::Selector::Pid(*pid),
        ProcessSelector::Tag(tag) => selector::Selector::Tag(tag.clone()),
    };
    agent::Selector { selector: Some(selector) }
}

fn envd_selector(process: &ProcessSelector) -> process::ProcessSelector {
    let selector = match process {
        ProcessSelector::Pid(pid) => process_selector::Selector::Pid(*pid),
        ProcessSelector::Tag(tag) => process_selector::Selector::Tag(tag.clone()),
    };
    process::ProcessSelector { selector: Some(selector) }
}

fn entry(entry: Option<filesystem::EntryInfo>) -> Result<FileEntry, SessionError> {
    let entry = entry.ok_or_else(|| malformed("no file entry"))?;
    let modified_at = entry
        .modified_time
        .as_option()
        .map_or(0, |time| time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos / 1_000_000)));
    Ok(FileEntry {
        kind: match entry.r#type.as_known() {
            Some(FileType::FILE_TYPE_FILE) => EntryKind::File,
            Some(FileType::FILE_TYPE_DIRECTORY) => EntryKind::Directory,
            Some(FileType::FILE_TYPE_SYMLINK) => EntryKind::Symlink,
            Some(FileType::FILE_TYPE_UNSPECIFIED) | None => EntryKind::Other,
        },
        name: entry.name,
        path: entry.path,
        size: u64::try_from(entry.size).unwrap_or(0),
        mode: entry.mode & 0o7777,
        owner: entry.owner,
        group: entry.group,
        modified_at: Timestamp::from_unix_ms(modified_at),
        symlink_target: entry.symlink_target,
    })
}

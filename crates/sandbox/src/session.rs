//! What can be done inside a sandbox, whatever it runs on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use stacyvm_api::Timestamp;

use crate::{AgentIo, SessionError};

pub type ProcessStream = Pin<Box<dyn Stream<Item = Result<ProcessEvent, SessionError>> + Send>>;
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SessionError>> + Send>>;
pub type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchChange, SessionError>> + Send>>;

/// One sandbox from the inside. Calls may run at the same time in any number;
/// none of them holds up another.
///
/// Paths are absolute inside the sandbox. A path is bytes on Linux; ours are
/// text, and names that are not UTF-8 are shown with replacement characters.
#[async_trait]
pub trait Session: Send + Sync + 'static {
    /// Starts a command. Dropping the stream leaves it running.
    async fn start(&self, request: StartRequest) -> Result<ProcessStream, SessionError>;

    /// Output of a command from an offset on, then live.
    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError>;

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError>;

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError>;

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError>;

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError>;

    /// Sends any signal to the command's process group.
    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError>;

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError>;

    /// Entries below a directory, without itself, in order of path.
    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError>;

    /// Whole file, or the bytes of `range` that exist.
    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError>;

    /// Replaces a file and makes missing parents; what was there stays until
    /// the last byte has arrived.
    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError>;

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError>;

    /// Renames, making missing parents of the new path.
    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError>;

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError>;

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError>;

    /// Paths that match a pattern with `*`, `?`, `[…]` and `**`, in order.
    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError>;

    /// A tree as an uncompressed tar, names relative to `path`.
    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError>;

    /// Unpacks an uncompressed tar below `path`.
    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError>;

    async fn watch(&self, path: &str, recursive: bool) -> Result<WatchStream, SessionError>;

    /// A byte stream to something that listens inside.
    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError>;

    /// TCP ports that listen inside, in order.
    async fn ports(&self) -> Result<Vec<u16>, SessionError>;

    /// Tells the agent when to end the sandbox if no server does.
    async fn set_deadline(&self, expires_at: Timestamp) -> Result<(), SessionError>;

    /// The last `lines` lines that the sandbox's commands wrote, oldest first.
    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError>;

    /// Answers when the agent does.
    async fn ping(&self) -> Result<(), SessionError>;
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartRequest {
    /// Program and arguments; the program is looked up in the command's PATH.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// `/workspace` unless given; must exist.
    pub workdir: Option<String>,
    /// Name or uid; the sandbox's own user otherwise.
    pub user: Option<String>,
    /// Name to select the process by later.
    pub tag: Option<String>,
    /// All of the command's processes are killed after this long.
    pub deadline: Option<Duration>,
    /// Keep standard input open for `send_input`; it is empty otherwise.
    pub stdin: bool,
    pub terminal: Option<TerminalSize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    pub process: ProcessSelector,
    /// Bytes of output already seen (stdout and stderr counted together).
    pub offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessSelector {
    Pid(u32),
    Tag(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub cols: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessInput {
    Stdin(Bytes),
    Terminal(Bytes),
}

/// What comes out of a command: `Started` first, `Exited` last. A stream that
/// ends without `Exited` ended with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    Started {
        pid: u32,
    },
    Stdout(Bytes),
    Stderr(Bytes),
    Terminal(Bytes),
    /// Output that was written but that the bounded buffer no longer holds.
    Dropped {
        bytes: u64,
    },
    /// Nothing happened for a while and the command still runs.
    Keepalive,
    Exited(Exit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, or `None` when a signal ended the command.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// The agent killed it at its deadline.
    pub timed_out: bool,
}

impl Exit {
    /// The shell's convention: the status, or 128 + signal.
    pub fn shell_code(&self) -> i32 {
        self.code.unwrap_or_else(|| 128 + self.signal.unwrap_or(0))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedProcess {
    pub pid: u32,
    pub tag: Option<String>,
    pub argv: Vec<String>,
    /// `None` while it runs.
    pub exit: Option<Exit>,
    /// Whether its input is that of a terminal.
    pub terminal: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Directory,
    Symlink,
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    pub name: String,
    pub path: String,
    pub kind: EntryKind,
    pub size: u64,
    /// Permission bits only.
    pub mode: u32,
    pub owner: String,
    pub group: String,
    pub modified_at: Timestamp,
    pub symlink_target: Option<String>,
}

pub struct FileContent {
    pub entry: FileEntry,
    /// Which bytes `stream` carries.
    pub range: Range<u64>,
    pub stream: ByteStream,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Permission bits; `0644` unless given.
    pub mode: Option<u32>,
    pub user: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    pub recursive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchChange {
    /// Relative to the watched directory.
    pub name: String,
    pub kind: stacyvm_api::WatchEventKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DialTarget {
    /// A TCP port on the sandbox's loopback.
    Port(u16),
    /// A unix socket, opened as the sandbox's user.
    Unix(String),
}

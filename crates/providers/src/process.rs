//! A command's output and end, as the agent keeps them: a bounded replay
//! buffer in which every byte has an offset. For runtimes without our agent.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::stream;
use stacyvm_sandbox::{Exit, ProcessEvent, ProcessStream, SessionError, TerminalSize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Output kept per command for those who come later.
const REPLAY_BYTES_MAX: usize = 1 << 20;
/// Input that nobody reads yet.
const STDIN_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdout,
    Stderr,
    Terminal,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) argv: Vec<String>,
    pub(crate) terminal: bool,
    /// Ends everything that the command started.
    pub(crate) group: CancellationToken,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    /// Offset of the first byte, and the bytes.
    chunks: VecDeque<(u64, Channel, Bytes)>,
    /// Offsets of the first byte still kept and of the end.
    start: u64,
    end: u64,
    /// Positions of those who read along: a writer waits for them.
    readers: HashMap<u64, u64>,
    next_reader: u64,
    stdin: VecDeque<u8>,
    stdin_open: bool,
    size: Option<TerminalSize>,
    killed: Option<Exit>,
    exit: Option<Exit>,
    gone: bool,
    /// Nobody can tell any more how it goes on.
    failure: Option<SessionError>,
}

/// How the process is to be made.
#[derive(Debug)]
pub(crate) struct NewProcess {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) argv: Vec<String>,
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) stdin_open: bool,
}

impl Process {
    pub(crate) fn new(new: NewProcess) -> Arc<Self> {
        let state = State {
            chunks: VecDeque::new(),
            start: 0,
            end: 0,
            readers: HashMap::new(),
            next_reader: 0,
            stdin: VecDeque::new(),
            stdin_open: new.stdin_open || new.terminal.is_some(),
            size: new.terminal,
            killed: None,
            exit: None,
            gone: false,
            failure: None,
        };
        Arc::new(Self {
            pid: new.pid,
            tag: new.tag,
            argv: new.argv,
            terminal: new.terminal.is_some(),
            group: CancellationToken::new(),
            state: Mutex::new(state),
            changed: watch::Sender::new(()),
        })
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        self.lock().exit
    }

    pub(crate) fn terminal_size(&self) -> Option<TerminalSize> {
        self.lock().size
    }

    pub(crate) fn resize(&self, size: TerminalSize) {
        self.lock().size = Some(size);
    }

    /// Ends the command and everything that it started; the first one wins.
    pub(crate) fn kill(&self, exit: Exit) {
        self.lock().killed.get_or_insert(exit);
        self.group.cancel();
    }

    pub(crate) fn killed(&self) -> Option<Exit> {
        self.lock().killed
    }

    /// Unless the whole sandbox ended: then nobody is left to tell how.
    pub(crate) fn finish(&self, exit: Exit) {
        let mut state = self.lock();
        if !state.gone {
            state.exit.get_or_insert(exit);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// The sandbox ended: who reads hears so.
    pub(crate) fn lose(&self) {
        self.lock().gone = true;
        self.group.cancel();
        self.changed.send_replace(());
    }

    /// The way to the command broke: who reads hears so after the output.
    pub(crate) fn fail(&self, error: SessionError) {
        self.lock().failure.get_or_insert(error);
        self.group.cancel();
        self.changed.send_replace(());
    }

    /// Whether it ended, in whatever way.
    pub(crate) fn is_over(&self) -> bool {
        let state = self.lock();
        state.exit.is_some() || state.gone || state.failure.is_some()
    }

    /// Appends output. Waits while a reader is so far behind that it would lose
    /// bytes; without readers the oldest output goes.
    pub(crate) async fn emit(&self, channel: Channel, bytes: Bytes) {
        let channel = if self.terminal { Channel::Terminal } else { channel };
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            {
                let mut state = self.lock();
                let slowest = state.readers.values().min().copied();
                let fits = slowest.is_none_or(|at| state.end - at + bytes.len() as u64 <= REPLAY_BYTES_MAX as u64);
                if fits || state.gone || state.failure.is_some() {
                    let at = state.end;
                    state.end += bytes.len() as u64;
                    state.chunks.push_back((at, channel, bytes));
                    state.trim();
                    break;
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
        self.changed.send_replace(());
    }

    /// Output that was written and that nobody has.
    pub(crate) fn skip(&self, bytes: u64) {
        let mut state = self.lock();
        state.end = state.end.saturating_add(bytes);
        if state.chunks.is_empty() {
            state.start = state.end;
        }
        drop(state);
        self.changed.send_replace(());
    }

    pub(crate) fn write_stdin(&self, bytes: &[u8]) -> Result<(), SessionError> {
        let mut state = self.lock();
        if state.exit.is_some() || !state.stdin_open {
            return Err(SessionError::InvalidArgument("the command's standard input is closed".to_owned()));
        }
        if state.stdin.len() + bytes.len() > STDIN_BYTES_MAX {
            return Err(SessionError::InvalidArgument("the command does not read its standard input".to_owned()));
        }
        state.stdin.extend(bytes);
        drop(state);
        self.changed.send_replace(());
        Ok(())
    }

    pub(crate) fn close_stdin(&self) {
        self.lock().stdin_open = false;
        self.changed.send_replace(());
    }

    /// Everything that arrived on standard input since the last call, or
    /// `None` at its end.
    pub(crate) async fn read_stdin(&self) -> Option<Vec<u8>> {
        self.take_stdin(|pending| Some(pending.len())).await
    }

    /// One line with its newline; the rest without one at the end.
    pub(crate) async fn read_stdin_line(&self) -> Option<Vec<u8>> {
        self.take_stdin(|pending| pending.iter().position(|byte| *byte == b'\n').map(|at| at + 1)).await
    }

    async fn take_stdin(&self, enough: impl Fn(&VecDeque<u8>) -> Option<usize>) -> Option<Vec<u8>> {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            {
                let mut state = self.lock();
                let count = if state.stdin.is_empty() { None } else { enough(&state.stdin) };
                if let Some(count) = count {
                    return Some(state.stdin.drain(..count).collect());
                }
                if !state.stdin_open {
                    let rest: Vec<u8> = state.stdin.drain(..).collect();
                    return if rest.is_empty() { None } else { Some(rest) };
                }
            }
            changed.changed().await.ok()?;
        }
    }

    /// Events from `offset` on, then live.
    pub(crate) fn stream(self: &Arc<Self>, offset: u64) -> ProcessStream {
        let mut state = self.lock();
        let reader = state.next_reader;
        state.next_reader += 1;
        let at = offset.clamp(state.start, state.end);
        if state.exit.is_none() {
            state.readers.insert(reader, at);
        }
        drop(state);
        let cursor = Cursor {
            process: Arc::clone(self),
            changed: self.changed.subscribe(),
            reader,
            wanted: offset,
            phase: Phase::Start,
        };
        Box::pin(stream::unfold(cursor, |mut cursor| async move {
            let item = cursor.next().await?;
            Some((item, cursor))
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn trim(&mut self) {
        let slowest = self.readers.values().min().copied().unwrap_or(u64::MAX);
        while self.end - self.start > REPLAY_BYTES_MAX as u64 {
            let Some((_, _, oldest)) = self.chunks.front() else { return };
            let length = oldest.len() as u64;
            if self.start + length > slowest {
                return;
            }
            self.start += length;
            self.chunks.pop_front();
        }
    }

    /// The bytes at an offset, to the end of their chunk.
    fn at(&self, offset: u64) -> Option<(Channel, Bytes)> {
        let behind = self.chunks.partition_point(|(start, _, _)| *start <= offset);
        let (start, channel, chunk) = self.chunks.get(behind.checked_sub(1)?)?;
        let skip = (offset - start) as usize;
        (skip < chunk.len()).then(|| (*channel, chunk.slice(skip..)))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Start,
    Running,
    Ended,
}

/// One reader of a command's events.
struct Cursor {
    process: Arc<Process>,
    changed: watch::Receiver<()>,
    reader: u64,
    wanted: u64,
    phase: Phase,
}

impl Cursor {
    async fn next(&mut self) -> Option<Result<ProcessEvent, SessionError>> {
        match self.phase {
            Phase::Ended => return None,
            Phase::Start => {
                self.phase = Phase::Running;
                return Some(Ok(ProcessEvent::Started { pid: self.process.pid }));
            }
            Phase::Running => {}
        }
        loop {
            self.changed.mark_unchanged();
            if let Some(item) = self.ready() {
                self.process.changed.send_replace(());
                return Some(item);
            }
            if self.changed.changed().await.is_err() {
                return None;
            }
        }
    }

    fn ready(&mut self) -> Option<Result<ProcessEvent, SessionError>> {
        let mut state = self.process.lock();
        if self.wanted < state.start {
            let bytes = state.start - self.wanted;
            self.wanted = state.start;
            return Some(Ok(ProcessEvent::Dropped { bytes }));
        }
        if let Some((channel, bytes)) = state.at(self.wanted) {
            self.wanted += bytes.len() as u64;
            let wanted = self.wanted;
            if let Some(at) = state.readers.get_mut(&self.reader) {
                *at = wanted;
            }
            state.trim();
            return Some(Ok(match channel {
                Channel::Stdout => ProcessEvent::Stdout(bytes),
                Channel::Stderr => ProcessEvent::Stderr(bytes),
                Channel::Terminal => ProcessEvent::Terminal(bytes),
            }));
        }
        if self.wanted < state.end {
            let next = state.chunks.iter().map(|(start, _, _)| *start).find(|start| *start > self.wanted);
            let bytes = next.unwrap_or(state.end) - self.wanted;
            self.wanted += bytes;
            return Some(Ok(ProcessEvent::Dropped { bytes }));
        }
        if let Some(exit) = state.exit {
            self.phase = Phase::Ended;
            return Some(Ok(ProcessEvent::Exited(exit)));
        }
        if state.gone {
            self.phase = Phase::Ended;
            return Some(Err(SessionError::Gone));
        }
        if let Some(failure) = &state.failure {
            self.phase = Phase::Ended;
            return Some(Err(retold(failure)));
        }
        None
    }
}

/// The same failure for another reader; causes become text.
fn retold(error: &SessionError) -> SessionError {
    match error {
        SessionError::Gone => SessionError::Gone,
        SessionError::DeadlineExceeded => SessionError::DeadlineExceeded,
        SessionError::PidsExhausted => SessionError::PidsExhausted,
        SessionError::MemoryExhausted => SessionError::MemoryExhausted,
        SessionError::DiskFull => SessionError::DiskFull,
        SessionError::InvalidArgument(text) => SessionError::InvalidArgument(text.clone()),
        SessionError::FileNotFound(path) => SessionError::FileNotFound(path.clone()),
        SessionError::FileConflict(text) => SessionError::FileConflict(text.clone()),
        SessionError::FileForbidden(path) => SessionError::FileForbidden(path.clone()),
        SessionError::ProcessNotFound(process) => SessionError::ProcessNotFound(process.clone()),
        SessionError::CommandNotFound(text) => SessionError::CommandNotFound(text.clone()),
        SessionError::UserNotFound(user) => SessionError::UserNotFound(user.clone()),
        SessionError::Limited(what) => SessionError::Limited(what),
        SessionError::Unsupported(what) => SessionError::Unsupported(what),
        SessionError::PortClosed(port) => SessionError::PortClosed(port.clone()),
        SessionError::Unavailable(cause) => {
            SessionError::Unavailable(cause.as_ref().map(|cause| cause.to_string().into()))
        }
        SessionError::BadAnswer { operation, cause } => {
            SessionError::BadAnswer { operation, cause: cause.to_string().into() }
        }
        SessionError::Failed { operation, cause } => {
            SessionError::Failed { operation, cause: cause.to_string().into() }
        }
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        self.process.lock().readers.remove(&self.reader);
        self.process.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    fn process() -> Arc<Process> {
        Process::new(NewProcess { pid: 1, tag: None, argv: Vec::new(), terminal: None, stdin_open: false })
    }

    #[tokio::test]
    async fn lost_output_is_told_where_it_was() {
        let process = process();
        process.emit(Channel::Stdout, Bytes::from_static(b"ab")).await;
        process.skip(5);
        process.emit(Channel::Stderr, Bytes::from_static(b"cd")).await;
        process.skip(7);
        let exit = Exit { code: Some(0), signal: None, timed_out: false };
        process.finish(exit);
        let events: Vec<_> = process.stream(0).skip(1).map(Result::unwrap).collect().await;
        let expected = [
            ProcessEvent::Stdout(Bytes::from_static(b"ab")),
            ProcessEvent::Dropped { bytes: 5 },
            ProcessEvent::Stderr(Bytes::from_static(b"cd")),
            ProcessEvent::Dropped { bytes: 7 },
            ProcessEvent::Exited(exit),
        ];
        assert_eq!(events, expected);
    }

    #[tokio::test]
    async fn a_failure_comes_after_the_output_and_for_every_reader() {
        let process = process();
        process.emit(Channel::Stdout, Bytes::from_static(b"so far")).await;
        process.fail(SessionError::DiskFull);
        for _ in 0..2 {
            let mut stream = process.stream(0).skip(1);
            assert_eq!(stream.next().await.unwrap().unwrap(), ProcessEvent::Stdout(Bytes::from_static(b"so far")));
            assert!(matches!(stream.next().await, Some(Err(SessionError::DiskFull))));
            assert!(stream.next().await.is_none());
        }
    }
}

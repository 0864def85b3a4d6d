//! One reader of a command's output.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::output::{OutputKind, Read};
use super::{Exit, Process, Taking, lock};

/// What a reader sees; `Exited` is the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Data(OutputKind, Bytes),
    /// Bytes that were written but are no longer held.
    Dropped(u64),
    /// Nothing happened for a while.
    Keepalive,
    Exited(Exit),
}

pub(crate) struct ReaderOptions {
    /// Bytes of output already seen.
    pub offset: u64,
    pub keepalive: Duration,
    /// Longest piece of data given out.
    pub max_chunk: usize,
}

/// Takes a command's output at its own pace. While it exists and keeps taking,
/// the command waits for it once the buffer is full.
pub(crate) struct Reader {
    process: Arc<Process>,
    id: u64,
    offset: u64,
    keepalive: Duration,
    max_chunk: usize,
    finished: bool,
}

impl Reader {
    pub(crate) fn new(process: Arc<Process>, options: &ReaderOptions) -> Self {
        let id = {
            let mut state = lock(&process.state);
            let id = state.next_reader;
            state.next_reader += 1;
            let taking = Taking { offset: options.offset, waits_since: None };
            state.readers.insert(id, taking);
            id
        };
        Self {
            process,
            id,
            offset: options.offset,
            keepalive: options.keepalive,
            max_chunk: options.max_chunk,
            finished: false,
        }
    }

    /// The next event, or `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        if self.finished {
            return None;
        }
        loop {
            let process = Arc::clone(&self.process);
            let changed = process.produced.notified();
            if let Some(event) = self.take() {
                self.finished = matches!(event, Event::Exited(_));
                return Some(event);
            }
            if timeout(self.keepalive, changed).await.is_err() {
                return Some(Event::Keepalive);
            }
        }
    }

    fn take(&mut self) -> Option<Event> {
        let mut state = lock(&self.process.state);
        let (event, seen) = match state.output.read(self.offset, self.max_chunk) {
            Read::Data(kind, bytes) => {
                let seen = bytes.len() as u64;
                (Event::Data(kind, bytes), seen)
            }
            Read::Dropped(count) => (Event::Dropped(count), count),
            Read::Nothing => {
                if let Some(taking) = state.readers.get_mut(&self.id) {
                    taking.waits_since = None;
                }
                return state.exit.map(|(exit, _)| Event::Exited(exit));
            }
        };
        self.offset += seen;
        let taking = Taking { offset: self.offset, waits_since: None };
        state.readers.insert(self.id, taking);
        drop(state);
        self.process.consumed.notify_waiters();
        Some(event)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.process.state).readers.remove(&self.id);
        self.process.consumed.notify_waiters();
    }
}

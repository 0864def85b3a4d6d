//! Reading along with a command until its end.
//!
//! Every command has somebody who reads its stream, so that its end is always
//! recorded: the caller as long as the caller wants, and afterwards a task that
//! throws the output away.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};
use stacyvm_sandbox::{AttachRequest, Exit, ProcessEvent, ProcessSelector, ProcessStream, Session, SessionError};
use tokio::time::Instant;

use super::command::Command;
use super::{ExecEvent, ExecStream, OutputChannel};
use crate::EngineError;
use crate::record::Record;
use crate::shared::Shared;

/// The agent kills at the deadline; it is not believed for longer than this.
const DEADLINE_GRACE: Duration = Duration::from_secs(15);
/// Longest wait for an answer that is not output.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A broken stream is taken up again this often, in vain, before it counts as
/// lost, or whoever reads along hears that the sandbox is away.
const REATTACH_MAX: u32 = 3;
const REATTACH_PAUSE: Duration = Duration::from_millis(200);
/// Between two tries of who has nobody to tell.
const AWAY_PAUSE: Duration = Duration::from_secs(2);
/// What a sandbox said before its end may take this long to arrive.
const LAST_WORDS: Duration = Duration::from_secs(1);
const SIGKILL: i32 = 9;

pub(super) struct Follower {
    shared: Arc<Shared>,
    record: Arc<Record>,
    command: Arc<Command>,
    session: Arc<dyn Session>,
    inner: ProcessStream,
    /// Bytes of output seen.
    offset: u64,
    /// Streams in a row that broke without a word.
    fruitless: u32,
    /// Tries in a row that nobody answered.
    unanswered: u32,
    /// When the command is overdue.
    overdue_at: Option<Instant>,
    phase: Phase,
    /// Reads for nobody; nobody takes over from it.
    draining: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Following,
    /// It ended; that is to be recorded and told.
    Ending(Exit),
    /// Nobody answers, and the caller was told; the command goes on.
    Away,
    Done,
}

/// After the end of a sandbox, when all that it said has had time to arrive.
async fn last_words(record: &Record) {
    record.ended.cancelled().await;
    tokio::time::sleep(LAST_WORDS).await;
}

/// What a reader begins with.
pub(super) struct Follow {
    pub(super) shared: Arc<Shared>,
    pub(super) record: Arc<Record>,
    pub(super) command: Arc<Command>,
    pub(super) session: Arc<dyn Session>,
    pub(super) inner: ProcessStream,
    pub(super) offset: u64,
}

impl Follower {
    pub(super) fn new(follow: Follow) -> Self {
        let Follow { shared, record, command, session, inner, offset } = follow;
        command.followers.fetch_add(1, Ordering::Relaxed);
        let left = |deadline: Duration| deadline.saturating_sub(command.elapsed(shared.now())) + DEADLINE_GRACE;
        let overdue_at = command.deadline.map(|deadline| Instant::now() + left(deadline));
        Self {
            shared,
            record,
            command,
            session,
            inner,
            offset,
            fruitless: 0,
            unanswered: 0,
            overdue_at,
            phase: Phase::Following,
            draining: false,
        }
    }

    pub(super) fn into_stream(self) -> ExecStream {
        ExecStream::new(stream::unfold(self, |mut follower| async move {
            let item = follower.next().await?;
            Some((item, follower))
        }))
    }

    /// Reads to the end for nobody.
    pub(super) fn drain(mut self) -> impl Future<Output = ()> + Send {
        // Marked before the first poll: a runtime that ends drops tasks that
        // never ran, and a drop that spawns again would never come to an end.
        self.draining = true;
        async move { while let Some(_unread) = self.next().await {} }
    }

    async fn next(&mut self) -> Option<Result<ExecEvent, EngineError>> {
        loop {
            match self.phase {
                Phase::Away | Phase::Done => return None,
                Phase::Ending(exit) => {
                    let exit = self.shared.finish_command(&self.record, &self.command, exit).await;
                    self.done();
                    return Some(Ok(ExecEvent::Exited(exit)));
                }
                Phase::Following => {}
            }
            let event = tokio::select! {
                biased;
                event = self.inner.next() => event,
                () = last_words(&self.record) => return Some(Err(self.lose(SessionError::Gone))),
                () = at(self.overdue_at) => match self.kill_overdue().await {
                    Ok(()) => continue,
                    Err(error) => return Some(Err(error)),
                },
            };
            match event {
                Some(Ok(event)) => {
                    if let Some(event) = self.take(event) {
                        return Some(Ok(event));
                    }
                }
                Some(Err(error)) => {
                    if let Err(error) = self.reattach(error).await {
                        return Some(Err(error));
                    }
                }
                None => {
                    if let Err(error) = self.reattach(SessionError::Unavailable(None)).await {
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    fn take(&mut self, event: ProcessEvent) -> Option<ExecEvent> {
        if !matches!(event, ProcessEvent::Started { .. }) {
            self.fruitless = 0;
        }
        let (channel, data) = match event {
            ProcessEvent::Started { .. } => return None,
            ProcessEvent::Stdout(data) => (OutputChannel::Stdout, data),
            ProcessEvent::Stderr(data) => (OutputChannel::Stderr, data),
            ProcessEvent::Terminal(data) => (OutputChannel::Terminal, data),
            ProcessEvent::Dropped { bytes } => {
                self.offset += bytes;
                return Some(ExecEvent::Dropped { bytes, offset: self.offset });
            }
            ProcessEvent::Keepalive => return Some(ExecEvent::Keepalive),
            ProcessEvent::Exited(exit) => {
                self.phase = Phase::Ending(exit);
                return None;
            }
        };
        self.offset += data.len() as u64;
        self.command.keep_output(&data, self.shared.options.exec_log_output_bytes);
        Some(ExecEvent::Output { channel, data, offset: self.offset })
    }

    /// A broken stream says nothing about the command: the agent still has it.
    async fn reattach(&mut self, error: SessionError) -> Result<(), EngineError> {
        let is_away = match &error {
            SessionError::Gone
            | SessionError::ProcessNotFound(_)
            | SessionError::Unsupported(_)
            | SessionError::BadAnswer { .. } => return Err(self.lose(error)),
            SessionError::Unavailable(_) => true,
            _ => false,
        };
        if self.fruitless == REATTACH_MAX || self.record.ended.is_cancelled() {
            return Err(self.lose(error));
        }
        let patient = self.unanswered < REATTACH_MAX;
        match (patient, is_away, self.draining) {
            (true, ..) | (_, true, true) => {}
            (_, true, false) => {
                self.phase = Phase::Away;
                return Err(error.into());
            }
            (_, false, _) => return Err(self.lose(error)),
        }
        tokio::time::sleep(if patient { REATTACH_PAUSE } else { AWAY_PAUSE }).await;
        let process = ProcessSelector::Tag(self.command.exec_id.to_string());
        let attach = self.session.attach(AttachRequest { process, offset: self.offset });
        match tokio::time::timeout(CALL_TIMEOUT, attach).await {
            Ok(Ok(stream)) => {
                (self.fruitless, self.unanswered) = (self.fruitless + 1, 0);
                self.inner = stream;
            }
            Ok(Err(SessionError::ProcessNotFound(_))) => return Err(self.lose(error)),
            // Tried again by the next turn, with an empty stream.
            Ok(Err(_)) | Err(_) => {
                self.unanswered += 1;
                self.inner = Box::pin(stream::empty());
            }
        }
        Ok(())
    }

    /// Nothing is said to have ended that may go on: where the kill is not
    /// confirmed the caller is told so, and whoever reads on tries again.
    async fn kill_overdue(&mut self) -> Result<(), EngineError> {
        tracing::warn!(sandbox = %self.record.id, exec = %self.command.exec_id, "a command outlived its deadline");
        let process = ProcessSelector::Tag(self.command.exec_id.to_string());
        let killed = tokio::time::timeout(CALL_TIMEOUT, self.session.signal(&process, SIGKILL)).await;
        if matches!(killed, Ok(Ok(()) | Err(SessionError::ProcessNotFound(_)))) {
            self.phase = Phase::Ending(Exit { code: None, signal: Some(SIGKILL), timed_out: true });
            return Ok(());
        }
        tracing::warn!(sandbox = %self.record.id, exec = %self.command.exec_id, "and could not be killed");
        self.overdue_at = Some(Instant::now() + AWAY_PAUSE);
        if self.draining {
            return Ok(());
        }
        self.phase = Phase::Away;
        Err(SessionError::Unavailable(None).into())
    }

    fn lose(&mut self, error: SessionError) -> EngineError {
        self.shared.lose_command(&self.record, &self.command);
        self.done();
        let error =
            if self.record.ran_out_of_memory.load(Ordering::Relaxed) { SessionError::MemoryExhausted } else { error };
        error.into()
    }

    fn done(&mut self) {
        self.phase = Phase::Done;
        self.command.followers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Follower {
    /// The last one to leave has somebody else read on.
    fn drop(&mut self) {
        if self.phase == Phase::Done {
            return;
        }
        let others = self.command.followers.fetch_sub(1, Ordering::Relaxed) - 1;
        if others > 0 || self.draining || self.command.end.get().is_some() {
            return;
        }
        let inner = std::mem::replace(&mut self.inner, Box::pin(stream::empty()));
        let mut follower = Self::new(Follow {
            shared: Arc::clone(&self.shared),
            record: Arc::clone(&self.record),
            command: Arc::clone(&self.command),
            session: Arc::clone(&self.session),
            inner,
            offset: self.offset,
        });
        // Where nobody answered, it goes on asking.
        follower.phase = if self.phase == Phase::Away { Phase::Following } else { self.phase };
        if self.shared.stop.is_cancelled() {
            // A crash, or the end of the server: nobody reads on.
            follower.phase = Phase::Done;
            return;
        }
        self.shared.spawn(follower.drain());
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

//! Streams of events from an agent.

use connectrpc::ConnectError;
use connectrpc::client::ServerStream;
use futures_util::stream;
use stacyvm_api::WatchEventKind;
use stacyvm_envd::agent::{self, ProcessEventView, process_event};
use stacyvm_envd::filesystem::{EventType, WatchDirResponse, WatchDirResponseView, watch_dir_response};

use super::error::{from_call, malformed};
use super::transport::{StreamBody, Transport};
use crate::{Exit, ProcessEvent, ProcessStream, SessionError, WatchChange, WatchStream};

type Processes = ServerStream<StreamBody, ProcessEventView<'static>>;
type Changes = ServerStream<StreamBody, WatchDirResponseView<'static>>;

/// The events of a command. The first is awaited here, so that a command that
/// cannot be started is an error of the call, not of its stream.
pub(super) async fn processes(
    events: Processes,
    transport: &Transport,
    operation: &'static str,
) -> Result<ProcessStream, SessionError> {
    let mut events = Events { stream: events, transport: transport.clone(), operation };
    let first = events.next_process().await?;
    if !matches!(first, Some(ProcessEvent::Started { .. })) {
        return Err(malformed("no start event"));
    }
    let state = Some((first, events));
    Ok(Box::pin(stream::unfold(state, move |state| async move {
        let (first, mut events) = state?;
        let event = match first {
            Some(first) => Ok(first),
            None => match events.next_process().await {
                Ok(Some(event)) => Ok(event),
                Ok(None) => Err(malformed("no end event")),
                Err(error) => Err(error),
            },
        };
        let is_last = matches!(event, Ok(ProcessEvent::Exited(_)) | Err(_));
        Some((event, (!is_last).then_some((None, events))))
    })))
}

/// The changes below a directory, once the watch is in place.
pub(super) async fn changes(events: Changes, transport: &Transport) -> Result<WatchStream, SessionError> {
    let mut events = Events { stream: events, transport: transport.clone(), operation: "watch a directory" };
    match events.next_change().await? {
        Some(Change::Started) => {}
        Some(Change::Changed(_) | Change::Nothing) | None => return Err(malformed("no start event")),
    }
    Ok(Box::pin(stream::try_unfold(events, |mut events| async move {
        loop {
            match events.next_change().await? {
                Some(Change::Changed(change)) => return Ok(Some((change, events))),
                Some(Change::Started | Change::Nothing) => {}
                None => return Ok(None),
            }
        }
    })))
}

pub(super) fn exit(exit: &agent::Exit) -> Exit {
    Exit { code: exit.code, signal: exit.signal, timed_out: exit.timed_out }
}

/// A stream, and what its failures need to be understood.
struct Events<S> {
    stream: S,
    transport: Transport,
    operation: &'static str,
}

impl<S> Events<S> {
    async fn judge(&self, error: ConnectError) -> SessionError {
        self.transport.judge(from_call(self.operation, &error)).await
    }
}

impl Events<Processes> {
    async fn next_process(&mut self) -> Result<Option<ProcessEvent>, SessionError> {
        match self.stream.message::<agent::ProcessEvent>().await {
            Ok(Some(message)) => process_event(message.to_owned_message()).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(self.judge(error).await),
        }
    }
}

impl Events<Changes> {
    async fn next_change(&mut self) -> Result<Option<Change>, SessionError> {
        match self.stream.message::<WatchDirResponse>().await {
            Ok(message) => Ok(message.map(|message| change(message.to_owned_message()))),
            Err(error) => Err(self.judge(error).await),
        }
    }
}

fn process_event(event: agent::ProcessEvent) -> Result<ProcessEvent, SessionError> {
    let event = event.event.ok_or_else(|| malformed("an empty event"))?;
    Ok(match event {
        process_event::Event::Started(started) => ProcessEvent::Started { pid: started.pid },
        process_event::Event::Stdout(bytes) => ProcessEvent::Stdout(bytes),
        process_event::Event::Stderr(bytes) => ProcessEvent::Stderr(bytes),
        process_event::Event::Terminal(bytes) => ProcessEvent::Terminal(bytes),
        process_event::Event::Dropped(bytes) => ProcessEvent::Dropped { bytes },
        process_event::Event::Keepalive(_) => ProcessEvent::Keepalive,
        process_event::Event::Exited(ended) => ProcessEvent::Exited(exit(&ended)),
    })
}

enum Change {
    Started,
    Changed(WatchChange),
    Nothing,
}

fn change(response: WatchDirResponse) -> Change {
    match response.event {
        Some(watch_dir_response::Event::Start(_)) => Change::Started,
        Some(watch_dir_response::Event::Keepalive(_)) | None => Change::Nothing,
        Some(watch_dir_response::Event::Filesystem(change)) => {
            let kind = match change.r#type.as_known() {
                Some(EventType::EVENT_TYPE_CREATE) => WatchEventKind::Create,
                Some(EventType::EVENT_TYPE_WRITE) => WatchEventKind::Write,
                Some(EventType::EVENT_TYPE_REMOVE) => WatchEventKind::Remove,
                Some(EventType::EVENT_TYPE_RENAME) => WatchEventKind::Rename,
                Some(EventType::EVENT_TYPE_CHMOD) => WatchEventKind::Chmod,
                Some(EventType::EVENT_TYPE_UNSPECIFIED) | None => return Change::Nothing,
            };
            Change::Changed(WatchChange { name: change.name, kind })
        }
    }
}

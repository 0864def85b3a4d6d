//! Commands over a WebSocket (http-api 8.2): two protocols on one endpoint.
//!
//! ```text
//! first message ──┬─ "type":"start"  ─► start ──┐
//!                 ├─ "type":"attach" ─► attach ─┴─► interactive: both directions ─► exit, close 1000
//!                 ├─ a request without a type ────► one-shot: output only ────────► done, close 1000
//!                 └─ anything else ───────────────► close 1007
//! ```
//!
//! What cannot start is told in a message, then closed with 1011; what is no
//! message closes with 1002, 1007 or 1009. Every close says why. A client that
//! goes away leaves the command running, to be attached to again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code, rejection};
use axum::extract::{FromRequestParts, Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, header};
use serde_json::Value;
use stacyvm_api::{
    ContentEncoding, ErrorCode, ExecId, ExecRequest, SandboxId, TerminalClientMessage, TerminalServerMessage,
};
use stacyvm_engine::{Caller, ExecEvent, ExecStream, RunningExec, StartOptions};
use stacyvm_sandbox::TerminalSize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::{self, error::ProtocolError};
use tokio_util::sync::CancellationToken;

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Sandbox, Who};
use crate::routes::exec::{input_bytes, terminal_size};
use crate::routes::socket_form::{Interactive, OneShot, OutputForm, error_message};

/// Largest message from a client. Input beyond it is sent in several.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// A client that connects has this long to say what it wants.
const FIRST_MESSAGE_DEADLINE: Duration = Duration::from_secs(30);

/// How often the server asks whether the client is still there, and how many
/// times it asks in vain.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const MAX_UNANSWERED_PINGS: u32 = 3;

/// Answers to a client's messages that wait for their turn.
const REPLY_QUEUE: usize = 16;

/// Longest wait for a client to take the last messages and to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// Size of a terminal of which only one side was given.
const DEFAULT_TERMINAL: TerminalSize = TerminalSize { cols: 80, rows: 24 };

/// Why a connection is closed, as its close frame says (RFC 6455 7.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Close {
    code: u16,
    reason: &'static str,
}

impl Close {
    const ENDED: Self = Self { code: close_code::NORMAL, reason: "the command has ended" };
    const LOST: Self = Self { code: close_code::ERROR, reason: "the command was lost from sight" };
    const AWAY: Self =
        Self { code: close_code::AWAY, reason: "the server stops, or the key has ended; the command goes on" };

    /// What a client did wrong; `None` when it is the connection that broke,
    /// and nobody is there to be told.
    fn for_error(error: &axum::Error) -> Option<Self> {
        let cause = std::error::Error::source(error)?;
        match cause.downcast_ref::<tungstenite::Error>()? {
            tungstenite::Error::Capacity(_) => {
                Some(Self { code: close_code::SIZE, reason: "a message is longer than 1 MiB; send it in several" })
            }
            tungstenite::Error::Utf8(_) => Some(Self { code: close_code::INVALID, reason: "a text is not UTF-8" }),
            tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
            tungstenite::Error::Protocol(_) => {
                Some(Self { code: close_code::PROTOCOL, reason: "that is not the WebSocket protocol" })
            }
            _ => None,
        }
    }
}

type Sender = SplitSink<WebSocket, Message>;
type Receiver = SplitStream<WebSocket>;

/// The upgrade, or a refusal in the common envelope.
pub(super) async fn open(
    State(app): State<App>,
    From(caller): From,
    Who(identity): Who,
    Sandbox(id): Sandbox,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (mut parts, _body) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &app).await.map_err(refuse_handshake)?;
    // Unknown sandboxes are told before the upgrade, where status codes exist.
    app.engine.get(&caller, &id)?;
    let ticket = app.sockets.token();
    let upgrade = upgrade.max_message_size(MAX_MESSAGE_BYTES).max_frame_size(MAX_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let _ticket = ticket;
        let closing = app.closing.child_token();
        let conversation = Conversation { app, caller, id, closing: closing.clone() }.hold(socket);
        tokio::pin!(conversation);
        tokio::select! {
            () = &mut conversation => {}
            () = identity.ended() => {
                closing.cancel();
                conversation.await;
            }
        }
    }))
}

fn refuse_handshake(rejection: rejection::WebSocketUpgradeRejection) -> ApiError {
    use rejection::WebSocketUpgradeRejection as Rejection;
    match rejection {
        Rejection::InvalidUpgradeHeader(_) | Rejection::InvalidConnectionHeader(_) => {
            ApiError::new(ErrorCode::UpgradeRequired, "this route speaks WebSocket")
                .header(header::UPGRADE, HeaderValue::from_static("websocket"))
        }
        other => ApiError::bad_request(format!("not a WebSocket handshake: {}", other.body_text())),
    }
}

/// What a first message asks for.
#[derive(Debug, PartialEq)]
enum First {
    Start { request: Box<ExecRequest>, cols: Option<u16>, rows: Option<u16> },
    Attach { exec_id: ExecId, offset: u64, encoding: Option<ContentEncoding> },
    OneShot(Box<ExecRequest>),
}

/// Why a conversation cannot begin.
#[derive(Debug, PartialEq)]
enum Refusal {
    /// The first message makes no sense.
    Malformed(String),
    /// What came is no message of the protocol, or too long a one.
    Broken(Close),
    /// The client left, or said nothing.
    Silent,
}

struct Conversation {
    app: App,
    caller: Caller,
    id: SandboxId,
    /// The server shuts down, or the caller's key ended.
    closing: CancellationToken,
}

impl Conversation {
    async fn hold(self, mut socket: WebSocket) {
        let first = tokio::select! {
            first = tokio::time::timeout(FIRST_MESSAGE_DEADLINE, first_message(&mut socket)) => first,
            () = self.closing.cancelled() => return close(socket, Close::AWAY.code, Close::AWAY.reason).await,
        };
        match first {
            Ok(Ok(First::OneShot(request))) => self.one_shot(socket, *request).await,
            Ok(Ok(First::Start { request, cols, rows })) => self.start(socket, *request, cols, rows).await,
            Ok(Ok(First::Attach { exec_id, offset, encoding })) => {
                let attached = self.app.engine.attach_exec(&self.caller, &self.id, &exec_id, offset).await;
                self.interact(socket, attached.map_err(ApiError::from), is_base64(encoding)).await;
            }
            Ok(Err(Refusal::Malformed(why))) => close(socket, close_code::INVALID, &why).await,
            Ok(Err(Refusal::Broken(Close { code, reason }))) => close(socket, code, reason).await,
            Ok(Err(Refusal::Silent)) => answer_close(&mut socket).await,
            Err(_) => close(socket, close_code::POLICY, "no message came").await,
        }
    }

    /// The form of the reference: one request, its output, `done`.
    async fn one_shot(self, mut socket: WebSocket, request: ExecRequest) {
        let form = OneShot::new(&self.id, is_base64(request.encoding));
        match self.app.engine.start_exec(&self.caller, &self.id, request, StartOptions::default()).await {
            Ok(running) => self.converse(socket, running, form).await,
            Err(error) => {
                let failure = serde_json::json!({ "error": error.to_string() });
                socket.send(Message::text(failure.to_string())).await.ok();
                close(socket, close_code::ERROR, "the command could not be started").await;
            }
        }
    }

    async fn start(self, socket: WebSocket, request: ExecRequest, cols: Option<u16>, rows: Option<u16>) {
        let base64 = is_base64(request.encoding);
        let started = self.start_with_input(request, cols, rows).await;
        self.interact(socket, started, base64).await;
    }

    async fn start_with_input(
        &self,
        request: ExecRequest,
        cols: Option<u16>,
        rows: Option<u16>,
    ) -> Result<RunningExec, ApiError> {
        let terminal = match (cols, rows) {
            (None, None) => None,
            (cols, rows) => {
                let (cols, rows) = (cols.unwrap_or(DEFAULT_TERMINAL.cols), rows.unwrap_or(DEFAULT_TERMINAL.rows));
                Some(terminal_size(cols, rows)?)
            }
        };
        // A runtime without input runs what says that it wants none.
        let keep_stdin_open = terminal.is_some() || request.keep_stdin_open != Some(false);
        let options = StartOptions { terminal, keep_stdin_open };
        Ok(self.app.engine.start_exec(&self.caller, &self.id, request, options).await?)
    }

    async fn interact(self, mut socket: WebSocket, running: Result<RunningExec, ApiError>, base64: bool) {
        match running {
            Ok(running) => self.converse(socket, running, Interactive::new(base64)).await,
            Err(failure) => {
                socket.send(encode(&error_message(&failure))).await.ok();
                close(socket, close_code::ERROR, "the command could not be started").await;
            }
        }
    }

    /// Both directions at once, so that a client that does not read can still
    /// send a signal. Ends when the output is over or the client is gone.
    async fn converse<F: OutputForm>(&self, socket: WebSocket, running: RunningExec, mut form: F) {
        let (sender, receiver) = socket.split();
        let (replies, inbox) = mpsc::channel(REPLY_QUEUE);
        let heard = Arc::new(AtomicBool::new(true));
        let (broke, breaks) = oneshot::channel();
        let opening = form.opening(&running);
        let input = Input {
            conversation: self,
            interactive: F::INTERACTIVE,
            exec_id: running.exec_id,
            replies,
            broke,
            heard: heard.clone(),
        };
        let output = Output {
            form,
            events: running.stream,
            sender,
            inbox,
            breaks,
            heard,
            unanswered_pings: 0,
            closing: self.closing.clone(),
        };
        let output = output.send(opening);
        let input = input.read(receiver);
        tokio::pin!(input, output);
        tokio::select! {
            () = &mut output => {
                // The client answers our close with its own; hanging up before
                // could make the last messages disappear on the way.
                tokio::time::timeout(CLOSE_DEADLINE, input).await.ok();
            }
            left = &mut input => match left {
                Left::Closed => {}
                // The output knows why, and tells it.
                Left::Broke => output.await,
            }
        }
    }
}

/// How a client ceases to be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// It closed the connection, or the connection is gone.
    Closed,
    /// It sent what cannot be read; what follows cannot either.
    Broke,
}

async fn first_message(socket: &mut WebSocket) -> Result<First, Refusal> {
    while let Some(message) = socket.recv().await {
        match message {
            Ok(Message::Text(text)) => return parse_first(&text),
            Ok(Message::Binary(_)) => return Err(Refusal::Malformed("the first message must be text".to_owned())),
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(Message::Close(_)) => return Err(Refusal::Silent),
            Err(error) => return Err(Close::for_error(&error).map_or(Refusal::Silent, Refusal::Broken)),
        }
    }
    Err(Refusal::Silent)
}

fn parse_first(text: &str) -> Result<First, Refusal> {
    let malformed = |error: serde_json::Error| Refusal::Malformed(error.to_string());
    let value: Value = serde_json::from_str(text).map_err(malformed)?;
    // serde would take a list for the fields of a request in order.
    if !value.is_object() {
        return Err(Refusal::Malformed("the first message must be a JSON object".to_owned()));
    }
    let Some(kind) = value.get("type").and_then(Value::as_str) else {
        let request = serde_json::from_value(value).map_err(malformed)?;
        return Ok(First::OneShot(Box::new(request)));
    };
    if !matches!(kind, "start" | "attach") {
        return Err(Refusal::Malformed("begin with `start` or `attach`".to_owned()));
    }
    match serde_json::from_value(value).map_err(malformed)? {
        TerminalClientMessage::Start { request, cols, rows } => {
            Ok(First::Start { request: Box::new(request), cols, rows })
        }
        TerminalClientMessage::Attach { exec_id, offset, encoding } => Ok(First::Attach { exec_id, offset, encoding }),
        TerminalClientMessage::Stdin { .. }
        | TerminalClientMessage::CloseStdin
        | TerminalClientMessage::Resize { .. }
        | TerminalClientMessage::Signal { .. }
        | TerminalClientMessage::Ping => Err(Refusal::Malformed("begin with `start` or `attach`".to_owned())),
    }
}

/// From the client to the command.
struct Input<'a> {
    conversation: &'a Conversation,
    /// Without it, what the client says has no meaning, but reading still
    /// answers its pings and notices that it left.
    interactive: bool,
    exec_id: ExecId,
    replies: mpsc::Sender<TerminalServerMessage>,
    broke: oneshot::Sender<Close>,
    heard: Arc<AtomicBool>,
}

impl Input<'_> {
    async fn read(self, mut receiver: Receiver) -> Left {
        while let Some(message) = receiver.next().await {
            let message = match message {
                Ok(message) => message,
                Err(error) => {
                    let told = Close::for_error(&error).map(|close| self.broke.send(close));
                    return if let Some(Ok(())) = told { Left::Broke } else { Left::Closed };
                }
            };
            self.heard.store(true, Ordering::Relaxed);
            let done = match message {
                // Reading on sends the answer to a close, which is then the end.
                Message::Close(_) | Message::Ping(_) | Message::Pong(_) => Ok(()),
                Message::Text(_) | Message::Binary(_) if !self.interactive => Ok(()),
                Message::Binary(data) => self.write(data).await,
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(message) => self.act(message).await,
                    Err(error) => Err(ApiError::bad_request(format!("a message cannot be read: {error}"))),
                },
            };
            match done {
                // It ended while this was on its way, which no client can
                // avoid; the output tells it of the end.
                Err(failure) if failure.code() == ErrorCode::NotFound => {}
                Err(failure) => drop(self.replies.send(error_message(&failure)).await),
                Ok(()) => {}
            }
        }
        Left::Closed
    }

    async fn act(&self, message: TerminalClientMessage) -> Result<(), ApiError> {
        let Conversation { app, caller, id, .. } = self.conversation;
        match message {
            TerminalClientMessage::Stdin { data, data_b64 } => {
                self.write(input_bytes(data, data_b64.as_deref())?).await?;
            }
            TerminalClientMessage::CloseStdin => app.engine.close_stdin(caller, id, &self.exec_id).await?,
            TerminalClientMessage::Resize { cols, rows } => {
                app.engine.resize(caller, id, &self.exec_id, terminal_size(cols, rows)?).await?;
            }
            TerminalClientMessage::Signal { signal } => app.engine.signal(caller, id, &self.exec_id, &signal).await?,
            TerminalClientMessage::Ping => {
                self.replies.send(TerminalServerMessage::Pong).await.ok();
            }
            TerminalClientMessage::Start { .. } | TerminalClientMessage::Attach { .. } => {
                return Err(ApiError::bad_request("a command runs on this connection already"));
            }
        }
        Ok(())
    }

    async fn write(&self, data: Bytes) -> Result<(), ApiError> {
        let Conversation { app, caller, id, .. } = self.conversation;
        Ok(app.engine.send_input(caller, id, &self.exec_id, data).await?)
    }
}

/// From the command to the client.
struct Output<F> {
    form: F,
    events: ExecStream,
    sender: Sender,
    inbox: mpsc::Receiver<TerminalServerMessage>,
    breaks: oneshot::Receiver<Close>,
    /// Set by the input whenever the client says anything.
    heard: Arc<AtomicBool>,
    unanswered_pings: u32,
    closing: CancellationToken,
}

impl<F: OutputForm> Output<F> {
    async fn send(mut self, opening: Vec<String>) {
        if self.send_all(opening).await.is_err() {
            return;
        }
        let mut next_ping = Instant::now() + PING_INTERVAL;
        loop {
            let messages = tokio::select! {
                event = self.events.next() => match event {
                    Some(Ok(ExecEvent::Exited(exit))) => {
                        let last = self.form.exited(&exit);
                        return self.finish(last, Close::ENDED).await;
                    }
                    Some(Ok(event)) => self.form.event(event),
                    Some(Err(error)) => {
                        let last = self.form.failed(&error);
                        return self.finish(last, Close { code: F::FAILED_CODE, ..Close::LOST }).await;
                    }
                    None => return self.finish(Vec::new(), Close::LOST).await,
                },
                Some(reply) = self.inbox.recv() => vec![text_of(&reply)],
                Ok(close) = &mut self.breaks => {
                    return self.finish(Vec::new(), close).await;
                }
                () = self.closing.cancelled() => return self.finish(Vec::new(), Close::AWAY).await,
                () = tokio::time::sleep_until(next_ping) => {
                    next_ping = Instant::now() + PING_INTERVAL;
                    if self.ping().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            if self.send_all(messages).await.is_err() {
                return;
            }
        }
    }

    async fn send_all(&mut self, messages: Vec<String>) -> Result<(), axum::Error> {
        for message in messages {
            self.sender.send(Message::text(message)).await?;
        }
        Ok(())
    }

    /// Fails once the client has been silent for too long. A client that does
    /// not read holds this up, and is waited for.
    async fn ping(&mut self) -> Result<(), axum::Error> {
        if self.heard.swap(false, Ordering::Relaxed) {
            self.unanswered_pings = 0;
        }
        if self.unanswered_pings >= MAX_UNANSWERED_PINGS {
            return Err(axum::Error::new(std::io::Error::from(std::io::ErrorKind::TimedOut)));
        }
        self.unanswered_pings += 1;
        self.sender.send(Message::Ping(Bytes::new())).await
    }

    /// The last messages and the close; a client that does not take them is
    /// left.
    async fn finish(mut self, last: Vec<String>, close: Close) {
        let Close { code, reason } = close;
        let farewell = async {
            self.send_all(last).await?;
            self.sender.send(Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::from_static(reason) }))).await
        };
        tokio::time::timeout(CLOSE_DEADLINE, farewell).await.ok();
    }
}

fn is_base64(encoding: Option<ContentEncoding>) -> bool {
    encoding == Some(ContentEncoding::Base64)
}

fn text_of(message: &TerminalServerMessage) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

fn encode(message: &TerminalServerMessage) -> Message {
    Message::text(text_of(message))
}

/// Lets the answer to a client's close go out.
async fn answer_close(socket: &mut WebSocket) {
    let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
    tokio::time::timeout(CLOSE_DEADLINE, answered).await.ok();
}

/// Closes before a command runs. A close frame holds at most 123 bytes of
/// reason (RFC 6455 5.5).
async fn close(mut socket: WebSocket, code: u16, reason: &str) {
    let reason: String = reason.chars().filter(char::is_ascii).take(120).collect();
    let farewell = async {
        socket.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await.ok();
        while let Some(Ok(_)) = socket.recv().await {}
    };
    tokio::time::timeout(CLOSE_DEADLINE, farewell).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_message_decides_which_protocol_is_spoken() {
        let Ok(First::OneShot(request)) = parse_first(r#"{"command":"ls","stream":true}"#) else { panic!("one-shot") };
        assert_eq!(request.command, "ls");
        let first = parse_first(r#"{"type":"start","command":"sh","cols":90,"rows":30,"timeout":"5s"}"#);
        let Ok(First::Start { request, cols, rows }) = first else { panic!("start") };
        assert_eq!((request.command.as_str(), cols, rows), ("sh", Some(90), Some(30)));
        let first = parse_first(r#"{"type":"attach","exec_id":"ex-9d2k7m1x0c4v8b3n5q6w","offset":7}"#);
        assert!(matches!(first, Ok(First::Attach { offset: 7, .. })));
    }

    #[test]
    fn first_messages_that_make_no_sense_are_refused() {
        for text in [
            "",
            "no",
            "[]",
            "7",
            r#"{"type":"stdin","data":"x"}"#,
            r#"{"type":"dance"}"#,
            r#"{"type":"start","command":7}"#,
            r#"{"type":"attach"}"#,
            r#"{"command":"x","timeout":"soon"}"#,
        ] {
            assert!(matches!(parse_first(text), Err(Refusal::Malformed(_))), "{text}");
        }
    }
}

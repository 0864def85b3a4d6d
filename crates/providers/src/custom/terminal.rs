//! Commands with input, over a WebSocket of [`Feature::Terminal`]: the first
//! message is the command, then binary messages are input and text messages are
//! controls. What comes back is what lines of a stream are, or binary: a byte
//! for the channel (1, 2) and the output.
//!
//! [`Feature::Terminal`]: stacyvm_api::backend::Feature::Terminal

use bytes::{Buf as _, Bytes};
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use stacyvm_api::backend::{ExecRequest, StreamLine, TerminalControl};
use stacyvm_sandbox::{ProcessStream, SessionError, StartRequest};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::error::CallError;
use super::exec::{patience, start_failure};
use super::session::BackendSession;
use crate::process::{Channel, Process};

/// One message of the backend, at most.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Messages of ours that wait for the backend to read.
const INPUT_MESSAGES_MAX: usize = 64;

type Socket = WebSocketStream<reqwest::Upgraded>;

/// Something for a command.
#[derive(Debug)]
pub(super) enum Input {
    Bytes(Bytes),
    Control(TerminalControl),
}

impl BackendSession {
    pub(super) async fn open_terminal(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        let first = ExecRequest {
            stdin: request.stdin,
            terminal: request.terminal.map(|size| (size.cols, size.rows)),
            ..self.exec_request(&request)?
        };
        let failed = |error| start_failure(error, &request);
        let mut socket = self.connect_terminal().await.map_err(failed)?;
        self.begin(&mut socket, &first).await.map_err(failed)?;
        let (sender, receiver) = mpsc::channel(INPUT_MESSAGES_MAX);
        let process = self.inside.add(&request, Some(sender));
        let stream = process.stream(0);
        let (session, limit) = (self.clone(), patience(request.deadline));
        tokio::spawn(async move {
            let run = session.converse(socket, receiver, &process);
            session.settle(&process, limit, run).await;
        });
        Ok(stream)
    }

    async fn connect_terminal(&self) -> Result<Socket, CallError> {
        let key = generate_key();
        let request = self
            .http
            .get(&["sandboxes", &self.backend_id, "terminal"], &[])
            .header(CONNECTION, HeaderValue::from_static("Upgrade"))
            .header(UPGRADE, HeaderValue::from_static("websocket"))
            .header(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"))
            .header(SEC_WEBSOCKET_KEY, key.as_str());
        let (stream, headers) = self.http.upgrade(request).await?;
        if headers.get(SEC_WEBSOCKET_ACCEPT).is_none_or(|it| *it != derive_accept_key(key.as_bytes())) {
            return Err(CallError::Garbage("it is no WebSocket"));
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        Ok(WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await)
    }

    /// Orders the command and waits until it started.
    async fn begin(&self, socket: &mut Socket, first: &ExecRequest) -> Result<(), CallError> {
        let limit = self.http.limit();
        let begun = async {
            socket.send(control(first)?).await.map_err(lost)?;
            while let Some(message) = socket.next().await {
                let Message::Text(text) = message.map_err(lost)? else { continue };
                let line = parse(text.as_bytes())?;
                return match line.stream.as_str() {
                    "started" => Ok(()),
                    "error" => Err(self.told(line)),
                    _ => Err(CallError::Garbage("a terminal does not begin with `started`")),
                };
            }
            Err(CallError::Broken(None))
        };
        tokio::time::timeout(limit, begun).await.map_err(|_| CallError::TimedOut(limit))?
    }

    async fn converse(
        &self,
        socket: Socket,
        mut input: mpsc::Receiver<Input>,
        process: &Process,
    ) -> Result<(), CallError> {
        let (mut sink, mut stream) = socket.split();
        let send = async {
            while let Some(input) = input.recv().await {
                let message = match input {
                    Input::Bytes(bytes) => Message::Binary(bytes),
                    Input::Control(said) => control(&said)?,
                };
                sink.send(message).await.map_err(lost)?;
            }
            std::future::pending().await
        };
        let receive = async {
            while let Some(message) = stream.next().await {
                let last = match message.map_err(lost)? {
                    Message::Binary(mut bytes) => {
                        let channel = if bytes.first() == Some(&2) { Channel::Stderr } else { Channel::Stdout };
                        bytes.advance(bytes.len().min(1));
                        self.inside.emit(process, channel, bytes).await;
                        false
                    }
                    Message::Text(text) => self.take(process, parse(text.as_bytes())?).await?,
                    Message::Close(_) => break,
                    Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => false,
                };
                if last {
                    return Ok(());
                }
            }
            Err(CallError::Broken(None))
        };
        tokio::select! {
            ended = send => ended,
            ended = receive => ended,
        }
    }
}

fn control<T: serde::Serialize>(said: &T) -> Result<Message, CallError> {
    let text = serde_json::to_string(said).map_err(|_| CallError::Garbage("a message cannot be written"))?;
    Ok(Message::text(text))
}

fn parse(text: &[u8]) -> Result<StreamLine, CallError> {
    serde_json::from_slice(text).map_err(|_| CallError::Garbage("a terminal says what is none of its messages"))
}

fn lost(error: tokio_tungstenite::tungstenite::Error) -> CallError {
    CallError::Broken(Some(std::io::Error::other(error)))
}

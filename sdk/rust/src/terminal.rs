//! Interactive commands over a WebSocket: input, output, resize, signals, and
//! going on with a command that was started before.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use reqwest::StatusCode;
use reqwest::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use stacyvm_api::{ContentEncoding, ExecId, ExecRequest, TerminalClientMessage, TerminalServerMessage};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::client::transport;
use crate::exec::exact_bytes;
use crate::{ApiError, Channel, ClientError, ExecEvent, Exit, SandboxClient};

/// Largest message accepted: the server's own are below 1 MiB.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Input sent in one message.
const INPUT_CHUNK_BYTES: usize = 64 * 1024;

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub cols: u16,
    pub rows: u16,
}

type Socket = WebSocketStream<reqwest::Upgraded>;

/// A running command with its input open. Dropping it leaves the command
/// running; [`SandboxClient::attach`] goes on with it.
#[derive(Debug)]
pub struct Terminal {
    pub input: TerminalInput,
    pub output: TerminalOutput,
}

/// The writing half of a [`Terminal`].
#[derive(Debug)]
pub struct TerminalInput {
    server: String,
    sink: SplitSink<Socket, Message>,
}

/// The reading half of a [`Terminal`].
#[derive(Debug)]
pub struct TerminalOutput {
    server: String,
    stream: SplitStream<Socket>,
}

impl SandboxClient {
    /// Starts a command with its input open: on a terminal of `size`, or on
    /// plain pipes without one.
    pub async fn terminal(&self, request: &ExecRequest, size: Option<TerminalSize>) -> Result<Terminal, ClientError> {
        let request = ExecRequest { encoding: Some(ContentEncoding::Base64), ..request.clone() };
        let (cols, rows) = (size.map(|size| size.cols), size.map(|size| size.rows));
        self.open_terminal(TerminalClientMessage::Start { request, cols, rows }).await
    }

    /// Goes on with a command, with its output from `offset`.
    pub async fn attach(&self, exec_id: ExecId, offset: u64) -> Result<Terminal, ClientError> {
        let encoding = Some(ContentEncoding::Base64);
        self.open_terminal(TerminalClientMessage::Attach { exec_id, offset, encoding }).await
    }

    async fn open_terminal(&self, first: TerminalClientMessage) -> Result<Terminal, ClientError> {
        let socket = self.upgrade(&["sandboxes", self.id.as_str(), "exec", "ws"]).await?;
        let server = self.client.server().to_owned();
        let (sink, stream) = socket.split();
        let mut terminal = Terminal {
            input: TerminalInput { server: server.clone(), sink },
            output: TerminalOutput { server, stream },
        };
        terminal.input.send(&first).await?;
        Ok(terminal)
    }

    async fn upgrade(&self, path: &[&str]) -> Result<Socket, ClientError> {
        let key = generate_key();
        let request = self
            .client
            .upgrade_request(path)?
            .header(CONNECTION, HeaderValue::from_static("Upgrade"))
            .header(UPGRADE, HeaderValue::from_static("websocket"))
            .header(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"))
            .header(SEC_WEBSOCKET_KEY, key.as_str());
        let response = self.client.send(request).await?;
        let accepted =
            response.headers().get(SEC_WEBSOCKET_ACCEPT).is_some_and(|it| *it == derive_accept_key(key.as_bytes()));
        if response.status() != StatusCode::SWITCHING_PROTOCOLS || !accepted {
            return Err(ClientError::Protocol("the server did not open a WebSocket".to_owned()));
        }
        let stream = response.upgrade().await.map_err(|error| self.client.broken(error))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        Ok(WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await)
    }
}

impl TerminalInput {
    /// Writes to the command's standard input.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), ClientError> {
        for chunk in data.chunks(INPUT_CHUNK_BYTES) {
            let message = Message::binary(Bytes::copy_from_slice(chunk));
            self.sink.send(message).await.map_err(|error| transport(&self.server, error))?;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    pub async fn close(&mut self) -> Result<(), ClientError> {
        self.send(&TerminalClientMessage::CloseStdin).await
    }

    pub async fn resize(&mut self, size: TerminalSize) -> Result<(), ClientError> {
        self.send(&TerminalClientMessage::Resize { cols: size.cols, rows: size.rows }).await
    }

    /// Sends a signal, by name (`TERM`) or number.
    pub async fn signal(&mut self, signal: &str) -> Result<(), ClientError> {
        self.send(&TerminalClientMessage::Signal { signal: signal.to_owned() }).await
    }

    /// Asks for a sign of life, which also keeps idle connections open.
    pub async fn ping(&mut self) -> Result<(), ClientError> {
        self.send(&TerminalClientMessage::Ping).await
    }

    async fn send(&mut self, message: &TerminalClientMessage) -> Result<(), ClientError> {
        let text = serde_json::to_string(message).map_err(|error| ClientError::Protocol(error.to_string()))?;
        self.sink.send(Message::text(text)).await.map_err(|error| transport(&self.server, error))
    }
}

impl TerminalOutput {
    /// The next event; `None` once the server has closed the connection. A
    /// connection that ends without an [`ExecEvent::Exit`] was cut off.
    ///
    /// An [`ClientError::Api`] after [`ExecEvent::Started`] is the server's
    /// answer to something sent as input; the command and its output go on.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, ClientError> {
        while let Some(message) = self.stream.next().await {
            let text = match message.map_err(|error| transport(&self.server, error))? {
                Message::Text(text) => text,
                Message::Close(_) => return Ok(None),
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            let message: TerminalServerMessage =
                serde_json::from_str(&text).map_err(|error| ClientError::Protocol(format!("a message: {error}")))?;
            if let Some(event) = event_of(message)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}

fn event_of(message: TerminalServerMessage) -> Result<Option<ExecEvent>, ClientError> {
    let output = |channel, data, data_b64, offset| {
        exact_bytes(data, data_b64).map(|data| Some(ExecEvent::Output { channel, data, offset: Some(offset) }))
    };
    match message {
        TerminalServerMessage::Started { exec_id, pid } => Ok(Some(ExecEvent::Started { exec_id, pid })),
        TerminalServerMessage::Stdout { data, data_b64, offset } => output(Channel::Stdout, data, data_b64, offset),
        TerminalServerMessage::Stderr { data, data_b64, offset } => output(Channel::Stderr, data, data_b64, offset),
        TerminalServerMessage::Dropped { bytes } => Ok(Some(ExecEvent::Dropped { bytes })),
        TerminalServerMessage::Exit { exit_code, duration, error } => {
            Ok(Some(ExecEvent::Exit(Exit { code: exit_code, duration: Some(duration), error })))
        }
        TerminalServerMessage::Error { code, message, hint } => Err(ClientError::Api(ApiError {
            status: StatusCode::SWITCHING_PROTOCOLS.as_u16(),
            code: Some(code),
            code_text: code.to_string(),
            message,
            hint,
            request_id: None,
        })),
        TerminalServerMessage::Pong => Ok(None),
    }
}

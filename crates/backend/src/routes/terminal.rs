//! Commands with input, over a WebSocket.

use std::sync::Arc;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream::SplitSink;
use futures_util::{SinkExt as _, StreamExt as _};
use stacyvm_api::backend::{ExecRequest, StreamLine, TerminalControl};
use stacyvm_sandbox::{ProcessEvent, ProcessInput, ProcessStream, Session, SessionError, TerminalSize};

use super::exec::{Running, Writer, start_request};
use crate::error::{Answer, Refusal};
use crate::state::App;

/// One message of the client, at most.
const MESSAGE_BYTES_MAX: usize = 2 << 20;

pub(super) async fn open(
    State(app): State<App>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let session = app.session(&id).await?;
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(|socket| async move {
        // Whoever hung up needs no answer.
        let _ = converse(socket, session).await;
    }))
}

async fn converse(mut socket: WebSocket, session: Arc<dyn Session>) -> Result<(), axum::Error> {
    let (running, events, on_terminal) = match begin(&mut socket, &session).await {
        Ok(Some(begun)) => begun,
        Ok(None) => return Ok(()),
        Err(refusal) => {
            return socket.send(text(&refusal.line())).await;
        }
    };
    socket.send(text(&StreamLine { stream: "started".to_owned(), ..StreamLine::default() })).await?;
    let (mut sink, mut stream) = socket.split();
    let process = running.process.clone();
    let receive = async {
        while let Some(Ok(message)) = stream.next().await {
            let told = match message {
                Message::Binary(bytes) if on_terminal => {
                    session.send_input(&process, ProcessInput::Terminal(bytes)).await
                }
                Message::Binary(bytes) => session.send_input(&process, ProcessInput::Stdin(bytes)).await,
                Message::Text(said) => match serde_json::from_str::<TerminalControl>(&said) {
                    Ok(TerminalControl::CloseStdin) => session.close_stdin(&process).await,
                    Ok(TerminalControl::Resize { cols, rows }) => {
                        session.resize(&process, TerminalSize { cols, rows }).await
                    }
                    Ok(TerminalControl::Signal { signal }) => session.signal(&process, signal).await,
                    Err(_) => Ok(()),
                },
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => Ok(()),
            };
            if matches!(told, Err(SessionError::Gone)) {
                break;
            }
        }
    };
    tokio::select! {
        () = receive => Ok(()),
        sent = send(&mut sink, events, running) => sent,
    }
}

async fn begin(
    socket: &mut WebSocket,
    session: &Arc<dyn Session>,
) -> Result<Option<(Running, ProcessStream, bool)>, Refusal> {
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Text(said) = message else { continue };
        let request: ExecRequest =
            serde_json::from_str(&said).map_err(|_| Refusal::bad_request("the first message has to be a command"))?;
        let request = start_request(&request)?;
        let on_terminal = request.terminal.is_some();
        let (running, events) = Running::start(Arc::clone(session), request).await?;
        return Ok(Some((running, events, on_terminal)));
    }
    Ok(None)
}

async fn send(
    sink: &mut SplitSink<WebSocket, Message>,
    mut events: ProcessStream,
    running: Running,
) -> Result<(), axum::Error> {
    let mut writer = Writer::default();
    while !writer.ended {
        match events.next().await {
            Some(Ok(ProcessEvent::Stdout(bytes) | ProcessEvent::Terminal(bytes))) => {
                sink.send(output(1, &bytes)).await?;
            }
            Some(Ok(ProcessEvent::Stderr(bytes))) => sink.send(output(2, &bytes)).await?,
            event => {
                for line in writer.lines(event) {
                    sink.send(text(&line)).await?;
                }
            }
        }
    }
    running.ended();
    sink.close().await
}

fn output(channel: u8, bytes: &Bytes) -> Message {
    let mut framed = BytesMut::with_capacity(bytes.len() + 1);
    framed.put_u8(channel);
    framed.extend_from_slice(bytes);
    Message::Binary(framed.freeze())
}

fn text(line: &StreamLine) -> Message {
    // Strings and numbers always have a form.
    Message::Text(serde_json::to_string(line).unwrap_or_default().into())
}

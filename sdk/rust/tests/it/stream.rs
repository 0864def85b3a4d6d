//! Streams: command output, terminals, events, watching.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{any, get, post};
use serde_json::{Value, json};
use stacyvm_api::{ErrorCode, ExecRequest, WatchEventKind};
use stacyvm_client::{Channel, ClientError, EventsOptions, ExecEvent, Terminal, TerminalSize, WatchOptions};

use crate::stub::Stub;

/// A body that arrives in exactly these pieces.
fn pieces(pieces: &[&'static str]) -> Response {
    let pieces: Vec<_> =
        pieces.iter().map(|piece| Ok::<_, std::io::Error>(Bytes::from_static(piece.as_bytes()))).collect();
    Response::new(Body::from_stream(futures_util::stream::iter(pieces)))
}

fn output(channel: Channel, data: &'static [u8], offset: Option<u64>) -> ExecEvent {
    ExecEvent::Output { channel, data: Bytes::from_static(data), offset }
}

#[tokio::test]
async fn streamed_output_is_put_together_from_any_pieces() {
    let seen = Arc::new(Mutex::new(Value::Null));
    let exec = {
        let seen = seen.clone();
        move |Json(body): Json<Value>| async move {
            *seen.lock().unwrap() = body;
            pieces(&[
                "{\"stream\":\"stdout\",\"data\":\"\\ufffd\",\"data_b6",
                "4\":\"/wA=\",\"offset\":2}\n\n\n{\"stream\":\"stderr\",\"data\":\"oops\"}\r\n",
                "{\"stream\":\"later-kind\",\"data\":\"x\"}\n",
                "{\"stream\":\"stdout\",\"data\":\"on\",\"dropped\":9}\n",
                "{\"stream\":\"exit\",\"data\":\"\",\"exit_code\":3,\"duration\":\"5ms\",\"error\":\"SANDBOX_OOM\"}",
            ])
        }
    };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/exec", post(exec))).await;
    let request = ExecRequest { command: "x".into(), stdin: Some("in".into()), ..ExecRequest::default() };
    let mut stream = stub.sandbox().exec_stream(&request).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), Some(output(Channel::Stdout, b"\xff\0", Some(2))));
    assert_eq!(stream.next().await.unwrap(), Some(output(Channel::Stderr, b"oops", None)));
    assert_eq!(stream.next().await.unwrap(), Some(ExecEvent::Dropped { bytes: 9 }));
    assert_eq!(stream.next().await.unwrap(), Some(output(Channel::Stdout, b"on", None)));
    let Some(ExecEvent::Exit(exit)) = stream.next().await.unwrap() else { panic!("no exit") };
    assert_eq!((exit.code, exit.error), (3, Some(ErrorCode::SandboxOom)));
    assert_eq!(stream.next().await.unwrap(), None);
    let body = seen.lock().unwrap().take();
    assert_eq!(body["stdin"], "aW4=", "encoding covers stdin too");
    assert_eq!(
        (&body["stream"], &body["stream_exit"], &body["encoding"]),
        (&json!(true), &json!(true), &json!("base64"))
    );
}

#[tokio::test]
async fn output_that_is_not_json_is_a_protocol_error() {
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/exec", post(|| async { "garbage\n" }))).await;
    let mut stream = stub.sandbox().exec_stream(&ExecRequest::default()).await.unwrap();
    assert!(matches!(stream.next().await, Err(ClientError::Protocol(_))));
}

async fn talk(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        let message: Value = match message {
            Message::Text(text) => serde_json::from_str(&text).unwrap(),
            Message::Binary(bytes) => json!({"type": "stdin", "bytes": bytes.to_vec()}),
            Message::Close(_) => return,
            other => panic!("unexpected {other:?}"),
        };
        let answer = match message["type"].as_str().unwrap() {
            "start" => {
                assert_eq!(
                    (&message["cols"], &message["rows"], &message["command"]),
                    (&json!(80), &json!(24), &json!("cat"))
                );
                json!({"type": "started", "exec_id": "ex-00000000000000000001", "pid": 7})
            }
            "stdin" => {
                assert_eq!(message["bytes"], json!([0, 255, 27, 91, 65]));
                json!({"type": "stdout", "data": "?", "data_b64": "AP8bW0E=", "offset": 4})
            }
            "resize" => {
                json!({"type": "stdout", "data": format!("{}x{}", message["cols"], message["rows"]), "offset": 9})
            }
            "signal" => json!({"type": "error", "code": "BAD_REQUEST", "message": "no such signal"}),
            "ping" => json!({"type": "pong"}),
            "close_stdin" => json!({"type": "exit", "exit_code": 0, "duration": "1s"}),
            other => panic!("unexpected {other}"),
        };
        socket.send(Message::text(answer.to_string())).await.unwrap();
        if message["type"] == "close_stdin" {
            socket.send(Message::Close(None)).await.unwrap();
            return;
        }
    }
}

#[tokio::test]
async fn a_terminal_carries_input_output_resize_and_exit() {
    let upgrade = |socket: WebSocketUpgrade| async { socket.on_upgrade(talk) };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/exec/ws", any(upgrade))).await;
    let request = ExecRequest { command: "cat".into(), ..ExecRequest::default() };
    let size = TerminalSize { cols: 80, rows: 24 };
    let Terminal { mut input, mut output } = stub.sandbox().terminal(&request, Some(size)).await.unwrap();
    let Some(ExecEvent::Started { exec_id, pid: 7 }) = output.next().await.unwrap() else { panic!("not started") };
    assert_eq!(exec_id.as_str(), "ex-00000000000000000001");
    input.write(b"\x00\xff\x1b[A").await.unwrap();
    assert_eq!(output.next().await.unwrap(), Some(self::output(Channel::Stdout, b"\x00\xff\x1b[A", Some(4))));
    input.resize(TerminalSize { cols: 100, rows: 30 }).await.unwrap();
    assert_eq!(output.next().await.unwrap(), Some(self::output(Channel::Stdout, b"100x30", Some(9))));
    input.signal("NOPE").await.unwrap();
    assert_eq!(output.next().await.unwrap_err().code(), Some(ErrorCode::BadRequest));
    input.ping().await.unwrap();
    input.close().await.unwrap();
    let Some(ExecEvent::Exit(exit)) = output.next().await.unwrap() else { panic!("no exit") };
    assert_eq!(exit.code, 0);
    assert_eq!(output.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_refused_upgrade_is_the_servers_own_error() {
    let refuse = || async { (StatusCode::NOT_FOUND, Json(json!({"code": "NOT_FOUND", "message": "gone"}))) };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/exec/ws", get(refuse))).await;
    let error = stub.sandbox().terminal(&ExecRequest::default(), None).await.unwrap_err();
    assert_eq!((error.code(), error.to_string().as_str()), (Some(ErrorCode::NotFound), "gone"));
}

#[tokio::test]
async fn a_server_that_does_not_upgrade_is_noticed() {
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/exec/ws", get(|| async { "hello" }))).await;
    let error = stub.sandbox().terminal(&ExecRequest::default(), None).await.unwrap_err();
    assert!(matches!(error, ClientError::Protocol(_)), "{error:?}");
}

#[tokio::test]
async fn events_go_on_after_the_last_one_seen() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let events = move |headers: HeaderMap| {
        let call = count.fetch_add(1, Ordering::Relaxed);
        let last = headers.get("last-event-id").map(|id| id.to_str().unwrap().to_owned());
        async move {
            let event = |n: u32| {
                format!(
                    ": heartbeat\n\nid: evt-{n}\ndata: {{\"id\":\"evt-{n}\",\"type\":\"sandbox.created\",\"timestamp\":\"2026-11-23T14:00:00Z\"}}\n\n"
                )
            };
            match call {
                0 => assert_eq!(last.as_deref(), Some("evt-4")),
                1 => assert_eq!(last.as_deref(), Some("evt-5")),
                other => panic!("call {other}"),
            }
            event(5 + u32::try_from(call).unwrap())
        }
    };
    let stub = Stub::start(Router::new().route("/events", get(events))).await;
    let options = EventsOptions { after: Some("evt-4".to_owned()) };
    let mut stream = stub.client.events(&options).await.unwrap();
    assert_eq!(stream.next().await.unwrap().id, "evt-5");
    assert_eq!(stream.next().await.unwrap().id, "evt-6");
}

#[tokio::test]
async fn watching_skips_heartbeats() {
    let watch = || async { pieces(&["\n{\"name\":\"a/b\",\"ty", "pe\":\"rename\"}\n"]) };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/files/watch", get(watch))).await;
    let mut stream = stub.sandbox().watch("/workspace", &WatchOptions { recursive: true }).await.unwrap();
    let event = stream.next().await.unwrap().unwrap();
    assert_eq!((event.name.as_str(), event.kind), ("a/b", WatchEventKind::Rename));
    assert_eq!(stream.next().await.unwrap(), None);
}

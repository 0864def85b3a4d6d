//! Commands over WebSockets: both protocols of the one endpoint.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::support::{Fixture, eventually, within};

pub(crate) struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    async fn open(fixture: &Fixture, id: &str) -> Self {
        Self::open_with_key(fixture, id, "").await
    }

    pub(crate) async fn open_with_key(fixture: &Fixture, id: &str, key: &str) -> Self {
        let stream = TcpStream::connect(fixture.address).await.unwrap();
        let url = format!("ws://{}/api/v1/sandboxes/{id}/exec/ws", fixture.address);
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
        let (socket, response) = within(tokio_tungstenite::client_async(request, stream)).await.unwrap();
        assert_eq!(response.status().as_u16(), 101);
        Self(socket)
    }

    pub(crate) async fn say(&mut self, message: &Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    /// The next text message or the close.
    async fn next(&mut self) -> Result<Value, Option<CloseFrame>> {
        loop {
            match within(self.0.next()).await {
                Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(frame))) => return Err(frame),
                other => panic!("the socket broke: {other:?}"),
            }
        }
    }

    pub(crate) async fn message(&mut self) -> Value {
        self.next().await.unwrap_or_else(|close| panic!("closed: {close:?}"))
    }

    pub(crate) async fn close_code(&mut self) -> u16 {
        match self.next().await {
            Err(frame) => explained(frame),
            Ok(message) => panic!("not a close: {message}"),
        }
    }

    /// Messages up to the close.
    async fn rest(&mut self) -> (Vec<Value>, u16) {
        let mut messages = Vec::new();
        loop {
            match self.next().await {
                Ok(message) => messages.push(message),
                Err(frame) => return (messages, explained(frame)),
            }
        }
    }

    /// Closes from this side; what the server says to it.
    async fn leave(mut self, code: CloseCode) -> Option<CloseFrame> {
        let frame = CloseFrame { code, reason: "enough".into() };
        self.0.send(Message::Close(Some(frame))).await.unwrap();
        loop {
            match within(self.0.next()).await {
                Some(Ok(Message::Close(frame))) => return frame,
                Some(Ok(_)) => {}
                other => panic!("no answer to the close: {other:?}"),
            }
        }
    }
}

/// The code of a close, which always comes with a reason.
fn explained(frame: Option<CloseFrame>) -> u16 {
    let frame = frame.expect("a close with a code");
    assert!(!frame.reason.is_empty(), "{frame:?} says nothing");
    frame.code.into()
}

#[tokio::test]
async fn a_clients_close_is_answered_at_any_time() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let silent = Socket::open(&fixture, &id).await;
    let answer = silent.leave(CloseCode::Normal).await.expect("a frame");
    assert_eq!((answer.code, answer.reason.as_str()), (CloseCode::Normal, "enough"));

    let mut busy = Socket::open(&fixture, &id).await;
    busy.say(&json!({ "type": "start", "command": "cat" })).await;
    busy.message().await;
    assert_eq!(busy.leave(CloseCode::Away).await.expect("a frame").code, CloseCode::Away);

    let mut one_shot = Socket::open(&fixture, &id).await;
    one_shot.say(&json!({ "command": "echo up; sleep 100", "stream": true })).await;
    one_shot.message().await;
    assert_eq!(one_shot.leave(CloseCode::Normal).await.expect("a frame").code, CloseCode::Normal);
}

#[tokio::test]
async fn what_is_no_message_closes_with_what_is_wrong_with_it() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let long = Message::text("x".repeat((1 << 20) + 1));
    // A frame of a reserved kind, and a text that is not UTF-8.
    let (reserved, garbled) = (&[0x83u8, 0x80, 0, 0, 0, 0][..], &[0x81u8, 0x82, 0, 0, 0, 0, 0xff, 0xfe][..]);
    for started in [false, true] {
        let open = || async {
            let mut socket = Socket::open(&fixture, &id).await;
            if started {
                socket.say(&json!({ "type": "start", "command": "cat" })).await;
                assert_eq!(socket.message().await["type"], "started");
            }
            socket
        };
        let mut socket = open().await;
        socket.0.send(long.clone()).await.unwrap();
        assert_eq!(socket.close_code().await, 1009, "started: {started}");
        for (bytes, code) in [(reserved, 1002), (garbled, 1007)] {
            let mut socket = open().await;
            socket.0.get_mut().write_all(bytes).await.unwrap();
            assert_eq!(socket.close_code().await, code, "started: {started}");
        }
    }
}

#[tokio::test]
async fn the_one_shot_form_gives_chunks_done_and_a_normal_close() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "command": "echo out; sleep 0.05; echo err >&2; exit 5", "stream": true })).await;
    let (messages, code) = socket.rest().await;
    let expected = [
        json!({ "stream": "stdout", "data": "out\n" }),
        json!({ "stream": "stderr", "data": "err\n" }),
        json!({ "type": "done", "exit_code": 5 }),
    ];
    assert_eq!(messages, expected);
    assert_eq!(code, 1000);
}

#[tokio::test]
async fn the_one_shot_form_tells_failures_and_deadlines_as_published() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "command": "x", "timeout": "11m" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!((messages.len(), code), (1, 1011));
    assert!(messages[0]["error"].as_str().unwrap().contains("maximum"), "{messages:?}");

    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "command": "sleep 100", "timeout": "100ms" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!(messages[0], json!({ "stream": "stderr", "data": format!("exec timeout: {id}") }));
    assert_eq!((messages[1]["type"].as_str(), code), (Some("done"), 1000));
}

#[tokio::test]
async fn first_messages_that_make_no_sense_close_with_1007() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    for text in ["nonsense", "[]", r#"{"command":7}"#, r#"{"type":"stdin","data":"x"}"#, r#"{"type":"dance"}"#] {
        let mut socket = Socket::open(&fixture, &id).await;
        socket.0.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.close_code().await, 1007, "{text}");
    }
}

#[tokio::test]
async fn an_interactive_command_takes_input_resize_and_ping() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "cat", "cols": 90, "rows": 30 })).await;
    let started = socket.message().await;
    assert_eq!(started["type"], "started");
    assert!(started["exec_id"].as_str().unwrap().starts_with("ex-") && started["pid"].is_u64());
    socket.say(&json!({ "type": "ping" })).await;
    assert_eq!(socket.message().await, json!({ "type": "pong" }));
    socket.say(&json!({ "type": "resize", "cols": 100, "rows": 40 })).await;
    socket.say(&json!({ "type": "stdin", "data": "typed\n" })).await;
    let mut shown = String::new();
    while !shown.contains("typed") {
        let message = socket.message().await;
        assert_eq!(message["type"], "stdout", "{message}");
        shown.push_str(message["data"].as_str().unwrap());
    }
    socket.say(&json!({ "type": "signal", "signal": "KILL" })).await;
    let (messages, code) = socket.rest().await;
    let exit = messages.last().unwrap();
    assert_eq!((&exit["type"], &exit["exit_code"]), (&json!("exit"), &json!(137)));
    assert_eq!(code, 1000);
}

#[tokio::test]
async fn without_a_terminal_both_streams_stay_apart_and_input_can_end() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "cat; echo err >&2; exit 4", "encoding": "base64" })).await;
    assert_eq!(socket.message().await["type"], "started");
    socket.0.send(Message::binary(vec![0u8, 255])).await.unwrap();
    assert_eq!(socket.message().await, json!({ "type": "stdout", "data": "", "data_b64": "AP8=", "offset": 2 }));
    socket.say(&json!({ "type": "stdin", "data": "", "data_b64": "AQ==" })).await;
    assert_eq!(socket.message().await["data_b64"], "AQ==");
    socket.say(&json!({ "type": "close_stdin" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!((&messages[0]["type"], &messages[0]["data_b64"]), (&json!("stderr"), &json!("ZXJyCg==")));
    assert_eq!((&messages[1]["type"], &messages[1]["exit_code"], code), (&json!("exit"), &json!(4), 1000));
}

#[tokio::test]
async fn a_wrong_message_is_told_and_the_command_goes_on() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "cat" })).await;
    socket.message().await;
    for wrong in [
        json!({ "type": "dance" }),
        json!({ "type": "signal", "signal": "NONSENSE" }),
        json!({ "type": "stdin", "data_b64": "!" }),
        json!({ "type": "resize", "cols": 0, "rows": 1 }),
        json!({ "type": "start", "command": "true" }),
    ] {
        socket.say(&wrong).await;
        let told = socket.message().await;
        assert_eq!((&told["type"], &told["code"]), (&json!("error"), &json!("BAD_REQUEST")), "{wrong}: {told}");
    }
    socket.say(&json!({ "type": "close_stdin" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!((&messages[0]["exit_code"], code), (&json!(0), 1000));
}

/// Which of the two comes first is not for a client to say.
#[tokio::test]
async fn input_for_a_command_that_has_just_ended_is_no_error() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    // More than the connection holds: the end is not told before this is read.
    let long = json!({ "command": "head -c 12000000 /dev/zero", "background": true });
    let path = format!("/sandboxes/{id}/exec");
    let exec_id = fixture.post(&path, &long).await.expect(202)["exec_id"].as_str().unwrap().to_owned();
    eventually("its end", || async {
        let summary = fixture.get(&format!("{path}/{exec_id}")).await.expect(200);
        (summary["status"] == "exited").then_some(())
    })
    .await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "attach", "exec_id": exec_id })).await;
    for late in
        [json!({ "type": "stdin", "data": "late" }), json!({ "type": "close_stdin" }), json!({ "type": "ping" })]
    {
        socket.say(&late).await;
    }
    let (messages, code) = socket.rest().await;
    let said = |kind: &str| messages.iter().filter(|message| message["type"] == kind).count();
    assert_eq!((said("error"), said("pong"), said("exit"), code), (0, 1, 1, 1000));
}

#[tokio::test]
async fn a_start_that_fails_is_told_with_its_code() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "x", "timeout": "11m" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!((&messages[0]["type"], &messages[0]["code"], code), (&json!("error"), &json!("RESOURCE_LIMIT"), 1011));
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "attach", "exec_id": "ex-00000000000000000000" })).await;
    let (messages, code) = socket.rest().await;
    assert_eq!((&messages[0]["code"], code), (&json!("NOT_FOUND"), 1011));
}

#[tokio::test]
async fn a_client_that_left_attaches_again_from_its_offset() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "echo one; cat" })).await;
    let exec_id = socket.message().await["exec_id"].as_str().unwrap().to_owned();
    let output = socket.message().await;
    assert_eq!((&output["data"], &output["offset"]), (&json!("one\n"), &json!(4)));
    drop(socket);
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "attach", "exec_id": exec_id, "offset": 4 })).await;
    assert_eq!(socket.message().await["exec_id"], *exec_id);
    socket.say(&json!({ "type": "stdin", "data": "two\n" })).await;
    assert_eq!(socket.message().await, json!({ "type": "stdout", "data": "two\n", "offset": 8 }));
    socket.say(&json!({ "type": "close_stdin" })).await;
    assert_eq!(socket.rest().await.1, 1000);
}

#[tokio::test]
async fn requests_that_are_no_handshake_get_the_envelope() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let path = format!("/sandboxes/{id}/exec/ws");
    let plain = fixture.get(&path).await;
    assert_eq!(plain.failure(), (426, "UPGRADE_REQUIRED".to_owned()));
    assert_eq!(plain.header("upgrade"), Some("websocket"));
    let handshake = |path: &str, version: &str, key: &str| {
        fixture
            .api("GET", path)
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", version)
            .header("Sec-WebSocket-Key", key)
    };
    let key = "dGhlIHNhbXBsZSBub25jZQ==";
    assert_eq!(handshake(&path, "8", key).send().await.failure().0, 400);
    assert_eq!(handshake(&path, "13", "").send().await.failure().0, 400);
    let unknown = handshake("/sandboxes/sb-00000000000000000000/exec/ws", "13", key).send().await;
    assert_eq!(unknown.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn sockets_are_told_when_the_server_ends_and_commands_go_on() {
    let mut fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut socket = Socket::open(&fixture, &id).await;
    socket.say(&json!({ "type": "start", "command": "cat" })).await;
    let exec_id = socket.message().await["exec_id"].as_str().unwrap().to_owned();
    let mut silent = Socket::open(&fixture, &id).await;
    fixture.begin_stop();
    assert_eq!(socket.close_code().await, 1001);
    assert_eq!(silent.close_code().await, 1001);
    drop((socket, silent));
    fixture.ended().await;
    let (sandbox, exec_id) = (id.parse().unwrap(), exec_id.parse().unwrap());
    let engine = &fixture.engine;
    eventually("the running command", || async {
        let caller = stacyvm_engine::Caller::default();
        let summary = engine.exec_summary(&caller, &sandbox, &exec_id).await.unwrap();
        (summary.status == stacyvm_api::ProcessStatus::Running).then_some(())
    })
    .await;
}

//! Connections, request ids, panics, and ending in good order.

use std::time::Duration;

use serde_json::json;
use stacyvm_providers::mock::{Fault, MockOperation, Times};
use stacyvm_server::ServerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Fixture, eventually, within};

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let fixture = Fixture::open().await;
    for path in ["/health", "/nothing", "/sandboxes/sb-0"] {
        let echoed = fixture.api("GET", path).header("X-Request-ID", "my-id.1").send().await;
        assert_eq!(echoed.header("x-request-id"), Some("my-id.1"), "{path}");
        let made = fixture.get(path).await;
        assert_eq!(made.header("x-request-id").map(str::len), Some(36), "{path}");
        let key = format!("id-e2b_{}", "0123456789".repeat(4));
        for refused in ["x".repeat(129).as_str(), "caf\u{e9}", &key] {
            let made = fixture.api("GET", path).header("X-Request-ID", refused).send().await;
            let id = made.header("x-request-id").unwrap();
            assert_eq!((id.len(), &id[14..15]), (36, "4"), "{path}: {refused} gave {id}");
        }
    }
}

#[tokio::test]
async fn streams_sockets_preflights_and_refusals_have_request_ids_too() {
    let options = ServerOptions { cors_origins: vec!["https://app.example".to_owned()], ..ServerOptions::default() };
    let fixture = Fixture::with_options(options).await;
    let id = fixture.sandbox().await;
    let socket = fixture
        .api("GET", &format!("/sandboxes/{id}/exec/ws"))
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    let exec = json!({ "command": "true", "stream": true });
    let preflight = fixture.api("OPTIONS", "/sandboxes").header("Origin", "https://app.example");
    for (request, status) in [
        (fixture.api("GET", "/events"), 200),
        (fixture.api("POST", &format!("/sandboxes/{id}/exec")).json(&exec), 200),
        (socket, 101),
        (preflight.header("Access-Control-Request-Method", "POST"), 200),
        (fixture.api("GET", "/sandboxes").header("Host", "evil.example"), 403),
        (fixture.api("GET", "/sandboxes").header("Origin", "https://evil.example"), 403),
        (fixture.api("POST", "/sandboxes").body("x"), 415),
        (fixture.request("GET", "/swagger/"), 200),
    ] {
        let live = request.header("X-Request-ID", "my-id").open().await;
        assert_eq!((live.status, live.header("x-request-id")), (status, Some("my-id")));
    }
}

#[tokio::test]
async fn answers_cannot_be_sniffed_framed_kept_or_run() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let path = format!("/sandboxes/{id}/files?path=page.html");
    let upload = fixture.api("PUT", &path).header("X-StacyVM-Upload", "1").body("<script>alert(1)</script>");
    upload.send().await.expect(200);
    for path in [path.as_str(), "/pool/status", "/nothing", "/metrics/prometheus", "/admin/audit?format=csv"] {
        let answer = fixture.get(path).await;
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("x-frame-options"), Some("DENY"), "{path}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}");
    }
    let answer = fixture.get("/pool/status").await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn leaf_routes_have_no_trailing_slash_and_nothing_redirects() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    for path in ["/health/", &format!("/sandboxes/{id}/exec/"), &format!("/sandboxes/{id}/files/list/"), "//sandboxes"]
    {
        assert_eq!(fixture.get(path).await.failure(), (404, "NOT_FOUND".to_owned()), "{path}");
    }
    assert_eq!(fixture.request("GET", "/api/v1").send().await.failure().0, 404);
}

#[tokio::test]
async fn paths_are_decoded_once() {
    let fixture = Fixture::open().await;
    let name = "a/b%2f c";
    fixture.post("/templates", &json!({ "name": "plain", "image": "x" })).await.expect(201);
    assert_eq!(fixture.get("/templates/pl%61in").await.expect(200)["name"], "plain");
    let answer = fixture.get("/templates/a%2Fb%252f%20c").await;
    assert_eq!(answer.failure().0, 404);
    assert!(answer.json()["message"].as_str().unwrap().contains(name), "{}", answer.text());
    assert_eq!(fixture.get("/templates/%ff").await.failure().0, 400);
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let fixture = Fixture::open().await;
    let mut socket = TcpStream::connect(fixture.address).await.unwrap();
    let request = format!("GET /api/v1/pool/status HTTP/1.1\r\nHost: {}\r\n\r\n", fixture.address);
    // Pipelined, and in one packet.
    socket.write_all(request.repeat(3).as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    within(async {
        while seen.windows(17).filter(|window| *window == b"{\"enabled\":false}").count() < 3 {
            assert!(socket.read_buf(&mut seen).await.unwrap() > 0, "{}", String::from_utf8_lossy(&seen));
        }
    })
    .await;
}

#[tokio::test]
async fn garbage_ends_its_connection_and_nothing_else() {
    let fixture = Fixture::open().await;
    for garbage in [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"GET\r\n\r\n", b"\x00\x00\x00\x00", &vec![b'x'; 70_000]] {
        let mut socket = TcpStream::connect(fixture.address).await.unwrap();
        socket.write_all(garbage).await.ok();
        socket.shutdown().await.ok();
        let mut answer = Vec::new();
        within(socket.read_to_end(&mut answer)).await.ok();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(fixture.get("/health").await.status, 200);
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_spoken() {
    let fixture = Fixture::open().await;
    let stream = TcpStream::connect(fixture.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(connection);
    let uri = format!("http://{}/api/v1/health", fixture.address);
    let request = http::Request::get(uri).body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
    let response = within(sender.send_request(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    let request = http::Request::get("http://evil.example/api/v1/health");
    let response = within(sender.send_request(request.body(http_body_util::Empty::new()).unwrap())).await.unwrap();
    assert_eq!(response.status().as_u16(), 403);
    driver.abort();
}

#[tokio::test]
async fn a_request_that_is_being_answered_may_end_when_the_server_does() {
    let mut fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let request = fixture
        .api("POST", &format!("/sandboxes/{id}/exec"))
        .json(&json!({ "command": "read x; echo done", "timeout": "20s" }));
    fixture.mock.faults().inject(MockOperation::Start, Fault::Delay(Duration::from_millis(300)), Times::Once);
    let call = tokio::spawn(request.json(&json!({ "command": "echo done" })).send());
    let mock = fixture.mock.clone();
    eventually("the command", || async { (mock.calls(MockOperation::Start).started > 0).then_some(()) }).await;
    fixture.begin_stop();
    let answer = within(call).await.unwrap();
    assert_eq!(answer.expect(200)["stdout"], "done\n");
    fixture.ended().await;
    assert!(TcpStream::connect(fixture.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn requests_that_never_end_are_cut_off_after_the_grace() {
    let options = ServerOptions { shutdown_grace: Duration::from_millis(100), ..ServerOptions::default() };
    let mut fixture = Fixture::with_options(options).await;
    fixture.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let mut socket =
        fixture.api("POST", "/sandboxes").header("Content-Type", "application/json").body("{}").begin().await;
    socket.write_all(b"{}").await.unwrap();
    let mock = fixture.mock.clone();
    eventually("the create", || async { (mock.calls(MockOperation::Create).started > 0).then_some(()) }).await;
    fixture.stop().await;
}

#[tokio::test]
async fn localhost_listens_on_every_address_that_it_has() {
    let fixture =
        Fixture::with_options(ServerOptions { host: "localhost".to_owned(), ..ServerOptions::default() }).await;
    assert_eq!(fixture.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_goes_on_sending() {
    let fixture = Fixture::open().await;
    let announced = fixture
        .api("PUT", "/sandboxes/sb-00000000000000000000/files?path=/x")
        .header("X-StacyVM-Upload", "1")
        .header("Content-Length", "200000000");
    let mut socket = announced.begin().await;
    // Writes until the server closes its side, as many clients do before they
    // look for an answer.
    let piece = vec![0u8; 1 << 20];
    within(async { while socket.write_all(&piece).await.is_ok() && !is_readable(&socket) {} }).await;
    for _ in 0..20 {
        socket.write_all(&piece).await.expect("the server takes what is still coming");
    }
    let mut live = crate::support::Live::read(socket).await;
    assert_eq!(live.status, 404);
    assert!(String::from_utf8(live.rest().await).unwrap().contains("NOT_FOUND"));
}

/// Something has arrived. Looks without taking it.
fn is_readable(socket: &TcpStream) -> bool {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let mut byte = [0u8];
    let mut buffer = tokio::io::ReadBuf::new(&mut byte);
    matches!(socket.poll_peek(&mut context, &mut buffer), std::task::Poll::Ready(Ok(_)))
}

#[tokio::test]
async fn an_answer_before_the_body_says_that_the_connection_ends() {
    let fixture = Fixture::with_keys("k", "").await;
    let body = json!({ "image": "alpine:latest" });
    let post = |key: &str, path: &str| fixture.api("POST", path).key(key).json(&body);
    let form = post("k", "/sandboxes").header("Content-Type", "text/plain");
    for (request, status) in [(post("", "/sandboxes"), 401), (post("k", "/nothing"), 404), (form, 415)] {
        // Only the head: the server cannot have read the rest.
        let head = request.header("Content-Length", "100").begin().await;
        let live = crate::support::Live::read(head).await;
        assert_eq!((live.status, live.header("connection")), (status, Some("close")));
    }
    // A small body that is there is read, whatever the answer.
    let refused = post("", "/sandboxes").send().await;
    assert_eq!((refused.status, refused.header("connection")), (401, None));
    let read = post("k", "/sandboxes").send().await;
    assert_eq!((read.status, read.header("connection")), (201, None));
    let none = fixture.api("GET", "/sandboxes").key("").send().await;
    assert_eq!((none.status, none.header("connection")), (401, None), "there was no body");
}

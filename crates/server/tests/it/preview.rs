//! Previews by host: requests and answers on their way through.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use stacyvm_server::ServerOptions;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use crate::guest::{Guest, PORT, Preview, field, previews};
use crate::support::{Fixture, Live, eventually, within};

#[tokio::test]
async fn the_guest_sees_the_request_as_the_browser_sent_it() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let request = preview.request("GET", "/a%20b//c?x=1&y=/&stacyvm_tokens=2");
    let answer = request
        .header("Accept", "text/html")
        .header("Authorization", "Bearer the-guest's-own")
        .header("X-Forwarded-For", "6.6.6.6")
        .header("X-Forwarded-Host", "evil.example")
        .header("X-Forwarded-Proto", "https")
        .header("X-Forwarded-Port", "1")
        .header("X-Real-IP", "6.6.6.6")
        .header("Forwarded", "for=6.6.6.6")
        .send()
        .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let head = answer.text();
    let host = preview.host(PORT);
    assert!(head.starts_with("GET /a%20b//c?x=1&y=/&stacyvm_tokens=2 HTTP/1.1\r\n"), "{head}");
    assert_eq!(field(head, "host"), Some(host.as_str()));
    assert_eq!(field(head, "x-forwarded-host"), Some(host.as_str()));
    assert_eq!(field(head, "x-forwarded-proto"), Some("http"));
    assert_eq!(field(head, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(field(head, "via"), Some("1.1 stacyvm"));
    assert_eq!(field(head, "authorization"), Some("Bearer the-guest's-own"));
    assert!(!head.contains("6.6.6.6") && !head.contains("evil") && field(head, "x-forwarded-port").is_none(), "{head}");
}

#[tokio::test]
async fn fields_of_one_connection_stay_on_it() {
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, X-Secret\r\nKeep-Alive: timeout=5\r\n\
                  X-Secret: 1\r\nProxy-Authenticate: Basic\r\nX-Kept: yes\r\nServer: guest\r\n\r\nok";
    let preview = Preview::of(&Guest::answering(answer).await).await;
    let answer = preview.request("GET", "/").send().await;
    assert_eq!((answer.text(), answer.header("x-kept"), answer.header("server")), ("ok", Some("yes"), Some("guest")));
    for gone in ["x-secret", "keep-alive", "proxy-authenticate", "connection"] {
        assert_eq!(answer.header(gone), None, "{gone}");
    }

    let preview = Preview::of(&Guest::echoing().await).await;
    let answer = preview
        .request("GET", "/")
        .header("Connection", "X-Hop, keep-alive, host, x-forwarded-for")
        .header("X-Hop", "1")
        .header("TE", "trailers, deflate")
        .header("Proxy-Authorization", "Basic x")
        .header("X-End", "kept")
        .send()
        .await;
    let head = answer.text();
    for gone in ["x-hop", "proxy-authorization", "keep-alive"] {
        assert_eq!(field(head, gone), None, "{head}");
    }
    assert_eq!((field(head, "te"), field(head, "x-end")), (Some("trailers"), Some("kept")), "{head}");
    assert!(field(head, "host").is_some() && field(head, "x-forwarded-for") == Some("127.0.0.1"), "{head}");
}

#[tokio::test]
async fn every_way_of_writing_the_host_reaches_the_port_and_no_other_does() {
    let preview = Preview::of(&Guest::answering("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nguest").await).await;
    let bare = preview.id.trim_start_matches("sb-").to_owned();
    for host in [
        format!("3000-{}.localhost", preview.id),
        format!("3000-{bare}.localhost:1"),
        format!("3000-{}.LOCALHOST", preview.id.to_uppercase()),
    ] {
        let answer = preview.request("GET", "/api/v1/sandboxes").header("Host", &host).send().await;
        assert_eq!(answer.text(), "guest", "the API's paths are the guest's here: {host}");
    }
    // Whatever is not a preview goes to the API, which answers to its own names.
    for host in [format!("x.3000-{bare}.localhost"), format!("3000-{bare}.evil.example"), "foo.localhost".to_owned()] {
        let answer = preview.request("GET", "/").header("Host", &host).send().await;
        assert_eq!(answer.failure().0, 403, "{host}");
    }
    for port in ["0", "08000", "99999"] {
        let ask = || preview.request("GET", "/").header("Host", &format!("{port}-{}.localhost", preview.id));
        let answer = ask().send().await;
        assert_eq!(answer.failure(), (400, "BAD_REQUEST".to_owned()), "{port}");
        assert!(answer.json()["hint"].as_str().unwrap().contains("3000-sb-"), "{answer:?}");
        let page = ask().header("Accept", "text/html").send().await;
        assert!(page.status == 400 && page.text().contains("<h1>") && page.text().contains("3000-sb-"), "{page:?}");
    }
    let absolute = format!("GET http://3000-{}.localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", preview.id);
    let mut two_hosts = preview.raw(&absolute).await;
    let mut line = String::new();
    within(two_hosts.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 400"), "two names are none: {line}");
}

/// What the operator named as this server's own is that, whatever it looks like.
#[tokio::test]
async fn a_host_of_our_own_is_no_mistaken_preview() {
    let options = ServerOptions { allowed_hosts: vec!["*.localhost".to_owned()], ..previews() };
    let preview = Preview::with_options(&Guest::echoing().await, options).await;
    let host = format!("99999-{}.localhost", preview.id);
    let answer = preview.request("GET", "/api/v1/live").header("Host", &host).send().await;
    assert_eq!((answer.status, answer.json()["status"].as_str()), (200, Some("alive")), "{answer:?}");
}

#[tokio::test]
async fn connections_to_the_guest_are_used_again() {
    let guest = Guest::echoing().await;
    let preview = Preview::of(&guest).await;
    for path in ["/1", "/2", "/3"] {
        let answer = preview.request("GET", path).send().await;
        assert!(answer.text().starts_with(&format!("GET {path} ")), "{answer:?}");
    }
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn a_kept_connection_that_the_guest_closes_costs_a_safe_request_nothing() {
    // The second request of the first connection is taken and dropped.
    let guest = Guest::scripted(|mut talk, number| async move {
        let head = talk.head().await.unwrap_or_default();
        talk.answer("200 OK", &head).await;
        if number > 0 {
            while let Some(head) = talk.head().await {
                talk.answer("200 OK", &head).await;
            }
        }
        talk.head().await;
    })
    .await;
    let preview = Preview::of(&guest).await;
    assert_eq!(preview.request("GET", "/1").send().await.status, 200);
    let again = preview.request("GET", "/2").send().await;
    assert!(again.text().starts_with("GET /2 "), "{again:?}");
    assert_eq!(guest.connections(), 2);

    let preview = Preview::of(&guest_that_drops_the_second().await).await;
    assert_eq!(preview.request("GET", "/1").send().await.status, 200);
    let post = preview.request("POST", "/2").body("pay").send().await;
    assert_eq!(post.failure(), (502, "BAD_GATEWAY".to_owned()), "what may have been acted on is not sent twice");
}

async fn guest_that_drops_the_second() -> Guest {
    Guest::scripted(|mut talk, _| async move {
        if talk.head().await.is_some() {
            talk.answer("200 OK", "once").await;
        }
        talk.head().await;
    })
    .await
}

#[tokio::test]
async fn answers_arrive_as_the_guest_writes_them() {
    let (tell, told) = mpsc::channel::<()>(1);
    let told = std::sync::Arc::new(tokio::sync::Mutex::new(told));
    let guest = Guest::scripted(move |mut talk, _| {
        let told = told.clone();
        async move {
            talk.head().await;
            talk.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
                .await;
            for number in 0..3 {
                talk.write(format!("9\r\ndata: {number}\n\n\r\n").as_bytes()).await;
                // The next one is written only when this one was read.
                told.lock().await.recv().await;
            }
            talk.write(b"0\r\n\r\n").await;
        }
    })
    .await;
    let preview = Preview::of(&guest).await;
    let mut live = preview.request("GET", "/events").open().await;
    assert_eq!(live.header("content-type"), Some("text/event-stream"));
    for number in 0..3 {
        assert_eq!(live.chunk().await.unwrap(), format!("data: {number}\n\n").as_bytes());
        tell.send(()).await.unwrap();
    }
    assert_eq!(live.chunk().await, None);
}

#[tokio::test]
async fn bodies_go_both_ways_at_once() {
    let guest = Guest::scripted(|mut talk, _| async move {
        let head = talk.head().await.unwrap();
        assert_eq!(field(&head, "transfer-encoding"), Some("chunked"), "{head}");
        talk.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        loop {
            let size = talk.line().await;
            let count = usize::from_str_radix(size.trim(), 16).unwrap();
            let chunk = talk.bytes(count + 2).await;
            talk.write(&[size.as_bytes(), &chunk].concat()).await;
            if count == 0 {
                return;
            }
        }
    })
    .await;
    let preview = Preview::of(&guest).await;
    let mut socket = preview.request("POST", "/").header("Transfer-Encoding", "chunked").begin().await;
    socket.write_all(b"3\r\none\r\n").await.unwrap();
    let (reader, mut writer) = socket.into_split();
    let mut live = Live::of(reader).await;
    assert_eq!(live.chunk().await.unwrap(), b"one", "before the rest was sent");
    writer.write_all(b"3\r\ntwo\r\n").await.unwrap();
    assert_eq!(live.chunk().await.unwrap(), b"two");
    writer.write_all(b"0\r\n\r\n").await.unwrap();
    assert_eq!(live.chunk().await, None);
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let guest = Guest::scripted(|mut talk, _| async move {
        let head = talk.head().await.unwrap();
        assert_eq!(field(&head, "trailer"), Some("x-sum"), "{head}");
        let mut body = String::new();
        while !body.ends_with("\r\n\r\n") {
            body.push_str(&talk.line().await);
        }
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-count\r\n\r\n2\r\nok\r\n0\r\n";
        let sum = field(&body, "x-sum").unwrap_or("none");
        talk.write(format!("{answer}x-count: {sum}\r\n\r\n").as_bytes()).await;
    })
    .await;
    let preview = Preview::of(&guest).await;
    let request = preview.request("POST", "/").header("Transfer-Encoding", "chunked");
    let request = request.header("Trailer", "x-sum").header("TE", "trailers");
    let answer = request.body("3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n").send().await;
    assert_eq!((answer.text(), answer.trailer("x-count")), ("ok", Some("6")), "{answer:?}");
}

#[tokio::test]
async fn a_body_goes_out_when_the_guest_consents_to_it() {
    let guest = Guest::scripted(|mut talk, _| async move {
        while let Some(head) = talk.head().await {
            assert_eq!(field(&head, "expect"), Some("100-continue"), "{head}");
            if head.starts_with("PUT /no") {
                return talk.answer("413 Content Too Large", "too much").await;
            }
            talk.write(b"HTTP/1.1 100 Continue\r\n\r\n").await;
            let body = talk.bytes(4).await;
            talk.answer("200 OK", std::str::from_utf8(&body).unwrap()).await;
        }
    })
    .await;
    let preview = Preview::of(&guest).await;
    let ask =
        |path: &str| format!("PUT {path} HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    let mut refused = preview.raw(&ask("/no")).await;
    let mut line = String::new();
    within(refused.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 413"), "the body was never asked for: {line}");

    let mut accepted = preview.raw(&ask("/yes")).await;
    line.clear();
    within(accepted.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 100"), "{line}");
    within(accepted.read_line(&mut line)).await.unwrap();
    accepted.get_mut().write_all(b"body").await.unwrap();
    let mut answer = Live::read(accepted.into_inner()).await;
    assert_eq!((answer.status, answer.rest().await), (200, b"body".to_vec()));
}

#[tokio::test]
async fn web_sockets_pass_and_end_with_either_side() {
    let guest = Guest::scripted(|talk, _| async move {
        let mut socket = tokio_tungstenite::accept_async(talk.stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() {
                socket.send(Message::text(format!("echo {message}"))).await.unwrap();
            } else if message.is_binary() {
                return;
            }
        }
    })
    .await;
    let preview = Preview::of(&guest).await;
    let stream = TcpStream::connect(preview.fixture.address).await.unwrap();
    let url = format!("ws://{}/chat", preview.host(PORT));
    let (mut socket, response) = within(tokio_tungstenite::client_async(url, stream)).await.unwrap();
    assert_eq!(response.status().as_u16(), 101);
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text(format!("echo {text}")));
    }
    socket.send(Message::binary(Bytes::from_static(b"end"))).await.unwrap();
    assert!(!matches!(within(socket.next()).await, Some(Ok(Message::Text(_)))), "the guest has left");
}

#[tokio::test]
async fn any_protocol_that_both_sides_agree_on_becomes_a_tunnel() {
    let guest = Guest::scripted(|mut talk, _| async move {
        let head = talk.head().await.unwrap();
        let chosen = if head.starts_with("GET /other") { "other" } else { "lines" };
        assert_eq!((field(&head, "upgrade"), field(&head, "connection")), (Some("Lines"), Some("upgrade")), "{head}");
        talk.write(format!("HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {chosen}\r\n\r\n").as_bytes())
            .await;
        let line = talk.line().await;
        talk.write(line.to_uppercase().as_bytes()).await;
    })
    .await;
    let preview = Preview::of(&guest).await;
    let ask =
        |path: &str| format!("GET {path} HTTP/1.1\r\nHost: $HOST\r\nConnection: Upgrade\r\nUpgrade: Lines\r\n\r\n");
    let mut socket = preview.raw(&ask("/")).await;
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        within(socket.read_line(&mut head)).await.unwrap();
    }
    assert!(head.starts_with("HTTP/1.1 101") && field(&head, "upgrade") == Some("lines"), "{head}");
    socket.get_mut().write_all(b"hello\n").await.unwrap();
    let mut rest = String::new();
    within(socket.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "HELLO\n", "and then the guest's end is ours");

    let mut socket = preview.raw(&ask("/other")).await;
    let mut line = String::new();
    within(socket.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 502"), "a protocol that nobody asked for: {line}");
}

#[tokio::test]
async fn upgrades_that_would_hide_requests_are_not_passed_on() {
    let preview = Preview::of(&Guest::echoing().await).await;
    for protocol in ["h2c", "foo, H2C", "h2"] {
        let request = preview.request("GET", "/").header("Upgrade", protocol);
        let answer =
            request.header("Connection", "Upgrade, HTTP2-Settings").header("HTTP2-Settings", "AAMAAABk").send();
        let answer = answer.await;
        assert_eq!(answer.status, 200, "{protocol}");
        assert_eq!(
            (field(answer.text(), "upgrade"), field(answer.text(), "http2-settings")),
            (None, None),
            "{protocol}"
        );
    }
}

#[tokio::test]
async fn http2_clients_reach_http1_guests() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let stream = TcpStream::connect(preview.fixture.address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = within(handshake).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://{}/path?q=1", preview.host(PORT)))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(Full::new(Bytes::from_static(b"")))
        .unwrap();
    let response = within(sender.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    let body = within(response.into_body().collect()).await.unwrap().to_bytes();
    let head = std::str::from_utf8(&body).unwrap();
    assert!(head.starts_with("POST /path?q=1 HTTP/1.1\r\n"), "{head}");
    assert_eq!(field(head, "host"), Some(preview.host(PORT).as_str()), "{head}");
    assert_eq!((field(head, "cookie"), field(head, "via")), (Some("a=1; b=2"), Some("2.0 stacyvm")), "{head}");
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_by_the_guest() {
    let (tell, mut told) = mpsc::channel::<&str>(4);
    let guest = Guest::scripted(move |mut talk, _| {
        let tell = tell.clone();
        async move {
            talk.head().await;
            tell.send("asked").await.unwrap();
            talk.ended().await;
            tell.send("left").await.unwrap();
        }
    })
    .await;
    let preview = Preview::of(&guest).await;
    let socket = preview.request("GET", "/slow").begin().await;
    assert_eq!(within(told.recv()).await, Some("asked"));
    drop(socket);
    assert_eq!(within(told.recv()).await, Some("left"));
}

#[tokio::test]
async fn the_server_ends_without_waiting_for_endless_streams() {
    let guest = Guest::scripted(|mut talk, _| async move {
        let head = talk.head().await.unwrap_or_default();
        if head.contains("Upgrade") || head.contains("upgrade") {
            talk.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").await;
        } else {
            talk.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n").await;
        }
        talk.ended().await;
    })
    .await;
    let mut preview = Preview::of(&guest).await;
    let mut tunnel = preview.raw("GET / HTTP/1.1\r\nHost: $HOST\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").await;
    let mut line = String::new();
    within(tunnel.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 101"), "{line}");
    let mut events = preview.request("GET", "/").open().await;
    assert_eq!(events.chunk().await.unwrap(), b"data: 1\n\n");
    preview.fixture.stop().await;
    assert_eq!(events.chunk().await, None, "ended in order");
    let mut rest = Vec::new();
    within(tunnel.read_to_end(&mut rest)).await.unwrap();
}

#[tokio::test]
async fn a_closed_port_is_a_page_for_people_and_an_error_for_programs() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let closed = || preview.request("GET", "/").header("Host", &preview.host(8080));
    let answer = closed().send().await;
    assert_eq!(answer.failure(), (502, "PORT_CLOSED".to_owned()));
    assert!(answer.json()["message"].as_str().unwrap().contains(&format!("port 8080 of sandbox {}", preview.id)));
    let page = closed().header("Accept", "text/html,application/xhtml+xml").send().await;
    assert_eq!((page.status, page.header("content-type")), (502, Some("text/html; charset=utf-8")));
    assert!(page.text().contains("http-equiv=\"refresh\"") && page.text().contains("nothing listens on port 8080"));
    assert_eq!((page.header("cache-control"), page.header("retry-after")), (Some("no-store"), Some("2")));
    assert_eq!(page.header("content-security-policy"), Some("default-src 'none'; style-src 'unsafe-inline'"));
}

#[tokio::test]
async fn a_sandbox_that_is_not_there_has_no_preview() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let unknown = "3000-sb-00000000000000000000.localhost";
    let answer = preview.request("GET", "/").header("Host", unknown).send().await;
    assert_eq!(answer.failure(), (404, "NOT_FOUND".to_owned()));
    let page = preview.request("GET", "/").header("Host", unknown).header("Accept", "text/html").send().await;
    assert!(page.status == 404 && page.text().contains("does not exist") && !page.text().contains("refresh"));

    assert_eq!(preview.request("GET", "/").send().await.status, 200, "a connection is kept");
    preview.fixture.delete(&format!("/sandboxes/{}", preview.id)).await.expect(200);
    assert_eq!(preview.request("GET", "/").send().await.failure().0, 404, "and not used after the end");
}

#[tokio::test]
async fn the_agents_port_is_never_the_guests() {
    let guest = Guest::echoing().await;
    let preview = Preview::of(&guest).await;
    let id = preview.id.parse().unwrap();
    preview.fixture.mock.listen(&id, 49983, stacyvm_providers::mock::MockService::At(guest.address));
    let answer = preview.request("GET", "/").header("Host", &preview.host(49983)).send().await;
    assert_eq!(answer.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(guest.connections(), 0);
    let port = format!("/sandboxes/{}/ports/49983", preview.id);
    let set = preview.fixture.api("PUT", &port).json(&json!({ "access": "public" })).send().await;
    assert_eq!(set.failure(), (400, "BAD_REQUEST".to_owned()));
}

#[tokio::test]
async fn without_a_domain_there_are_no_previews() {
    let options = stacyvm_server::ServerOptions::default();
    let preview = Preview::with_options(&Guest::echoing().await, options).await;
    assert_eq!(preview.request("GET", "/").send().await.failure().0, 403);
    let link = preview.fixture.post(&format!("/sandboxes/{}/ports/3000/link", preview.id), &json!({})).await;
    assert_eq!(link.failure(), (501, "UNSUPPORTED".to_owned()));
}

#[tokio::test]
async fn a_sandbox_has_a_limit_of_connections_and_gives_them_back() {
    let guest = Guest::scripted(|mut talk, _| async move {
        talk.head().await;
        talk.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n").await;
        talk.ended().await;
    })
    .await;
    let preview = Preview::of(&guest).await;
    let mut open = Vec::new();
    for _ in 0..256 {
        let mut live = preview.request("GET", "/").open().await;
        assert_eq!(live.chunk().await.unwrap(), b"x");
        open.push(live);
    }
    let refused = preview.request("GET", "/").send().await;
    assert_eq!(refused.failure(), (503, "UNAVAILABLE".to_owned()));
    open.pop();
    eventually("the place is given back", || async {
        let live = preview.request("GET", "/").open().await;
        (live.status == 200).then_some(())
    })
    .await;
    // Another sandbox has places of its own.
    let other = Fixture::with_options(previews()).await;
    let other = Preview::on(&guest, other).await;
    assert_eq!(other.request("GET", "/").open().await.status, 200);
}

//! Guests that attack browsers, other guests, or the server itself.

use std::fmt::Write as _;

use serde_json::json;
use stacyvm_engine::Caller;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::guest::{Guest, PORT, Preview};
use crate::support::{BASE, Fixture, eventually, within};

#[tokio::test]
async fn guests_set_cookies_for_their_own_host_only() {
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: a=1; Domain=localhost; Path=/; HttpOnly\r\n\
                  Set-Cookie: b=2; domain = .localhost;Secure\r\nSet-Cookie: c=3; Max-Age=5\r\nSet-Cookie: d=domain=x\r\n\
                  Set-Cookie: __Host-stacyvm-preview=evil; Path=/; Secure\r\n\
                  Set-Cookie: =__Host-Stacyvm-Preview=evil; Path=/; Secure\r\n\
                  Clear-Site-Data: \"*\"\r\nAlt-Svc: h3=\"evil.example:443\"\r\n\r\n";
    let preview = Preview::of(&Guest::answering(answer).await).await;
    let answer = preview.request("GET", "/").send().await;
    let cookies: Vec<_> =
        answer.headers.iter().filter(|(name, _)| name == "set-cookie").map(|(_, value)| value.as_str()).collect();
    assert_eq!(cookies, ["a=1; Path=/; HttpOnly", "b=2;Secure", "c=3; Max-Age=5", "d=domain=x"]);
    assert_eq!((answer.header("clear-site-data"), answer.header("alt-svc")), (None, None));
}

#[tokio::test]
async fn answers_that_two_readers_would_read_differently_do_not_pass() {
    let chunked = "4\r\nbody\r\n0\r\n\r\n";
    for (head, passes) in [
        ("Content-Length: 3\r\nTransfer-Encoding: chunked", true),
        ("Transfer-Encoding: gzip, chunked", false),
        ("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", false),
        ("Content-Length: 4\r\nContent-Length: 5", false),
        ("Content-Length: 4, 5", false),
        ("Content-Length: -4", false),
        ("Transfer-Encoding : chunked", false),
        ("X: 1\r\n Transfer-Encoding: chunked", false),
    ] {
        let guest = Guest::answering(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{chunked}")).await;
        let preview = Preview::of(&guest).await;
        let answer = preview.request("GET", "/").send().await;
        if passes {
            assert_eq!((answer.status, answer.text(), answer.header("content-length")), (200, "body", None), "{head}");
        } else {
            assert_eq!(answer.failure(), (502, "BAD_GATEWAY".to_owned()), "{head}");
        }
    }
}

/// As long as nothing was passed on, there is an answer for it.
#[tokio::test]
async fn a_body_that_cannot_be_read_is_said_so() {
    for body in ["nonsense\r\n", "-4\r\nbody\r\n0\r\n\r\n", "fffffffffffffffff\r\nbody", "\r\n"] {
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let preview = Preview::of(&Guest::answering(answer).await).await;
        // On a machine that is busy the head may go on alone, and is cut off then.
        let said = eventually("an answer that says so", async || {
            let mut socket = preview.raw("GET / HTTP/1.1\r\nHost: $HOST\r\nConnection: close\r\n\r\n").await;
            let mut said = String::new();
            within(socket.read_to_string(&mut said)).await.ok();
            said.starts_with("HTTP/1.1 502 ").then_some(said)
        })
        .await;
        assert!(said.contains("BAD_GATEWAY") && said.contains("chunks cannot be read"), "{body:?}: {said}");
    }
}

#[tokio::test]
async fn bytes_after_an_answer_are_no_answer_to_the_next_request() {
    let planted = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let preview = Preview::of(&Guest::answering(planted).await).await;
    for _ in 0..4 {
        let answer = preview.request("GET", "/").send().await;
        assert!(answer.status == 502 || answer.text() == "ok", "{answer:?}");
    }
}

#[tokio::test]
async fn heads_are_bounded_and_what_is_no_http_is_said_so() {
    let mut many = String::from("HTTP/1.1 200 OK\r\n");
    for number in 0..300 {
        write!(many, "X-{number}: 1\r\n").unwrap();
    }
    let large = format!("HTTP/1.1 200 OK\r\nX: {}\r\n", "x".repeat(65 << 10));
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(1 << 20));
    for (answer, what) in [
        (format!("{many}\r\n"), "answered with more than"),
        (format!("{large}\r\n"), "answered with more than"),
        (endless, "answered with more than"),
        ("SSH-2.0-OpenSSH_9.2\r\n".to_owned(), "does not speak HTTP"),
        ("HTTP/1.1 099 Odd\r\n\r\n".to_owned(), "does not speak HTTP"),
    ] {
        let preview = Preview::of(&Guest::answering(answer).await).await;
        let answer = preview.request("GET", "/").send().await;
        assert_eq!(answer.failure(), (502, "BAD_GATEWAY".to_owned()));
        assert!(answer.json()["message"].as_str().unwrap().contains(what), "{answer:?}");
    }
    let preview = Preview::of(&Guest::scripted(|mut talk, _| async move { drop(talk.head().await) }).await).await;
    assert_eq!(preview.request("GET", "/").send().await.failure(), (502, "BAD_GATEWAY".to_owned()));
}

#[tokio::test]
async fn interim_answers_are_passed_over_and_end() {
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n";
    let few = format!("HTTP/1.1 100 Continue\r\n\r\n{hints}{hints}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let preview = Preview::of(&Guest::answering(few).await).await;
    assert_eq!(preview.request("GET", "/").send().await.text(), "ok");

    let (stopped, has_stopped) = tokio::sync::oneshot::channel();
    let stopped = std::sync::Mutex::new(Some(stopped));
    let endless = Guest::scripted(move |mut talk, _| {
        let stopped = stopped.lock().unwrap().take();
        async move {
            talk.head().await;
            while talk.stream.write_all(hints.as_bytes()).await.is_ok() {}
            stopped.map(|stopped| stopped.send(()));
        }
    })
    .await;
    let preview = Preview::of(&endless).await;
    let answer = preview.request("GET", "/").send().await;
    assert_eq!(answer.failure(), (502, "BAD_GATEWAY".to_owned()));
    assert!(answer.json()["message"].as_str().unwrap().contains("interim answers"), "{answer:?}");
    within(has_stopped).await.expect("the connection is closed");
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_browser_too() {
    let guest = Guest::scripted(|mut talk, _| async move {
        talk.head().await;
        talk.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
    })
    .await;
    let preview = Preview::of(&guest).await;
    let mut socket = preview.raw("GET / HTTP/1.1\r\nHost: $HOST\r\n\r\n").await;
    let mut all = Vec::new();
    // A reset is as clear as an end that comes too early.
    within(socket.read_to_end(&mut all)).await.ok();
    let text = String::from_utf8_lossy(&all);
    assert!(text.contains("100\r\n") && !text.contains("\r\n\r\nhalf\0") && text.len() < 400, "{text}");
}

#[tokio::test]
async fn a_page_of_a_preview_cannot_drive_the_api() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let page = format!("http://{}", preview.host(PORT));
    let exec = format!("{BASE}/sandboxes/{}/exec", preview.id);
    let command = json!({ "command": "echo hello" }).to_string();
    let attempts = |site: &'static str| {
        [
            // fetch() with JSON, a form, a simple request, an image.
            preview.fixture.request("POST", &exec).header("Content-Type", "application/json").body(command.clone()),
            preview
                .fixture
                .request("POST", &exec)
                .header("Content-Type", "application/x-www-form-urlencoded")
                .body("command=echo"),
            preview.fixture.request("POST", &exec).header("Content-Type", "text/plain").body(command.clone()),
            preview.fixture.request("DELETE", &format!("{BASE}/sandboxes/{}", preview.id)),
            preview.fixture.request("GET", &format!("{BASE}/sandboxes")),
        ]
        .map(|request| request.header("Sec-Fetch-Site", site))
    };
    for site in ["same-site", "cross-site"] {
        for (number, attempt) in attempts(site).into_iter().enumerate() {
            assert_eq!(attempt.header("Origin", &page).send().await.failure().0, 403, "{number}");
        }
        for (number, attempt) in attempts(site).into_iter().enumerate() {
            assert_eq!(attempt.send().await.failure().0, 403, "{number} without Origin");
        }
    }
    let preflight = preview.fixture.request("OPTIONS", &exec).header("Origin", &page);
    let preflight = preflight.header("Access-Control-Request-Method", "POST").send().await;
    assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (403, None));
    let socket = preview.fixture.request("GET", &format!("{exec}/ws")).header("Origin", &page);
    let socket = socket.header("Upgrade", "websocket").header("Connection", "Upgrade");
    let socket = socket.header("Sec-WebSocket-Version", "13").header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    assert_eq!(socket.send().await.failure().0, 403);
    // A name of the attacker's that leads to this machine.
    let rebound = preview.fixture.request("GET", &format!("{BASE}/sandboxes"));
    let rebound = rebound.header("Host", "evil.example").header("Sec-Fetch-Site", "same-origin").send().await;
    assert_eq!(rebound.failure().0, 403);
    assert!(preview.fixture.engine.get(&Caller::default(), &preview.id.parse().unwrap()).is_ok(), "nothing happened");
}

#[tokio::test]
async fn requests_that_two_readers_would_read_differently_do_not_pass() {
    let guest = Guest::echoing().await;
    let preview = Preview::of(&guest).await;
    for head in [
        "Content-Length: 4\r\nContent-Length: 5",
        "Content-Length: +4",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding : chunked",
        "Host: $HOST",
    ] {
        let mut socket = preview.raw(&format!("POST / HTTP/1.1\r\nHost: $HOST\r\n{head}\r\n\r\n0\r\n\r\n")).await;
        let mut answer = [0; 12];
        within(socket.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 400", "{head}");
    }
    assert_eq!(guest.connections(), 0);
    // Both a length and chunks: chunks count, and the length is gone.
    let both = "POST / HTTP/1.1\r\nHost: $HOST\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let mut socket = preview.raw(both).await;
    let mut answer = vec![0; 2048];
    let count = within(socket.read(&mut answer)).await.unwrap();
    let text = String::from_utf8_lossy(&answer[..count]).to_lowercase();
    let echoed = text.split("\r\n\r\n").nth(1).unwrap_or_default();
    assert!(text.starts_with("http/1.1 400") || !echoed.contains("content-length: 3"), "{text}");
}

#[tokio::test]
async fn the_api_host_never_shows_a_preview() {
    let preview = Preview::of(&Guest::echoing().await).await;
    let headers = [("X-Forwarded-Host", preview.host(PORT)), ("Forwarded", format!("host={}", preview.host(PORT)))];
    for (name, value) in headers {
        let answer = preview.fixture.request("GET", "/").header(name, &value).send().await;
        assert_eq!(answer.failure(), (404, "NOT_FOUND".to_owned()), "{name}");
    }
    let fixture = Fixture::open().await;
    assert_eq!(fixture.request("GET", "/sb-00000000000000000000/3000/").send().await.failure().0, 404);
}

//! Wrong types, wrong sizes, wrong bytes: always the envelope, never a 500, and
//! the server goes on.

use serde_json::{Value, json};
use stacyvm_server::{BodyLimits, ServerOptions};
use tokio::io::AsyncWriteExt;

use crate::support::{Answer, Fixture, Live, within};

const BAD: (u16, &str) = (400, "BAD_REQUEST");

fn failure(answer: &Answer) -> (u16, String) {
    answer.failure()
}

async fn raw(fixture: &Fixture, path: &str, body: &[u8]) -> Answer {
    fixture.api("POST", path).header("Content-Type", "application/json").body(body).send().await
}

#[tokio::test]
async fn bodies_that_are_no_json_objects_are_400() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let paths = [
        "/sandboxes",
        "/sandboxes/admission",
        "/templates",
        &format!("/sandboxes/{id}/exec"),
        &format!("/sandboxes/{id}/files"),
    ];
    let bodies: [&[u8]; 12] = [
        b"",
        b"{",
        b"[]",
        b"[1]",
        b"7",
        b"\"x\"",
        b"true",
        b"{} {}",
        b"{\"a\":}",
        b"{'a':1}",
        b"\xff\xfe",
        b"{\"image\":\"\xff\"}",
    ];
    for path in paths {
        for body in bodies {
            let answer = raw(&fixture, path, body).await;
            assert_eq!(failure(&answer), (BAD.0, BAD.1.to_owned()), "{path} {}", String::from_utf8_lossy(body));
        }
        let nested = "[".repeat(100_000);
        assert_eq!(raw(&fixture, path, format!("{{\"x\":{nested}").as_bytes()).await.failure().0, 400);
    }
}

/// Whoever refuses a request, a route or the HTTP library.
#[tokio::test]
async fn every_refusal_is_the_envelope() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let sandbox = format!("/api/v1/sandboxes/{id}");
    for (method, target, header, expected) in [
        ("GET", "/nothing".to_owned(), ("", ""), (404, "NOT_FOUND")),
        ("GET", "/api/v1/nothing".to_owned(), ("", ""), (404, "NOT_FOUND")),
        ("GET", "/api/v1/sandboxes/%ff".to_owned(), ("", ""), (400, "BAD_REQUEST")),
        ("PATCH", "/api/v1/sandboxes".to_owned(), ("", ""), (405, "METHOD_NOT_ALLOWED")),
        ("GET", "/api/v1/sandboxes?limit=many".to_owned(), ("", ""), (400, "BAD_REQUEST")),
        ("POST", format!("{sandbox}/exec"), ("Content-Type", "text/plain"), (415, "UNSUPPORTED_MEDIA_TYPE")),
        ("GET", format!("{sandbox}/exec/ws"), ("", ""), (426, "UPGRADE_REQUIRED")),
        ("GET", format!("{sandbox}/exec/ws"), ("Upgrade", "websocket"), (426, "UPGRADE_REQUIRED")),
    ] {
        let mut request = fixture.request(method, &target);
        if !header.0.is_empty() {
            request = request.header(header.0, header.1).body("{}");
        }
        let answer = request.send().await;
        assert_eq!(failure(&answer), (expected.0, expected.1.to_owned()), "{method} {target} {header:?}");
        assert!(answer.json()["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer:?}");
    }
}

#[tokio::test]
async fn fields_of_the_wrong_type_are_400_and_named() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let exec = format!("/sandboxes/{id}/exec");
    let table: [(&str, Value, &str); 24] = [
        ("/sandboxes", json!({ "image": 7 }), "image"),
        ("/sandboxes", json!({ "memory_mb": "many" }), "memory_mb"),
        ("/sandboxes", json!({ "memory_mb": 15 }), "16 is the minimum"),
        ("/sandboxes", json!({ "pids_limit": 15 }), "pids_limit 15 is too little to run anything: 16 is the minimum"),
        ("/sandboxes", json!({ "vcpus": 1e-6 }), "vcpus 0.000001 is too little to run anything: 0.01 is the minimum"),
        ("/templates", json!({ "name": "t", "image": "x", "memory_mb": 15 }), "16 is the minimum"),
        ("/templates", json!({ "name": "t", "image": "x", "pids_limit": 1 }), "16 is the minimum"),
        ("/templates", json!({ "name": "t", "image": "x", "vcpus": 0.001 }), "0.01 is the minimum"),
        ("/templates", json!({ "name": "t", "image": "x", "cpu_cores": 0.001 }), "0.01 is the minimum"),
        ("/sandboxes", json!({ "memory_mb": -1 }), "memory_mb"),
        ("/sandboxes", json!({ "memory_mb": 1e30 }), "memory_mb"),
        ("/sandboxes", json!({ "vcpus": [] }), "vcpus"),
        ("/sandboxes", json!({ "ttl": 30 }), "ttl"),
        ("/sandboxes", json!({ "ttl": "30" }), "ttl"),
        ("/sandboxes", json!({ "ttl": "-5m" }), "ttl"),
        ("/sandboxes", json!({ "ttl": "forever" }), "ttl"),
        ("/sandboxes", json!({ "metadata": { "a": 1 } }), "metadata.a"),
        ("/sandboxes", json!({ "network": { "mode": 7 } }), "network"),
        ("/sandboxes/admission", json!({ "ttl": "soon" }), "ttl"),
        ("/templates", json!({ "name": [], "image": "x" }), "name"),
        (&exec, json!({ "command": ["ls"] }), "command"),
        (&exec, json!({ "command": "x", "args": "y" }), "args"),
        (&exec, json!({ "command": "x", "env": { "A": null } }), "env"),
        (&exec, json!({ "command": "x", "timeout": "1 hour" }), "timeout"),
    ];
    for (path, body, field) in table {
        let answer = fixture.post(path, &body).await;
        assert_eq!(failure(&answer), (BAD.0, BAD.1.to_owned()), "{body}");
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(field), "{field} is not named: {message}");
    }
    assert_eq!(fixture.post("/sandboxes", &json!({ "ttl": "0s" })).await.failure().0, 400, "born expired");
    for body in [json!({}), json!({ "ttl": "" }), json!({ "ttl": "0s" }), json!({ "ttl": "x" })] {
        let answer = fixture.post(&format!("/sandboxes/{id}/extend"), &body).await;
        assert_eq!(answer.failure().0, 400, "{body}");
    }
    assert_eq!(fixture.get(&format!("/sandboxes/{id}")).await.status, 200);
}

#[tokio::test]
async fn paths_that_no_file_can_have_are_400() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let files = |rest: &str| format!("/sandboxes/{id}/files{rest}");
    let long = "x".repeat(5000);
    for path in ["", "%20", "a%00b", "%ff%fe", &long] {
        for rest in [format!("?path={path}"), format!("/stat?path={path}"), format!("/watch?path={path}")] {
            let answer = fixture.get(&files(&rest)).await;
            // Bytes that are no UTF-8 become U+FFFD, which then names nothing.
            let accepted = if path == "%ff%fe" { [400, 404] } else { [400, 400] };
            assert!(accepted.contains(&answer.failure().0), "{rest}: {answer:?}");
        }
        assert!(matches!(fixture.delete(&files(&format!("?path={path}"))).await.failure().0, 400 | 404));
    }
    assert_eq!(fixture.get(&files("/stat")).await.failure().0, 400);
    assert_eq!(fixture.get(&files("/glob")).await.failure().0, 400);
    for body in [
        json!({ "content": "x" }),
        json!({ "path": " ", "content": "x" }),
        json!({ "path": "a\u{0}b", "content": "x" }),
        json!({ "path": "/x", "content": "x", "mode": "rw" }),
        json!({ "path": "/x", "content": "x", "encoding": "utf7" }),
    ] {
        assert_eq!(fixture.post(&files(""), &body).await.failure().0, 400, "{body}");
    }
    for body in
        [json!({ "old_path": "/a" }), json!({ "new_path": "/a" }), json!({ "old_path": "/a\u{0}", "new_path": "/b" })]
    {
        assert_eq!(fixture.post(&files("/move"), &body).await.failure().0, 400, "{body}");
    }
    for body in [json!({ "path": "/a" }), json!({ "path": "/a", "mode": "8" }), json!({ "mode": "644" })] {
        assert_eq!(fixture.post(&files("/chmod"), &body).await.failure().0, 400, "{body}");
    }
}

#[tokio::test]
async fn bodies_above_the_limit_are_413_before_they_arrive() {
    let body_limits = BodyLimits { json_bytes: 1000, file_json_bytes: 5000 };
    let fixture = Fixture::with_options(ServerOptions { body_limits, ..ServerOptions::default() }).await;
    let id = fixture.sandbox().await;
    let files = format!("/sandboxes/{id}/files");
    let large = (413, "PAYLOAD_TOO_LARGE".to_owned());
    let body = json!({ "image": "x".repeat(2000) });
    assert_eq!(fixture.post("/sandboxes", &body).await.failure(), large);
    let content = |length: usize| json!({ "path": "/workspace/x", "content": "x".repeat(length) });
    assert_eq!(fixture.post(&files, &content(4000)).await.status, 200);
    let refused = fixture.post(&files, &content(6000)).await;
    assert_eq!(refused.failure(), large);
    assert!(refused.text().contains("PUT"), "the way out is named: {}", refused.text());

    // Only the head is sent: the answer does not wait for the rest.
    let announced = fixture
        .api("POST", "/sandboxes")
        .header("Content-Type", "application/json")
        .header("Content-Length", "9999999");
    let live = within(async { Live::read(announced.begin().await).await }).await;
    assert_eq!(live.status, 413);
    let chunked = fixture
        .api("POST", "/sandboxes")
        .header("Content-Type", "application/json")
        .header("Transfer-Encoding", "chunked");
    let mut socket = chunked.begin().await;
    let piece = format!("{:x}\r\n{}\r\n", 800, " ".repeat(800));
    socket.write_all(piece.repeat(2).as_bytes()).await.unwrap();
    assert_eq!(within(Live::read(socket)).await.status, 413);
    // Raw uploads have no limit of the server.
    let upload = fixture.api("PUT", &format!("{files}?path=/workspace/y")).header("X-StacyVM-Upload", "1");
    assert_eq!(upload.body(vec![b'x'; 20_000]).send().await.expect(200)["size"], 20_000);
}

#[tokio::test]
async fn ids_that_no_sandbox_can_have_are_not_found() {
    let fixture = Fixture::open().await;
    let not_found = (404, "NOT_FOUND".to_owned());
    for id in ["SB-1", "..%2F..%2Fetc", "sb_1", "%00", &"a".repeat(300), "sb-\u{e9}", "%20"] {
        let id = id.replace('\u{e9}', "%C3%A9");
        assert_eq!(fixture.get(&format!("/sandboxes/{id}")).await.failure(), not_found, "{id}");
        let destroyed = fixture.delete(&format!("/sandboxes/{id}")).await;
        assert_eq!(destroyed.status, 200, "destroying nothing succeeds: {id}");
    }
}

#[tokio::test]
async fn query_text_is_decoded_as_forms_do() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let body = json!({ "path": "/workspace/a b+c", "content": "x" });
    fixture.post(&format!("/sandboxes/{id}/files"), &body).await.expect(200);
    for path in ["/workspace/a+b%2Bc", "/workspace/a%20b%2bc", "%2Fworkspace%2Fa+b%2Bc"] {
        assert_eq!(fixture.get(&format!("/sandboxes/{id}/files?path={path}")).await.text(), "x", "{path}");
    }
}

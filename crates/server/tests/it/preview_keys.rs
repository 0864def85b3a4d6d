//! Stored keys and previews: what they open, and what ends with them.

use std::num::NonZeroU32;

use serde_json::{Value, json};
use stacyvm_providers::mock::MockService;
use stacyvm_server::{Secret, ServerOptions};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

use crate::guest::{Guest, PORT, Preview, field, previews};
use crate::support::{Answer, Fixture, Request, within};

const ROOT: &str = "root-key-0123456789abcdef0123456789";

/// Takes up protocols, and begins event streams that have no end.
async fn endless() -> Guest {
    Guest::scripted(|mut talk, _| async move {
        let head = talk.head().await.unwrap_or_default().to_lowercase();
        if head.contains("upgrade: x") {
            talk.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nhi\n").await;
        } else if !head.contains("get /never") {
            talk.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n").await;
        }
        talk.ended().await;
    })
    .await
}

async fn guarded(guest: &Guest, options: ServerOptions) -> Preview {
    let options = ServerOptions { admin_api_key: Secret::new(ROOT), ..options };
    Preview::on(guest, Fixture::with_options(options).await.with_key(ROOT)).await
}

/// An id and a key.
async fn key(preview: &Preview, body: &Value) -> (String, String) {
    let made = preview.fixture.post("/admin/keys", body).await.expect(201);
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("id"), text("key"))
}

async fn revoke(preview: &Preview, id: &str) {
    preview.fixture.delete(&format!("/admin/keys/{id}")).await.expect(200);
}

fn visit(preview: &Preview, key: &str) -> Request {
    preview.request("GET", "/").key(key)
}

fn code(answer: &Answer) -> (u16, String) {
    answer.failure()
}

#[tokio::test]
async fn a_stored_key_opens_ports_when_it_may_use_sandboxes() {
    let guest = Guest::echoing().await;
    let preview = guarded(&guest, previews()).await;
    let (id, writer) = key(&preview, &json!({ "name": "writer", "scopes": ["api:*"] })).await;
    let (_, reader) = key(&preview, &json!({ "name": "reader", "scopes": ["read:*"] })).await;
    let opened = visit(&preview, &writer).send().await;
    assert_eq!((opened.status, field(opened.text(), "x-api-key")), (200, None), "{opened:?}");
    assert!(!opened.text().contains("e2b_"), "the guest does not see it: {}", opened.text());
    assert_eq!(code(&visit(&preview, &reader).send().await), (403, "FORBIDDEN".to_owned()));
    assert_eq!(code(&visit(&preview, "").send().await), (401, "UNAUTHORIZED".to_owned()));

    revoke(&preview, &id).await;
    assert_eq!(code(&visit(&preview, &writer).send().await), (401, "UNAUTHORIZED".to_owned()));
    assert_eq!(guest.connections(), 1, "only the good key came through");

    let refused = preview.fixture.get("/admin/audit?status=403").await.expect(200);
    let record = &refused[0];
    assert_eq!((&record["actor"], &record["method"]), (&json!("key:reader"), &json!("GET")), "{record}");
    assert_eq!(record["path"], format!("//{}/", preview.host(PORT)), "{record}");
}

#[tokio::test]
async fn the_first_stored_key_closes_ports_nobody_spoke_of() {
    let preview = Preview::of(&Guest::echoing().await).await;
    assert_eq!(preview.request("GET", "/").send().await.status, 200);
    let (_, root) = key(&preview, &json!({ "name": "root", "scopes": ["read:*", "admin:*", "api:*"] })).await;
    assert_eq!(code(&preview.request("GET", "/").send().await), (401, "UNAUTHORIZED".to_owned()));
    assert_eq!(visit(&preview, &root).send().await.status, 200);
    let port = preview.fixture.api("GET", &format!("/sandboxes/{}/ports/{PORT}", preview.id)).key(&root);
    assert_eq!(port.send().await.expect(200)["access"], "token");
}

#[tokio::test]
async fn what_a_key_opened_ends_with_it() {
    let preview = guarded(&endless().await, previews()).await;
    let (id, key) = key(&preview, &json!({ "name": "gone" })).await;
    let head =
        format!("GET / HTTP/1.1\r\nHost: $HOST\r\nX-API-Key: {key}\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n");
    let mut tunnel = preview.raw(&head).await;
    let mut read = String::new();
    while !read.ends_with("hi\n") {
        assert_ne!(within(tunnel.read_line(&mut read)).await.unwrap(), 0, "{read}");
    }
    let mut events = visit(&preview, &key).open().await;
    assert_eq!(events.chunk().await.unwrap(), b"data: 1\n\n");
    let waiting = tokio::spawn(preview.request("GET", "/never").key(&key).send());
    let path = format!("/sandboxes/{}/ports/{PORT}/forward", preview.id);
    let forward = preview.fixture.api("GET", &path).key(&key);
    let forward = forward.header("Connection", "upgrade").header("Upgrade", "stacyvm-forward");
    let mut forward = tokio::io::BufReader::new(forward.begin().await);
    let mut read = String::new();
    while !read.ends_with("\r\n\r\n") {
        assert_ne!(within(forward.read_line(&mut read)).await.unwrap(), 0, "{read}");
    }
    assert!(read.starts_with("HTTP/1.1 101"), "{read}");
    forward.get_mut().write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_ne!(within(forward.read_line(&mut read)).await.unwrap(), 0, "the guest answers");

    revoke(&preview, &id).await;
    let mut rest = Vec::new();
    within(tunnel.read_to_end(&mut rest)).await.ok();
    within(forward.read_to_end(&mut rest)).await.ok();
    events.breaks_off().await;
    assert_eq!(code(&within(waiting).await.unwrap()), (401, "UNAUTHORIZED".to_owned()));
}

#[tokio::test]
async fn links_and_their_sessions_end_with_the_key_that_made_them() {
    let preview = guarded(&endless().await, previews()).await;
    let (id, maker) = key(&preview, &json!({ "name": "maker", "ttl": "10m" })).await;
    let path = format!("/sandboxes/{}/ports/{PORT}/link", preview.id);
    let made = preview.fixture.api("POST", &path).key(&maker).json(&json!({ "ttl": "24h" })).send().await.expect(201);
    let until = |value: &Value| value.as_str().unwrap().parse::<stacyvm_api::Timestamp>().unwrap();
    let key_ends = until(&preview.fixture.get("/admin/keys").await.expect(200)[0]["expires_at"]);
    assert!(until(&made["expires_at"]) <= key_ends, "no longer than the key: {made}");
    let token = made["token"].as_str().unwrap();
    assert!(!token.contains("e2b_"), "{token}");

    let page = preview.request("GET", &format!("/?stacyvm_token={token}")).key("").header("Accept", "text/html");
    let page = page.send().await;
    assert_eq!(page.status, 303, "{page:?}");
    let cookie = page.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let with_cookie = || visit(&preview, "").header("Cookie", &cookie);
    let with_header = || visit(&preview, "").header("E2B-Traffic-Access-Token", token);
    let mut streams = [with_cookie().open().await, with_header().open().await];
    for stream in &mut streams {
        assert_eq!(stream.chunk().await.unwrap(), b"data: 1\n\n");
    }

    revoke(&preview, &id).await;
    for stream in &mut streams {
        stream.breaks_off().await;
    }
    for request in [with_cookie(), with_header()] {
        assert_eq!(code(&request.send().await), (401, "UNAUTHORIZED".to_owned()));
    }
}

#[tokio::test]
async fn previews_are_no_place_to_guess_keys() {
    let options = ServerOptions {
        api_key: Secret::new("hunter2"),
        failures_per_minute: NonZeroU32::new(4),
        trusted_proxies: vec!["127.0.0.0/8".to_owned()],
        ..previews()
    };
    let guest = Guest::echoing().await;
    let preview = guarded(&guest, options).await;
    let from = |address: &str, key: &str| visit(&preview, key).header("X-Forwarded-For", address).send();
    let (guesser, other) = ("192.0.2.66", "192.0.2.7");
    for _ in 0..20 {
        assert_eq!(code(&from(guesser, "").await).0, 401, "showing no key is no guess");
    }
    for guess in ["a", "b", "c", "hunter1"] {
        assert_eq!(code(&from(guesser, guess).await).0, 401, "{guess}");
    }
    for guess in ["c", "hunter2"] {
        let answer = from(guesser, guess).await;
        assert_eq!(code(&answer), (429, "RESOURCE_LIMIT".to_owned()), "{guess}");
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
    }
    let list = preview.fixture.api("GET", "/sandboxes").key("hunter2").header("X-Forwarded-For", guesser);
    assert_eq!(list.send().await.status, 429, "guesses count together, wherever they are made");
    let opened = from(other, "hunter2").await;
    assert_eq!((opened.status, field(opened.text(), "x-forwarded-for")), (200, Some(other)), "{opened:?}");
}

#[tokio::test]
async fn a_key_that_a_public_port_does_not_need_is_not_looked_at() {
    let options = ServerOptions { failures_per_minute: NonZeroU32::new(1), ..previews() };
    let preview = guarded(&Guest::echoing().await, options).await;
    let path = format!("/sandboxes/{}/ports/{PORT}", preview.id);
    preview.fixture.api("PUT", &path).json(&json!({ "access": "public" })).send().await.expect(200);
    // The guest may have keys of its own, which are kept from it all the same.
    for _ in 0..5 {
        let answer = visit(&preview, "the-guests-own").send().await;
        assert_eq!((answer.status, field(answer.text(), "x-api-key")), (200, None), "{answer:?}");
    }
    let other = MockService::At(endless().await.address);
    preview.fixture.mock.listen(&preview.id.parse().unwrap(), 3001, other);
    let closed = preview.request("GET", "/").header("Host", &preview.host(3001)).key("wrong").send().await;
    assert_eq!(code(&closed).0, 401);
}

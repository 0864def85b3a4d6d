//! Stored API keys: made, used, bound, expired, revoked, guessed, and never
//! seen again.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use stacyvm_engine::LastAdminKey;
use stacyvm_server::{Authentication, Secret, Server, ServerError, ServerOptions};

use crate::sockets::Socket;
use crate::support::{Fixture, Request, within};

const ROOT: &str = "root-key-0123456789abcdef0123456789";

async fn keyed() -> Fixture {
    Fixture::with_keys("", ROOT).await.with_key(ROOT)
}

async fn create(fixture: &Fixture, body: &Value) -> Value {
    fixture.post("/admin/keys", body).await.expect(201)
}

fn key_of(created: &Value) -> &str {
    created["key"].as_str().unwrap()
}

fn list(fixture: &Fixture, key: &str) -> Request {
    fixture.api("GET", "/sandboxes").key(key)
}

#[tokio::test]
async fn a_key_is_shown_once_and_works_until_it_is_revoked() {
    let fixture = keyed().await;
    let created = create(&fixture, &json!({ "name": "ci", "ttl": "24h" })).await;
    let key = key_of(&created);
    assert_eq!((key.len(), &key[..4]), (44, "e2b_"));
    assert!(key[4..].bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{key}");
    assert_eq!((&created["scopes"], &created["created_by"]), (&json!(["read:*", "api:*"]), &json!("admin_key")));
    assert!(created["expires_at"].is_string() && created.get("last_used_at").is_none());

    assert_eq!(list(&fixture, key).send().await.status, 200);
    let listed = fixture.get("/admin/keys").await;
    assert!(!listed.text().contains(&key[4..]), "{}", listed.text());
    let listed = listed.expect(200);
    let about = &listed.as_array().unwrap()[0];
    assert_eq!((&about["name"], &about["prefix"]), (&json!("ci"), &json!(&key[..12])));
    assert!(about["last_used_at"].is_string() && about.get("key").is_none() && about.get("hash").is_none());

    let path = format!("/admin/keys/{}", created["id"].as_str().unwrap());
    assert_eq!(fixture.delete(&path).await.expect(200), json!({ "status": "revoked" }));
    let refused = list(&fixture, key).send().await;
    assert_eq!(refused.failure(), (401, "UNAUTHORIZED".to_owned()));
    assert_eq!(fixture.delete(&path).await.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(fixture.get("/admin/keys").await.expect(200), json!([]));
    let all = fixture.get("/admin/keys?revoked=true").await.expect(200);
    assert!(all[0]["revoked_at"].is_string());
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let fixture = keyed().await;
    for (body, part) in [
        (json!({}), "name"),
        (json!({ "name": "a b" }), "name"),
        (json!({ "name": "a", "scopes": [] }), "scopes"),
        (json!({ "name": "a", "scopes": ["operator:*"] }), "scopes"),
        (json!({ "name": "a", "ttl": "0s" }), "ttl"),
        (json!({ "name": "a", "ttl": 60 }), "ttl"),
        (json!({ "name": "a", "owner_id": "a/b" }), "owner"),
    ] {
        let answer = fixture.post("/admin/keys", &body).await;
        assert_eq!(answer.failure(), (400, "BAD_REQUEST".to_owned()), "{body}");
        assert!(answer.json()["message"].as_str().unwrap().contains(part), "{body}: {}", answer.text());
    }
    create(&fixture, &json!({ "name": "a" })).await;
    let again = fixture.post("/admin/keys", &json!({ "name": "a" })).await;
    assert_eq!(again.failure(), (409, "CONFLICT".to_owned()));
    assert_eq!(fixture.delete("/admin/keys/nonsense").await.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn the_first_key_closes_an_open_server_and_has_to_be_an_administrators() {
    let fixture = Fixture::with_keys("", "").await;
    let lone = fixture.post("/admin/keys", &json!({ "name": "lone" })).await;
    assert_eq!(lone.failure(), (409, "CONFLICT".to_owned()));
    assert_eq!(fixture.get("/sandboxes").await.status, 200, "it is open still");

    let root = create(&fixture, &json!({ "name": "root", "scopes": ["read:*", "api:*", "admin:*"] })).await;
    assert_eq!(fixture.get("/sandboxes").await.status, 401);
    assert_eq!(fixture.post("/admin/keys", &json!({ "name": "x", "scopes": ["admin:*"] })).await.status, 401);
    let key = key_of(&root).to_owned();
    let fixture = fixture.with_key(&key);
    create(&fixture, &json!({ "name": "lone" })).await;

    // Without any key left the server stays closed.
    for about in fixture.get("/admin/keys").await.expect(200).as_array().unwrap() {
        let path = format!("/admin/keys/{}", about["id"].as_str().unwrap());
        fixture
            .engine
            .keys()
            .revoke(&path.rsplit('/').next().unwrap().parse().unwrap(), LastAdminKey::Revoked)
            .await
            .unwrap();
    }
    for presented in ["", &key, "anything"] {
        assert_eq!(fixture.api("GET", "/sandboxes").key(presented).send().await.status, 401, "{presented}");
    }
}

#[tokio::test]
async fn stored_keys_count_when_the_server_decides_where_it_may_listen() {
    let fixture = Fixture::with_keys("", "").await;
    let bind = |options: ServerOptions| Server::bind(ServerOptions { port: 0, ..options }, fixture.engine.clone());
    let beyond = || ServerOptions { host: "0.0.0.0".to_owned(), ..ServerOptions::default() };
    let of = |authentication| ServerOptions { authentication, ..ServerOptions::default() };
    assert!(matches!(bind(beyond()).await, Err(ServerError::OpenBeyondLoopback { .. })));
    assert!(matches!(bind(of(Authentication::Required)).await, Err(ServerError::NoUsableKey)));
    assert!(!bind(of(Authentication::Off)).await.unwrap().demands_key());

    let key = fixture.stored_key("root", &["admin"]).await;
    let every = ServerOptions { cors_origins: vec!["*".to_owned()], ..beyond() };
    assert!(bind(every).await.unwrap().demands_key());
    assert!(bind(of(Authentication::Required)).await.is_ok());
    assert!(matches!(bind(of(Authentication::Off)).await, Err(ServerError::KeysWithoutAuthentication)));

    let about = fixture.api("GET", "/admin/keys").key(&key).send().await.expect(200);
    fixture
        .engine
        .keys()
        .revoke(&about[0]["id"].as_str().unwrap().parse().unwrap(), LastAdminKey::Revoked)
        .await
        .unwrap();
    assert!(matches!(bind(beyond()).await, Err(ServerError::NoUsableKey)), "nobody could call it");
    let proxies = ServerOptions { trusted_proxies: vec!["proxy".to_owned()], ..of(Authentication::Off) };
    assert!(matches!(bind(proxies).await, Err(ServerError::TrustedProxy(_))));
}

#[tokio::test]
async fn a_server_without_authentication_makes_no_keys() {
    let options = ServerOptions { authentication: Authentication::Off, ..ServerOptions::default() };
    let fixture = Fixture::with_options(options).await;
    let refused = fixture.post("/admin/keys", &json!({ "name": "root", "scopes": ["admin:*"] })).await;
    assert_eq!(refused.failure(), (409, "CONFLICT".to_owned()));
    assert_eq!(fixture.get("/admin/keys").await.expect(200), json!([]));
}

#[tokio::test]
async fn an_expired_key_is_refused_at_once_and_told_so() {
    let fixture = keyed().await;
    let created = create(&fixture, &json!({ "name": "brief", "ttl": "1h" })).await;
    assert_eq!(list(&fixture, key_of(&created)).send().await.status, 200);
    fixture.engine.options().clock.advance(Duration::from_hours(1));
    let refused = list(&fixture, key_of(&created)).send().await;
    assert_eq!(refused.failure(), (401, "UNAUTHORIZED".to_owned()));
    assert!(refused.text().contains("expired"), "{}", refused.text());
}

#[tokio::test]
async fn what_is_under_way_with_a_revoked_key_ends() {
    let fixture = keyed().await;
    let id = fixture.sandbox().await;
    let created = create(&fixture, &json!({ "name": "gone" })).await;
    let key = key_of(&created);
    let mut events = fixture.api("GET", "/events").key(key).open().await;
    assert_eq!(events.status, 200);
    let mut socket = Socket::open_with_key(&fixture, &id, key).await;
    socket.say(&json!({ "type": "start", "command": "sleep 600" })).await;
    assert_eq!(socket.message().await["type"], "started");
    let exec = fixture.api("POST", &format!("/sandboxes/{id}/exec")).key(key).json(&json!({ "command": "sleep 600" }));
    let exec = tokio::spawn(exec.send());
    // The command runs once the log shows it beside the socket's.
    crate::support::eventually("the command runs", || async {
        let log = fixture.get(&format!("/sandboxes/{id}/exec")).await.expect(200);
        (log.as_array().unwrap().len() == 2).then_some(())
    })
    .await;

    fixture.delete(&format!("/admin/keys/{}", created["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(socket.close_code().await, 1001);
    assert_eq!(within(exec).await.unwrap().failure(), (401, "UNAUTHORIZED".to_owned()));
    events.breaks_off().await;
    // Commands belong to the sandbox, not to the call that began them.
    let running = fixture.get(&format!("/sandboxes/{id}/exec")).await.expect(200);
    assert!(running.as_array().unwrap().iter().all(|exec| exec["status"] == "running"), "{running}");
}

#[tokio::test]
async fn a_key_may_revoke_itself_and_hears_so() {
    let fixture = Fixture::with_keys("", "").await;
    let root = create(&fixture, &json!({ "name": "root", "scopes": ["admin:*"] })).await;
    let path = format!("/admin/keys/{}?force=true", root["id"].as_str().unwrap());
    let answer = fixture.api("DELETE", &path).key(key_of(&root)).send().await;
    assert_eq!(answer.expect(200), json!({ "status": "revoked" }));
}

#[tokio::test]
async fn the_last_key_of_an_administrator_goes_only_by_force() {
    let fixture = Fixture::with_keys("", "").await;
    let scopes = ["read:*", "api:*", "admin:*"];
    let root = create(&fixture, &json!({ "name": "root", "scopes": scopes })).await;
    let fixture = fixture.with_key(key_of(&root));
    let path = format!("/admin/keys/{}", root["id"].as_str().unwrap());
    let refused = fixture.delete(&path).await;
    assert_eq!(refused.failure(), (409, "CONFLICT".to_owned()));
    assert!(refused.json()["hint"].as_str().unwrap().contains("force=true"), "{}", refused.text());
    assert_eq!(fixture.delete(&format!("{path}?force=false")).await.status, 409);
    assert_eq!(fixture.get("/sandboxes").await.status, 200, "it works still");
    assert_eq!(fixture.delete(&format!("{path}?force=true")).await.expect(200), json!({ "status": "revoked" }));
    assert_eq!(fixture.get("/sandboxes").await.status, 401);

    // The configuration's key is another way in.
    let fixture = keyed().await;
    let other = create(&fixture, &json!({ "name": "other", "scopes": ["admin:*"] })).await;
    fixture.delete(&format!("/admin/keys/{}", other["id"].as_str().unwrap())).await.expect(200);
}

#[tokio::test]
async fn a_bound_key_acts_for_its_owner_only() {
    let fixture = keyed().await;
    let bound = create(&fixture, &json!({ "name": "alice", "owner_id": "alice" })).await;
    let spawn = |header: &str, body: &str| {
        let request = fixture.api("POST", "/sandboxes").key(key_of(&bound)).header("X-User-ID", header);
        request.json(&json!({ "owner_id": body }))
    };
    for (header, body) in [("", ""), ("", "alice"), ("alice", ""), ("alice", "alice")] {
        assert_eq!(spawn(header, body).send().await.expect(201)["owner_id"], "alice", "{header} {body}");
    }
    for (header, body) in [("bob", ""), ("", "bob"), ("alice", "bob")] {
        let refused = spawn(header, body).send().await;
        assert_eq!(refused.failure(), (403, "FORBIDDEN".to_owned()), "{header} {body}");
        assert_eq!(refused.json()["message"], "this key acts for alice only");
    }
    // A key that is bound to nobody names whom it likes, and the header wins.
    let free = fixture.api("POST", "/sandboxes").header("X-User-ID", "carol").json(&json!({ "owner_id": "bob" }));
    assert_eq!(free.send().await.expect(201)["owner_id"], "carol");
    let quota = fixture.api("PUT", "/quotas/alice").key(key_of(&bound)).json(&json!({ "max_sandboxes": 100 }));
    assert_eq!(quota.send().await.failure(), (403, "FORBIDDEN".to_owned()), "it must not lift its own limits");
    let quota = fixture.api("DELETE", "/quotas/alice").key(key_of(&bound));
    assert_eq!(quota.send().await.failure(), (403, "FORBIDDEN".to_owned()));
    fixture.api("PUT", "/quotas/alice").json(&json!({ "max_sandboxes": 100 })).send().await.expect(200);
}

#[tokio::test]
async fn an_address_that_guesses_is_slowed_and_random_keys_are_not() {
    let options = ServerOptions {
        api_key: Secret::new("hunter2"),
        admin_api_key: Secret::new(ROOT),
        failures_per_minute: NonZeroU32::new(5),
        trusted_proxies: vec!["127.0.0.0/8".to_owned()],
        ..ServerOptions::default()
    };
    let fixture = Fixture::with_options(options).await;
    let stored = fixture.stored_key("stored", &["read"]).await;
    let from = |address: &str, key: &str| list(&fixture, key).header("X-Forwarded-For", address).send();
    let (guesser, other) = ("192.0.2.66", "192.0.2.7");
    for guess in ["", "a", "hunter1", "e2b_0", "b"] {
        assert_eq!(from(guesser, guess).await.failure(), (401, "UNAUTHORIZED".to_owned()), "{guess}");
    }
    for guess in ["c", "hunter2", ""] {
        let answer = from(guesser, guess).await;
        assert_eq!(answer.failure(), (429, "RESOURCE_LIMIT".to_owned()), "{guess}: nothing is learnt by guessing on");
        let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=12).contains(&seconds), "{seconds}");
    }
    for key in [stored.as_str(), ROOT] {
        assert_eq!(from(guesser, key).await.status, 200, "a key that cannot be guessed opens still");
    }
    assert_eq!(from(other, "hunter2").await.status, 200, "others are not affected");
    assert_eq!(from(other, "x").await.status, 401);
    let probe = fixture.api("GET", "/ready").header("X-Forwarded-For", guesser).send().await;
    assert_eq!(probe.status, 200);
}

#[tokio::test]
async fn thousands_of_wrong_keys_open_nothing_and_leave_little() {
    let fixture = Fixture::with_keys("", ROOT).await;
    let real = fixture.stored_key("real", &["read"]).await;
    for number in 0..2000_u32 {
        // One digit off, in every place.
        let at = 4 + (number as usize % 40);
        let mut wrong = real.clone();
        let digit =
            char::from_digit((real[at..=at].parse::<u32>().unwrap_or(number) + 1 + number / 40) % 16, 16).unwrap();
        wrong.replace_range(at..=at, &digit.to_string());
        if wrong != real {
            let answer = list(&fixture, &wrong).send().await;
            assert_eq!(answer.status, 401, "{wrong}");
        }
    }
    assert_eq!(list(&fixture, &real).send().await.status, 200);
    let fixture = fixture.with_key(ROOT);
    let records = fixture.get("/admin/audit?limit=500&status=401").await.expect(200);
    let count = records.as_array().unwrap().len();
    assert!((1..=60).contains(&count), "refusals of one address are recorded up to a bound: {count}");
}

/// Everything that any server of these tests logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn holds(bytes: &[u8], part: &str) -> bool {
    bytes.windows(part.len()).any(|window| window == part.as_bytes())
}

#[tokio::test]
async fn a_key_appears_nowhere_but_in_the_answer_that_made_it() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).init();

    let mut fixture = keyed().await;
    let created = create(&fixture, &json!({ "name": "marker", "scopes": ["read:*", "api:*", "admin:*"] })).await;
    let marker = key_of(&created).to_owned();
    let wrong = format!("e2b_{}", "5eed".repeat(10));
    let fixture_key = |request: Request, key: &str| request.key(key).header("User-Agent", &format!("curl {key}"));
    for key in [marker.as_str(), &wrong, ROOT] {
        for (method, path) in [
            ("GET", format!("/sandboxes/{key}")),
            ("GET", format!("/nothing/{key}?key={key}")),
            ("DELETE", format!("/admin/keys/{key}")),
            ("POST", format!("/sandboxes/{key}/exec")),
            ("DELETE", format!("/sandboxes/{key}")),
        ] {
            let request = fixture_key(fixture.api(method, &path), key);
            let request = if method == "POST" { request.json(&json!({ "command": key })) } else { request };
            request.header("X-Request-ID", "marker-test").send().await;
        }
        let admin = fixture.api("GET", "/admin/keys").header("X-API-Key", "").header("X-Admin-API-Key", key);
        admin.send().await;
    }
    for path in [
        "/admin/keys?revoked=true",
        "/admin/audit?limit=500",
        "/admin/audit?limit=500&format=csv",
        "/diagnostics",
        "/metrics",
        "/metrics/prometheus",
    ] {
        let answer = fixture.get(path).await;
        assert_eq!(answer.status, 200, "{path}");
        for key in [&marker[4..], &wrong[4..], ROOT] {
            assert!(!holds(&answer.body, key), "{path} shows {key}");
        }
    }
    assert!(fixture.get("/admin/audit?path=e2b_%E2%80%A6").await.expect(200).as_array().unwrap().len() > 3);

    fixture.stop().await;
    fixture.engine.shutdown().await;
    let mut files = 0;
    for entry in std::fs::read_dir(fixture.data()).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        files += 1;
        for key in [&marker[4..], &wrong[4..], ROOT] {
            assert!(!holds(&bytes, key), "{} holds {key}", path.display());
        }
    }
    assert!(files > 0);
    let log = log.0.lock().unwrap();
    assert!(holds(&log, "marker-test"), "the log was looked at");
    for key in [&marker[4..], &wrong[4..], ROOT] {
        assert!(!holds(&log, key), "the log holds {key}");
    }
}

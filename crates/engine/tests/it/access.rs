//! API keys and the audit log: what is kept of them, and for how long.

use std::sync::Arc;
use std::time::Duration;

use stacyvm_api::{ApiKeyRequest, AuditQuery, AuditRecord, CreatedApiKey, ErrorCode, KeyScope};
use stacyvm_engine::{AuditEntry, AuditKind, Engine, KeyLookup, Keys, LastAdminKey, RevokedKeys, StoredKey};

use crate::harness::{Host, PATIENCE};

fn named(name: &str) -> ApiKeyRequest {
    ApiKeyRequest { name: name.to_owned(), ..ApiKeyRequest::default() }
}

async fn make(keys: &Keys, request: ApiKeyRequest) -> CreatedApiKey {
    keys.create("tester", request).await.unwrap()
}

fn valid(keys: &Keys, key: &str) -> Option<Arc<StoredKey>> {
    match keys.look_up(key.as_bytes()) {
        KeyLookup::Valid(key) => Some(key),
        KeyLookup::Expired | KeyLookup::Unknown => None,
    }
}

fn call(kind: AuditKind, actor: &str, path: &str, status: u16) -> AuditEntry {
    AuditEntry {
        kind,
        actor: actor.to_owned(),
        key: None,
        owner: Some("alice".parse().unwrap()),
        tenant: None,
        method: "POST".to_owned(),
        path: path.to_owned(),
        status,
        duration: Duration::from_millis(7),
        request_id: "r-1".to_owned(),
        remote_addr: "192.0.2.1".to_owned(),
        user_agent: "test".to_owned(),
    }
}

async fn paths(engine: &Engine, query: AuditQuery) -> Vec<String> {
    engine.audit(&query).await.unwrap().items.into_iter().map(|record| record.path).collect()
}

/// Every byte of the database, with what is not yet moved into the main file.
fn database_bytes(host: &Host) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in std::fs::read_dir(host.directory.path()).unwrap() {
        bytes.extend(std::fs::read(entry.unwrap().path()).unwrap());
    }
    bytes
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[tokio::test]
async fn a_key_is_found_by_itself_alone_and_survives_a_restart() {
    let host = Host::new();
    let engine = host.engine().await;
    assert!(!engine.keys().ever_made());
    let request = ApiKeyRequest {
        scopes: Some(vec![KeyScope::Admin, KeyScope::Read, KeyScope::Read]),
        owner_id: Some("alice".parse().unwrap()),
        ..named("ci")
    };
    let made = make(engine.keys(), request).await;
    assert_eq!(made.about.scopes, [KeyScope::Read, KeyScope::Admin], "each once, in order");
    assert!(made.key.starts_with(&made.about.prefix));
    assert_eq!((made.about.prefix.len(), made.key.len()), (12, 44));
    drop(engine);

    let engine = host.engine().await;
    let found = valid(engine.keys(), &made.key).unwrap();
    assert_eq!((found.id(), found.name(), found.owner().unwrap().as_str()), (&made.about.id, "ci", "alice"));
    assert_eq!(KeyScope::ALL.map(|scope| found.grants(scope)), [true, false, true]);
    assert!(engine.keys().ever_made());
    let mut wrong = made.key.clone();
    wrong.replace_range(43..44, if made.key.ends_with('0') { "1" } else { "0" });
    for other in ["", "e2b_", &wrong, &made.key.to_uppercase(), &format!("{} ", made.key), made.about.id.as_str()] {
        assert!(valid(engine.keys(), other).is_none(), "{other:?}");
    }
}

#[tokio::test]
async fn the_database_never_holds_a_key() {
    let host = Host::new();
    let engine = host.engine().await;
    let made = make(engine.keys(), named("ci")).await;
    valid(engine.keys(), &made.key).unwrap();
    engine.shutdown().await;
    let bytes = database_bytes(&host);
    assert!(holds(&bytes, made.about.prefix.as_bytes()), "the right files are looked at");
    assert!(!holds(&bytes, made.key.as_bytes()) && !holds(&bytes, made.key.strip_prefix("e2b_").unwrap().as_bytes()));
}

#[tokio::test]
async fn names_scopes_and_spans_are_checked() {
    let host = Host::new();
    let engine = host.engine().await;
    let keys = engine.keys();
    let refusal = |request| async { keys.create("tester", request).await.unwrap_err() };
    for name in ["", " ", "a b", "a/b", "é", "key:x", &"x".repeat(65)] {
        assert_eq!(refusal(named(name)).await.code(), ErrorCode::BadRequest, "{name:?}");
    }
    let none = ApiKeyRequest { scopes: Some(Vec::new()), ..named("a") };
    assert!(refusal(none).await.to_string().contains("scope"));
    let no_time = ApiKeyRequest { ttl: Some("0".parse().unwrap()), ..named("a") };
    assert!(refusal(no_time).await.to_string().contains("ttl"));
    assert!(!keys.ever_made(), "a refused key leaves the server open");

    let made = make(keys, named("a.b_c-d@e")).await;
    assert_eq!(made.about.scopes, [KeyScope::Read, KeyScope::Api], "the default");
    let again = refusal(named("a.b_c-d@e")).await;
    assert_eq!((again.code(), again.hint().is_some()), (ErrorCode::Conflict, true));
    keys.revoke(&made.about.id, LastAdminKey::Kept).await.unwrap();
    make(keys, named("a.b_c-d@e")).await;
}

#[tokio::test]
async fn the_last_key_of_an_administrator_is_kept_unless_somebody_insists() {
    let host = Host::new();
    let engine = host.engine().await;
    let keys = engine.keys();
    let admin = |name: &str, ttl: Option<&str>| ApiKeyRequest {
        scopes: Some(vec![KeyScope::Admin]),
        ttl: ttl.map(|ttl| ttl.parse().unwrap()),
        ..named(name)
    };
    let first = make(keys, admin("first", None)).await;
    let ci = make(keys, named("ci")).await;
    let refused = keys.revoke(&first.about.id, LastAdminKey::Kept).await.unwrap_err();
    assert_eq!((refused.code(), refused.to_string().contains("`first` is the last key")), (ErrorCode::Conflict, true));
    assert!(refused.hint().unwrap().contains("force") && valid(keys, &first.key).is_some());
    keys.revoke(&ci.about.id, LastAdminKey::Kept).await.expect("it administers nothing");

    let second = make(keys, admin("second", None)).await;
    keys.revoke(&first.about.id, LastAdminKey::Kept).await.expect("there is another");
    keys.revoke(&second.about.id, LastAdminKey::Kept).await.unwrap_err();
    keys.revoke(&second.about.id, LastAdminKey::Revoked).await.unwrap();
    assert!(!keys.any_usable(Some(KeyScope::Admin)));
}

#[tokio::test]
async fn revocation_takes_effect_at_once_and_for_ever() {
    let host = Host::new();
    let engine = host.engine().await;
    let (gone, stays) = (make(engine.keys(), named("gone")).await, make(engine.keys(), named("stays")).await);
    let held = valid(engine.keys(), &gone.key).unwrap();
    assert_eq!(engine.keys().valid(&gone.about.id).unwrap().name(), "gone");
    engine.keys().revoke(&gone.about.id, LastAdminKey::Kept).await.unwrap();
    assert!(valid(engine.keys(), &gone.key).is_none() && engine.keys().valid(&gone.about.id).is_none());
    assert_eq!(engine.keys().valid(&stays.about.id).unwrap().name(), "stays");
    tokio::time::timeout(PATIENCE, held.ended()).await.expect("what is under way is told");
    assert_eq!(engine.keys().revoke(&gone.about.id, LastAdminKey::Kept).await.unwrap_err().code(), ErrorCode::NotFound);
    let listed = |revoked| {
        let keys = engine.keys().clone();
        async move { keys.list(revoked).await.unwrap().into_iter().map(|key| key.name).collect::<Vec<_>>() }
    };
    assert_eq!(listed(RevokedKeys::LeftOut).await, ["stays"]);
    assert_eq!(listed(RevokedKeys::Included).await.len(), 2);
    engine.crash();
    drop(engine);

    let engine = host.engine().await;
    assert!(valid(engine.keys(), &gone.key).is_none() && valid(engine.keys(), &stays.key).is_some());
    engine.keys().revoke(&stays.about.id, LastAdminKey::Kept).await.unwrap();
    assert!(engine.keys().ever_made() && !engine.keys().any_usable(None));
}

#[tokio::test]
async fn a_key_ends_with_its_time() {
    let host = Host::new();
    let engine = host.engine().await;
    let made = make(engine.keys(), ApiKeyRequest { ttl: Some("1h".parse().unwrap()), ..named("short") }).await;
    assert_eq!(made.about.expires_at, Some(made.about.created_at + Duration::from_hours(1)));
    host.clock.advance(Duration::from_secs(3599));
    assert!(valid(engine.keys(), &made.key).is_some() && engine.keys().any_usable(Some(KeyScope::Api)));
    host.clock.advance(Duration::from_secs(1));
    assert!(matches!(engine.keys().look_up(made.key.as_bytes()), KeyLookup::Expired));
    assert!(engine.keys().valid(&made.about.id).is_none() && !engine.keys().any_usable(None));

    let brief = make(engine.keys(), ApiKeyRequest { ttl: Some("50ms".parse().unwrap()), ..named("brief") }).await;
    if let Some(held) = valid(engine.keys(), &brief.key) {
        tokio::time::timeout(PATIENCE, held.ended()).await.expect("what is under way is told");
    }
}

#[tokio::test]
async fn the_last_use_is_shown_at_once_and_kept() {
    let host = Host::new();
    let engine = host.engine().await;
    let made = make(engine.keys(), named("ci")).await;
    let last_used = |engine: &Engine| {
        let keys = engine.keys().clone();
        async move { keys.list(RevokedKeys::LeftOut).await.unwrap()[0].last_used_at }
    };
    assert_eq!(last_used(&engine).await, None);
    valid(engine.keys(), &made.key).unwrap();
    let first = last_used(&engine).await.unwrap();
    host.clock.advance(Duration::from_mins(2));
    valid(engine.keys(), &made.key).unwrap();
    let second = last_used(&engine).await.unwrap();
    assert!(second >= first + Duration::from_mins(2));
    engine.shutdown().await;
    let engine = host.engine().await;
    assert_eq!(last_used(&engine).await, Some(second));
}

#[tokio::test]
async fn the_first_key_can_be_made_without_an_engine() {
    let host = Host::new();
    let path = host.options().database_path;
    let keys = Keys::open(&path).await.unwrap();
    let made = make(&keys, named("first")).await;
    keys.close().await.unwrap();
    let engine = host.engine().await;
    assert!(valid(engine.keys(), &made.key).is_some());
}

#[tokio::test]
async fn calls_are_found_by_what_they_were() {
    let host = Host::new();
    let engine = host.engine().await;
    engine.record_call(call(AuditKind::Call, "key:ci", "/api/v1/sandboxes", 201));
    engine.record_call(AuditEntry {
        method: "GET".to_owned(),
        ..call(AuditKind::Admin, "admin_key", "/api/v1/admin/keys", 200)
    });
    engine.record_call(call(AuditKind::Denied, "anonymous", "/api/v1/templates", 401));
    let all = engine.audit(&AuditQuery::default()).await.unwrap();
    assert_eq!(all.items.iter().map(|record| record.status).collect::<Vec<_>>(), [401, 200, 201], "newest first");
    let AuditRecord { actor, method, duration_ms, request_id, remote_addr, user_agent, owner_id, .. } = &all.items[2];
    assert_eq!((actor.as_str(), method.as_str(), *duration_ms), ("key:ci", "POST", 7));
    assert_eq!((request_id.as_str(), remote_addr.as_str(), user_agent.as_str()), ("r-1", "192.0.2.1", "test"));
    assert_eq!(owner_id.as_ref().unwrap().as_str(), "alice");

    let with = |set: fn(&mut AuditQuery)| {
        let mut query = AuditQuery::default();
        set(&mut query);
        paths(&engine, query)
    };
    assert_eq!(with(|query| query.actor = Some("key:ci".to_owned())).await, ["/api/v1/sandboxes"]);
    assert_eq!(with(|query| query.actor = Some("key".to_owned())).await, [""; 0], "actors match exactly");
    assert_eq!(with(|query| query.method = Some("get".to_owned())).await, ["/api/v1/admin/keys"]);
    assert_eq!(with(|query| query.status = Some(401)).await, ["/api/v1/templates"]);
    assert_eq!(with(|query| query.path = Some("admin".to_owned())).await, ["/api/v1/admin/keys"]);
    assert_eq!(with(|query| query.path = Some("%".to_owned())).await, [""; 0], "a part is no pattern");
}

#[tokio::test]
async fn pages_follow_each_other_and_limits_are_checked() {
    let host = Host::new();
    let engine = host.engine().await;
    for number in 0..5 {
        engine.record_call(call(AuditKind::Call, "a", &format!("/{number}"), 200));
    }
    let page = engine.audit(&AuditQuery { limit: Some(3), ..AuditQuery::default() }).await.unwrap();
    let read: Vec<_> = page.items.iter().map(|record| record.path.as_str()).collect();
    assert_eq!(read, ["/4", "/3", "/2"]);
    let next = AuditQuery { limit: Some(3), cursor: page.next_cursor, ..AuditQuery::default() };
    let page = engine.audit(&next).await.unwrap();
    assert_eq!((page.items.len(), page.next_cursor), (2, None));
    for query in [
        AuditQuery { limit: Some(0), ..AuditQuery::default() },
        AuditQuery { status: Some(0), ..AuditQuery::default() },
        AuditQuery { cursor: Some("x".to_owned()), ..AuditQuery::default() },
    ] {
        assert_eq!(engine.audit(&query).await.unwrap_err().code(), ErrorCode::BadRequest, "{query:?}");
    }
    assert_eq!(paths(&engine, AuditQuery { limit: Some(u64::MAX), ..AuditQuery::default() }).await.len(), 5);
}

#[tokio::test]
async fn old_calls_go_and_refusals_cannot_displace_administration() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.retention_interval = Duration::from_millis(20);
    options.retention.audit_refusals = 2;
    options.retention.audit_calls = 1;
    options.retention.audit_log = Some(Duration::from_hours(1));
    let engine = host.engine_with(options).await;
    engine.record_call(call(AuditKind::Admin, "a", "/admin", 200));
    for number in 0..4 {
        engine.record_call(call(AuditKind::Denied, "a", &format!("/denied/{number}"), 401));
        engine.record_call(call(AuditKind::Call, "a", &format!("/call/{number}"), 200));
    }
    let remain = |expected: &'static [&'static str]| {
        let engine = engine.clone();
        async move {
            let wait = async {
                while paths(&engine, AuditQuery::default()).await != expected {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not in time: {expected:?}"));
        }
    };
    remain(&["/call/3", "/denied/3", "/denied/2", "/admin"]).await;
    host.clock.advance(Duration::from_secs(3601));
    remain(&[]).await;
}

#[tokio::test]
async fn a_long_path_is_cut() {
    let host = Host::new();
    let engine = host.engine().await;
    engine.record_call(call(AuditKind::Call, "a", &"x".repeat(10_000), 200));
    assert_eq!(paths(&engine, AuditQuery::default()).await[0].len(), 2048);
}

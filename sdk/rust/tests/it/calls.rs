//! Requests as they leave, answers and refusals as they arrive.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use serde_json::{Value, json};
use stacyvm_api::{ApiKeyRequest, AuditQuery, CreateRequest, ErrorCode, KeyScope, ListQuery, SandboxState};
use stacyvm_client::{Client, ClientError, ClientOptions, UploadOptions};

use crate::stub::{ID, Stub};

fn record(id: &str) -> Value {
    json!({
        "id": id, "state": "running", "provider": "oci", "image": "host", "memory_mb": 512, "vcpus": 1,
        "created_at": "2026-11-23T14:00:00Z", "expires_at": "2026-11-23T14:30:00Z", "a_later_field": {"x": 1},
    })
}

#[tokio::test]
async fn create_sends_key_owner_and_body() {
    let seen = Arc::new(Mutex::new(None));
    let routes = Router::new().route(
        "/sandboxes",
        post({
            let seen = seen.clone();
            move |headers: HeaderMap, body: Bytes| async move {
                *seen.lock().unwrap() = Some((headers, serde_json::from_slice::<Value>(&body).unwrap()));
                (StatusCode::CREATED, Json(record(ID)))
            }
        }),
    );
    let stub = Stub::start(routes).await;
    let request = CreateRequest { image: Some("host".into()), vcpus: Some(0.5), ..CreateRequest::default() };
    let sandbox = stub.client.create(&request).await.unwrap();
    assert_eq!((sandbox.id.as_str(), sandbox.state), (ID, SandboxState::Running));
    let (headers, body) = seen.lock().unwrap().take().unwrap();
    assert_eq!(headers["x-api-key"], "the-key");
    assert_eq!(headers["x-user-id"], "alice");
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(body, json!({"image": "host", "vcpus": 0.5}), "fields that are not set are not sent");
}

#[tokio::test]
async fn a_refusal_keeps_code_message_hint_and_request_id() {
    let refuse = || async {
        let body = json!({"code": "IMAGE_NOT_FOUND", "message": "no image `x`", "hint": "try `host`"});
        (StatusCode::NOT_FOUND, [("x-request-id", "req-7")], Json(body))
    };
    let stub = Stub::start(Router::new().route("/sandboxes", post(refuse))).await;
    let error = stub.client.create(&CreateRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.hint()), (Some(ErrorCode::ImageNotFound), Some("try `host`")));
    let ClientError::Api(error) = error else { panic!("{error:?}") };
    assert_eq!((error.status, error.message.as_str()), (404, "no image `x`"));
    assert_eq!(error.request_id.as_deref(), Some("req-7"));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let away = || async { (StatusCode::FOUND, [("location", "http://127.0.0.1:9/")], "") };
    let stub = Stub::start(Router::new().route("/health", get(away))).await;
    let ClientError::Api(error) = stub.client.health().await.unwrap_err() else { panic!("not an answer") };
    assert_eq!(error.status, 302);
}

#[tokio::test]
async fn nobody_listening_is_an_error_of_its_own_with_a_hint() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let client = Client::new(&ClientOptions::new(format!("127.0.0.1:{port}"))).unwrap();
    let error = client.health().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("no server answers at http://127.0.0.1:{port}"));
    assert!(error.hint().unwrap().contains("stacyvm serve"));
}

#[tokio::test]
async fn an_answer_that_is_not_the_promised_one_names_the_path() {
    let stub = Stub::start(Router::new().route("/version", get(|| async { "<html>" }))).await;
    let error = stub.client.version().await.unwrap_err();
    assert!(matches!(&error, ClientError::Protocol(text) if text.contains("/api/v1/version")), "{error:?}");
}

#[tokio::test]
async fn list_all_follows_cursors_and_stops_at_one_that_repeats() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let page = move |Query(query): Query<ListQuery>| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            assert_eq!(query.state, Some(SandboxState::Running));
            match query.cursor.as_deref() {
                None => ([("x-next-cursor", "two")], Json(vec![record("sb-a")])),
                Some("two") => ([("x-next-cursor", "two")], Json(vec![record("sb-b")])),
                other => panic!("cursor {other:?} was never given"),
            }
        }
    };
    let stub = Stub::start(Router::new().route("/sandboxes", get(page))).await;
    let query = ListQuery { state: Some(SandboxState::Running), ..ListQuery::default() };
    let ids: Vec<_> = stub.client.list_all(&query).await.unwrap().into_iter().map(|it| it.id.to_string()).collect();
    assert_eq!((ids, calls.load(Ordering::Relaxed)), (vec!["sb-a".to_owned(), "sb-b".to_owned()], 2));
}

#[tokio::test]
async fn a_made_key_is_in_its_answer_and_never_in_debug_output() {
    let made = json!({"id": "key-00000000000000000001", "name": "ci", "prefix": "e2b_01234567", "scopes": ["read:*"],
                      "created_at": "2026-11-23T14:00:00Z", "created_by": "admin_key", "key": "e2b_hush"});
    let create = |body: Bytes| async move {
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body, json!({"name": "ci", "scopes": ["read:*"], "ttl": "1h0m0s"}));
        (StatusCode::CREATED, Json(made))
    };
    let stub = Stub::start(Router::new().route("/admin/keys", post(create))).await;
    let request = ApiKeyRequest {
        name: "ci".into(),
        scopes: Some(vec![KeyScope::Read]),
        ttl: Some("1h".parse().unwrap()),
        owner_id: None,
    };
    let made = stub.client.create_key(&request).await.unwrap();
    assert_eq!((made.key.as_str(), made.about.name.as_str()), ("e2b_hush", "ci"));
    assert!(!format!("{made:?}").contains("hush"));
}

#[tokio::test]
async fn the_audit_log_is_read_by_page_and_as_a_table() {
    let record = json!({"id": 7, "actor": "key:ci", "method": "POST", "path": "/api/v1/sandboxes", "status": 201,
                        "duration_ms": 3, "request_id": "r", "remote_addr": "::1", "user_agent": "",
                        "tenant_id": "", "created_at": "2026-11-23T14:00:00Z"});
    let audit = |Query(query): Query<AuditQuery>| async move {
        assert_eq!(query.actor.as_deref(), Some("key:ci"));
        match query.format.as_deref() {
            None => ([("x-next-cursor", "7")], Json(vec![record])).into_response(),
            Some("csv") => "id\n7\n".into_response(),
            other => panic!("format {other:?}"),
        }
    };
    let stub = Stub::start(Router::new().route("/admin/audit", get(audit))).await;
    let query = AuditQuery { actor: Some("key:ci".into()), ..AuditQuery::default() };
    let page = stub.client.audit(&query).await.unwrap();
    assert_eq!((page.items[0].status, page.next_cursor.as_deref()), (201, Some("7")));
    assert_eq!(stub.client.audit_csv(&query).await.unwrap(), "id\n7\n");
}

#[tokio::test]
async fn not_ready_is_an_answer() {
    let body = json!({"status": "not_ready", "version": "1", "uptime": "1s", "store": "ok", "providers": [],
                      "ready_providers": 0, "total_providers": 1});
    let ready = move || async move { (StatusCode::SERVICE_UNAVAILABLE, Json(body)) };
    let stub = Stub::start(Router::new().route("/ready", get(ready))).await;
    assert_eq!(stub.client.ready().await.unwrap().status, "not_ready");
}

#[tokio::test]
async fn files_travel_as_the_bytes_they_are() {
    const BYTES: &[u8] = b"\0\xff\xfe not text \r\n";
    type Stored = Arc<Mutex<Option<(Value, HeaderMap, Bytes)>>>;
    let stored: Stored = Arc::default();
    let put_file = {
        let stored = stored.clone();
        move |Path(id): Path<String>, Query(query): Query<Value>, headers: HeaderMap, body: Bytes| async move {
            assert_eq!(id, ID);
            *stored.lock().unwrap() = Some((query, headers, body));
            Json(json!({"status": "written"}))
        }
    };
    let get_file = |headers: HeaderMap| async move {
        let range = headers.get("range").map(|range| range.to_str().unwrap().to_owned());
        match range.as_deref() {
            None => BYTES.into_response(),
            Some("bytes=1-2") => (StatusCode::PARTIAL_CONTENT, &BYTES[1..=2]).into_response(),
            other => panic!("range {other:?}"),
        }
    };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/files", put(put_file).get(get_file))).await;

    let options = UploadOptions { mode: Some("0755".into()), size_bytes: Some(BYTES.len() as u64) };
    stub.sandbox().upload("/tmp/a b+c", BYTES, &options).await.unwrap();
    let (query, headers, body) = stored.lock().unwrap().take().unwrap();
    assert_eq!(query, json!({"path": "/tmp/a b+c", "mode": "0755"}));
    assert_eq!(headers["x-stacyvm-upload"], "1");
    assert_eq!(headers["content-length"], BYTES.len().to_string());
    assert_eq!(&body[..], BYTES);

    assert_eq!(stub.sandbox().read_file("/x").await.unwrap(), BYTES);
    assert_eq!(stub.sandbox().download("/x", Some(1..=2)).await.unwrap().bytes().await.unwrap(), &BYTES[1..=2]);
}

#[tokio::test]
async fn a_download_that_is_cut_off_is_not_a_whole_file() {
    let cut = || async {
        let chunks = [Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("cut"))];
        Response::new(Body::from_stream(futures_util::stream::iter(chunks)))
    };
    let stub = Stub::start(Router::new().route("/sandboxes/{id}/files", get(cut))).await;
    let error = stub.sandbox().read_file("/x").await.unwrap_err();
    assert!(matches!(error, ClientError::Transport { .. }), "{error:?}");
}

#[tokio::test]
async fn names_are_one_path_segment() {
    let template = |Path(name): Path<String>| async move { Json(json!({"name": name, "image": "host"})) };
    let stub = Stub::start(Router::new().route("/templates/{name}", get(template))).await;
    assert_eq!(stub.client.template("a/b ?#%2F").await.unwrap().name, "a/b ?#%2F");
}

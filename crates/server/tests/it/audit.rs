//! The audit log: every change and every refusal, streams included, and never
//! what was in them.

use serde_json::{Value, json};
use stacyvm_api::AuditQuery;
use stacyvm_providers::mock::{Fault, MockOperation, Times};
use stacyvm_server::ServerOptions;

use crate::sockets::Socket;
use crate::support::{Fixture, eventually, within};

const ROOT: &str = "root-key";

async fn keyed() -> Fixture {
    Fixture::with_keys("user-key", ROOT).await.with_key("user-key")
}

/// Records that a query finds, newest first.
async fn records(fixture: &Fixture, query: &str) -> Vec<Value> {
    let answer = fixture.api("GET", &format!("/admin/audit{query}")).key(ROOT).send().await;
    answer.expect(200).as_array().unwrap().clone()
}

/// Method, path below the base, status and actor of each record.
fn lines(records: &[Value]) -> Vec<String> {
    let text = |record: &Value, key: &str| record[key].as_str().unwrap().trim_start_matches("/api/v1").to_owned();
    let line = |record: &Value| {
        format!("{} {} {} {}", text(record, "method"), text(record, "path"), record["status"], text(record, "actor"))
    };
    records.iter().rev().map(line).collect()
}

#[tokio::test]
async fn changes_are_recorded_with_who_and_where_and_reads_are_not() {
    let fixture = keyed().await;
    let key = fixture.stored_key("ci", &["read", "api"]).await;
    let spawn = fixture.api("POST", "/sandboxes").key(&key).header("User-Agent", "sdk/1").header("X-User-ID", "alice");
    let spawn = spawn.header("X-Request-ID", "r-1").json(&json!({}));
    let id = spawn.send().await.expect(201)["id"].as_str().unwrap().to_owned();
    fixture.get("/sandboxes").await.expect(200);
    fixture.get(&format!("/sandboxes/{id}")).await.expect(200);
    fixture.post("/sandboxes/admission", &json!({})).await.expect(200);
    fixture.post("/templates", &json!({ "name": 7 })).await.failure();
    fixture.delete(&format!("/sandboxes/{id}?secret=query")).await.expect(200);

    let found = records(&fixture, "").await;
    assert_eq!(
        lines(&found),
        [
            "POST /sandboxes 201 key:ci",
            "POST /templates 400 api_key",
            format!("DELETE /sandboxes/{id} 200 api_key").as_str(),
        ]
    );
    let first = found.last().unwrap();
    assert_eq!((&first["request_id"], &first["user_agent"]), (&json!("r-1"), &json!("sdk/1")));
    assert_eq!((&first["remote_addr"], &first["owner_id"]), (&json!("127.0.0.1"), &json!("alice")));
    assert_eq!((&first["tenant_id"], first["id"].is_u64(), first["duration_ms"].is_u64()), (&json!(""), true, true));
    assert!(first["key_id"].as_str().unwrap().starts_with("key-") && first["created_at"].is_string());
    // What reads the log is administration, and recorded too.
    assert_eq!(lines(&records(&fixture, "?actor=admin_key").await), ["GET /admin/audit 200 admin_key"]);
}

#[tokio::test]
async fn streams_sockets_and_uploads_are_recorded_without_what_is_in_them() {
    let fixture = keyed().await;
    let id = fixture.sandbox().await;
    let secret = "hush-0123456789";
    let exec = json!({ "command": format!("echo {secret}"), "stream": true, "env": { "TOKEN": secret } });
    let stream = fixture.post(&format!("/sandboxes/{id}/exec"), &exec).await;
    assert!(stream.text().contains(secret));
    let mut socket = Socket::open_with_key(&fixture, &id, "user-key").await;
    socket.say(&json!({ "type": "start", "command": secret })).await;
    socket.message().await;
    let upload = fixture.api("PUT", &format!("/sandboxes/{id}/files?path={secret}"));
    upload.header("X-StacyVM-Upload", "1").body(secret).send().await.expect(200);

    let expected = [
        "POST /sandboxes 201 api_key".to_owned(),
        format!("POST /sandboxes/{id}/exec 200 api_key"),
        format!("GET /sandboxes/{id}/exec/ws 101 api_key"),
        format!("PUT /sandboxes/{id}/files 200 api_key"),
    ];
    let found = records(&fixture, "").await;
    assert_eq!(lines(&found), expected);
    assert!(!json!(found).to_string().contains(secret));
}

#[tokio::test]
async fn refusals_are_recorded_whatever_they_were_for() {
    let fixture = keyed().await;
    let reader = fixture.stored_key("reader", &["read"]).await;
    fixture.api("GET", "/sandboxes").key("").send().await.failure();
    fixture.api("GET", "/nothing").key("wrong").send().await.failure();
    fixture.api("POST", "/sandboxes").key(&reader).json(&json!({})).send().await.failure();
    fixture.api("GET", "/admin/audit").send().await.failure();
    fixture.api("GET", "/sandboxes").header("Host", "evil.example").send().await.failure();
    let page = fixture.api("POST", "/sandboxes").header("Origin", "https://evil.example").json(&json!({}));
    page.send().await.failure();
    assert_eq!(
        lines(&records(&fixture, "").await),
        [
            "GET /sandboxes 401 anonymous",
            "GET /nothing 401 anonymous",
            "POST /sandboxes 403 key:reader",
            "GET /admin/audit 403 api_key",
            "GET /sandboxes 403 anonymous",
            "POST /sandboxes 403 anonymous",
        ]
    );
}

/// Whoever percent-encodes a key has written it all the same.
#[tokio::test]
async fn an_encoded_key_in_a_path_is_in_no_record() {
    let fixture = keyed().await;
    let key = fixture.stored_key("ci", &["api"]).await;
    let (digits, encoded) = (&key[4..], key.bytes().fold(String::new(), |text, byte| format!("{text}%{byte:02X}")));
    for path in [format!("/sandboxes/%65%32%62%5F{digits}"), format!("/sandboxes/{encoded}/files?path={encoded}")] {
        assert_eq!(fixture.delete(&path).await.failure().0, 400, "{path}");
        assert_eq!(fixture.api("DELETE", &path).key("wrong").send().await.failure().0, 401, "{path}");
    }
    let found = records(&fixture, "").await;
    let text = json!(found).to_string();
    assert!(!text.contains(digits) && !text.contains(&encoded), "{text}");
    assert!(lines(&found).contains(&"DELETE /sandboxes/e2b_… 401 anonymous".to_owned()), "{text}");
}

#[tokio::test]
async fn a_flood_of_refusals_leaves_a_bounded_trace() {
    let fixture = keyed().await;
    for _ in 0..200 {
        fixture.api("DELETE", "/sandboxes").key("wrong").send().await.failure();
    }
    fixture.sandbox().await;
    let denied = records(&fixture, "?status=401&limit=500").await.len();
    assert!((30..200).contains(&denied), "{denied}");
    assert_eq!(lines(&records(&fixture, "?actor=api_key").await), ["POST /sandboxes 201 api_key"]);
}

#[tokio::test]
async fn a_call_whose_client_goes_away_is_recorded() {
    let fixture = keyed().await;
    fixture.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let connection = fixture.api("POST", "/sandboxes").json(&json!({})).begin_with_body().await;
    eventually("the create has begun", || async {
        (fixture.mock.calls(MockOperation::Create).started == 1).then_some(())
    })
    .await;
    drop(connection);
    let found = eventually("the call is recorded", || async {
        Some(records(&fixture, "?status=499").await).filter(|found| !found.is_empty())
    })
    .await;
    assert_eq!(lines(&found), ["POST /sandboxes 499 api_key"]);
}

#[tokio::test]
async fn the_log_is_filtered_paged_and_written_as_a_table() {
    let fixture = keyed().await;
    for _ in 0..3 {
        fixture.sandbox().await;
    }
    fixture.delete("/sandboxes").await.expect(200);
    assert_eq!(records(&fixture, "?method=delete").await.len(), 1);
    assert_eq!(records(&fixture, "?status=201&path=sandbox").await.len(), 3);
    assert_eq!(records(&fixture, "?actor=nobody").await.len(), 0);
    let page = fixture.api("GET", "/admin/audit?limit=2&actor=api_key").key(ROOT).send().await;
    assert_eq!(page.expect(200).as_array().unwrap().len(), 2);
    let cursor = page.header("x-next-cursor").unwrap();
    assert_eq!(records(&fixture, &format!("?limit=2&actor=api_key&cursor={cursor}")).await.len(), 2);
    for query in ["?limit=0", "?limit=-1", "?limit=x", "?status=0", "?status=x", "?format=xml", "?cursor=x"] {
        let answer = fixture.api("GET", &format!("/admin/audit{query}")).key(ROOT).send().await;
        assert_eq!(answer.failure(), (400, "BAD_REQUEST".to_owned()), "{query}");
    }

    let table = fixture.api("GET", "/admin/audit?format=csv&actor=api_key").key(ROOT).send().await;
    assert_eq!((table.status, table.header("content-type")), (200, Some("text/csv; charset=utf-8")));
    assert_eq!(table.header("content-disposition"), Some("attachment; filename=\"stacyvm-admin-audit.csv\""));
    assert_eq!(table.header("cache-control"), Some("no-store"));
    let rows: Vec<&str> = table.text().lines().collect();
    assert_eq!(rows[0], "id,created_at,actor,method,path,status,duration_ms,request_id,remote_addr,user_agent");
    assert_eq!(rows.len(), 5);
    assert!(rows[1].contains(",api_key,DELETE,/api/v1/sandboxes,200,"), "{}", rows[1]);
}

#[tokio::test]
async fn an_open_server_records_too() {
    let fixture = Fixture::with_options(ServerOptions::default()).await;
    fixture.sandbox().await;
    let page = within(fixture.engine.audit(&AuditQuery::default())).await.unwrap();
    assert_eq!((page.items.len(), page.items[0].actor.as_str()), (1, "anonymous"));
}

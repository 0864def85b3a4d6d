//! Sandboxes, templates and quotas: shapes, statuses, defaults.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use stacyvm_providers::mock::{Fault, MockOperation, Times};

use crate::support::{Fixture, eventually};

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn no_nulls(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Object(object) => object.values().all(no_nulls),
        Value::Array(items) => items.iter().all(no_nulls),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

#[tokio::test]
async fn a_sandbox_is_created_shown_listed_extended_and_destroyed() {
    let fixture = Fixture::open().await;
    let request = json!({
        "image": "alpine:latest", "memory_mb": 256, "vcpus": 2, "ttl": "10m",
        "metadata": { "project": "x" }, "unknown_field": true,
    });
    let created = fixture.post("/sandboxes", &request).await.expect(201);
    let id = created["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("sb-") && id.len() == 23, "{id}");
    assert_eq!(created["state"], "running");
    assert_eq!(created["provider"], "mock");
    assert_eq!(created["image"], "alpine:latest");
    assert_eq!(created["memory_mb"], 256);
    assert_eq!(created["vcpus"].to_string(), "2", "a whole number has no point");
    assert_eq!(created["metadata"], json!({ "project": "x" }));
    assert!(created["created_at"].as_str().unwrap().ends_with('Z'));
    assert!(no_nulls(&created), "absent, never null: {created}");
    assert!(created.get("preview_domain").is_none() && created.get("owner_id").is_none());

    for path in [format!("/sandboxes/{id}"), format!("/sandboxes/{id}/")] {
        assert_eq!(fixture.get(&path).await.expect(200)["id"], *id);
    }
    for path in ["/sandboxes", "/sandboxes/"] {
        assert_eq!(fixture.get(path).await.expect(200).as_array().unwrap().len(), 1);
    }
    let before = created["expires_at"].as_str().unwrap().to_owned();
    let extended = fixture.post(&format!("/sandboxes/{id}/extend"), &json!({ "ttl": "2h" })).await.expect(200);
    assert_eq!(extended["id"], *id);
    assert!(extended["expires_at"].as_str().unwrap() > before.as_str());

    let answer = fixture.delete(&format!("/sandboxes/{id}")).await;
    assert_eq!(answer.text(), "{\"status\":\"destroyed\"}\n");
    assert_eq!(fixture.get(&format!("/sandboxes/{id}")).await.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(fixture.get("/sandboxes").await.text(), "[]\n");
    assert!(fixture.mock.sandbox_ids().is_empty());
    assert_eq!(fixture.delete(&format!("/sandboxes/{id}")).await.status, 200, "destroying twice succeeds");
}

#[tokio::test]
async fn an_empty_request_gets_the_defaults() {
    let fixture = Fixture::open().await;
    for body in ["{}", "null"] {
        let request = fixture.api("POST", "/sandboxes").header("Content-Type", "application/json").body(body);
        let sandbox = request.send().await.expect(201);
        assert_eq!(sandbox["image"], "alpine:latest", "{body}");
        assert_eq!(sandbox["memory_mb"], 1024);
    }
}

#[tokio::test]
async fn the_user_header_names_the_owner_and_wins_over_the_body() {
    let fixture = Fixture::open().await;
    let create =
        |user: &str| fixture.api("POST", "/sandboxes").json(&json!({ "owner_id": "body" })).header("X-User-ID", user);
    assert_eq!(create("a@example.com").send().await.expect(201)["owner_id"], "a@example.com");
    assert_eq!(create("  ").send().await.expect(201)["owner_id"], "body");
    for bad in ["a/b", "a\\b", "a b", &"x".repeat(129)] {
        assert_eq!(create(bad).send().await.failure(), (400, "BAD_REQUEST".to_owned()), "{bad}");
    }
}

#[tokio::test]
async fn lists_are_filtered_and_paged_in_headers() {
    let fixture = Fixture::open().await;
    let mut made = Vec::new();
    for owner in ["a", "b", "a", "a"] {
        let body = json!({ "owner_id": owner, "metadata": { "n": made.len().to_string() } });
        made.push(fixture.post("/sandboxes", &body).await.expect(201)["id"].as_str().unwrap().to_owned());
    }
    let ids = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    };
    let newest_first: Vec<String> = made.iter().rev().cloned().collect();
    assert_eq!(ids(&fixture.get("/sandboxes").await.expect(200)), newest_first);
    let of_a = fixture.get("/sandboxes?owner_id=a&state=running&provider=mock").await.expect(200);
    assert_eq!(ids(&of_a), [made[3].clone(), made[2].clone(), made[0].clone()]);
    assert_eq!(ids(&fixture.get("/sandboxes?metadata=n%3D1").await.expect(200)), [made[1].clone()]);
    assert_eq!(fixture.get("/sandboxes?state=paused").await.text(), "[]\n");

    let mut seen = Vec::new();
    let mut target = "/sandboxes?limit=3".to_owned();
    loop {
        let page = fixture.get(&target).await;
        seen.extend(ids(&page.expect(200)));
        let Some(cursor) = page.header("x-next-cursor") else { break };
        target = format!("/sandboxes?limit=3&cursor={cursor}");
    }
    assert_eq!(seen, newest_first);
    for bad in ["limit=0", "limit=1001", "limit=x", "limit=-1", "state=dancing", "cursor=%00&limit=1"] {
        assert_eq!(fixture.get(&format!("/sandboxes?{bad}")).await.failure().0, 400, "{bad}");
    }
}

#[tokio::test]
async fn admission_and_quota_summary_are_closed_objects() {
    let fixture = Fixture::with_engine(|options| options.limits.max_sandboxes = Some(1)).await;
    let known = [
        "allowed",
        "queueable",
        "reason",
        "active_sandboxes",
        "max_sandboxes",
        "active_owner_sandboxes",
        "max_owner_sandboxes",
        "max_ttl",
    ];
    let yes = fixture.post("/sandboxes/admission", &json!({ "ttl": "5m", "owner_id": "a" })).await.expect(200);
    assert_eq!(yes["allowed"], true);
    fixture.sandbox().await;
    let no = fixture.post("/sandboxes/admission", &json!({})).await.expect(200);
    assert_eq!((&no["allowed"], &no["reason"]), (&json!(false), &json!("max_sandboxes")));
    for decision in [&yes, &no] {
        assert!(keys(decision).is_subset(&BTreeSet::from(known)), "{decision}");
        for required in ["allowed", "queueable", "active_sandboxes", "max_sandboxes"] {
            assert!(decision.get(required).is_some(), "{required} is always there: {decision}");
        }
    }
    assert_eq!(fixture.post("/sandboxes", &json!({})).await.failure(), (429, "RESOURCE_LIMIT".to_owned()));

    let summary = fixture.get("/quotas/summary").await.expect(200);
    let four = ["total", "with_max_sandboxes", "with_max_ttl", "with_max_exec_timeout"];
    assert_eq!(keys(&summary), BTreeSet::from(four));
}

#[tokio::test]
async fn failures_of_a_create_have_their_own_codes() {
    let fixture = Fixture::open().await;
    let create = |body: Value| fixture.api("POST", "/sandboxes").json(&body).send();
    assert_eq!(create(json!({ "provider": "nope" })).await.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(create(json!({ "template": "nope" })).await.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(create(json!({ "ttl": "48h" })).await.failure(), (429, "RESOURCE_LIMIT".to_owned()));
    fixture.mock.faults().inject(MockOperation::Create, Fault::MissingImage, Times::Once);
    assert_eq!(create(json!({})).await.failure(), (422, "IMAGE_NOT_FOUND".to_owned()));
    let secret = "backend said /var/lib/secret";
    fixture.mock.faults().inject(MockOperation::Create, Fault::Fail(secret.to_owned()), Times::Once);
    let answer = create(json!({})).await;
    assert_eq!(answer.failure(), (500, "INTERNAL_ERROR".to_owned()));
    assert!(!answer.text().contains("secret"), "causes are for the log: {}", answer.text());
    assert!(fixture.mock.sandbox_ids().is_empty());
}

#[tokio::test]
async fn repeating_a_create_with_its_key_gives_the_same_sandbox() {
    let fixture = Fixture::open().await;
    let create = |memory: u64| {
        fixture.api("POST", "/sandboxes").json(&json!({ "memory_mb": memory })).header("Idempotency-Key", "k-1").send()
    };
    let first = create(128).await.expect(201);
    assert_eq!(create(128).await.expect(201)["id"], first["id"]);
    assert_eq!(create(256).await.failure(), (409, "CONFLICT".to_owned()));
    assert_eq!(fixture.mock.sandbox_ids().len(), 1);
}

#[tokio::test]
async fn a_client_that_goes_away_gives_its_create_up() {
    let fixture = Fixture::open().await;
    fixture.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let mut socket =
        fixture.api("POST", "/sandboxes").header("Content-Type", "application/json").body("{}").begin().await;
    tokio::io::AsyncWriteExt::write_all(&mut socket, b"{}").await.unwrap();
    let mock = &fixture.mock;
    eventually("the create", || async { (mock.calls(MockOperation::Create).started > 0).then_some(()) }).await;
    drop(socket);
    let engine = &fixture.engine;
    eventually("the clean-up", || async {
        let page = engine.list(&stacyvm_engine::Caller::default(), &stacyvm_api::ListQuery::default()).await.unwrap();
        page.items.iter().all(|sandbox| sandbox.state != stacyvm_api::SandboxState::Creating).then_some(())
    })
    .await;
}

#[tokio::test]
async fn templates_round_trip_and_are_applied() {
    let fixture = Fixture::open().await;
    let template = json!({
        "name": "py", "image": "python:3", "memory_mb": 128, "vcpus": 1, "ttl": "10m", "provider": "mock",
        "metadata": { "team": "a" }, "env": { "GREETING": "hi" }, "description": "d",
    });
    let stored = fixture.post("/templates", &template).await.expect(201);
    for (key, value) in template.as_object().unwrap() {
        let same = if key == "ttl" { stored["ttl"] == "10m0s" } else { stored[key] == *value };
        assert!(same, "{key}: {} instead of {value}", stored[key]);
    }
    assert_eq!((&stored["cpu_cores"], &stored["ttl_seconds"]), (&json!(1), &json!(600)));
    assert_eq!(fixture.post("/templates", &template).await.failure(), (409, "CONFLICT".to_owned()));
    assert_eq!(fixture.get("/templates/py").await.expect(200), stored);
    assert_eq!(fixture.get("/templates/").await.expect(200), json!([stored]));
    assert_eq!(fixture.post("/templates", &json!({ "name": "x" })).await.failure().0, 400);

    let spawned = fixture.api("POST", "/templates/py/spawn").send().await.expect(201);
    assert_eq!((&spawned["image"], &spawned["memory_mb"]), (&json!("python:3"), &json!(128)));
    assert_eq!(spawned["metadata"]["team"], "a");
    let id = spawned["id"].as_str().unwrap();
    let said =
        fixture.post(&format!("/sandboxes/{id}/exec"), &json!({ "command": "echo $GREETING" })).await.expect(200);
    assert_eq!(said["stdout"], "hi\n");
    // Published SDKs fill in their default image beside the template.
    let body = json!({ "image": "alpine:latest", "template": "py" });
    assert_eq!(fixture.post("/sandboxes", &body).await.expect(201)["image"], "python:3");

    let update = json!({ "image": "python:4" });
    let updated = fixture.api("PUT", "/templates/py").json(&update).send().await.expect(200);
    assert_eq!((&updated["name"], &updated["image"]), (&json!("py"), &json!("python:4")));
    assert_eq!(updated["created_at"], stored["created_at"]);
    assert_eq!(fixture.delete("/templates/py").await.text(), "{\"status\":\"deleted\"}\n");
    assert_eq!(fixture.delete("/templates/py").await.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn quotas_are_stored_shown_and_held() {
    let fixture = Fixture::open().await;
    let put = |path: &str, body: Value| fixture.api("PUT", path).json(&body).send();
    let quota = put("/quotas/a@x", json!({ "max_sandboxes": 1, "max_ttl": "1h" })).await.expect(200);
    assert_eq!(
        (&quota["owner_id"], &quota["max_ttl"], &quota["max_exec_timeout"]),
        (&json!("a@x"), &json!("1h0m0s"), &json!("0s"))
    );
    assert_eq!(fixture.get("/quotas/a%40x").await.expect(200), quota);
    assert_eq!(fixture.get("/quotas").await.expect(200), json!([quota]));
    assert_eq!(fixture.get("/admin/quotas/").await.expect(200), json!([quota]));
    let create = || fixture.api("POST", "/sandboxes").json(&json!({})).header("X-User-ID", "a@x").send();
    create().await.expect(201);
    assert_eq!(create().await.failure(), (429, "RESOURCE_LIMIT".to_owned()));
    let usage = fixture.get("/quotas/a@x/usage").await.expect(200);
    assert_eq!((&usage["active_sandboxes"], &usage["quota_configured"]), (&json!(1), &json!(true)));
    assert_eq!(fixture.get("/quotas/stranger/usage").await.expect(200)["quota_configured"], false);
    for bad in [json!({ "max_sandboxes": -1 }), json!({ "max_ttl": "soon" }), json!({ "max_ttl": "1.5s" })] {
        assert_eq!(put("/quotas/a@x", bad.clone()).await.failure().0, 400, "{bad}");
    }
    assert_eq!(put("/quotas/a%20b", json!({})).await.failure().0, 400);
    assert_eq!(fixture.delete("/quotas/a@x").await.text(), "{\"status\":\"deleted\"}\n");
    assert_eq!(fixture.get("/quotas/a@x").await.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn logs_stats_and_ports_report_what_is_inside() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    fixture.post(&format!("/sandboxes/{id}/exec"), &json!({ "command": "seq 1 150" })).await.expect(200);
    let logs = |query: &str| fixture.api("GET", &format!("/sandboxes/{id}/logs{query}")).send();
    assert_eq!(logs("?lines=2").await.expect(200), json!(["149", "150"]));
    for default in ["", "?lines=0", "?lines=many", "?lines=-3"] {
        assert_eq!(logs(default).await.expect(200).as_array().unwrap().len(), 100, "{default}");
    }
    let stats = fixture.get(&format!("/sandboxes/{id}/stats")).await.expect(200);
    assert!(stats["supported"].is_boolean(), "{stats}");
    let port = json!({ "port": 7, "listening": true, "access": "public" });
    assert_eq!(fixture.get(&format!("/sandboxes/{id}/ports")).await.expect(200), json!([port]));
}

#[tokio::test]
async fn prune_destroys_what_has_expired() {
    let fixture = Fixture::open().await;
    fixture.sandbox().await;
    assert_eq!(fixture.delete("/sandboxes").await.text(), "{\"pruned\":0}\n");
    assert_eq!(fixture.delete("/sandboxes/").await.text(), "{\"pruned\":0}\n");
    assert_eq!(fixture.mock.sandbox_ids().len(), 1);
}

//! Health, metrics, diagnostics, providers, and the API page.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use stacyvm_providers::mock::{Fault, MockOperation, Times};

use crate::support::{Fixture, eventually};

#[tokio::test]
async fn probes_answer_with_and_without_a_key() {
    let fixture = Fixture::with_keys("k", "").await;
    for (path, status) in [("/live", "alive"), ("/health", "ok")] {
        let body = fixture.get(path).await.expect(200);
        assert_eq!(body["status"], status);
        assert!(body["version"].is_string() && body["uptime"].as_str().unwrap().ends_with('s'));
        assert_eq!(body.as_object().unwrap().len(), 3);
    }
    let ready = fixture.get("/ready").await.expect(200);
    assert_eq!(
        (&ready["status"], &ready["ready_providers"], &ready["total_providers"]),
        (&json!("ready"), &json!(1), &json!(1))
    );
    assert!(fixture.get("/version").await.expect(200)["version"].is_string());
}

#[tokio::test]
async fn an_unhealthy_default_provider_is_503_with_the_body_of_ready() {
    let fixture = Fixture::open().await;
    fixture.mock.faults().inject(MockOperation::Check, Fault::Fail("broken".to_owned()), Times::Always);
    assert_eq!(fixture.api("POST", "/providers/test").send().await.expect(200), json!({ "mock": false }));
    let body = eventually("not ready", || async {
        let answer = fixture.get("/ready").await;
        (answer.status == 503).then(|| answer.json())
    })
    .await;
    assert_eq!((&body["status"], &body["ready_providers"]), (&json!("not_ready"), &json!(0)));
    assert!(body.get("code").is_none(), "this is not the error envelope: {body}");
}

#[tokio::test]
async fn providers_show_health_capabilities_and_settings() {
    let fixture = Fixture::open().await;
    fixture.sandbox().await;
    for path in ["/providers", "/providers/", "/admin/providers"] {
        let list = fixture.get(path).await.expect(200);
        let provider = &list.as_array().unwrap()[0];
        assert_eq!(
            (&provider["name"], &provider["healthy"], &provider["default"]),
            (&json!("mock"), &json!(true), &json!(true))
        );
        let capabilities: BTreeSet<&str> =
            provider["capabilities"].as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect();
        for known in ["spawn", "exec", "exec_stream", "files", "console", "health", "imitated"] {
            assert!(capabilities.contains(known), "{known}: {capabilities:?}");
        }
    }
    let detail = fixture.get("/providers/mock").await.expect(200);
    assert_eq!((&detail["sandbox_count"], &detail["health"]["name"]), (&json!(1), &json!("mock")));
    assert!(detail["config"].is_object());
    assert_eq!(fixture.get("/providers/none").await.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn fixed_answers_have_their_published_form() {
    let fixture = Fixture::open().await;
    assert_eq!(fixture.get("/snapshots").await.text(), "[]\n");
    assert_eq!(fixture.get("/pool/status").await.text(), "{\"enabled\":false}\n");
    let stats = fixture.get("/system/stats").await.expect(200);
    let keys: BTreeSet<&str> = stats.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["cpu_pct", "mem_pct", "disk_pct", "net_rx_bps", "net_tx_bps", "load1"]));
    assert!(stats["mem_pct"].as_f64().unwrap() > 0.0);
}

#[tokio::test]
async fn metrics_and_diagnostics_have_the_published_keys() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    fixture.post(&format!("/sandboxes/{id}/exec"), &json!({ "command": "echo hush-hush" })).await.expect(200);
    let metrics = fixture.get("/metrics").await.expect(200);
    let published = [
        "uptime",
        "goroutines",
        "memory_alloc",
        "memory_sys",
        "memory_heap_alloc",
        "gc_cycles",
        "sandboxes",
        "providers",
        "workers",
        "leases",
        "events",
        "operations",
        "scheduler",
        "quotas",
        "rate_limit",
    ];
    for key in published {
        assert!(metrics.get(key).is_some(), "{key}");
    }
    assert_eq!((&metrics["sandboxes"]["total"], &metrics["sandboxes"]["by_state"]["running"]), (&json!(1), &json!(1)));
    let operations: BTreeMap<&str, &Value> = metrics["operations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (item["operation"].as_str().unwrap(), item))
        .collect();
    for operation in ["spawn", "exec"] {
        assert_eq!(operations[operation]["success_total"], 1, "{operation}");
        assert!(operations[operation]["latency_avg_ms"].as_f64().unwrap() > 0.0);
    }
    let answer = fixture.get("/diagnostics").await;
    let diagnostics = answer.expect(200);
    for key in [
        "generated_at",
        "build",
        "process",
        "store",
        "limits",
        "scheduler",
        "quotas",
        "rate_limit",
        "providers",
        "workers",
        "leases",
        "sandboxes",
        "events",
        "operations",
        "remediation",
        "redactions",
    ] {
        assert!(diagnostics.get(key).is_some(), "{key}");
    }
    assert_eq!(diagnostics["limits"]["max_ttl"], "24h0m0s");
    assert!(!answer.text().contains("hush-hush") && !answer.text().contains(&id), "nothing of sandboxes is shown");
}

#[tokio::test]
async fn prometheus_text_has_published_names_with_the_right_types() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    fixture.post(&format!("/sandboxes/{id}/exec"), &json!({ "command": "true" })).await.expect(200);
    fixture.get("/no-such-route").await;
    let answer = fixture.get("/metrics/prometheus").await;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let types = checked_exposition(answer.text());
    for (name, kind) in [
        ("stacyvm_uptime_seconds", "gauge"),
        ("stacyvm_runtime_gc_cycles_total", "counter"),
        ("stacyvm_sandboxes_total", "gauge"),
        ("stacyvm_sandboxes_by_provider_total", "gauge"),
        ("stacyvm_provider_healthy", "gauge"),
        ("stacyvm_workers_total", "gauge"),
        ("stacyvm_events_total", "counter"),
        ("stacyvm_event_subscribers", "gauge"),
        ("stacyvm_spawn_queue_enqueued_total", "counter"),
        ("stacyvm_spawn_queue_wait_milliseconds_max", "gauge"),
        ("stacyvm_owner_quotas_total", "gauge"),
        ("stacyvm_operation_success_total", "counter"),
        ("stacyvm_operation_failure_total", "counter"),
        ("stacyvm_operation_latency_milliseconds", "histogram"),
        ("stacyvm_operation_latency_milliseconds_max", "gauge"),
        ("stacyvm_http_requests_total", "counter"),
        ("stacyvm_http_request_duration_seconds", "histogram"),
    ] {
        assert_eq!(types.get(name).map(String::as_str), Some(kind), "{name}");
    }
    let text = answer.text();
    for sample in [
        "stacyvm_sandboxes_total{state=\"running\"} 1",
        "stacyvm_operation_success_total{operation=\"spawn\",provider=\"mock\"} 1",
        "stacyvm_operation_latency_milliseconds_count{operation=\"exec\",provider=\"mock\"} 1",
        "stacyvm_operation_latency_milliseconds_bucket{le=\"+Inf\",operation=\"exec\",provider=\"mock\"} 1",
        "stacyvm_http_requests_total{method=\"POST\",route=\"/api/v1/sandboxes\",status=\"201\"} 1",
        "stacyvm_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"} 1",
    ] {
        assert!(text.contains(sample), "{sample} is not in:\n{text}");
    }
    assert!(!text.contains("no-such-route") && !text.contains(&id), "labels come from the route table");

    let open = fixture.api("GET", "/metrics/prometheus").header("Accept", "application/openmetrics-text").send().await;
    assert!(open.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(open.text().ends_with("# EOF\n"));
}

/// Checks the text format's rules: each family's samples stand together behind
/// its one TYPE line, and a histogram's buckets never fall.
fn checked_exposition(text: &str) -> BTreeMap<String, String> {
    let mut types: BTreeMap<String, String> = BTreeMap::new();
    let mut family = String::new();
    let mut buckets: BTreeMap<String, f64> = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} has two TYPE lines");
            name.clone_into(&mut family);
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("not a number: {line}"));
            let name = series.split('{').next().unwrap();
            let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} stands behind {family}"));
            match types[&family].as_str() {
                "histogram" => assert!(matches!(suffix, "_bucket" | "_sum" | "_count"), "{line}"),
                _ => assert_eq!(suffix, "", "{line}"),
            }
            if suffix == "_bucket" {
                let start = series.find("le=\"").unwrap();
                let end = series[start + 4..].find('"').unwrap() + start + 5;
                let rest = format!("{}{}", &series[..start], &series[end..]);
                let before = buckets.insert(rest, value).unwrap_or(0.0);
                assert!(value >= before, "buckets add up: {line}");
            }
        }
    }
    types
}

#[tokio::test]
async fn the_api_document_and_its_page_are_served() {
    let fixture = Fixture::with_keys("k", "").await;
    let document = fixture.request("GET", "/swagger/doc.json").send().await;
    assert_eq!(document.status, 200);
    assert_eq!(document.text(), stacyvm_server::openapi_json());
    for path in ["/swagger", "/swagger/", "/swagger/index.html"] {
        let page = fixture.request("GET", path).send().await;
        assert_eq!((page.status, page.header("content-type")), (200, Some("text/html")), "{path}");
        assert!(page.text().contains("<base href=\"/swagger/\">"), "{path}");
        // The page obeys its own policy: nothing in it is inline.
        let policy = page.header("content-security-policy").unwrap();
        assert!(policy.contains("script-src 'self';") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert!(!page.text().contains("<script>") && !page.text().contains(" style=\""), "{path}");
    }
    let script = fixture.request("GET", "/swagger/swagger-initializer.js").send().await;
    assert!(script.text().contains("/swagger/doc.json"), "the page knows its document");
    assert_eq!(fixture.request("GET", "/swagger/swagger-ui-bundle.js").send().await.status, 200);
    assert_eq!(fixture.request("GET", "/swagger/none").send().await.failure().0, 404);
    assert_eq!(fixture.request("GET", "/").send().await.failure().0, 404);
}

//! The server about itself: health, metrics, diagnostics.

use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use stacyvm_api::{ErrorCode, Health, HostStats, PoolStatus, ProviderHealth, Readiness, Timestamp, Version};
use stacyvm_engine::{EngineOptions, MetricsSnapshot, OperationMetric, QueueStats, SpawnOverflow};

use crate::App;
use crate::acme::CertificateState;
use crate::error::ApiError;
use crate::host_stats::ProcessStats;
use crate::metrics::{OPEN_METRICS, Scrape, TEXT_FORMAT};
use crate::options::RateLimitOptions;
use crate::rate_limit::RateLimiter;
use crate::reply::Reply;
use crate::tls::Tls;

/// A reading of everything takes at most this long (control-plane 2.14).
const DIAGNOSTICS_DEADLINE: Duration = Duration::from_secs(3);
const READINESS_DEADLINE: Duration = Duration::from_secs(2);

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn live(State(app): State<App>) -> Reply<Health> {
    Reply::ok(health_body(&app, "alive"))
}

pub(super) async fn health(State(app): State<App>) -> Reply<Health> {
    Reply::ok(health_body(&app, "ok"))
}

pub(super) async fn ready(State(app): State<App>) -> Reply<Readiness> {
    let report = tokio::time::timeout(READINESS_DEADLINE, app.engine.readiness()).await;
    let closing = app.closing.is_cancelled();
    let (ready, store, providers) = match report {
        Ok(report) => {
            let store = if report.store.healthy { "ok" } else { "unavailable" };
            (report.ready && !closing, store, report.providers)
        }
        Err(_) => (false, "slow", app.engine.providers()),
    };
    let body = Readiness {
        status: if ready { "ready" } else { "not_ready" }.to_owned(),
        version: app.options.version.version.clone(),
        uptime: uptime(&app),
        store: store.to_owned(),
        ready_providers: healthy_count(&providers),
        total_providers: providers.len() as u64,
        providers,
    };
    Reply::with(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
}

pub(super) async fn version(State(app): State<App>) -> Reply<Version> {
    Reply::ok(app.options.version.clone())
}

pub(super) async fn snapshots() -> Reply<[u8; 0]> {
    Reply::ok([])
}

pub(super) async fn pool_status() -> Reply<PoolStatus> {
    Reply::ok(PoolStatus { enabled: false })
}

pub(super) async fn host_stats(State(app): State<App>) -> Reply<HostStats> {
    Reply::ok(app.host_stats.read())
}

pub(super) async fn metrics_prometheus(State(app): State<App>, headers: HeaderMap) -> Result<Response, ApiError> {
    let scrape = Scrape {
        http: &app.http_metrics,
        snapshot: snapshot(&app).await?,
        rate_limit: app.gate.stats(),
        process: ProcessStats::read(),
        uptime: app.started.elapsed(),
        certificates: certificates(&app),
    };
    let wants_open = headers
        .get_all(header::ACCEPT)
        .iter()
        .any(|value| value.to_str().is_ok_and(|text| text.contains("application/openmetrics-text")));
    let (content_type, text) =
        if wants_open { (OPEN_METRICS, scrape.open_metrics()) } else { (TEXT_FORMAT, scrape.prometheus()) };
    let text = text.map_err(|_| ApiError::new(ErrorCode::InternalError, "the metrics could not be written"))?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], text).into_response())
}

pub(super) async fn metrics_json(State(app): State<App>) -> Answer<Value> {
    let snapshot = snapshot(&app).await?;
    let process = ProcessStats::read();
    let mut body = json!({
        "uptime": uptime(&app),
        "goroutines": process.threads,
        "memory_alloc": process.resident_bytes,
        "memory_sys": process.virtual_bytes,
        "memory_heap_alloc": process.data_bytes,
        "gc_cycles": 0,
        "providers": {
            "total": snapshot.providers.len(),
            "healthy": healthy_count(&snapshot.providers),
            "items": snapshot.providers,
        },
        "execs_running": snapshot.running_execs,
        "dropped_log_entries": snapshot.dropped_log_entries,
    });
    merge(&mut body, common(&app, &snapshot));
    Ok(Reply::ok(body))
}

/// Written field by field: what is not named here cannot leak.
pub(super) async fn diagnostics(State(app): State<App>) -> Answer<Value> {
    let snapshot = snapshot(&app).await?;
    let process = ProcessStats::read();
    let version = &app.options.version;
    let store = &snapshot.store;
    let mut body = json!({
        "generated_at": Timestamp::now().to_whole_seconds(),
        "build": {
            "version": version.version,
            "commit": version.commit,
            "goos": version.os,
            "goarch": version.arch,
        },
        "process": {
            "uptime": uptime(&app),
            "goroutines": process.threads,
            "memory": {
                "alloc": process.resident_bytes,
                "sys": process.virtual_bytes,
                "heap_alloc": process.data_bytes,
                "gc_cycles": 0,
            },
        },
        "store": { "healthy": store.healthy, "latency_ms": store.latency_ms },
        "limits": limits(app.engine.options()),
        "providers": snapshot.providers,
        "remediation": { "api": "docs/api.md", "security": "docs/security.md" },
        "redactions": ["api keys", "server secret", "agent tokens", "environment values", "command output", "file contents"],
    });
    if let Some(error) = &store.error {
        body["store"]["error"] = json!(error);
    }
    if app.tls.is_some() {
        body["certificates"] = json!(certificates(&app));
    }
    merge(&mut body, common(&app, &snapshot));
    Ok(Reply::ok(body))
}

/// Those that this server shows.
fn certificates(app: &App) -> Vec<CertificateState> {
    app.tls.as_ref().map(Tls::certificates).unwrap_or_default()
}

/// What metrics and diagnostics have in common.
fn common(app: &App, snapshot: &MetricsSnapshot) -> Value {
    let counts = &snapshot.sandboxes;
    let events = &snapshot.events;
    let workers = [json!({ "id": "local", "status": "online", "stale": false })];
    json!({
        "sandboxes": {
            "total": counts.total,
            "active": counts.active,
            "by_state": counts.by_state,
            "by_provider": counts.by_provider,
            "by_worker": { "local": counts.total },
        },
        "workers": { "total": 1, "online": 1, "stale": 0, "unhealthy": 0, "items": workers },
        "leases": { "total": 0, "active": 0, "expired": 0, "by_holder": {} },
        "events": {
            "subscribers": events.subscribers,
            "history_size": events.history_size,
            "events_total": events.events_total,
        },
        "operations": snapshot.operations.iter().map(operation).collect::<Vec<_>>(),
        "scheduler": scheduler(app.engine.options(), &snapshot.queue),
        "quotas": snapshot.quotas,
        "rate_limit": rate_limit(app),
    })
}

fn operation(item: &OperationMetric) -> Value {
    let average = if item.latency_count == 0 { 0.0 } else { item.latency_total_ms / item.latency_count as f64 };
    let mut body = json!({
        "operation": item.operation,
        "provider": item.provider,
        "success_total": item.success_total,
        "failure_total": item.failure_total,
        "latency_count": item.latency_count,
        "latency_total_ms": item.latency_total_ms,
        "latency_min_ms": item.latency_min_ms,
        "latency_max_ms": item.latency_max_ms,
        "latency_avg_ms": average,
    });
    if let Some(error) = &item.last_error {
        body["last_error"] = json!(error);
    }
    if let Some(unix) = item.last_observed_unix {
        body["last_observed_unix"] = json!(unix);
    }
    body
}

fn limits(options: &EngineOptions) -> Value {
    let limits = &options.limits;
    let (overflow, timeout, waiters) = overflow(options);
    json!({
        "max_sandboxes": limits.max_sandboxes.unwrap_or(0),
        "max_sandboxes_per_owner": limits.max_sandboxes_per_owner.unwrap_or(0),
        "default_exec_timeout": span(limits.default_exec_timeout.unwrap_or_default()),
        "max_exec_timeout": span(limits.max_exec_timeout.unwrap_or_default()),
        "max_ttl": span(limits.max_ttl.unwrap_or_default()),
        "spawn_overflow": overflow,
        "spawn_queue_timeout": span(timeout),
        "max_spawn_queue": waiters,
    })
}

fn scheduler(options: &EngineOptions, queue: &QueueStats) -> Value {
    let (overflow, timeout, waiters) = overflow(options);
    let average_ms = queue.wait_total_ms.checked_div(queue.wait_count).unwrap_or(0);
    let text = |ms: u64| span(Duration::from_millis(ms));
    json!({
        "spawn_overflow": overflow,
        "spawn_queue_depth": queue.depth,
        "max_spawn_queue": waiters,
        "spawn_queue_timeout": span(timeout),
        "admission_control": "worker_aware_local",
        "worker_id": "local",
        "eligible_workers": 1,
        "spawn_queued_total": queue.enqueued_total,
        "spawn_dequeued_total": queue.dequeued_total,
        "spawn_queue_timeouts": queue.timeout_total,
        "spawn_queue_wait_count": queue.wait_count,
        "spawn_queue_wait_total": text(queue.wait_total_ms),
        "spawn_queue_wait_max": text(queue.wait_max_ms),
        "spawn_queue_wait_avg": text(average_ms),
        "spawn_queue_wait_total_ms": queue.wait_total_ms,
        "spawn_queue_wait_max_ms": queue.wait_max_ms,
        "spawn_queue_wait_avg_ms": average_ms,
    })
}

/// The published keys, with zero values while there is no limit.
fn rate_limit(app: &App) -> Value {
    let options = app.gate.limiter().map(RateLimiter::options);
    let stats = app.gate.stats();
    let text = |of: fn(&RateLimitOptions) -> Duration| options.map(|options| span(of(options))).unwrap_or_default();
    json!({
        "enabled": options.is_some(),
        "requests_per_minute": options.map_or(0, |options| options.requests_per_minute.get()),
        "burst": options.map_or(0, |options| options.burst.get()),
        "key_by": options.map_or("", |options| options.key_by.word()),
        "active_buckets": stats.active_buckets,
        "allowed_total": stats.allowed_total,
        "limited_total": stats.limited_total,
        "evicted_total": stats.evicted_total,
        "bucket_ttl": text(|options| options.bucket_ttl),
        "cleanup_interval": text(|options| options.cleanup_interval),
    })
}

fn overflow(options: &EngineOptions) -> (&'static str, Duration, usize) {
    match options.spawn_overflow {
        SpawnOverflow::Reject => ("reject", Duration::ZERO, 0),
        SpawnOverflow::Queue { max_waiters, timeout } => ("queue", timeout, max_waiters),
    }
}

async fn snapshot(app: &App) -> Result<MetricsSnapshot, ApiError> {
    tokio::time::timeout(DIAGNOSTICS_DEADLINE, app.engine.metrics())
        .await
        .map_err(|_| ApiError::new(ErrorCode::Unavailable, "the metrics took too long to read"))
}

fn health_body(app: &App, status: &str) -> Health {
    Health { status: status.to_owned(), version: app.options.version.version.clone(), uptime: uptime(app) }
}

fn uptime(app: &App) -> stacyvm_api::Duration {
    app.started.elapsed().into()
}

fn healthy_count(providers: &[ProviderHealth]) -> u64 {
    providers.iter().filter(|provider| provider.healthy).count() as u64
}

fn span(duration: Duration) -> String {
    stacyvm_api::Duration::from(duration).to_string()
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

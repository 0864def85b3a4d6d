//! Metrics as Prometheus text: the engine's snapshot and the server's own
//! counters of requests.
//!
//! Names are the published ones (control-plane 2.14), with the types they
//! deserve. `prometheus-client` writes OpenMetrics; scrapers that ask for the
//! older text format get the few lines that differ rewritten.

use std::fmt::{self, Write as _};
use std::time::Duration;

use http::{Method, StatusCode};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use stacyvm_engine::{BUCKET_BOUNDS_MS, MetricsSnapshot, OperationMetric};

use crate::acme::CertificateState;
use crate::host_stats::ProcessStats;
use crate::rate_limit::RateLimitStats;

pub(crate) const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
pub(crate) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds. Most calls take less than a few milliseconds.
const REQUEST_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 5.0, 30.0];

/// Counts of requests. Labels come from the route table, never from paths.
#[derive(Debug, Clone)]
pub(crate) struct HttpMetrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    method: String,
    route: String,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(REQUEST_BUCKETS)),
        }
    }
}

impl HttpMetrics {
    pub(crate) fn observe(&self, method: &Method, route: &str, status: StatusCode, elapsed: Duration) {
        let method = method_label(method);
        let status = status.as_u16();
        let labels = RequestLabels { method: method.clone(), route: route.to_owned(), status };
        self.requests.get_or_create(&labels).inc();
        let labels = RouteLabels { method, route: route.to_owned() };
        self.durations.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("stacyvm_http_requests", "HTTP requests answered.", self.requests.clone());
        let help = "Time until the head of an HTTP response.";
        registry.register("stacyvm_http_request_duration_seconds", help, self.durations.clone());
    }
}

/// A client may invent methods; the label must not grow with them.
fn method_label(method: &Method) -> String {
    let known = [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH, Method::HEAD, Method::OPTIONS];
    if known.contains(method) { method.to_string() } else { "other".to_owned() }
}

/// What one scrape shows.
pub(crate) struct Scrape<'a> {
    pub(crate) http: &'a HttpMetrics,
    pub(crate) snapshot: MetricsSnapshot,
    pub(crate) rate_limit: RateLimitStats,
    pub(crate) process: ProcessStats,
    pub(crate) uptime: Duration,
    pub(crate) certificates: Vec<CertificateState>,
}

impl Scrape<'_> {
    /// OpenMetrics 1.0.
    pub(crate) fn open_metrics(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        self.http.register(&mut registry);
        registry.register_collector(Box::new(EngineMetrics {
            snapshot: self.snapshot,
            rate_limit: self.rate_limit,
            process: self.process,
            uptime: self.uptime,
            certificates: self.certificates,
        }));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }

    /// Prometheus text 0.0.4.
    pub(crate) fn prometheus(self) -> Result<String, fmt::Error> {
        to_prometheus(&self.open_metrics()?)
    }
}

/// OpenMetrics names a counter without the suffix `_total` that its samples
/// have; the older format names it as its samples. It also has no `# EOF`.
fn to_prometheus(open_metrics: &str) -> Result<String, fmt::Error> {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
            continue;
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let kind = if kind == "unknown" { "untyped" } else { kind };
            if let Some((_, help)) = help.take().filter(|(named, _)| *named == name) {
                writeln!(text, "# HELP {name}{suffix} {help}")?;
            }
            writeln!(text, "# TYPE {name}{suffix} {kind}")?;
            continue;
        }
        if line != "# EOF" && !line.starts_with("# UNIT ") {
            text.push_str(line);
            text.push('\n');
        }
    }
    Ok(text)
}

#[derive(Debug)]
struct EngineMetrics {
    snapshot: MetricsSnapshot,
    rate_limit: RateLimitStats,
    process: ProcessStats,
    uptime: Duration,
    certificates: Vec<CertificateState>,
}

type Label = (&'static str, String);

impl Collector for EngineMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut writer = Writer { encoder };
        self.process(&mut writer)?;
        self.sandboxes(&mut writer)?;
        self.providers(&mut writer)?;
        self.background(&mut writer)?;
        self.certificates(&mut writer)?;
        operations(&mut writer, &self.snapshot.operations)
    }
}

impl EngineMetrics {
    fn process(&self, writer: &mut Writer<'_>) -> fmt::Result {
        writer.gauge("stacyvm_uptime_seconds", "Seconds since the server started.", self.uptime.as_secs_f64())?;
        let (process, threads) = (&self.process, self.process.threads);
        // The names are the reference's, whose runtime has other things to count.
        writer.gauge("stacyvm_runtime_goroutines", "Threads of the server.", threads)?;
        let help = "Memory of the server that is in use.";
        writer.gauge("stacyvm_runtime_memory_alloc_bytes", help, process.resident_bytes)?;
        let help = "Address space of the server.";
        writer.gauge("stacyvm_runtime_memory_sys_bytes", help, process.virtual_bytes)?;
        writer.counter("stacyvm_runtime_gc_cycles", "Always zero: nothing is garbage collected.", 0)
    }

    fn sandboxes(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let counts = &self.snapshot.sandboxes;
        let by_state = counts.by_state.iter().map(|(state, count)| {
            let state = serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned));
            (vec![("state", state.unwrap_or_default())], *count)
        });
        writer.gauges("stacyvm_sandboxes_total", "Sandboxes by state.", by_state)?;
        let by_provider = counts.by_provider.iter().map(|(name, count)| (vec![("provider", name.clone())], *count));
        writer.gauges("stacyvm_sandboxes_by_provider_total", "Sandboxes by runtime.", by_provider)?;
        let local = [(vec![("worker", "local".to_owned())], counts.total)];
        writer.gauges("stacyvm_sandboxes_by_worker_total", "Sandboxes by worker.", local)?;
        writer.gauge("stacyvm_execs_running", "Commands that run right now.", self.snapshot.running_execs)
    }

    fn providers(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let providers = &self.snapshot.providers;
        let named = |name: &str| ("provider", name.to_owned());
        let healthy = providers.iter().map(|provider| {
            (vec![named(&provider.name), ("default", provider.default.to_string())], u64::from(provider.healthy))
        });
        writer.gauges("stacyvm_provider_healthy", "Whether a runtime works.", healthy)?;
        let latency = providers.iter().map(|provider| (vec![named(&provider.name)], provider.latency_ms));
        let help = "Time that a runtime's last health check took.";
        writer.gauges("stacyvm_provider_health_latency_milliseconds", help, latency)?;
        let counted = providers.iter().filter_map(|p| Some((vec![named(&p.name)], p.runtime_count?)));
        writer.gauges("stacyvm_provider_runtime_sandboxes", "Sandboxes that a runtime reports.", counted)
    }

    fn background(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let MetricsSnapshot { events, queue, quotas, store, dropped_log_entries, .. } = &self.snapshot;
        let status = |value: &str| vec![("status", value.to_owned())];
        let workers = [(status("total"), 1), (status("online"), 1), (status("stale"), 0), (status("unhealthy"), 0)];
        writer.gauges("stacyvm_workers_total", "Workers by status.", workers)?;
        let leases = [(status("total"), 0), (status("active"), 0), (status("expired"), 0)];
        writer.gauges("stacyvm_leases_total", "Leases by status.", leases)?;

        writer.counter("stacyvm_events", "Events published.", events.events_total)?;
        writer.gauge("stacyvm_event_subscribers", "Clients that follow events.", events.subscribers)?;
        writer.gauge("stacyvm_event_history_size", "Events that can be replayed from memory.", events.history_size)?;

        writer.gauge("stacyvm_spawn_queue_depth", "Creates that wait for room.", queue.depth)?;
        writer.gauge("stacyvm_spawn_queue_capacity", "Creates that may wait.", queue.capacity)?;
        writer.counter("stacyvm_spawn_queue_enqueued", "Creates that had to wait.", queue.enqueued_total)?;
        writer.counter("stacyvm_spawn_queue_dequeued", "Creates that waited and went on.", queue.dequeued_total)?;
        writer.counter("stacyvm_spawn_queue_timeout", "Creates that waited in vain.", queue.timeout_total)?;
        let help = "Time that creates waited, added up.";
        writer.gauge("stacyvm_spawn_queue_wait_milliseconds_sum", help, queue.wait_total_ms)?;
        writer.gauge("stacyvm_spawn_queue_wait_milliseconds_count", "Waits that ended.", queue.wait_count)?;
        writer.gauge("stacyvm_spawn_queue_wait_milliseconds_max", "Longest wait.", queue.wait_max_ms)?;

        writer.gauge("stacyvm_owner_quotas_total", "Owners with limits of their own.", quotas.total)?;
        let kind = |value: &str| vec![("type", value.to_owned())];
        let overrides = [
            (kind("max_sandboxes"), quotas.with_max_sandboxes),
            (kind("max_ttl"), quotas.with_max_ttl),
            (kind("max_exec_timeout"), quotas.with_max_exec_timeout),
        ];
        writer.gauges("stacyvm_owner_quota_overrides_total", "Limits of owners by kind.", overrides)?;

        let limit = &self.rate_limit;
        writer.counter("stacyvm_rate_limit_allowed", "Requests within the rate limit.", limit.allowed_total)?;
        writer.counter("stacyvm_rate_limit_blocked", "Requests beyond the rate limit.", limit.limited_total)?;
        let help = "Callers that the rate limit forgot.";
        writer.counter("stacyvm_rate_limit_evicted_buckets", help, limit.evicted_total)?;
        writer.gauge("stacyvm_rate_limit_active_buckets", "Callers that are counted.", limit.active_buckets)?;

        writer.gauge("stacyvm_store_healthy", "Whether the database answers.", u64::from(store.healthy))?;
        let help = "Log entries dropped because the database could not keep up.";
        writer.counter("stacyvm_dropped_log_entries", help, *dropped_log_entries)
    }

    /// None where TLS is somebody else's.
    fn certificates(&self, writer: &mut Writer<'_>) -> fmt::Result {
        if self.certificates.is_empty() {
            return Ok(());
        }
        let named = |state: &CertificateState| vec![("certificate", state.certificate.to_owned())];
        let ends = self.certificates.iter().filter_map(|state| {
            let seconds = state.not_after?.unix_ms() / 1000;
            Some((named(state), seconds))
        });
        writer.gauges("stacyvm_certificate_not_after_seconds", "When a certificate ends, in Unix time.", ends)?;
        let failures = self.certificates.iter().map(|state| (named(state), u64::from(state.failures)));
        let help = "Tries in a row to have or to read another certificate that failed.";
        writer.gauges("stacyvm_certificate_failures", help, failures)
    }
}

fn operations(writer: &mut Writer<'_>, operations: &[OperationMetric]) -> fmt::Result {
    let labels =
        |item: &OperationMetric| vec![("operation", item.operation.to_owned()), ("provider", item.provider.clone())];
    let succeeded = operations.iter().map(|item| (labels(item), item.success_total));
    writer.counters("stacyvm_operation_success", "Operations that succeeded.", succeeded)?;
    let failed = operations.iter().map(|item| (labels(item), item.failure_total));
    writer.counters("stacyvm_operation_failure", "Operations that failed.", failed)?;
    let longest = operations.iter().map(|item| (labels(item), item.latency_max_ms));
    writer.gauges("stacyvm_operation_latency_milliseconds_max", "Longest operation.", longest)?;

    let help = "How long operations took.";
    let name = "stacyvm_operation_latency_milliseconds";
    let mut family = writer.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for item in operations {
        let buckets: Vec<(f64, u64)> =
            BUCKET_BOUNDS_MS.iter().copied().chain([f64::INFINITY]).zip(item.latency_buckets).collect();
        let labels = labels(item);
        let mut metric = family.encode_family(&labels)?;
        metric.encode_histogram::<NoLabelSet>(item.latency_total_ms, item.latency_count, &buckets, None)?;
    }
    Ok(())
}

/// Writes families of constant samples.
struct Writer<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Writer<'_> {
    fn gauge<V: EncodeGaugeValue + Copy>(&mut self, name: &str, help: &str, value: V) -> fmt::Result {
        let metric = ConstGauge::new(value);
        metric.encode(self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstCounter::new(value);
        metric.encode(self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauges<V: EncodeGaugeValue + Copy>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<Label>, V)>,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn counters<V: EncodeCounterValue + Copy>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<Label>, V)>,
    ) -> fmt::Result {
        let mut family: MetricEncoder<'_> = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_names_counters_as_their_samples() {
        let open =
            "# HELP a_b Things.\n# TYPE a_b counter\na_b_total{x=\"1\"} 2\n# HELP g G.\n# TYPE g gauge\ng 1\n# EOF\n";
        let expected = "# HELP a_b_total Things.\n# TYPE a_b_total counter\na_b_total{x=\"1\"} 2\n# HELP g G.\n# TYPE g gauge\ng 1\n";
        assert_eq!(to_prometheus(open).unwrap(), expected);
    }

    #[test]
    fn invented_methods_share_one_label() {
        assert_eq!(method_label(&Method::from_bytes(b"BREW").unwrap()), "other");
        assert_eq!(method_label(&Method::PATCH), "PATCH");
    }
}

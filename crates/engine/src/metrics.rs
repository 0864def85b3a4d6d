//! Counters and histograms, read as one snapshot.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use stacyvm_api::{ProviderHealth, QuotaSummary, SandboxState, Timestamp};

/// Upper bounds in milliseconds of the latency buckets; one more bucket takes
/// everything above.
pub const BUCKET_BOUNDS_MS: [f64; 16] =
    [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0];

/// Everything that `GET /metrics` shows of the engine.
#[derive(Debug, Clone)]
pub struct MetricsSnapshot {
    pub sandboxes: SandboxCounts,
    /// In order of operation, then provider.
    pub operations: Vec<OperationMetric>,
    pub events: EventStats,
    pub queue: QueueStats,
    pub quotas: QuotaSummary,
    pub providers: Vec<ProviderHealth>,
    pub store: StoreHealth,
    /// Commands running right now, in all sandboxes.
    pub running_execs: u64,
    /// Log entries that were dropped because the database could not keep up.
    pub dropped_log_entries: u64,
}

/// Sandboxes that are not destroyed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxCounts {
    pub total: u64,
    /// In state `running`.
    pub active: u64,
    pub by_state: BTreeMap<SandboxState, u64>,
    pub by_provider: BTreeMap<String, u64>,
}

/// One operation on one provider since the server started (http-api 5.12).
#[derive(Debug, Clone, PartialEq)]
pub struct OperationMetric {
    /// `spawn`, `exec`, `exec_stream`, `destroy`, `file_write`, …
    pub operation: &'static str,
    /// `unknown` when the sandbox was not found.
    pub provider: String,
    pub success_total: u64,
    pub failure_total: u64,
    pub latency_count: u64,
    pub latency_total_ms: f64,
    pub latency_min_ms: f64,
    pub latency_max_ms: f64,
    /// Observations per bucket of [`BUCKET_BOUNDS_MS`], not added up; the last
    /// is everything above.
    pub latency_buckets: [u64; BUCKET_BOUNDS_MS.len() + 1],
    pub last_error: Option<String>,
    pub last_observed_unix: Option<i64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventStats {
    pub subscribers: u64,
    /// Events that can be replayed from memory.
    pub history_size: u64,
    /// Since the server started.
    pub events_total: u64,
}

/// The queue of creates that wait for room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// False when creates beyond the limits are rejected.
    pub enabled: bool,
    pub depth: u64,
    pub capacity: u64,
    pub timeout_ms: u64,
    pub enqueued_total: u64,
    pub dequeued_total: u64,
    pub timeout_total: u64,
    pub wait_count: u64,
    pub wait_total_ms: u64,
    pub wait_max_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreHealth {
    pub healthy: bool,
    pub latency_ms: u64,
    pub error: Option<String>,
}

/// Ready means that the store answers and that the default provider is healthy.
#[derive(Debug, Clone)]
pub struct ReadinessReport {
    pub ready: bool,
    pub store: StoreHealth,
    pub providers: Vec<ProviderHealth>,
}

/// Counters and histograms by operation and provider.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<BTreeMap<(&'static str, String), OperationMetric>>);

impl Metrics {
    pub(crate) fn observe(
        &self,
        operation: &'static str,
        provider: &str,
        took: Duration,
        error: Option<String>,
        now: Timestamp,
    ) {
        let took_ms = took.as_secs_f64() * 1000.0;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let metric = all
            .entry((operation, provider.to_owned()))
            .or_insert_with(|| OperationMetric::new(operation, provider.to_owned()));
        metric.latency_min_ms = if metric.latency_count == 0 { took_ms } else { metric.latency_min_ms.min(took_ms) };
        metric.latency_max_ms = metric.latency_max_ms.max(took_ms);
        metric.latency_total_ms += took_ms;
        metric.latency_count += 1;
        metric.latency_buckets[BUCKET_BOUNDS_MS.partition_point(|bound| *bound < took_ms)] += 1;
        metric.last_observed_unix = Some(now.unix_ms().div_euclid(1000));
        if let Some(error) = error {
            metric.failure_total += 1;
            metric.last_error = Some(error);
        } else {
            metric.success_total += 1;
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<OperationMetric> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl OperationMetric {
    fn new(operation: &'static str, provider: String) -> Self {
        Self {
            operation,
            provider,
            success_total: 0,
            failure_total: 0,
            latency_count: 0,
            latency_total_ms: 0.0,
            latency_min_ms: 0.0,
            latency_max_ms: 0.0,
            latency_buckets: [0; BUCKET_BOUNDS_MS.len() + 1],
            last_error: None,
            last_observed_unix: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_fall_into_the_bucket_of_their_bound() {
        let metrics = Metrics::default();
        for (took_us, error) in [(500, None), (501, Some("late".to_owned())), (10_000_000_000, None)] {
            metrics.observe("exec", "mock", Duration::from_micros(took_us), error, Timestamp::from_unix_ms(5000));
        }
        let metric = &metrics.snapshot()[0];
        assert_eq!((metric.latency_buckets[0], metric.latency_buckets[1]), (1, 1));
        assert_eq!(metric.latency_buckets[BUCKET_BOUNDS_MS.len()], 1);
        assert_eq!((metric.success_total, metric.failure_total, metric.latency_count), (2, 1, 3));
        assert_eq!((metric.latency_min_ms, metric.last_observed_unix), (0.5, Some(5)));
        assert_eq!(metric.last_error.as_deref(), Some("late"));
    }
}

//! Health of providers: checked in the background, read from memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use stacyvm_api::{ErrorCode, ProviderDetail, ProviderHealth};
use stacyvm_sandbox::{HealthReport, Provider};
use tokio::sync::Notify;

use crate::EngineError;
use crate::shared::Shared;

/// What every provider offers (http-api 5.9).
const BASE_CAPABILITIES: [&str; 7] =
    ["spawn", "exec", "exec_stream", "files", "console", "health", "runtime_inventory"];

#[derive(Debug, Default)]
pub(crate) struct HealthCache {
    known: RwLock<BTreeMap<String, ProviderHealth>>,
    /// What is known may be out of date: the background looks again.
    doubted: Notify,
}

impl HealthCache {
    /// A call ended. Where it says of a provider that counts as well that it is
    /// away, or the other way round, nobody is told otherwise until the next check
    /// would have been due.
    pub(crate) fn compare<T>(&self, provider: &str, outcome: Result<&T, &EngineError>) {
        let is_away = match outcome {
            Ok(_) => false,
            Err(error) if error.code() == ErrorCode::Unavailable => true,
            Err(_) => return,
        };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.get(provider).is_some_and(|health| health.healthy == is_away) {
            self.doubted.notify_one();
        }
    }
}

/// When providers are looked at again: soon after one was found to be away, and
/// less and less soon while it stays so.
#[derive(Debug)]
struct Rhythm {
    first: Duration,
    usual: Duration,
    pause: Duration,
    away: BTreeSet<String>,
}

impl Rhythm {
    fn new(first: Duration, usual: Duration) -> Self {
        let first = first.min(usual);
        Self { first, usual, pause: usual, away: BTreeSet::new() }
    }

    fn next(&mut self, checked: &[ProviderHealth]) -> Duration {
        let away: BTreeSet<_> =
            checked.iter().filter(|health| !health.healthy).map(|health| health.name.clone()).collect();
        self.pause = if away.is_empty() {
            self.usual
        } else if away.is_subset(&self.away) {
            (self.pause * 2).min(self.usual)
        } else {
            self.first
        };
        self.away = away;
        self.pause
    }
}

impl Shared {
    /// Keeps what is known of providers up to date, for ever.
    pub(crate) async fn keep_checking(&self) {
        let timing = &self.options.timing;
        let mut rhythm = Rhythm::new(timing.health_retry_first, timing.health_interval);
        let mut pause = rhythm.next(&self.cached_health());
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.health.doubted.notified() => {}
            }
            pause = rhythm.next(&self.check_providers().await);
        }
    }

    /// Checks all providers at the same time, each within its deadline.
    pub(crate) async fn check_providers(&self) -> Vec<ProviderHealth> {
        // Each is known as soon as it is: one that hangs holds up no other.
        let checks = self.providers.values().map(|provider| async move {
            let health = self.check_provider(provider).await;
            let mut cache = self.health.known.write().unwrap_or_else(PoisonError::into_inner);
            if cache.get(&health.name).is_some_and(|before| before.healthy != health.healthy) {
                tracing::info!(provider = health.name, healthy = health.healthy, error = health.error, "provider");
            }
            cache.insert(health.name.clone(), health.clone());
            health
        });
        join_all(checks).await
    }

    /// In order of name.
    pub(crate) fn cached_health(&self) -> Vec<ProviderHealth> {
        let cache = self.health.known.read().unwrap_or_else(PoisonError::into_inner);
        let known = |provider: &Arc<dyn Provider>| {
            cache.get(provider.name()).cloned().unwrap_or_else(|| ProviderHealth {
                name: provider.name().to_owned(),
                healthy: false,
                default: provider.name() == self.options.default_provider,
                latency_ms: 0,
                last_checked: String::new(),
                error: Some("not checked yet".to_owned()),
                capabilities: capabilities(provider.as_ref()),
                shortfalls: shortfalls(provider.as_ref()),
                runtime_count: None,
                findings: Vec::new(),
            })
        };
        let counts = self.counts_by_provider();
        self.providers
            .values()
            .map(|provider| {
                let count = counts.get(provider.name()).copied().unwrap_or(0);
                ProviderHealth { runtime_count: Some(count), ..known(provider) }
            })
            .collect()
    }

    pub(crate) fn provider_detail(&self, name: &str) -> Result<ProviderDetail, EngineError> {
        let provider = self.providers.get(name).ok_or_else(|| EngineError::ProviderNotFound(name.to_owned()))?;
        let health = self.cached_health().into_iter().find(|health| health.name == name);
        let health = health.ok_or(EngineError::Internal("a provider without health"))?;
        let mut config = provider.describe();
        config.entry("type".to_owned()).or_insert_with(|| name.to_owned());
        Ok(ProviderDetail {
            name: name.to_owned(),
            healthy: health.healthy,
            default: health.default,
            sandbox_count: health.runtime_count.unwrap_or(0),
            capabilities: health.capabilities.clone(),
            shortfalls: health.shortfalls.clone(),
            health,
            config,
        })
    }

    pub(crate) fn counts_by_provider(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for record in self.all_records() {
            *counts.entry(record.provider.name().to_owned()).or_default() += 1;
        }
        counts
    }

    async fn check_provider(&self, provider: &Arc<dyn Provider>) -> ProviderHealth {
        let started = Instant::now();
        let limit = self.options.timing.health_timeout;
        let report = tokio::time::timeout(limit, provider.check()).await.unwrap_or_else(|_| {
            let mut report = HealthReport::default();
            let message = format!("no answer within {}", stacyvm_api::Duration::from(limit));
            report.fail("check", message, "look at the server's log and at the runtime's own");
            report
        });
        ProviderHealth {
            name: provider.name().to_owned(),
            healthy: report.is_healthy(),
            default: provider.name() == self.options.default_provider,
            latency_ms: started.elapsed().as_millis() as u64,
            last_checked: self.now().to_whole_seconds(),
            error: report.reason(),
            capabilities: capabilities(provider.as_ref()),
            shortfalls: shortfalls(provider.as_ref()),
            runtime_count: None,
            findings: report.findings,
        }
    }
}

fn capabilities(provider: &dyn Provider) -> Vec<String> {
    let offered = provider.capabilities();
    let optional = [
        ("pty", offered.pty),
        ("watch", offered.watch),
        ("dial", offered.dial),
        ("stats", offered.stats),
        ("survives_restart", offered.survives_restart),
        ("network", offered.network),
        ("pause", offered.pause),
        ("oom_ends_sandbox", offered.oom_ends_sandbox),
        // Programs are not run: tests leave out what needs real ones.
        ("imitated", offered.imitated),
        ("shares_host", offered.shares_host),
        ("rewrites_paths", offered.rewrites_paths),
    ];
    let extra = optional.into_iter().filter(|(_, offered)| *offered).map(|(name, _)| name);
    let family = std::iter::once(offered.family).filter(|family| !family.is_empty());
    BASE_CAPABILITIES.into_iter().chain(extra).chain(family).map(str::to_owned).collect()
}

fn shortfalls(provider: &dyn Provider) -> Vec<String> {
    let short = provider.shortfalls();
    let all = [
        ("text_only", short.text_only),
        ("plain_files", short.plain_files),
        ("no_archives", short.no_archives),
        ("late_output", short.late_output),
        ("one_user", short.one_user),
        ("plain_failures", short.plain_failures),
        ("loose_limits", short.loose_limits),
    ];
    all.into_iter().filter(|(_, short)| *short).map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(name: &str, healthy: bool) -> ProviderHealth {
        ProviderHealth {
            name: name.to_owned(),
            healthy,
            default: false,
            latency_ms: 0,
            last_checked: String::new(),
            error: None,
            capabilities: Vec::new(),
            shortfalls: Vec::new(),
            runtime_count: None,
            findings: Vec::new(),
        }
    }

    #[test]
    fn who_is_away_is_looked_for_soon_and_then_less_and_less() {
        let mut rhythm = Rhythm::new(Duration::from_secs(1), Duration::from_secs(15));
        let mut pauses = |one: bool, other: bool, count: usize| {
            let checked = [health("one", one), health("other", other)];
            (0..count).map(|_| rhythm.next(&checked).as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(pauses(true, true, 2), [15, 15]);
        assert_eq!(pauses(false, true, 6), [1, 2, 4, 8, 15, 15]);
        assert_eq!(pauses(false, false, 2), [1, 2], "another one is away, too");
        assert_eq!(pauses(true, false, 1), [4]);
        assert_eq!(pauses(true, true, 1), [15]);
    }
}

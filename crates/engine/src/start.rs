//! The engine's beginning and its orderly end.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use stacyvm_sandbox::Provider;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::event::EventBus;
use crate::health::HealthCache;
use crate::idempotency::Creates;
use crate::metrics::Metrics;
use crate::quota::Quotas;
use crate::recovery::SecondLook;
use crate::shared::Shared;
use crate::store::Store;
use crate::{EngineError, EngineOptions, Keys};

/// Longest wait for runtimes of other machines: whether they answer is nothing
/// that the sandboxes of this one should wait for.
const ELSEWHERE_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for background work at an orderly end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn start(
    options: EngineOptions,
    providers: Vec<Arc<dyn Provider>>,
    stop: &CancellationToken,
) -> Result<Arc<Shared>, EngineError> {
    let providers: BTreeMap<String, Arc<dyn Provider>> =
        providers.into_iter().map(|provider| (provider.name().to_owned(), provider)).collect();
    if !providers.contains_key(&options.default_provider) {
        return Err(EngineError::ProviderNotFound(options.default_provider));
    }
    let store = Store::open(&options.database_path).await?;
    let bus = EventBus::open(store.clone(), options.clock.clone(), stop.clone()).await?;
    let quotas = Arc::new(Quotas::default());
    quotas.load(store.quotas().await?);
    let templates = store.templates().await?;
    let keys = Keys::load(store.clone(), options.clock.clone()).await?;
    let admission = Admission::new(options.limits.clone(), options.spawn_overflow, Arc::clone(&quotas));
    let shared = Arc::new(Shared {
        options,
        bus,
        metrics: Metrics::default(),
        quotas,
        admission,
        providers,
        health: HealthCache::default(),
        second_look: SecondLook::default(),
        templates: RwLock::new(templates.into_iter().map(|found| (found.name.clone(), found)).collect()),
        creates: Creates::default(),
        keys,
        expiry_changed: Notify::new(),
        closing: AtomicBool::new(false),
        tasks: TaskTracker::new(),
        stop: stop.clone(),
        records: RwLock::new(HashMap::new()),
        store,
    });
    shared.load().await?;
    begin_background_work(&shared).await;
    Ok(shared)
}

/// What is pending is written and the file closed. Sandboxes stay.
pub(crate) async fn shutdown(shared: &Arc<Shared>) {
    if shared.stop.is_cancelled() {
        return;
    }
    shared.closing.store(true, Ordering::Relaxed);
    shared.stop.cancel();
    shared.tasks.close();
    if tokio::time::timeout(SHUTDOWN_PATIENCE, shared.tasks.wait()).await.is_err() {
        tracing::warn!("background work did not end in time");
    }
    for provider in shared.providers.values() {
        if tokio::time::timeout(SHUTDOWN_PATIENCE, provider.shutdown()).await.is_err() {
            tracing::warn!(provider = provider.name(), "a provider did not end its background work in time");
        }
    }
    let written = async {
        shared.store.writer().flush().await?;
        shared.bus.close().await?;
        shared.store.close().await
    };
    if let Err(error) = written.await {
        tracing::error!(error = ?error, "the last entries could not be written");
    }
}

/// Starts the loops, and gives recovery and the first health check a moment to
/// end, so that the first requests find a settled server.
async fn begin_background_work(shared: &Arc<Shared>) {
    let writer = Arc::clone(shared.store.writer());
    let stop = shared.stop.clone();
    // Ends at the stop by itself, never in the middle of a batch.
    shared.tasks.spawn(async move { writer.run(stop).await });
    let recovered = Arc::new(Notify::new());
    let here = Arc::new(Notify::new());
    let (first, tell, tell_here) = (Arc::clone(shared), Arc::clone(&recovered), Arc::clone(&here));
    shared.spawn(async move {
        tokio::join!(Arc::clone(&first).recover(&tell_here), first.check_providers());
        tell.notify_one();
        // On a timer only after the first comparison: its leftovers are not
        // this process's own work.
        first.keep_reconciling().await;
    });
    let settled = async {
        if tokio::time::timeout(ELSEWHERE_WAIT, recovered.notified()).await.is_err() {
            here.notified().await;
        }
    };
    if tokio::time::timeout(shared.options.timing.recovery_wait, settled).await.is_err() {
        tracing::warn!("taking in what an earlier process left goes on in the background");
    }
    let reaper = Arc::clone(shared);
    shared.spawn(reaper.reap());
    shared.spawn(Arc::clone(shared).keep_looking_at_paused());
    let health = Arc::clone(shared);
    shared.spawn(async move { health.keep_checking().await });
    let retention = Arc::clone(shared);
    shared.spawn(async move {
        loop {
            retention.delete_old().await;
            tokio::time::sleep(retention.options.timing.retention_interval).await;
        }
    });
}

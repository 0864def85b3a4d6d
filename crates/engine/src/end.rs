//! How sandboxes end: on request, at their expiry, or all at once; and how
//! their end is put off.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use serde_json::Map;
use stacyvm_api::{EventKind, Sandbox, SandboxId, SandboxState};

use crate::lifecycle::{Happening, Runtime};
use crate::order::check_ttl;
use crate::record::Record;
use crate::shared::{Operation, Shared};
use crate::{Caller, Destroyed, EngineError};

/// Sandboxes ended, or told their expiry, at the same time.
const PARALLEL: usize = 32;
/// A destroy is answered this much after the provider's own deadline.
const DESTROY_SLACK: Duration = Duration::from_secs(1);

impl Shared {
    pub(crate) async fn destroy(self: &Arc<Self>, caller: &Caller, id: &SandboxId) -> Result<Destroyed, EngineError> {
        let record = match self.find(caller, id) {
            Ok(record) => record,
            Err(error) if caller.tenant.is_some() => return Err(error),
            // Unknown, or destroyed before.
            Err(_) => return Ok(Destroyed::Done),
        };
        let started = Instant::now();
        let destroyed = self.end(&record, "it was destroyed on request").await;
        self.log_operation(
            caller,
            &Operation {
                action: "sandbox.destroy",
                sandbox: Some(id),
                provider: record.provider.name(),
                resource: id.as_str(),
                error: None,
                took: started.elapsed(),
            },
        );
        Ok(destroyed)
    }

    /// Destroys what has expired; says how many are gone.
    pub(crate) async fn prune(self: &Arc<Self>, caller: &Caller) -> u64 {
        let mine = |record: &Arc<Record>| caller.may_see(record.tenant.as_deref());
        let expired = self.expired().into_iter().filter(mine).collect();
        self.end_all(expired, "it expired").await
    }

    /// Destroys everything, and lets nothing new begin.
    pub(crate) async fn destroy_all(self: &Arc<Self>) -> u64 {
        self.closing.store(true, Ordering::Relaxed);
        let all = self.all_records();
        self.end_all(all, "the server ended").await
    }

    pub(crate) async fn extend(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        ttl: Duration,
    ) -> Result<Sandbox, EngineError> {
        let record = self.find(caller, id)?;
        match record.state() {
            SandboxState::Running | SandboxState::Paused | SandboxState::Unhealthy => {}
            SandboxState::Destroying | SandboxState::Destroyed => {
                return Err(EngineError::SandboxNotFound(id.clone()));
            }
            state @ (SandboxState::Creating | SandboxState::Error) => {
                let reason = record.sandbox().reason.clone();
                return Err(EngineError::SandboxNotReady { id: id.clone(), state, reason });
            }
        }
        let owner = record.sandbox().owner_id.clone();
        let max = self.quotas.effective(owner.as_ref(), &self.options.limits).max_ttl;
        let ttl = check_ttl(ttl, max).inspect_err(|error| {
            self.emit_failure(&record, EventKind::ResourceLimit, "extend", error);
        })?;
        self.set_expiry(&record, ttl);
        if let Err(error) = self.push_expiry(&record).await {
            tracing::warn!(sandbox = %id, error = ?error, "the agent was not told of an extension; trying again");
        }
        self.emit_about(&record, EventKind::SandboxExtended, Map::new());
        Ok(Sandbox::clone(&record.sandbox()))
    }

    /// Ends what expires, and tells agents of expiries that they do not know,
    /// until the engine stops.
    pub(crate) async fn reap(self: Arc<Self>) {
        loop {
            let (now, interval) = (self.now(), self.options.timing.reap_interval);
            let next =
                self.all_records().iter().filter(|record| can_expire(record.state())).map(|r| r.expires_at()).min();
            let pause = next.map_or(interval, |next| next.since(now).min(interval));
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.expiry_changed.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            for record in self.expired() {
                let shared = Arc::clone(&self);
                // Each in its own task: one that hangs delays no other, and the
                // provider call in it has its deadline.
                tracing::info!(sandbox = %record.id, "a sandbox expired");
                shared.apply(&record, Happening::DestroyAsked, Some("it expired"));
            }
            self.push_expiries().await;
        }
    }

    fn expired(&self) -> Vec<Arc<Record>> {
        let now = self.now();
        let expired = |record: &Arc<Record>| can_expire(record.state()) && record.expires_at() <= now;
        self.all_records().into_iter().filter(expired).collect()
    }

    async fn push_expiries(self: &Arc<Self>) {
        let behind = |record: &Arc<Record>| {
            let known = record.agent_expires_at.load(Ordering::Relaxed);
            record.state() == SandboxState::Running && known != record.expires_at().unix_ms().unsigned_abs()
        };
        let behind: Vec<Arc<Record>> = self.all_records().into_iter().filter(behind).collect();
        let push = |record: Arc<Record>| async move {
            if let Err(error) = self.push_expiry(&record).await {
                tracing::debug!(sandbox = %record.id, error = ?error, "the agent was not told of an extension");
            }
        };
        stream::iter(behind).for_each_concurrent(PARALLEL, push).await;
    }

    async fn end_all(self: &Arc<Self>, records: Vec<Arc<Record>>, reason: &str) -> u64 {
        let ends = records.into_iter().map(|record| async move { self.end(&record, reason).await });
        let done = |ended: &Destroyed| std::future::ready(*ended == Destroyed::Done);
        stream::iter(ends).buffer_unordered(PARALLEL).filter(done).count().await as u64
    }

    /// Asks for an end and waits for it, or for the first failure.
    async fn end(self: &Arc<Self>, record: &Arc<Record>, reason: &str) -> Destroyed {
        let failures = record.free_failures.load(Ordering::Relaxed);
        self.apply(record, Happening::DestroyAsked, Some(reason));
        if failures > 0 && record.state() == SandboxState::Destroying && record.runtime() == Runtime::Held {
            // Between two attempts: somebody asks, so do not wait.
            self.apply(record, Happening::RetryDue, None);
        }
        let ended = record.wait_until(|state, _| {
            state == SandboxState::Destroyed || record.free_failures.load(Ordering::Relaxed) > failures
        });
        let limit = self.options.timing.destroy_timeout + DESTROY_SLACK;
        let _still_running = tokio::time::timeout(limit, ended).await;
        if record.state() == SandboxState::Destroyed { Destroyed::Done } else { Destroyed::Retrying }
    }
}

/// What is still being made has its own deadline, and what is already being
/// destroyed needs no second reason.
fn can_expire(state: SandboxState) -> bool {
    match state {
        SandboxState::Running | SandboxState::Paused | SandboxState::Unhealthy | SandboxState::Error => true,
        SandboxState::Creating | SandboxState::Destroying | SandboxState::Destroyed => false,
    }
}

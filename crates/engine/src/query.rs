//! Questions about the whole: lists, admission, usage, readiness, metrics; and
//! the settings that are quotas.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use stacyvm_api::{
    AdmissionDecision, CreateRequest, EventKind, ListQuery, OwnerId, OwnerQuota, OwnerQuotaRequest, OwnerUsage,
    Sandbox, SandboxId, SandboxState, SandboxStats,
};
use stacyvm_sandbox::{ProviderError, ResourceUsage};

use crate::event::Subject;
use crate::metrics::{MetricsSnapshot, ReadinessReport, SandboxCounts, StoreHealth};
use crate::options::SpawnOverflow;
use crate::page::{self, Cursor};
use crate::record::Record;
use crate::shared::{Operation, Shared, within};
use crate::{Caller, EngineError, LimitExceeded, SandboxPage, quota};

/// Entries of one page of sandboxes.
const PAGE_MAX: u32 = 1000;
/// Longest wait for a reading of usage.
const USAGE_TIMEOUT: Duration = Duration::from_secs(2);
/// Console lines asked for at once.
const CONSOLE_LINES_MAX: usize = 1000;
/// A store that takes longer to answer is not ready.
const STORE_TIMEOUT: Duration = Duration::from_secs(2);

impl Shared {
    pub(crate) async fn list(&self, caller: &Caller, query: &ListQuery) -> Result<SandboxPage, EngineError> {
        let limit = page::limit(query.limit, PAGE_MAX)?;
        let cursor = query.cursor.as_deref().filter(|text| !text.is_empty()).map(Cursor::parse).transpose()?;
        let filter = Filter::new(caller, query)?;
        let mut items = if query.state == Some(SandboxState::Destroyed) {
            return self.list_destroyed(&filter, limit.unwrap_or(PAGE_MAX), cursor).await;
        } else {
            let all = self.all_records();
            let matching = all.iter().map(|record| record.sandbox()).filter(|sandbox| filter.accepts(sandbox));
            matching
                .filter(|found| cursor.as_ref().is_none_or(|after| after.precedes(found.created_at, found.id.as_str())))
                .collect::<Vec<Arc<Sandbox>>>()
        };
        items.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        let more = limit.is_some_and(|limit| items.len() > limit as usize);
        items.truncate(limit.map_or(usize::MAX, |limit| limit as usize));
        let last = items.last().filter(|_| more);
        let next_cursor = last.map(|last| Cursor::text(last.created_at, last.id.as_str()));
        Ok(SandboxPage { items: items.iter().map(|sandbox| Sandbox::clone(sandbox)).collect(), next_cursor })
    }

    /// From the store, batch by batch, because filters leave some out.
    async fn list_destroyed(
        &self,
        filter: &Filter<'_>,
        limit: u32,
        cursor: Option<Cursor>,
    ) -> Result<SandboxPage, EngineError> {
        self.store.writer().committed().await?;
        let mut after = cursor;
        let mut items = Vec::new();
        loop {
            let before = after.as_ref().map(|cursor| (cursor.at, cursor.id.as_str()));
            let rows = self.store.destroyed_sandboxes(before, PAGE_MAX).await?;
            let Some(last) = rows.last() else { return Ok(SandboxPage { items, next_cursor: None }) };
            after = Some(Cursor { at: last.sandbox.created_at, id: last.sandbox.id.to_string() });
            for row in rows {
                if !filter.accepts(&row.sandbox) {
                    continue;
                }
                if items.len() == limit as usize {
                    let last: Option<&Sandbox> = items.last();
                    let next_cursor = last.map(|last| Cursor::text(last.created_at, last.id.as_str()));
                    return Ok(SandboxPage { items, next_cursor });
                }
                items.push(row.sandbox);
            }
        }
    }

    /// Whether a create would be let in now (http-api S4).
    pub(crate) fn decide(&self, caller: &Caller, request: &CreateRequest) -> Result<AdmissionDecision, EngineError> {
        let owner = Self::owner_of(caller, request)?;
        let effective = self.quotas.effective(owner.as_ref(), &self.options.limits);
        let occupancy = self.admission.occupancy(owner.as_ref());
        let mut decision = AdmissionDecision {
            allowed: true,
            active_sandboxes: occupancy.active,
            max_sandboxes: self.options.limits.max_sandboxes.unwrap_or(0),
            active_owner_sandboxes: owner.is_some().then_some(occupancy.active_of_owner).filter(|count| *count > 0),
            max_owner_sandboxes: owner.is_some().then_some(effective.max_sandboxes).flatten(),
            max_ttl: effective.max_ttl.map(Into::into),
            ..AdmissionDecision::default()
        };
        let refusal = match self.ttl_of(owner.as_ref(), request.ttl) {
            Err(EngineError::Limit(exceeded)) => Some(exceeded.reason().to_owned()),
            Err(error) => return Err(error),
            Ok(_) if self.provider(request.provider.as_deref()).is_err() => Some("worker_unavailable".to_owned()),
            Ok(_) => occupancy.exceeded.as_ref().map(|exceeded| {
                let room_may_come =
                    matches!(exceeded, LimitExceeded::Sandboxes { .. } | LimitExceeded::OwnerSandboxes { .. });
                decision.queueable = room_may_come && self.options.spawn_overflow != SpawnOverflow::Reject;
                exceeded.reason().to_owned()
            }),
        };
        decision.allowed = refusal.is_none();
        decision.reason = refusal;
        Ok(decision)
    }

    pub(crate) async fn stats(&self, caller: &Caller, id: &SandboxId) -> Result<SandboxStats, EngineError> {
        let record = self.find(caller, id)?;
        match within("reading", USAGE_TIMEOUT, record.provider.usage(id)).await {
            Ok(usage) => Ok(stats_of(&record, &usage)),
            Err(EngineError::Provider(ProviderError::Unsupported { .. })) => Ok(SandboxStats::default()),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn console(
        &self,
        caller: &Caller,
        id: &SandboxId,
        lines: usize,
    ) -> Result<Vec<String>, EngineError> {
        let record = self.find(caller, id)?;
        let session = self.session(&record).await?;
        let limit = self.options.timing.ping_timeout;
        within("reading", limit, session.console(lines.min(CONSOLE_LINES_MAX))).await
    }

    // Quotas.

    pub(crate) async fn put_quota(
        &self,
        owner: &OwnerId,
        request: &OwnerQuotaRequest,
    ) -> Result<OwnerQuota, EngineError> {
        let saved = quota::parse(owner, request, self.quotas.get(owner).as_ref(), self.now())?;
        self.store.save_quota(&saved).await?;
        self.quotas.put(saved.clone());
        self.admission.reconsider();
        let mut data = Map::new();
        data.insert("owner_id".to_owned(), Value::from(owner.as_str()));
        data.insert("max_sandboxes".to_owned(), Value::from(saved.max_sandboxes));
        data.insert("max_ttl".to_owned(), Value::from(saved.max_ttl.to_string()));
        data.insert("max_exec_timeout".to_owned(), Value::from(saved.max_exec_timeout.to_string()));
        self.bus.emit(EventKind::QuotaSaved, Subject { data, ..Subject::default() });
        Ok(saved)
    }

    pub(crate) async fn delete_quota(&self, owner: &OwnerId) -> Result<(), EngineError> {
        if self.quotas.get(owner).is_none() {
            return Err(EngineError::QuotaNotFound(owner.to_string()));
        }
        self.store.delete_quota(owner.as_str()).await?;
        self.quotas.remove(owner);
        self.admission.reconsider();
        let data = Map::from_iter([("owner_id".to_owned(), Value::from(owner.as_str()))]);
        self.bus.emit(EventKind::QuotaDeleted, Subject { data, ..Subject::default() });
        Ok(())
    }

    pub(crate) fn owner_usage(&self, owner: &OwnerId) -> OwnerUsage {
        let effective = self.quotas.effective(Some(owner), &self.options.limits);
        let span = |span: Option<Duration>| span.unwrap_or_default().into();
        OwnerUsage {
            owner_id: owner.clone(),
            active_sandboxes: self.admission.occupancy(Some(owner)).active_of_owner,
            max_sandboxes: effective.max_sandboxes.unwrap_or(0),
            max_ttl: span(effective.max_ttl),
            max_exec_timeout: span(effective.max_exec_timeout),
            quota_configured: self.quotas.get(owner).is_some(),
        }
    }

    /// Changes of settings are in the operation log too.
    pub(crate) fn log_setting(
        &self,
        caller: &Caller,
        action: &'static str,
        resource: &str,
        error: Option<&EngineError>,
    ) {
        let operation = Operation { action, sandbox: None, provider: "", resource, error, took: Duration::ZERO };
        self.log_operation(caller, &operation);
    }

    // Health and metrics.

    pub(crate) async fn store_health(&self) -> StoreHealth {
        let started = Instant::now();
        let checked = tokio::time::timeout(STORE_TIMEOUT, self.store.check()).await;
        let error = match checked {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the database does not answer".to_owned()),
        };
        StoreHealth { healthy: error.is_none(), latency_ms: started.elapsed().as_millis() as u64, error }
    }

    pub(crate) async fn readiness(&self) -> ReadinessReport {
        let (store, providers) = (self.store_health().await, self.cached_health());
        let default_works = providers.iter().any(|provider| provider.default && provider.healthy);
        ReadinessReport { ready: store.healthy && default_works, store, providers }
    }

    pub(crate) async fn metrics_snapshot(&self) -> MetricsSnapshot {
        let mut sandboxes = SandboxCounts { by_provider: self.counts_by_provider(), ..SandboxCounts::default() };
        let mut running_execs = 0;
        for record in self.all_records() {
            let state = record.state();
            sandboxes.total += 1;
            sandboxes.active += u64::from(state == SandboxState::Running);
            *sandboxes.by_state.entry(state).or_default() += 1;
            running_execs += record.commands().len() as u64;
        }
        MetricsSnapshot {
            sandboxes,
            operations: self.metrics.snapshot(),
            events: self.bus.stats(),
            queue: self.admission.stats(),
            quotas: self.quotas.summary(),
            providers: self.cached_health(),
            store: self.store_health().await,
            running_execs,
            dropped_log_entries: self.store.writer().dropped(),
        }
    }

    pub(crate) async fn delete_old(&self) {
        let newest = self.bus.newest();
        match self.store.delete_old(self.now(), &self.options.retention, newest).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(rows, "deleted what was kept long enough"),
            Err(error) => tracing::error!(error = ?error, "what was kept long enough could not be deleted"),
        }
    }
}

/// Which sandboxes a list is about.
struct Filter<'a> {
    caller: &'a Caller,
    state: Option<SandboxState>,
    provider: Option<&'a str>,
    owner: Option<OwnerId>,
    metadata: Option<(&'a str, &'a str)>,
}

impl<'a> Filter<'a> {
    fn new(caller: &'a Caller, query: &'a ListQuery) -> Result<Self, EngineError> {
        let given = |text: &'a Option<String>| text.as_deref().map(str::trim).filter(|text| !text.is_empty());
        let owner = OwnerId::parse_optional(query.owner_id.as_deref().unwrap_or_default());
        let metadata = given(&query.metadata).map(|pair| {
            let message = "the metadata filter is written key=value".to_owned();
            pair.split_once('=').ok_or(EngineError::InvalidInput(message))
        });
        Ok(Self {
            caller,
            state: query.state,
            provider: given(&query.provider),
            owner: owner.map_err(|error| EngineError::InvalidInput(error.to_string()))?,
            metadata: metadata.transpose()?,
        })
    }

    fn accepts(&self, sandbox: &Sandbox) -> bool {
        self.caller.may_see(sandbox.tenant_id.as_deref())
            && self.state.is_none_or(|state| state == sandbox.state)
            && self.provider.is_none_or(|provider| provider == sandbox.provider)
            && (self.owner.is_none() || self.owner == sandbox.owner_id)
            && self.metadata.is_none_or(|(key, value)| sandbox.metadata.get(key).is_some_and(|found| found == value))
    }
}

fn stats_of(record: &Record, usage: &ResourceUsage) -> SandboxStats {
    let limit = |bytes: u64| (bytes > 0).then_some(bytes);
    let now = Instant::now();
    let mut last = record.cpu_reading.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let cpu_pct = last.map_or(0.0, |(at, before)| {
        let elapsed_usec = (now - at).as_micros() as f64;
        let used_usec = usage.cpu_usec.saturating_sub(before) as f64;
        if elapsed_usec > 0.0 { 100.0 * used_usec / elapsed_usec } else { 0.0 }
    });
    *last = Some((now, usage.cpu_usec));
    SandboxStats {
        supported: true,
        cpu_pct: Some(cpu_pct),
        mem_bytes: Some(usage.memory_bytes),
        mem_limit_bytes: limit(usage.memory_limit_bytes),
        pids: Some(usage.pids),
        pids_limit: limit(usage.pids_limit),
        disk_bytes: usage.disk_bytes,
        disk_limit_bytes: limit(usage.disk_limit_bytes),
    }
}

//! What an earlier process left behind, and what went wrong since: rows and
//! runtimes are compared at start and on a timer, and every difference is
//! settled one by one. One bad item never stops the rest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::stream::{self, StreamExt as _};
use serde_json::{Map, Value};
use stacyvm_api::{EventKind, Sandbox, SandboxId, SandboxState};
use stacyvm_sandbox::{Provider, RuntimeSandbox, RuntimeState};
use tokio::sync::Notify;

use crate::EngineError;
use crate::event::Subject;
use crate::lifecycle::{Effect, Happening, Lifecycle};
use crate::missing::MissingProvider;
use crate::options::UnknownSandboxes;
use crate::record::{NewRecord, Record, WORKER_ID};
use crate::shared::{Shared, within};
use crate::spawn::FIRST_GENERATION;
use crate::store::{SandboxRow, StoreError};

/// Sandboxes settled at the same time.
const PARALLEL: usize = 32;

/// A runtime and what is on record there.
type Work = (Arc<dyn Provider>, Vec<Arc<Record>>);

/// When a comparison is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// Nothing of this process runs yet: every half-done thing is a leftover.
    Start,
    /// Creates and destroys of this process are under way and look after
    /// themselves.
    Timer,
}

/// Calls of sandboxes that are said to be paused: whoever paused them outside of
/// this server may have resumed them since.
#[derive(Debug, Default)]
pub(crate) struct SecondLook {
    wanted: Notify,
    taken: Notify,
}

/// Whether a runtime is on another machine, which may not answer for long.
fn is_elsewhere(provider: &dyn Provider) -> bool {
    provider.capabilities().family == "remote_http"
}

impl Shared {
    /// Brings the stored sandboxes into memory, where they hold their capacity.
    pub(crate) async fn load(self: &Arc<Self>) -> Result<(), StoreError> {
        let lost = self.store.lose_execs_of_destroyed().await?;
        let rows = self.store.live_sandboxes().await?;
        let mut ports = self.store.port_access().await?;
        tracing::info!(sandboxes = rows.len(), lost_commands = lost, "read what an earlier process left");
        for row in rows {
            let known = self.providers.get(&row.sandbox.provider).cloned();
            let provider = known.unwrap_or_else(|| Arc::new(MissingProvider::new(&row.sandbox.provider)));
            if let Some(idempotency) = &row.idempotency {
                self.creates.restore(idempotency, &row.sandbox.id);
            }
            let lifecycle = Lifecycle::recovered(row.sandbox.state);
            let reservation = self.admission.reserve_existing(row.sandbox.owner_id.as_ref());
            let record = Record::new(NewRecord { row, provider, lifecycle, reservation });
            *record.port_access() = ports.remove(&record.id).unwrap_or_default();
            self.remember(&record);
        }
        Ok(())
    }

    /// Settles everything once, at start; what nobody owns is swept afterwards,
    /// which takes as long as there is of it.
    /// `here` tells when the runtimes of this machine are done with.
    pub(crate) async fn recover(self: Arc<Self>, here: &Notify) {
        let (elsewhere, local): (Vec<_>, Vec<_>) =
            self.records_by_provider().into_iter().partition(|(provider, _)| is_elsewhere(provider.as_ref()));
        let local = async {
            self.reconcile(local, Occasion::Start).await;
            here.notify_one();
        };
        tokio::join!(local, self.reconcile(elsewhere, Occasion::Start));
    }

    /// Settles what went wrong, until the engine stops.
    pub(crate) async fn keep_reconciling(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.options.timing.reconcile_interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            self.sweep_all().await;
            ticks.tick().await;
            self.reconcile(self.records_by_provider(), Occasion::Timer).await;
        }
    }

    /// Waits until a sandbox that is said to be paused was looked at again.
    pub(crate) async fn look_again_if_paused(&self, record: &Record) {
        if record.state() == SandboxState::Paused {
            let taken = self.second_look.taken.notified();
            self.second_look.wanted.notify_one();
            tokio::time::timeout(self.options.timing.ping_timeout, taken).await.ok();
        }
    }

    /// Looks for those who wait, all at once, until the engine stops.
    pub(crate) async fn keep_looking_at_paused(self: Arc<Self>) {
        loop {
            self.second_look.wanted.notified().await;
            for (provider, mut records) in self.records_by_provider() {
                records.retain(|record| record.state() == SandboxState::Paused);
                if records.is_empty() {
                    continue;
                }
                let listed = within("listing", self.options.timing.ping_timeout, provider.list()).await;
                let Ok(listed) = listed else { continue };
                for record in &records {
                    let found = listed.iter().find(|sandbox| sandbox.id == record.id).map(|sandbox| sandbox.state);
                    self.settle_running(record, SandboxState::Paused, found).await;
                }
            }
            self.second_look.taken.notify_waiters();
        }
    }

    fn records_by_provider(&self) -> Vec<Work> {
        let mut by_provider: HashMap<String, Vec<Arc<Record>>> = HashMap::new();
        for record in self.all_records() {
            by_provider.entry(record.provider.name().to_owned()).or_default().push(record);
        }
        let mut work = Vec::new();
        for provider in self.providers.values() {
            work.push((Arc::clone(provider), by_provider.remove(provider.name()).unwrap_or_default()));
        }
        for records in by_provider.into_values() {
            if let Some(first) = records.first() {
                work.push((Arc::clone(&first.provider), records));
            }
        }
        work
    }

    async fn reconcile(self: &Arc<Self>, work: Vec<Work>, occasion: Occasion) {
        let settle = |(provider, records)| self.reconcile_provider(provider, records, occasion);
        stream::iter(work).for_each_concurrent(None, settle).await;
    }

    async fn reconcile_provider(
        self: &Arc<Self>,
        provider: Arc<dyn Provider>,
        records: Vec<Arc<Record>>,
        occasion: Occasion,
    ) {
        // The states of before the listing: what changes during it is not
        // judged by it.
        let records: Vec<(Arc<Record>, SandboxState)> =
            records.into_iter().map(|record| (Arc::clone(&record), record.state())).collect();
        let listed = within("listing", self.options.timing.list_timeout, provider.list()).await;
        match listed {
            Ok(found) => {
                let known: HashSet<&SandboxId> = records.iter().map(|(record, _)| &record.id).collect();
                let unknown: Vec<&RuntimeSandbox> =
                    found.iter().filter(|sandbox| !known.contains(&sandbox.id)).collect();
                stream::iter(unknown)
                    .for_each_concurrent(PARALLEL, |sandbox| self.settle_unknown(&provider, sandbox))
                    .await;
                let found: HashMap<&SandboxId, &RuntimeSandbox> =
                    found.iter().map(|sandbox| (&sandbox.id, sandbox)).collect();
                stream::iter(&records)
                    .for_each_concurrent(PARALLEL, |(record, state)| {
                        self.settle(record, *state, found.get(&record.id).copied(), occasion)
                    })
                    .await;
            }
            Err(error) => {
                self.note_unlistable(&provider, &error);
                stream::iter(&records)
                    .for_each_concurrent(PARALLEL, |(record, state)| self.settle_unlisted(record, *state, occasion))
                    .await;
            }
        }
    }

    async fn sweep_all(&self) {
        stream::iter(self.providers.values()).for_each_concurrent(None, |provider| self.sweep(provider)).await;
    }

    /// One row, and what the runtime says of it.
    async fn settle(
        self: &Arc<Self>,
        record: &Arc<Record>,
        state: SandboxState,
        found: Option<&RuntimeSandbox>,
        occasion: Occasion,
    ) {
        let runtime = found.map(|found| found.state);
        let gone = matches!(runtime, None | Some(RuntimeState::Dead));
        let ending = matches!(state, SandboxState::Destroying | SandboxState::Error);
        if occasion == Occasion::Start && (gone || ending) {
            self.lose_commands(record).await;
        }
        match (state, occasion) {
            (SandboxState::Creating, Occasion::Start) => self.settle_half_made(record, found).await,
            (SandboxState::Running | SandboxState::Unhealthy | SandboxState::Paused, _) => {
                self.settle_running(record, state, runtime).await;
            }
            (SandboxState::Destroying, Occasion::Start) => {
                self.note_action(record, "resumed_destroy", "its destroy had not ended");
                self.apply(record, Happening::RetryDue, None);
            }
            (SandboxState::Error, Occasion::Start) if found.is_none() => {
                self.apply(record, Happening::RuntimeFreed, None);
            }
            (SandboxState::Error, Occasion::Start) => self.apply(record, Happening::RetryDue, None),
            // Under way in this process.
            (SandboxState::Creating | SandboxState::Destroying | SandboxState::Error, Occasion::Timer)
            | (SandboxState::Destroyed, _) => {}
        }
    }

    /// The server ended while it made this one. Its caller may have had the
    /// answer, so that a sandbox that works is kept.
    async fn settle_half_made(self: &Arc<Self>, record: &Arc<Record>, found: Option<&RuntimeSandbox>) {
        let running = found.filter(|found| found.state == RuntimeState::Running && !record.has_setup);
        if let Some(found) = running
            && self.ping(record).await.is_ok()
        {
            if let Some(limits) = &found.limits {
                record.set_limits(limits.clone());
            }
            self.note_action(record, "finished_create", "it was made, but not yet recorded as running");
            self.apply(record, Happening::Created, None);
            self.settle_commands(record).await;
        } else {
            let reason = "the server ended while it was made";
            self.note_action(record, "removed_half_made", reason);
            self.apply(record, Happening::CreateFailed, Some(reason));
        }
    }

    async fn settle_running(self: &Arc<Self>, record: &Arc<Record>, state: SandboxState, found: Option<RuntimeState>) {
        match found {
            None => {
                let reason = "its runtime no longer has it";
                self.note_action(record, "marked_destroyed", reason);
                self.apply(record, Happening::Vanished, Some(reason));
            }
            Some(RuntimeState::Dead) => {
                let reason = "it ended by itself";
                self.note_action(record, "marked_dead", reason);
                self.apply(record, Happening::Died, Some(reason));
            }
            Some(RuntimeState::Paused) => {
                if state == SandboxState::Running {
                    self.apply(record, Happening::Paused, None);
                }
                self.take_in(record).await;
            }
            Some(RuntimeState::Running) => {
                if state == SandboxState::Paused {
                    self.apply(record, Happening::Resumed, None);
                }
                match self.ping(record).await {
                    Ok(()) => {
                        self.apply(record, Happening::Answered, None);
                        self.take_in(record).await;
                    }
                    Err(error) => {
                        tracing::warn!(sandbox = %record.id, error = ?error, "a sandbox does not answer");
                        self.apply(record, Happening::Silent, Some(&format!("it does not answer: {error}")));
                    }
                }
            }
        }
    }

    /// A runtime has a sandbox of ours that is not in memory.
    async fn settle_unknown(self: &Arc<Self>, provider: &Arc<dyn Provider>, found: &RuntimeSandbox) {
        if self.record(&found.id).is_some() {
            // Made while the runtime was asked.
            return;
        }
        let stored = match self.store.sandbox(&found.id).await {
            Ok(stored) => stored,
            Err(error) => {
                tracing::error!(sandbox = %found.id, error = ?error, "it is not known whether this sandbox is ours");
                return;
            }
        };
        let adopt = self.options.unknown_sandboxes == UnknownSandboxes::Adopt;
        if stored.is_none() && adopt && found.state != RuntimeState::Dead {
            self.adopt(provider, found);
            return;
        }
        let reason = if stored.is_some() { "it was destroyed before" } else { "no record of it exists" };
        self.emit_action(&found.id, None, provider.name(), "removed_runtime", reason);
        let limit = self.options.timing.destroy_timeout;
        if let Err(error) = within("destroy", limit, provider.destroy(&found.id)).await {
            // The next comparison finds it again.
            tracing::warn!(sandbox = %found.id, error = ?error, "a leftover sandbox could not be destroyed");
        }
    }

    fn adopt(self: &Arc<Self>, provider: &Arc<dyn Provider>, found: &RuntimeSandbox) {
        let (now, defaults) = (self.now(), &self.options.defaults);
        let sandbox = Sandbox {
            id: found.id.clone(),
            state: SandboxState::Creating,
            provider: provider.name().to_owned(),
            image: found.image.clone().unwrap_or_else(|| defaults.image.clone()),
            memory_mb: defaults.memory_mb,
            vcpus: defaults.vcpus,
            disk_size_mb: None,
            owner_id: None,
            tenant_id: None,
            worker_id: Some(WORKER_ID.to_owned()),
            created_at: found.created_at.unwrap_or(now),
            expires_at: now + defaults.ttl,
            metadata: found.metadata.clone(),
            preview_domain: None,
            network: None,
            limits: None,
            reason: None,
        };
        let row =
            SandboxRow { sandbox, generation: FIRST_GENERATION, has_setup: false, idempotency: None, updated_at: now };
        let (provider, reservation) = (Arc::clone(provider), self.admission.reserve_existing(None));
        let lifecycle = Lifecycle::new();
        let record = Record::new(NewRecord { row, provider, lifecycle, reservation });
        if let Some(limits) = &found.limits {
            record.set_limits(limits.clone());
        }
        // The agent has an expiry of its own and must hear of this one.
        record.agent_knows_expiry(stacyvm_api::Timestamp::from_unix_ms(0));
        self.remember(&record);
        self.note_action(&record, "adopted_runtime", "no record of it exists");
        self.apply(&record, Happening::Created, None);
        self.expiry_changed.notify_one();
    }

    fn note_unlistable(&self, provider: &Arc<dyn Provider>, error: &EngineError) {
        tracing::error!(provider = provider.name(), error = ?error, "a runtime cannot list its sandboxes");
        let data = crate::shared::failure_data("reconcile", provider.name(), &error.to_string());
        self.bus.emit(EventKind::ProviderFailed, Subject { sandbox: None, tenant: None, data });
    }

    /// One row while the runtime does not say what it has. What still answers
    /// works; the rest may or may not be there.
    async fn settle_unlisted(self: &Arc<Self>, record: &Arc<Record>, state: SandboxState, occasion: Occasion) {
        match (state, occasion) {
            (SandboxState::Running | SandboxState::Unhealthy, _) => match self.ping(record).await {
                Ok(()) => {
                    self.apply(record, Happening::Answered, None);
                    self.take_in(record).await;
                }
                Err(error) => {
                    self.apply(record, Happening::Silent, Some(&format!("its runtime does not answer: {error}")));
                }
            },
            (SandboxState::Creating, Occasion::Start) => {
                self.apply(record, Happening::CreateFailed, Some("the server ended while it was made"));
            }
            (SandboxState::Destroying | SandboxState::Error, Occasion::Start) => {
                self.apply(record, Happening::RetryDue, None);
            }
            (SandboxState::Creating | SandboxState::Destroying | SandboxState::Error, Occasion::Timer)
            | (SandboxState::Paused | SandboxState::Destroyed, _) => {}
        }
    }

    async fn sweep(&self, provider: &Arc<dyn Provider>) {
        match within("sweep", self.options.timing.list_timeout, provider.sweep()).await {
            Ok(freed) => {
                for what in freed {
                    tracing::info!(provider = provider.name(), what, "freed what no sandbox owns");
                    let mut data = action_data(provider.name(), "swept", "no sandbox owns it");
                    data.insert("what".to_owned(), Value::from(what));
                    self.bus.emit(EventKind::ReconcileAction, Subject { sandbox: None, tenant: None, data });
                }
            }
            Err(error) => tracing::warn!(provider = provider.name(), error = ?error, "a runtime cannot be swept"),
        }
    }

    async fn ping(&self, record: &Record) -> Result<(), EngineError> {
        let session = self.connect(record).await?;
        within("ping", self.options.timing.ping_timeout, session.ping()).await
    }

    /// Watches a sandbox of an earlier process, and learns what became of its
    /// commands.
    async fn take_in(self: &Arc<Self>, record: &Arc<Record>) {
        if record.taken_in.load(Ordering::Relaxed) {
            return;
        }
        self.note_kills(record).await;
        self.settle_commands(record).await;
        self.carry_out(record, Effect::Watch);
    }

    fn note_action(&self, record: &Record, action: &str, reason: &str) {
        self.emit_action(&record.id, record.tenant.as_deref(), record.provider.name(), action, reason);
    }

    fn emit_action(&self, id: &SandboxId, tenant: Option<&str>, provider: &str, action: &str, reason: &str) {
        tracing::info!(sandbox = %id, provider, action, reason, "reconciled");
        let data = action_data(provider, action, reason);
        let subject = Subject { sandbox: Some(id.clone()), tenant: tenant.map(str::to_owned), data };
        self.bus.emit(EventKind::ReconcileAction, subject);
    }
}

fn action_data(provider: &str, action: &str, reason: &str) -> Map<String, Value> {
    [("action", action), ("provider", provider), ("reason", reason)]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect()
}

//! What every part of the engine works on, and how effects of the life cycle
//! are carried out.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use stacyvm_api::{EventKind, SandboxId, Template, Timestamp};
use stacyvm_sandbox::{Connection, Ending, EnvdSession, Provider, Session};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::event::{EventBus, Subject};
use crate::health::HealthCache;
use crate::idempotency::Creates;
use crate::lifecycle::{Effect, Happening};
use crate::metrics::Metrics;
use crate::quota::Quotas;
use crate::record::Record;
use crate::recovery::SecondLook;
use crate::store::{OperationRow, Store};
use crate::token::agent_token;
use crate::{Caller, EngineError, EngineOptions, Keys};

/// Longest text kept of what an operation was about or how it failed.
const LOG_TEXT_MAX_BYTES: usize = 2048;
/// Pause before a watch that failed begins again.
const WATCH_RETRY: Duration = Duration::from_secs(5);

pub(crate) struct Shared {
    pub(crate) options: EngineOptions,
    pub(crate) store: Store,
    pub(crate) bus: Arc<EventBus>,
    pub(crate) metrics: Metrics,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) providers: BTreeMap<String, Arc<dyn Provider>>,
    pub(crate) health: HealthCache,
    pub(crate) second_look: SecondLook,
    pub(crate) templates: RwLock<BTreeMap<String, Template>>,
    pub(crate) creates: Creates,
    pub(crate) keys: Keys,
    /// An expiry changed: the reaper looks again.
    pub(crate) expiry_changed: Notify,
    /// No more creates and commands.
    pub(crate) closing: AtomicBool,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) records: RwLock<HashMap<SandboxId, Arc<Record>>>,
}

impl Shared {
    pub(crate) fn now(&self) -> Timestamp {
        self.options.clock.now()
    }

    /// Runs something that outlives its caller, but not the engine.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    pub(crate) fn check_open(&self) -> Result<(), EngineError> {
        if self.closing.load(Ordering::Relaxed) { Err(EngineError::ShuttingDown) } else { Ok(()) }
    }

    // Records.

    /// A sandbox that exists for this caller.
    pub(crate) fn find(&self, caller: &Caller, id: &SandboxId) -> Result<Arc<Record>, EngineError> {
        let record = self.record(id).filter(|record| caller.may_see(record.tenant.as_deref()));
        record.ok_or_else(|| EngineError::SandboxNotFound(id.clone()))
    }

    pub(crate) fn record(&self, id: &SandboxId) -> Option<Arc<Record>> {
        self.records.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn all_records(&self) -> Vec<Arc<Record>> {
        self.records.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(crate) fn remember(&self, record: &Arc<Record>) {
        self.records.write().unwrap_or_else(PoisonError::into_inner).insert(record.id.clone(), Arc::clone(record));
    }

    fn forget(&self, record: &Record) {
        self.records.write().unwrap_or_else(PoisonError::into_inner).remove(&record.id);
        if let Some(idempotency) = &record.idempotency {
            self.creates.forget(&idempotency.key, &record.id);
        }
    }

    pub(crate) fn provider(&self, name: Option<&str>) -> Result<&Arc<dyn Provider>, EngineError> {
        let name = name.map(str::trim).filter(|name| !name.is_empty()).unwrap_or(&self.options.default_provider);
        self.providers.get(name).ok_or_else(|| EngineError::ProviderNotFound(name.to_owned()))
    }

    /// The way into a sandbox, in whatever state it is.
    pub(crate) async fn connect(&self, record: &Record) -> Result<Arc<dyn Session>, EngineError> {
        let opened = record.session.get_or_try_init(|| async {
            let limit = self.options.timing.connect_timeout;
            let connection = within("connect", limit, record.provider.connect(&record.id)).await?;
            Ok::<_, EngineError>(match connection {
                Connection::Native(session) => session,
                Connection::Envd(channel) => {
                    let token = agent_token(&self.options.server_secret, &record.id, record.generation);
                    Arc::new(EnvdSession::connect(channel, token)?) as Arc<dyn Session>
                }
            })
        });
        Ok(Arc::clone(opened.await?))
    }

    /// The way into a sandbox that can be worked with.
    pub(crate) async fn session(&self, record: &Record) -> Result<Arc<dyn Session>, EngineError> {
        self.look_again_if_paused(record).await;
        record.check_usable()?;
        self.connect(record).await
    }

    /// Tells the agent the expiry that the record has now.
    pub(crate) async fn push_expiry(&self, record: &Record) -> Result<(), EngineError> {
        let expires_at = record.expires_at();
        let session = self.connect(record).await?;
        let limit = self.options.timing.ping_timeout;
        let told = tokio::time::timeout(limit, session.set_deadline(expires_at)).await;
        match told {
            // A runtime without such a notion has nothing to be told.
            Ok(Ok(()) | Err(stacyvm_sandbox::SessionError::Unsupported(_))) => {
                record.agent_knows_expiry(expires_at);
                Ok(())
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(EngineError::ProviderTimeout { operation: "extension", after: limit }),
        }
    }

    // Life cycle.

    /// Takes in what happened to a sandbox and carries out the effects.
    pub(crate) fn apply(self: &Arc<Self>, record: &Arc<Record>, happening: Happening, reason: Option<&str>) {
        let effects = record.apply(happening, reason, self.now(), |effect, row| match effect {
            Effect::Announce(kind) => {
                let mut data = Map::new();
                if kind == EventKind::SandboxError
                    && let Some(reason) = &row.sandbox.reason
                {
                    data.insert("error".to_owned(), Value::String(reason.clone()));
                }
                self.emit_about(record, kind, data);
            }
            Effect::Persist => self.store.writer().save_sandbox(row),
            Effect::Watch
            | Effect::EndInside
            | Effect::AbortCreate
            | Effect::Free
            | Effect::RetryFree
            | Effect::ReleaseCapacity
            | Effect::Forget => {}
        });
        for effect in effects {
            self.carry_out(record, effect);
        }
    }

    pub(crate) fn carry_out(self: &Arc<Self>, record: &Arc<Record>, effect: Effect) {
        let (shared, record) = (Arc::clone(self), Arc::clone(record));
        match effect {
            Effect::Watch => {
                record.taken_in.store(true, Ordering::Relaxed);
                self.spawn(async move { shared.watch(&record).await });
            }
            Effect::EndInside => record.ended.cancel(),
            Effect::AbortCreate => record.abort_create.cancel(),
            Effect::Free => self.spawn(async move { shared.free(&record).await }),
            Effect::RetryFree => self.spawn(async move {
                tokio::time::sleep(shared.retry_pause(&record)).await;
                shared.apply(&record, Happening::RetryDue, None);
            }),
            Effect::Forget => self.forget(&record),
            // In order with the change itself, and done already.
            Effect::Persist | Effect::Announce(_) | Effect::ReleaseCapacity => {}
        }
    }

    async fn free(self: Arc<Self>, record: &Arc<Record>) {
        let started = Instant::now();
        let limit = self.options.timing.destroy_timeout;
        let freed = within("destroy", limit, record.provider.destroy(&record.id)).await;
        let error = freed.as_ref().err().map(EngineError::to_string);
        self.metrics.observe("destroy", record.provider.name(), started.elapsed(), error.clone(), self.now());
        match freed {
            Ok(()) => {
                record.free_failures.store(0, Ordering::Relaxed);
                self.apply(record, Happening::RuntimeFreed, None);
            }
            Err(error) => {
                self.health.compare::<()>(record.provider.name(), Err(&error));
                // Once is enough in the log: it may go on for as long as a
                // runtime is away, and for every sandbox on it.
                if record.free_failures.fetch_add(1, Ordering::Relaxed) == 0 {
                    let id = &record.id;
                    tracing::warn!(sandbox = %id, error = ?error, "a sandbox could not be destroyed; it is tried on");
                } else {
                    tracing::debug!(sandbox = %record.id, error = ?error, "a sandbox still cannot be destroyed");
                }
                self.emit_failure(record, EventKind::OperationFailed, "destroy", &error);
                self.apply(record, Happening::FreeingFailed, None);
            }
        }
    }

    /// Doubles with every failure.
    fn retry_pause(&self, record: &Record) -> Duration {
        let timing = &self.options.timing;
        let doublings = record.free_failures.load(Ordering::Relaxed).saturating_sub(1).min(16);
        timing.retry_first.saturating_mul(1 << doublings).min(timing.retry_longest)
    }

    /// Notices a sandbox that ends by itself.
    async fn watch(self: Arc<Self>, record: &Arc<Record>) {
        loop {
            let ended = tokio::select! {
                biased;
                () = record.ended.cancelled() => return,
                ended = record.provider.wait(&record.id) => ended,
            };
            match ended {
                Ok(_) if record.expires_at() <= self.now() => {
                    self.apply(record, Happening::DestroyAsked, Some("it expired"));
                }
                Ok(Ending::Removed) => {
                    tracing::warn!(sandbox = %record.id, "a sandbox was removed behind the server's back");
                    self.apply(record, Happening::Vanished, Some("its runtime no longer has it"));
                }
                Ok(Ending::OutOfMemory) => {
                    tracing::warn!(sandbox = %record.id, "a sandbox used up its memory and ended");
                    record.ran_out_of_memory.store(true, Ordering::Relaxed);
                    self.apply(record, Happening::Died, Some("it used up its memory and ended"));
                }
                Ok(Ending::Died) => {
                    tracing::warn!(sandbox = %record.id, "a sandbox ended by itself");
                    self.apply(record, Happening::Died, Some("it ended by itself"));
                }
                Err(error) => {
                    tracing::warn!(sandbox = %record.id, error = ?error, "a sandbox cannot be watched");
                    tokio::select! {
                        () = record.ended.cancelled() => return,
                        () = tokio::time::sleep(WATCH_RETRY) => continue,
                    }
                }
            }
            return;
        }
    }

    // Events and logs.

    pub(crate) fn emit_about(&self, record: &Record, kind: EventKind, data: Map<String, Value>) {
        let subject = Subject { sandbox: Some(record.id.clone()), tenant: record.tenant.clone(), data };
        self.bus.emit(kind, subject);
    }

    /// `operation`, `provider` and `error`, as failure events carry them
    /// (http-api 8.3).
    pub(crate) fn emit_failure(&self, record: &Record, kind: EventKind, operation: &str, error: &EngineError) {
        self.emit_about(record, kind, failure_data(operation, record.provider.name(), &error.to_string()));
    }

    /// One entry of the operation log.
    pub(crate) fn log_operation(&self, caller: &Caller, operation: &Operation<'_>) {
        self.store.writer().log_operation(OperationRow {
            at: self.now(),
            actor: caller.actor.clone(),
            tenant: caller.tenant.clone(),
            action: operation.action,
            sandbox_id: operation.sandbox.cloned(),
            provider: operation.provider.to_owned(),
            resource: cut(operation.resource),
            success: operation.error.is_none(),
            detail: operation.error.map(|error| cut(&error.to_string())).unwrap_or_default(),
            duration: operation.took,
        });
    }
}

/// What was done, for the operation log.
pub(crate) struct Operation<'a> {
    /// `sandbox.spawn`, `exec`, `file.write`, … (control-plane 2.12).
    pub(crate) action: &'static str,
    pub(crate) sandbox: Option<&'a SandboxId>,
    pub(crate) provider: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) error: Option<&'a EngineError>,
    pub(crate) took: Duration,
}

/// Gives a provider call its deadline.
pub(crate) async fn within<T, E: Into<EngineError>>(
    operation: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, EngineError> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(EngineError::ProviderTimeout { operation, after: limit }),
    }
}

pub(crate) fn failure_data(operation: &str, provider: &str, error: &str) -> Map<String, Value> {
    let entry = |name: &str, value: &str| (name.to_owned(), Value::String(cut(value)));
    [entry("operation", operation), entry("provider", provider), entry("error", error)].into_iter().collect()
}

/// At most [`LOG_TEXT_MAX_BYTES`], on a character's boundary.
pub(crate) fn cut(text: &str) -> String {
    let mut end = text.len().min(LOG_TEXT_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

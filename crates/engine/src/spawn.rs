//! Making a sandbox, in a task of its own: what was begun is cleaned up
//! however the caller or the provider ends.
//!
//! Nobody learns of a sandbox before its record is committed (the one commit
//! that a request waits for). A provider that keeps records of its own works
//! meanwhile: after a crash in between, recovery removes what has no row. Any
//! other is asked only once the row is there, which recovery can settle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use serde_json::{Map, Value};
use stacyvm_api::{CreateRequest, EventKind, Sandbox, SandboxId, SandboxState};
use stacyvm_sandbox::{ProcessEvent, Progress, ProgressSink, SandboxSpec, Session, SessionError, StartRequest};
use tokio::sync::oneshot;

use crate::admission::{QueueObserver, Reservation};
use crate::event::Subject;
use crate::idempotency::{self, Claim, OurClaim};
use crate::lifecycle::{Happening, Lifecycle};
use crate::order::Order;
use crate::progress::ThrottledProgress;
use crate::record::{NewRecord, Record, WORKER_ID};
use crate::shared::{Operation, Shared, failure_data, within};
use crate::store::{Idempotency, SandboxRow};
use crate::token::agent_token;
use crate::{Caller, CreateOptions, EngineError, UnknownSandboxes};

/// A failed create answers once its remains are freed, or after this long.
const CLEAN_UP_PATIENCE: Duration = Duration::from_secs(1);
/// A create that took longer gets its whole ttl from when it can be used.
const SLOW_CREATE: Duration = Duration::from_secs(1);
/// Longest run of one setup command of a template.
const SETUP_TIMEOUT: Duration = Duration::from_mins(10);
/// Output of a failed setup command that goes into the error.
const SETUP_OUTPUT_MAX_BYTES: usize = 1024;

type Answer = oneshot::Sender<Result<Sandbox, EngineError>>;

/// What a create task works on.
struct Create {
    caller: Caller,
    order: Order,
    idempotency: Option<(Idempotency, OurClaim)>,
}

impl Shared {
    pub(crate) async fn create(
        self: &Arc<Self>,
        caller: &Caller,
        request: CreateRequest,
        options: CreateOptions,
    ) -> Result<Sandbox, EngineError> {
        self.check_open()?;
        let idempotency = match options.idempotency_key.as_deref() {
            Some(key) => Some(idempotency::scoped(caller, key, &request)?),
            None => None,
        };
        let order = self.resolve(caller, &request).inspect_err(|error| self.note_refusal(caller, error))?;
        let claim = loop {
            let Some(idempotency) = &idempotency else { break None };
            match self.creates.claim(idempotency).await? {
                Claim::Ours(claim) => break Some((idempotency.clone(), claim)),
                Claim::Made(id) => match self.record(&id) {
                    Some(record) => return Ok(Sandbox::clone(&record.sandbox())),
                    None => self.creates.forget(&idempotency.key, &id),
                },
            }
        };
        let (sender, receiver) = oneshot::channel();
        let create = Create { caller: caller.clone(), order, idempotency: claim };
        let shared = Arc::clone(self);
        self.spawn(async move { shared.run_create(create, sender).await });
        receiver.await.unwrap_or(Err(EngineError::ShuttingDown))
    }

    async fn run_create(self: Arc<Self>, create: Create, mut answer: Answer) {
        let started = Instant::now();
        let Create { caller, order, idempotency } = create;
        // With a key the caller may come back for it; without one, nobody
        // would ever learn the id.
        let wanted_by_caller_only = idempotency.is_none();
        let made = tokio::select! {
            made = self.make(&caller, &order, idempotency.as_ref().map(|(found, _)| found.clone())) => made,
            () = answer.closed(), if wanted_by_caller_only => return,
        };
        let provider = order.provider.name();
        let (id, result) = match made {
            Ok(record) => {
                if let Some((_, claim)) = idempotency {
                    claim.made(&record.id);
                }
                (Some(record.id.clone()), Ok(record))
            }
            Err((id, error)) => (id, Err(error)),
        };
        let error = result.as_ref().err();
        self.metrics.observe("spawn", provider, started.elapsed(), error.map(ToString::to_string), self.now());
        self.log_operation(
            &caller,
            &Operation {
                action: "sandbox.spawn",
                sandbox: id.as_ref(),
                provider,
                resource: &order.image,
                error,
                took: started.elapsed(),
            },
        );
        match result {
            Ok(record) => {
                let sent = answer.send(Ok(Sandbox::clone(&record.sandbox())));
                if sent.is_err() && wanted_by_caller_only {
                    self.apply(&record, Happening::DestroyAsked, Some("its caller was gone before it was made"));
                }
            }
            Err(error) => {
                tracing::info!(error = ?error, provider, image = order.image, "a sandbox could not be made");
                self.note_refusal(&caller, &error);
                let _caller_gone = answer.send(Err(error));
            }
        }
    }

    /// Admits, records and makes one sandbox. When this future is dropped, a
    /// guard has what was begun freed in the background.
    async fn make(
        self: &Arc<Self>,
        caller: &Caller,
        order: &Order,
        idempotency: Option<Idempotency>,
    ) -> Result<Arc<Record>, (Option<SandboxId>, EngineError)> {
        let observer = Queueing { shared: self, caller, order };
        let reserved = self.admission.reserve(order.owner.as_ref(), &observer).await;
        let reservation = reserved.map_err(|exceeded| (None, EngineError::Limit(exceeded)))?;
        let record = self.new_record(order, reservation, idempotency);
        let id = record.id.clone();
        self.remember(&record);
        let unfinished = Unfinished { shared: Arc::clone(self), record: Some(Arc::clone(&record)) };
        self.store.writer().save_sandbox(record.to_row(self.now()));
        let started = Instant::now();
        let recorded = async { Ok(self.store.writer().recorded().await?) };
        let made = async {
            tokio::select! {
                biased;
                () = record.abort_create.cancelled() => Err(EngineError::SandboxNotFound(id.clone())),
                made = self.make_with_provider(&record, order) => made,
            }
        };
        let made = async {
            if self.is_safe_without_row(order) {
                return tokio::try_join!(recorded, made).map(drop);
            }
            recorded.await?;
            made.await
        };
        match made.await {
            Ok(()) => {
                unfinished.finish();
                if started.elapsed() > SLOW_CREATE {
                    self.set_expiry(&record, order.ttl);
                }
                self.apply(&record, Happening::Created, None);
                self.expiry_changed.notify_one();
                if record.has_setup {
                    // Recovery cannot tell how far a set-up came, so that this
                    // state is waited for.
                    let _recovered_otherwise = self.store.writer().recorded().await;
                }
                // A destroy may have come first.
                if record.state() == SandboxState::Running {
                    return Ok(record);
                }
                Err((Some(id.clone()), EngineError::SandboxNotFound(id)))
            }
            Err(error) => {
                unfinished.finish();
                self.apply(&record, Happening::CreateFailed, Some(&error.to_string()));
                let freed = record.wait_until(|state, _| state == SandboxState::Destroyed);
                let _still_trying = tokio::time::timeout(CLEAN_UP_PATIENCE, freed).await;
                Err((Some(id), error))
            }
        }
    }

    /// Whether recovery would remove this sandbox if a crash came before its
    /// row: nobody has heard of it then.
    fn is_safe_without_row(&self, order: &Order) -> bool {
        let removed = self.options.unknown_sandboxes == UnknownSandboxes::Remove;
        removed && order.provider.capabilities().keeps_records
    }

    fn new_record(
        self: &Arc<Self>,
        order: &Order,
        reservation: Reservation,
        idempotency: Option<Idempotency>,
    ) -> Arc<Record> {
        let now = self.now();
        let sandbox = Sandbox {
            id: SandboxId::random(),
            state: SandboxState::Creating,
            provider: order.provider.name().to_owned(),
            image: order.image.clone(),
            memory_mb: order.memory_mb,
            vcpus: order.vcpus,
            disk_size_mb: order.disk_size_mb,
            owner_id: order.owner.clone(),
            tenant_id: order.tenant.clone(),
            worker_id: Some(WORKER_ID.to_owned()),
            created_at: now,
            expires_at: now + order.ttl,
            metadata: order.metadata.clone(),
            preview_domain: None,
            network: Some(order.network_request()),
            limits: None,
            reason: None,
        };
        let row = SandboxRow {
            sandbox,
            generation: FIRST_GENERATION,
            has_setup: !order.setup.is_empty(),
            idempotency,
            updated_at: now,
        };
        let provider = Arc::clone(&order.provider);
        Record::new(NewRecord { row, provider, lifecycle: Lifecycle::new(), reservation })
    }

    async fn make_with_provider(self: &Arc<Self>, record: &Arc<Record>, order: &Order) -> Result<(), EngineError> {
        let spec = SandboxSpec {
            image: order.image.clone(),
            memory_mib: order.memory_mb,
            vcpus: order.vcpus,
            pids_limit: order.pids_limit,
            disk: order.disk,
            requested: order.requested.clone(),
            network: order.network.clone(),
            env: order.env.clone(),
            user: order.user.clone(),
            hostname: record.id.to_string(),
            metadata: order.metadata.clone(),
            allow_unenforced: order.allow_unenforced,
            expires_at: record.expires_at(),
            generation: record.generation,
            agent_token: agent_token(&self.options.server_secret, &record.id, record.generation),
        };
        let progress = ThrottledProgress::new(EventProgress { shared: Arc::clone(self), record: Arc::clone(record) });
        let limit = self.options.timing.create_timeout;
        let created = within("create", limit, order.provider.create(&record.id, &spec, &progress)).await;
        self.health.compare(order.provider.name(), created.as_ref());
        let created = created?;
        record.set_limits(created.limits);
        let session = self.connect(record).await?;
        for (index, command) in order.setup.iter().enumerate() {
            self.run_setup(session.as_ref(), order, index, command).await?;
        }
        Ok(())
    }

    async fn run_setup(
        &self,
        session: &dyn Session,
        order: &Order,
        index: usize,
        command: &str,
    ) -> Result<(), EngineError> {
        let failed = |outcome: String| EngineError::SetupFailed {
            template: order.template.clone().unwrap_or_default(),
            index: index + 1,
            outcome,
        };
        let request = StartRequest {
            argv: vec!["sh".to_owned(), "-c".to_owned(), command.to_owned()],
            deadline: Some(SETUP_TIMEOUT),
            ..StartRequest::default()
        };
        let started = session.start(request).await;
        let mut events = started.map_err(|error: SessionError| failed(format!("could not be started: {error}")))?;
        let mut tail = Vec::new();
        while let Some(event) = events.next().await {
            match event.map_err(|error| failed(format!("was not seen to end: {error}")))? {
                ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes) | ProcessEvent::Terminal(bytes) => {
                    tail.extend_from_slice(&bytes);
                    let excess = tail.len().saturating_sub(SETUP_OUTPUT_MAX_BYTES);
                    tail.drain(..excess);
                }
                ProcessEvent::Started { .. } | ProcessEvent::Dropped { .. } | ProcessEvent::Keepalive => {}
                ProcessEvent::Exited(exit) if exit.timed_out => {
                    return Err(failed(format!("ran longer than {}", stacyvm_api::Duration::from(SETUP_TIMEOUT))));
                }
                ProcessEvent::Exited(exit) if exit.code == Some(0) => return Ok(()),
                ProcessEvent::Exited(exit) => {
                    let output = String::from_utf8_lossy(&tail);
                    return Err(failed(format!("exited with {}: {}", exit.shell_code(), output.trim())));
                }
            }
        }
        Err(failed("was not seen to end".to_owned()))
    }

    /// The sandbox lives this long from now. The agent hears of it in the
    /// background if it does not know yet.
    pub(crate) fn set_expiry(&self, record: &Record, ttl: Duration) {
        let now = self.now();
        let change = |sandbox: &mut Sandbox| sandbox.expires_at = now + ttl;
        record.update(now, change, |row| self.store.writer().save_sandbox(row));
        self.expiry_changed.notify_one();
    }

    /// Limits that were hit and providers that failed are worth an event.
    pub(crate) fn note_refusal(&self, caller: &Caller, error: &EngineError) {
        let Some(kind) = error.event_kind() else { return };
        let data = failure_data("spawn", &self.options.default_provider, &error.to_string());
        self.bus.emit(kind, Subject { sandbox: None, tenant: caller.tenant.clone(), data });
    }
}

/// Tokens of a new sandbox; counts up with fork and restore.
pub(crate) const FIRST_GENERATION: u32 = 1;

/// A create that was given up between two steps is a failed one.
struct Unfinished {
    shared: Arc<Shared>,
    record: Option<Arc<Record>>,
}

impl Unfinished {
    fn finish(mut self) {
        self.record = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.shared.apply(&record, Happening::CreateFailed, Some("it was given up while it was made"));
        }
    }
}

/// Tells of waits in the queue (http-api 8.3).
struct Queueing<'a> {
    shared: &'a Shared,
    caller: &'a Caller,
    order: &'a Order,
}

impl Queueing<'_> {
    fn emit(&self, kind: EventKind, name: &str, value: u64) {
        let mut data = Map::new();
        data.insert("operation".to_owned(), Value::from("spawn"));
        data.insert("provider".to_owned(), Value::from(self.order.provider.name()));
        if let Some(owner) = &self.order.owner {
            data.insert("owner_id".to_owned(), Value::from(owner.as_str()));
        }
        data.insert(name.to_owned(), Value::from(value));
        self.shared.bus.emit(kind, Subject { sandbox: None, tenant: self.caller.tenant.clone(), data });
    }
}

impl QueueObserver for Queueing<'_> {
    fn queued(&self, depth: usize) {
        self.emit(EventKind::SpawnQueued, "depth", depth as u64);
    }

    fn dequeued(&self, waited: Duration) {
        self.emit(EventKind::SpawnDequeued, "wait_ms", waited.as_millis() as u64);
    }

    fn timed_out(&self, waited: Duration) {
        self.emit(EventKind::SpawnQueueTimeout, "wait_ms", waited.as_millis() as u64);
    }
}

/// Progress of a create as events.
struct EventProgress {
    shared: Arc<Shared>,
    record: Arc<Record>,
}

impl ProgressSink for EventProgress {
    fn report(&self, progress: Progress) {
        let mut data = Map::new();
        data.insert("phase".to_owned(), Value::from(progress.phase));
        data.insert("message".to_owned(), Value::from(progress.message));
        data.insert("done_bytes".to_owned(), Value::from(progress.done_bytes));
        data.insert("total_bytes".to_owned(), Value::from(progress.total_bytes));
        self.shared.emit_about(&self.record, EventKind::ImageProgress, data);
    }
}

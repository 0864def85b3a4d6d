//! An engine on a directory of its own, which can crash and come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use stacyvm_api::{CreateRequest, Event, EventKind, ExecRequest, ExecResult, Sandbox, SandboxId, SandboxState};
use stacyvm_engine::{
    Caller, Clock, CreateOptions, Engine, EngineError, EngineOptions, EventItem, EventStream, ServerSecret,
};
use stacyvm_providers::mock::MockProvider;
use stacyvm_sandbox::Provider;
use tempfile::TempDir;

/// Every wait of these tests ends after this, as a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Host {
    pub(crate) directory: TempDir,
    pub(crate) mock: MockProvider,
    pub(crate) clock: Clock,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), mock: MockProvider::default(), clock: Clock::default() }
    }

    /// Options with short periods, so that background work is soon done.
    pub(crate) fn options(&self) -> EngineOptions {
        let path = self.directory.path().join("stacyvm.db");
        let mut options = EngineOptions::new(path, ServerSecret::new([7; 32]), "mock");
        options.clock = self.clock.clone();
        options.timing.reap_interval = Duration::from_millis(20);
        options.timing.retry_first = Duration::from_millis(10);
        options.timing.retry_longest = Duration::from_millis(40);
        options.timing.destroy_timeout = Duration::from_secs(2);
        options.timing.recovery_wait = PATIENCE;
        options
    }

    pub(crate) async fn engine(&self) -> Engine {
        self.engine_with(self.options()).await
    }

    pub(crate) async fn engine_with(&self, options: EngineOptions) -> Engine {
        let provider: Arc<dyn Provider> = Arc::new(self.mock.clone());
        Engine::start(options, vec![provider]).await.unwrap()
    }

    /// Waits until nothing is left on the runtime.
    pub(crate) async fn assert_empty(&self) {
        eventually("the runtime is empty", || self.mock.sandbox_ids().is_empty()).await;
    }
}

pub(crate) fn caller() -> Caller {
    Caller { actor: "tester".to_owned(), ..Caller::default() }
}

pub(crate) fn of_owner(owner: &str) -> Caller {
    Caller { owner: Some(owner.parse().unwrap()), ..caller() }
}

pub(crate) async fn create(engine: &Engine) -> Sandbox {
    create_with(engine, CreateRequest::default()).await.unwrap()
}

pub(crate) async fn create_with(engine: &Engine, request: CreateRequest) -> Result<Sandbox, EngineError> {
    engine.create(&caller(), request, CreateOptions::default()).await
}

pub(crate) fn sh(command: &str) -> ExecRequest {
    ExecRequest { command: command.to_owned(), ..ExecRequest::default() }
}

pub(crate) async fn run(engine: &Engine, id: &SandboxId, command: &str) -> ExecResult {
    engine.exec(&caller(), id, sh(command)).await.unwrap()
}

pub(crate) fn state(engine: &Engine, id: &SandboxId) -> Option<SandboxState> {
    engine.get(&caller(), id).ok().map(|sandbox| sandbox.state)
}

/// Polls a condition, and fails when it does not come true in time.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for an event of this kind about this sandbox.
pub(crate) async fn event_of(events: &mut EventStream, kind: EventKind, id: Option<&SandboxId>) -> Event {
    let found = async {
        while let Some(item) = events.next().await {
            if let EventItem::Event(event) = item
                && event.kind == kind
                && (id.is_none() || event.sandbox_id.as_ref() == id)
            {
                return event;
            }
        }
        panic!("the events ended before {kind:?}");
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("not in time: {kind:?}"))
}

/// A text of an event's data.
pub(crate) fn data<'a>(event: &'a Event, name: &str) -> &'a str {
    event.data.as_ref().and_then(|data| data.get(name)).and_then(|value| value.as_str()).unwrap_or_default()
}

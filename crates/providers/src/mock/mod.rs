//! A provider for tests of everything above the runtime.
//!
//! Sandboxes live in memory: a file tree, a small deterministic shell with the
//! programs that tests use, terminals, watching, and services to dial. No
//! program of the host is ever started and no file of the host is touched.
//!
//! A [`MockProvider`] is the "host": hand the same value to a second engine and
//! its sandboxes are still there, as after a restart of the server. Through
//! [`MockFaults`] operations fail, hang or take long; through [`Calls`] a test
//! sees what was asked of the provider and how much of it at once.
//!
//! Inside a sandbox: `/workspace`, `/tmp`, `/etc/os-release`, users `root`,
//! `user` and `nobody`, an echo service on port 7, and programs that are killed
//! by a limit: `mock-oom`, `mock-pids` and `mock-disk-full`.

mod archive;
mod faults;
mod pattern;
mod program;
mod sandbox;
mod session;
mod shell;
mod syntax;
mod tree;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use stacyvm_api::{Limit, LimitReport, SandboxId, Timestamp};
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, LimitKills, Progress, ProgressSink, Provider,
    ProviderError, ResourceUsage, RuntimeSandbox, RuntimeState, SandboxSpec,
};

pub use faults::{Calls, Fault, MockFaults, MockOperation, Times};
pub use sandbox::MockService;

use faults::Counters;
use sandbox::{MockSandbox, lock};
use session::MockSession;

/// The fake runtime. Clones are the same runtime.
#[derive(Clone)]
pub struct MockProvider {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    faults: MockFaults,
    counters: Counters,
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<MockSandbox>>>,
    orphans: Mutex<Vec<String>>,
}

impl Default for MockProvider {
    fn default() -> Self {
        Self::new("mock")
    }
}

impl MockProvider {
    pub fn new(name: &str) -> Self {
        let shared = Shared {
            name: name.to_owned(),
            faults: MockFaults::default(),
            counters: Counters::default(),
            sandboxes: Mutex::default(),
            orphans: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    pub fn faults(&self) -> &MockFaults {
        &self.shared.faults
    }

    pub fn calls(&self, operation: MockOperation) -> Calls {
        self.shared.counters.of(operation)
    }

    /// What exists on this runtime, dead remains included.
    pub fn sandbox_ids(&self) -> Vec<SandboxId> {
        lock(&self.shared.sandboxes).keys().cloned().collect()
    }

    /// What a sandbox was made from.
    pub fn spec(&self, id: &SandboxId) -> Option<SandboxSpec> {
        Some(self.find(id)?.spec.clone())
    }

    /// When the sandbox ends itself unless it is extended.
    pub fn expires_at(&self, id: &SandboxId) -> Option<Timestamp> {
        Some(self.find(id)?.expires_at())
    }

    /// The sandbox dies by itself; its remains stay until it is destroyed.
    pub fn die(&self, id: &SandboxId) {
        if let Some(sandbox) = self.find(id) {
            sandbox.die();
        }
    }

    /// A limit kills a process that no command's end tells of.
    pub fn count_kill(&self, id: &SandboxId, limit: Limit) {
        if let Some(sandbox) = self.find(id) {
            sandbox.count_kill(limit);
        }
    }

    /// The sandbox uses up its memory, and all of it ends with that.
    pub fn run_out_of_memory(&self, id: &SandboxId) {
        if let Some(sandbox) = self.find(id) {
            sandbox.out_of_memory.store(true, Ordering::Relaxed);
            sandbox.die();
        }
    }

    /// The sandbox and its remains vanish, as after a reboot of the host.
    pub fn vanish(&self, id: &SandboxId) {
        if let Some(sandbox) = lock(&self.shared.sandboxes).remove(id) {
            sandbox.die();
        }
    }

    /// A sandbox that no engine asked for.
    pub fn plant(&self, id: SandboxId, spec: SandboxSpec) {
        lock(&self.shared.sandboxes).insert(id.clone(), MockSandbox::new(id, spec));
    }

    /// Something that no sandbox owns; the next sweep frees it.
    pub fn plant_orphan(&self, description: &str) {
        lock(&self.shared.orphans).push(description.to_owned());
    }

    pub fn orphans(&self) -> usize {
        lock(&self.shared.orphans).len()
    }

    /// From now on commands find the process limit used up, or no longer.
    pub fn exhaust_pids(&self, id: &SandboxId, exhausted: Exhausted) {
        if let Some(sandbox) = self.find(id) {
            sandbox.pids_exhausted.store(exhausted == Exhausted::Yes, Ordering::Relaxed);
        }
    }

    pub fn fill_disk(&self, id: &SandboxId, exhausted: Exhausted) {
        if let Some(sandbox) = self.find(id) {
            sandbox.disk_full.store(exhausted == Exhausted::Yes, Ordering::Relaxed);
        }
    }

    /// Lets something listen on a port inside.
    pub fn listen(&self, id: &SandboxId, port: u16, service: MockService) {
        if let Some(sandbox) = self.find(id) {
            sandbox.listen(port, service);
        }
    }

    fn set_paused(&self, id: &SandboxId, paused: bool) -> Result<(), ProviderError> {
        let sandbox = self.find(id).ok_or_else(|| ProviderError::NotFound(id.clone()))?;
        sandbox.paused.store(paused, Ordering::Relaxed);
        Ok(())
    }

    fn find(&self, id: &SandboxId) -> Option<Arc<MockSandbox>> {
        lock(&self.shared.sandboxes).get(id).cloned()
    }

    async fn call<T>(
        &self,
        operation: MockOperation,
        name: &'static str,
        run: impl Future<Output = Result<T, ProviderError>> + Send,
    ) -> Result<T, ProviderError> {
        let counted = self.shared.counters.begin(operation);
        let fault = self.shared.faults.take(operation);
        let failed = |message: &str| ProviderError::Failed { operation: name, cause: message.into() };
        match &fault {
            Some(Fault::Fail(message)) => return Err(failed(message)),
            Some(Fault::MissingImage) => {
                return Err(ProviderError::Image {
                    image: "missing".to_owned(),
                    message: "it does not exist in its registry".to_owned(),
                    hint: None,
                    cause: None,
                });
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Delay(span)) => tokio::time::sleep(*span).await,
            Some(Fault::FailAfter(_)) | None => {}
        }
        let value = run.await?;
        if let Some(Fault::FailAfter(message)) = fault {
            return Err(failed(&message));
        }
        counted.succeeded();
        Ok(value)
    }
}

/// Nothing here takes memory, time or space that could be limited.
fn no_limits() -> LimitReport {
    let unenforced = vec![Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids, Limit::Disk];
    LimitReport { unenforced, disk_backend: Some("none".to_owned()), ..LimitReport::default() }
}

/// Whether a resource of a sandbox is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    Yes,
    No,
}

#[async_trait]
impl Provider for MockProvider {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            pty: true,
            watch: true,
            dial: true,
            stats: true,
            survives_restart: true,
            keeps_records: false,
            network: true,
            shares_host: false,
            rewrites_paths: false,
            pause: true,
            oom_ends_sandbox: false,
            imitated: true,
            family: "test_provider",
        }
    }

    fn describe(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("type".to_owned(), "mock".to_owned())])
    }

    async fn check(&self) -> HealthReport {
        let mut report = HealthReport::default();
        let checked = self.call(MockOperation::Check, "check itself", async { Ok(()) }).await;
        match checked {
            Ok(()) => report.ok("mock", "sandboxes live in memory"),
            Err(error) => report.fail("mock", error.to_string(), "clear the injected fault"),
        }
        report
    }

    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        let step = Progress { phase: "start", message: spec.image.clone(), done_bytes: 0, total_bytes: 0 };
        progress.report(step);
        let make = async {
            let mut sandboxes = lock(&self.shared.sandboxes);
            if sandboxes.contains_key(id) {
                let message = format!("sandbox {id} exists already");
                return Err(ProviderError::InvalidSpec { message });
            }
            sandboxes.insert(id.clone(), MockSandbox::new(id.clone(), spec.clone()));
            Ok(Created { limits: no_limits(), image_digest: None })
        };
        self.call(MockOperation::Create, "create the sandbox", make).await
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        let open = async {
            let sandbox = self.find(id).filter(|sandbox| sandbox.is_alive());
            let sandbox = sandbox.ok_or_else(|| ProviderError::NotFound(id.clone()))?;
            Ok(Connection::Native(Arc::new(MockSession { sandbox, shared: Arc::clone(&self.shared) })))
        };
        self.call(MockOperation::Connect, "connect to the sandbox", open).await
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        let end = async {
            self.vanish(id);
            Ok(())
        };
        self.call(MockOperation::Destroy, "destroy the sandbox", end).await
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        let all = async {
            let sandboxes = lock(&self.shared.sandboxes);
            let entries = sandboxes.values().map(|sandbox| RuntimeSandbox {
                id: sandbox.id.clone(),
                state: match (sandbox.is_alive(), sandbox.paused.load(Ordering::Relaxed)) {
                    (false, _) => RuntimeState::Dead,
                    (true, true) => RuntimeState::Paused,
                    (true, false) => RuntimeState::Running,
                },
                image: Some(sandbox.spec.image.clone()),
                created_at: Some(sandbox.created_at),
                metadata: sandbox.spec.metadata.clone(),
                limits: Some(no_limits()),
            });
            Ok(entries.collect())
        };
        self.call(MockOperation::List, "list its sandboxes", all).await
    }

    async fn sweep(&self) -> Result<Vec<String>, ProviderError> {
        let free = async { Ok(std::mem::take(&mut *lock(&self.shared.orphans))) };
        self.call(MockOperation::Sweep, "free what no sandbox owns", free).await
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        let Some(sandbox) = self.find(id) else { return Ok(Ending::Removed) };
        sandbox.ended.cancelled().await;
        Ok(match self.find(id) {
            None => Ending::Removed,
            Some(_) if sandbox.out_of_memory.load(Ordering::Relaxed) => Ending::OutOfMemory,
            Some(_) => Ending::Died,
        })
    }

    async fn kills(&self, id: &SandboxId) -> Result<LimitKills, ProviderError> {
        self.find(id).map(|sandbox| sandbox.usage().kills()).ok_or_else(|| ProviderError::NotFound(id.clone()))
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        let read =
            async { self.find(id).map(|sandbox| sandbox.usage()).ok_or_else(|| ProviderError::NotFound(id.clone())) };
        self.call(MockOperation::Usage, "read the usage", read).await
    }

    async fn pause(&self, id: &SandboxId) -> Result<(), ProviderError> {
        self.call(MockOperation::Pause, "pause the sandbox", async { self.set_paused(id, true) }).await
    }

    async fn resume(&self, id: &SandboxId) -> Result<(), ProviderError> {
        self.call(MockOperation::Resume, "resume the sandbox", async { self.set_paused(id, false) }).await
    }
}

//! The engine's public face.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use stacyvm_api::{
    AdmissionDecision, AuditQuery, CreateRequest, Duration, ExecId, ExecRequest, ExecResult, ListQuery, OwnerId,
    OwnerQuota, OwnerQuotaRequest, OwnerUsage, PortAccess, ProcessSummary, ProviderDetail, ProviderHealth,
    QuotaSummary, Sandbox, SandboxId, SandboxStats, Template, TemplateSpawnRequest,
};
use stacyvm_sandbox::{Provider, Session, SessionError, TerminalSize};
use tokio_util::sync::CancellationToken;

use crate::audit::{AuditEntry, AuditPage};
use crate::exec::{ExecPage, RunningExec, StartOptions};
use crate::file::FileOperation;
use crate::metrics::{MetricsSnapshot, ReadinessReport, StoreHealth};
use crate::shared::Shared;
use crate::token::derived_key;
use crate::{EngineError, EngineOptions, EventStream, Keys, start, template};

/// Who makes a call, as the server authenticated it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Whom new sandboxes are accounted to (`X-User-ID`); wins over the body's
    /// `owner_id`.
    pub owner: Option<OwnerId>,
    /// Whom the caller's key is bound to: a body that names somebody else is
    /// refused.
    pub bound_to: Option<OwnerId>,
    /// For the operation log: a key's name, a subject, never a credential.
    pub actor: String,
    /// With a tenant, only that tenant's sandboxes exist for this caller.
    pub tenant: Option<String>,
}

impl Caller {
    /// Whether what belongs to this tenant exists for the caller.
    pub(crate) fn may_see(&self, tenant: Option<&str>) -> bool {
        self.tenant.is_none() || self.tenant.as_deref() == tenant
    }
}

/// How to create beyond what the request says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Two creates by the same caller with the same key give the same sandbox,
    /// as long as it lives.
    pub idempotency_key: Option<String>,
}

/// How a destroy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroyed {
    /// It is gone, or never existed.
    Done,
    /// The runtime failed to end it. It stays `destroying` and is tried again
    /// until it is gone.
    Retrying,
}

/// Sandboxes, newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxPage {
    pub items: Vec<Sandbox>,
    pub next_cursor: Option<String>,
}

/// A running control plane. Cheap to clone; all clones are the same engine.
///
/// Dropping every clone is what a crash looks like: background work stops and
/// sandboxes stay. [`Engine::shutdown`] also writes what is not yet written.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    _stop: Arc<StopOnDrop>,
}

/// Background work ends with the last clone of the engine.
struct StopOnDrop(CancellationToken);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Engine {
    /// Opens the store, takes in what an earlier process left behind, and
    /// starts the background work. One bad sandbox never makes this fail.
    pub async fn start(options: EngineOptions, providers: Vec<Arc<dyn Provider>>) -> Result<Self, EngineError> {
        let stop = CancellationToken::new();
        let shared = start::start(options, providers, &stop).await?;
        Ok(Self { shared, _stop: Arc::new(StopOnDrop(stop)) })
    }

    /// Ends background work, writes what is pending, and closes the store.
    /// Sandboxes and their commands keep running.
    pub async fn shutdown(&self) {
        start::shutdown(&self.shared).await;
    }

    /// Stops at once and writes nothing more: what `kill -9` does to a server,
    /// for tests of recovery. Calls under way end with `ShuttingDown`.
    pub fn crash(&self) {
        self.shared.stop.cancel();
    }

    /// Destroys every sandbox, for `serve --destroy-on-exit`, and says how many.
    /// From then on nothing new is let in.
    pub async fn destroy_all(&self) -> u64 {
        self.shared.destroy_all().await
    }

    pub fn options(&self) -> &EngineOptions {
        &self.shared.options
    }

    // Sandboxes.

    /// Makes a sandbox and answers when it can run commands. When the returned
    /// future is dropped, what was made so far is freed in the background.
    pub async fn create(
        &self,
        caller: &Caller,
        request: CreateRequest,
        options: CreateOptions,
    ) -> Result<Sandbox, EngineError> {
        self.shared.create(caller, request, options).await
    }

    /// From memory. Destroyed sandboxes are not found.
    pub fn get(&self, caller: &Caller, id: &SandboxId) -> Result<Sandbox, EngineError> {
        Ok(Sandbox::clone(&self.shared.find(caller, id)?.sandbox()))
    }

    /// Newest first; all states but `destroyed`, unless that one is asked for.
    /// Without a limit, everything.
    pub async fn list(&self, caller: &Caller, query: &ListQuery) -> Result<SandboxPage, EngineError> {
        self.shared.list(caller, query).await
    }

    /// Ends a sandbox and frees all it used. Unknown ids are `Done`, except
    /// for a caller with a tenant, who gets `SandboxNotFound`.
    pub async fn destroy(&self, caller: &Caller, id: &SandboxId) -> Result<Destroyed, EngineError> {
        self.shared.destroy(caller, id).await
    }

    /// Destroys what has expired, of the caller's tenant or everywhere; says
    /// how many.
    pub async fn prune(&self, caller: &Caller) -> Result<u64, EngineError> {
        Ok(self.shared.prune(caller).await)
    }

    /// The sandbox then lives `ttl` from now; never above the maximum.
    pub async fn extend(&self, caller: &Caller, id: &SandboxId, ttl: Duration) -> Result<Sandbox, EngineError> {
        self.shared.extend(caller, id, ttl.get()).await
    }

    /// Whether a create would be let in right now.
    #[expect(clippy::unused_async, reason = "a store that does not fit in memory will have to be asked")]
    pub async fn admission(&self, caller: &Caller, request: &CreateRequest) -> Result<AdmissionDecision, EngineError> {
        self.shared.decide(caller, request)
    }

    pub async fn stats(&self, caller: &Caller, id: &SandboxId) -> Result<SandboxStats, EngineError> {
        self.shared.stats(caller, id).await
    }

    /// The last lines that the sandbox's commands wrote, oldest first.
    pub async fn console(&self, caller: &Caller, id: &SandboxId, lines: usize) -> Result<Vec<String>, EngineError> {
        self.shared.console(caller, id, lines).await
    }

    /// The inside of a running sandbox. Calls on it are not logged, counted or
    /// bounded: commands go through `start_exec`, files through
    /// `file_operation`; this is for dialing ports and the E2B surface.
    pub async fn session(&self, caller: &Caller, id: &SandboxId) -> Result<Arc<dyn Session>, EngineError> {
        let record = self.shared.find(caller, id)?;
        self.shared.session(&record).await
    }

    // Ports.

    /// The access of a port as somebody set it.
    pub fn port_access(&self, caller: &Caller, id: &SandboxId, port: u16) -> Result<Option<PortAccess>, EngineError> {
        Ok(self.shared.find(caller, id)?.access_of(port))
    }

    pub async fn set_port_access(
        &self,
        caller: &Caller,
        id: &SandboxId,
        port: u16,
        access: PortAccess,
    ) -> Result<(), EngineError> {
        self.shared.set_port_access(caller, id, port, access).await
    }

    /// The same for a request to the port itself, which names no caller: an
    /// error when the sandbox cannot be reached now.
    pub async fn reachable_port(&self, id: &SandboxId, port: u16) -> Result<Option<PortAccess>, EngineError> {
        self.shared.reachable_port(id, port).await
    }

    /// A key made from the server's secret, for signatures of the server's own.
    pub fn derived_key(&self, purpose: &str) -> [u8; 32] {
        derived_key(&self.shared.options.server_secret, purpose)
    }

    // Files.

    /// Runs one file operation and records it: event, metric, operation log.
    /// For streams, what is measured is the time until the stream exists.
    pub async fn file_operation<T, F, Fut>(
        &self,
        caller: &Caller,
        id: &SandboxId,
        operation: FileOperation,
        run: F,
    ) -> Result<T, EngineError>
    where
        F: FnOnce(Arc<dyn Session>) -> Fut + Send,
        Fut: Future<Output = Result<T, SessionError>> + Send,
    {
        self.shared.file_operation(caller, id, operation, run).await
    }

    // Commands.

    /// Starts a command and answers once it runs: everything that can be wrong
    /// before that is an error here.
    pub async fn start_exec(
        &self,
        caller: &Caller,
        id: &SandboxId,
        request: ExecRequest,
        options: StartOptions,
    ) -> Result<RunningExec, EngineError> {
        self.shared.start_exec(caller, id, request, options, "exec_stream").await
    }

    /// Runs a command to its end. A deadline is `EngineError::ExecTimeout`
    /// with what was written so far; output above the cap is cut and flagged.
    /// When the returned future is dropped, the command goes on.
    pub async fn exec(&self, caller: &Caller, id: &SandboxId, request: ExecRequest) -> Result<ExecResult, EngineError> {
        self.shared.exec(caller, id, request).await
    }

    /// Output of a command from `offset` on, then live; also after a restart
    /// of the server and for a while after the command's end.
    pub async fn attach_exec(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        offset: u64,
    ) -> Result<RunningExec, EngineError> {
        self.shared.attach_exec(caller, id, exec_id, offset).await
    }

    /// Commands of a sandbox, newest first; at most `limit` (100 unless given).
    pub async fn exec_log(
        &self,
        caller: &Caller,
        id: &SandboxId,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> Result<ExecPage, EngineError> {
        self.shared.exec_log(caller, id, limit, cursor).await
    }

    pub async fn exec_summary(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
    ) -> Result<ProcessSummary, EngineError> {
        Ok(self.shared.exec_summary(caller, id, exec_id).await?.0)
    }

    /// The beginning of a command's output, as far as the log keeps it.
    pub async fn exec_output(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
    ) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.shared.exec_summary(caller, id, exec_id).await?.1)
    }

    /// Writes to the command's standard input, or to its terminal.
    pub async fn send_input(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        data: Bytes,
    ) -> Result<(), EngineError> {
        self.shared.send_input(caller, id, exec_id, data).await
    }

    pub async fn close_stdin(&self, caller: &Caller, id: &SandboxId, exec_id: &ExecId) -> Result<(), EngineError> {
        self.shared.close_stdin(caller, id, exec_id).await
    }

    pub async fn resize(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        size: TerminalSize,
    ) -> Result<(), EngineError> {
        self.shared.resize(caller, id, exec_id, size).await
    }

    /// Sends a signal, named (`TERM`, `SIGINT`) or numbered, to the command's
    /// process group.
    pub async fn signal(
        &self,
        caller: &Caller,
        id: &SandboxId,
        exec_id: &ExecId,
        signal: &str,
    ) -> Result<(), EngineError> {
        self.shared.signal(caller, id, exec_id, signal).await
    }

    // Templates.

    pub async fn create_template(&self, caller: &Caller, template: Template) -> Result<Template, EngineError> {
        let name = template.name.clone();
        let done = self.shared.create_template(template).await;
        self.shared.log_setting(caller, "template.create", &name, done.as_ref().err());
        done
    }

    /// In order of name.
    #[expect(clippy::unused_async, reason = "a store that does not fit in memory will have to be asked")]
    pub async fn list_templates(&self) -> Result<Vec<Template>, EngineError> {
        Ok(self.shared.all_templates())
    }

    #[expect(clippy::unused_async, reason = "a store that does not fit in memory will have to be asked")]
    pub async fn get_template(&self, name: &str) -> Result<Template, EngineError> {
        self.shared.template(name)
    }

    /// Replaces all fields; the version counts up and `created_at` stays.
    pub async fn update_template(
        &self,
        caller: &Caller,
        name: &str,
        template: Template,
    ) -> Result<Template, EngineError> {
        let done = self.shared.update_template(name, template).await;
        self.shared.log_setting(caller, "template.update", name, done.as_ref().err());
        done
    }

    pub async fn delete_template(&self, caller: &Caller, name: &str) -> Result<(), EngineError> {
        let done = self.shared.delete_template(name).await;
        self.shared.log_setting(caller, "template.delete", name, done.as_ref().err());
        done
    }

    /// `create` with the template's fields and these overrides.
    pub async fn spawn_template(
        &self,
        caller: &Caller,
        name: &str,
        request: TemplateSpawnRequest,
        options: CreateOptions,
    ) -> Result<Sandbox, EngineError> {
        self.shared.create(caller, template::create_request(name, request), options).await
    }

    // Quotas. An owner's limit replaces the global one in either direction.

    /// In order of owner.
    pub fn list_quotas(&self) -> Vec<OwnerQuota> {
        self.shared.quotas.all()
    }

    pub fn quota_summary(&self) -> QuotaSummary {
        self.shared.quotas.summary()
    }

    pub fn get_quota(&self, owner: &OwnerId) -> Result<OwnerQuota, EngineError> {
        self.shared.quotas.get(owner).ok_or_else(|| EngineError::QuotaNotFound(owner.to_string()))
    }

    pub async fn put_quota(
        &self,
        caller: &Caller,
        owner: &OwnerId,
        request: &OwnerQuotaRequest,
    ) -> Result<OwnerQuota, EngineError> {
        let done = self.shared.put_quota(owner, request).await;
        self.shared.log_setting(caller, "quota.save", owner.as_str(), done.as_ref().err());
        done
    }

    pub async fn delete_quota(&self, caller: &Caller, owner: &OwnerId) -> Result<(), EngineError> {
        let done = self.shared.delete_quota(owner).await;
        self.shared.log_setting(caller, "quota.delete", owner.as_str(), done.as_ref().err());
        done
    }

    pub fn owner_usage(&self, owner: &OwnerId) -> OwnerUsage {
        self.shared.owner_usage(owner)
    }

    // Access.

    /// The stored API keys. Whether a call needs one is the server's to decide.
    pub fn keys(&self) -> &Keys {
        &self.shared.keys
    }

    /// Leaves a call to be written to the audit log. Returns at once; what the
    /// database cannot keep up with is counted and dropped.
    pub fn record_call(&self, entry: AuditEntry) {
        self.shared.record_call(entry);
    }

    /// Calls as they were recorded, everything before this one included.
    pub async fn audit(&self, query: &AuditQuery) -> Result<AuditPage, EngineError> {
        self.shared.audit(query).await
    }

    // Events.

    /// Events after `after` (`evt-12`, the last one that the client saw), then
    /// live ones; without `after` only live ones. A caller with a tenant sees
    /// that tenant's events.
    pub fn subscribe(&self, caller: &Caller, after: Option<&str>) -> Result<EventStream, EngineError> {
        self.shared.bus.subscribe(caller.tenant.clone(), after)
    }

    // Providers, health, metrics.

    /// In order of name, from the cache that a background task refreshes.
    pub fn providers(&self) -> Vec<ProviderHealth> {
        self.shared.cached_health()
    }

    pub fn provider(&self, name: &str) -> Result<ProviderDetail, EngineError> {
        self.shared.provider_detail(name)
    }

    /// Checks every provider now, at the same time, each within its deadline.
    pub async fn test_providers(&self) -> BTreeMap<String, bool> {
        let checked = self.shared.check_providers().await;
        checked.into_iter().map(|health| (health.name, health.healthy)).collect()
    }

    pub async fn store_health(&self) -> StoreHealth {
        self.shared.store_health().await
    }

    pub async fn readiness(&self) -> ReadinessReport {
        self.shared.readiness().await
    }

    pub async fn metrics(&self) -> MetricsSnapshot {
        self.shared.metrics_snapshot().await
    }
}

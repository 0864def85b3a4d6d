//! Sandboxes of somebody else's service, over HTTP.
//!
//! The published protocol is enough: spawn, exec, files, status, destroy. What
//! a backend can do besides it says in `GET /capabilities`, and what it then
//! has is used. With a connection to our own agent ([`Feature::Agent`], as
//! `stacyvm backend serve` has it over every runtime that runs one) a sandbox
//! there is as good as one here; without, a session of its own speaks the
//! protocol. What a backend cannot do is `Unsupported`, never pretended.
//!
//! A backend is not trusted: answers, lines and files have limits, calls have
//! deadlines, and its texts reach neither callers nor logs, except for failures
//! of one that says they are for callers ([`Feature::Errors`]).

mod error;
mod exec;
mod health;
mod http;
mod inside;
mod lines;
mod registry;
mod session;
mod stranger;
mod terminal;
mod tunnel;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use stacyvm_api::backend::{self, Feature, Listed, SpawnRequest, SpawnSpec, Spawned, Stats, Status};
use stacyvm_api::{Limit, LimitReport, NetworkMode, NetworkRequest, SandboxId, Timestamp};
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, ProgressSink, Provider, ProviderError, ResourceUsage,
    RuntimeSandbox, RuntimeState, SandboxSpec, Shortfalls,
};
use tokio::sync::oneshot;

pub use http::AddressError;

use error::CallError;
use http::Http;
use inside::Inside;
use registry::{Registered, Registry};
use session::BackendSession;
use tunnel::Tunnel;

/// How long an answer to a spawn that nobody waits for any more is awaited, to
/// destroy what it made.
const ABANDONED_SPAWN_TIME_MAX: Duration = Duration::from_mins(10);
/// How long the server's start waits to hear what the backend can do; one that
/// takes longer is asked again when it is used, and by each check of its health.
const FIRST_LOOK_TIME_MAX: Duration = Duration::from_secs(2);
/// Statuses that are asked for at once.
const STATUS_CALLS_MAX: usize = 8;
const BACKEND_ID_BYTES_MAX: usize = 256;
/// Where nothing names the sandbox that a spawn may have made.
const UNNAMED: &str = "create the sandbox: the answer does not name it, so one may be left at the backend";
/// Metadata that says which of a backend's sandboxes are this server's.
const OWNER_LABEL: &str = "stacyvm.owner";

/// Where a backend is and how patient to be with it.
#[derive(Clone)]
pub struct CustomOptions {
    pub name: String,
    pub base_url: String,
    pub api_key: Option<String>,
    /// For one answer; streams have no end.
    pub timeout: Duration,
    /// Between two looks at whether a sandbox still runs.
    pub poll_interval: Duration,
    /// Directory of this provider alone.
    pub state_dir: PathBuf,
}

impl CustomOptions {
    pub fn new(base_url: impl Into<String>, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            name: "custom".to_owned(),
            base_url: base_url.into(),
            api_key: None,
            timeout: Duration::from_mins(1),
            poll_interval: Duration::from_secs(5),
            state_dir: state_dir.into(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CustomError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("the directory of the provider cannot be used")]
    State(#[source] std::io::Error),
}

/// The runtime `custom`.
pub struct CustomProvider {
    options: CustomOptions,
    http: Http,
    registry: Registry,
    /// Which server this is, among those that use the backend.
    owner: String,
    offered: RwLock<Option<Arc<Offered>>>,
    insides: Mutex<BTreeMap<SandboxId, Arc<Inside>>>,
}

/// What a backend says that it can do.
#[derive(Debug, Default)]
struct Offered {
    features: Arc<BTreeSet<Feature>>,
    said: backend::Capabilities,
}

impl Offered {
    fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }

    /// The backend keeps our ids, and knows them all.
    fn keeps_ids(&self) -> bool {
        self.has(Feature::Spec) && self.has(Feature::Inventory)
    }
}

impl CustomProvider {
    /// Needs no backend that answers: it may come later.
    pub async fn open(options: CustomOptions) -> Result<Self, CustomError> {
        let http = Http::new(&options.base_url, options.api_key.as_deref(), options.timeout)?;
        let registry = Registry::open(options.state_dir.join("sandboxes")).map_err(CustomError::State)?;
        let owner = registry::owner(&options.state_dir.join("owner")).map_err(CustomError::State)?;
        let provider = Self { options, http, registry, owner, offered: RwLock::default(), insides: Mutex::default() };
        let limit = FIRST_LOOK_TIME_MAX.min(provider.http.limit());
        let first = tokio::time::timeout(limit, provider.discover()).await;
        if let Err(error) = first.unwrap_or(Err(CallError::TimedOut(limit))) {
            tracing::warn!(provider = provider.name(), %error, "the backend does not answer yet");
        }
        Ok(provider)
    }

    /// Asks the backend what it can do. One that has never heard of the question
    /// can do what is published.
    async fn discover(&self) -> Result<Arc<Offered>, CallError> {
        let said = match self.http.json::<backend::Capabilities>(self.http.get(&["capabilities"], &[])).await {
            Ok(said) => said,
            Err(CallError::Refused { status: 404 | 405 | 501, .. }) => backend::Capabilities::default(),
            Err(error) => return Err(error),
        };
        self.http.set_speaks(said.features.contains(&Feature::Errors));
        let features = said.features.iter().copied().filter(|it| *it != Feature::Unknown).collect();
        let offered = Arc::new(Offered { features: Arc::new(features), said });
        *self.offered.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&offered));
        Ok(offered)
    }

    fn known(&self) -> Option<Arc<Offered>> {
        self.offered.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn offered(&self) -> Result<Arc<Offered>, CallError> {
        match self.known() {
            Some(offered) => Ok(offered),
            None => self.discover().await,
        }
    }

    async fn offered_for(&self, id: &SandboxId, operation: &'static str) -> Result<Arc<Offered>, ProviderError> {
        match self.offered().await {
            Ok(offered) => Ok(offered),
            Err(error) if stranger::is_likely(&error) => {
                Err(self.strange(error, id, "GET /capabilities", operation).await)
            }
            Err(error) => Err(error.of_provider(self.name(), id, None, operation)),
        }
    }

    /// A failure of what may be no backend.
    async fn strange(&self, error: CallError, id: &SandboxId, route: &str, operation: &'static str) -> ProviderError {
        let message = match &error {
            _ if stranger::is_server(&self.http).await => stranger::SERVER.to_owned(),
            CallError::Refused { status: status @ (404 | 405 | 410 | 501), .. } => {
                format!("what answers at its address is not a backend: there is no {route} (HTTP {status})")
            }
            _ => return error.of_provider(self.name(), id, None, operation),
        };
        ProviderError::Unavailable {
            provider: self.name().to_owned(),
            message,
            hint: Some(stranger::advice("base_url in providers.custom")),
            cause: Some(error.into()),
        }
    }

    fn inside(&self, id: &SandboxId) -> Arc<Inside> {
        Arc::clone(self.insides.lock().unwrap_or_else(PoisonError::into_inner).entry(id.clone()).or_default())
    }

    /// What the backend calls a sandbox of ours, and its environment where the
    /// backend cannot keep that.
    fn locate(&self, id: &SandboxId, offered: &Offered) -> Result<Registered, ProviderError> {
        let found = self.registry.get(id).map_err(|error| state_failure("find the sandbox", error))?;
        match found {
            Some(registered) => Ok(registered),
            None if offered.keeps_ids() => Ok(Registered {
                backend_id: id.as_str().to_owned(),
                image: String::new(),
                created_at: Timestamp::from_unix_ms(0),
                env: BTreeMap::new(),
                metadata: BTreeMap::new(),
                limits: None,
            }),
            None => Err(ProviderError::NotFound(id.clone())),
        }
    }

    /// Orders the sandbox in a task of its own, so that one that is made after
    /// all is destroyed when nobody waits for it any more.
    async fn order(&self, id: &SandboxId, request: &SpawnRequest) -> Result<Spawned, CallError> {
        let (http, registry) = (self.http.clone(), self.registry.clone());
        let call = http.post(&["spawn"], request).header("idempotency-key", id.as_str());
        let own_id = request.spec.as_ref().map(|spec| spec.id.clone());
        let (answer, outcome) = oneshot::channel();
        tokio::spawn(async move {
            let spawned = http.json_within::<Spawned>(ABANDONED_SPAWN_TIME_MAX, call).await;
            let unwanted = match spawned {
                // The id that was ordered can be no other sandbox's.
                Ok(spawned) => answer.send(Ok(spawned)).err().and_then(Result::ok).and_then(|spawned| {
                    own_id.or_else(|| {
                        let free = is_plausible(&spawned.id) && registry.has(&spawned.id).is_ok_and(|taken| !taken);
                        free.then_some(spawned.id)
                    })
                }),
                Err(error) => {
                    // Whether it was made is not known where the answer was lost.
                    let lost = !matches!(error, CallError::Refused { .. } | CallError::Unreachable(_));
                    drop(answer.send(Err(error)));
                    own_id.filter(|_| lost)
                }
            };
            if let Some(id) = unwanted
                && let Err(error) = http.done(http.request(Method::DELETE, &["sandboxes", &id], &[])).await
                && !error.is_gone()
            {
                tracing::warn!(sandbox = id, %error, "a sandbox that nobody waits for could not be destroyed");
            }
        });
        let limit = self.http.limit();
        let answered = tokio::time::timeout(limit, outcome).await.map_err(|_| CallError::TimedOut(limit))?;
        answered.map_err(|_| CallError::Broken(None))?
    }

    fn spawn_request(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        offered: &Offered,
    ) -> Result<SpawnRequest, ProviderError> {
        let mut metadata = spec.metadata.clone();
        let full = if offered.has(Feature::Spec) {
            metadata.insert(OWNER_LABEL.to_owned(), self.owner.clone());
            Some(SpawnSpec {
                id: id.as_str().to_owned(),
                env: spec.env.clone(),
                user: spec.user.clone(),
                hostname: Some(spec.hostname.clone()),
                pids_limit: Some(spec.pids_limit),
                network: Some(NetworkRequest { mode: spec.network.mode.clone(), allow: spec.network.allow.clone() }),
                requested: spec.requested.iter().copied().collect(),
                allow_unenforced: spec.allow_unenforced,
                disk_in_memory: spec.disk.in_memory,
                expires_at: spec.expires_at,
                generation: spec.generation,
                agent_token: offered.has(Feature::Agent).then(|| spec.agent_token.clone()),
            })
        } else {
            plain_enough(spec)?;
            None
        };
        Ok(SpawnRequest {
            image: spec.image.clone(),
            memory_mb: Some(spec.memory_mib).filter(|mib| *mib > 0),
            vcpus: Some(spec.vcpus).filter(|vcpus| *vcpus > 0.0),
            disk_size_mb: spec.disk.size_mib.filter(|mib| *mib > 0),
            metadata: (!metadata.is_empty()).then_some(metadata),
            spec: full,
        })
    }

    fn ours(&self, listed: Listed) -> Option<RuntimeSandbox> {
        let mut metadata = listed.metadata;
        if metadata.remove(OWNER_LABEL)? != self.owner {
            return None;
        }
        Some(RuntimeSandbox {
            id: listed.id.parse().ok()?,
            state: state_of(listed.state.as_deref()),
            image: listed.image,
            created_at: listed.created_at,
            metadata,
            limits: listed.limits,
        })
    }

    async fn registered_state(&self, backend_id: &str) -> Result<RuntimeState, CallError> {
        match self.http.json::<Status>(self.http.get(&["status", backend_id], &[])).await {
            Ok(status) => Ok(state_of(status.state.as_deref())),
            // Only its remains are left, and they are ours.
            Err(error) if error.is_gone() => Ok(RuntimeState::Dead),
            Err(error) => Err(error),
        }
    }

    /// One that is gone is as good as deleted.
    async fn delete(&self, backend_id: &str) -> Result<(), CallError> {
        match self.http.done(self.http.request(Method::DELETE, &["sandboxes", backend_id], &[])).await {
            Ok(()) | Err(CallError::Refused { status: 404 | 410, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn forget(&self, id: &SandboxId) {
        if let Some(inside) = self.insides.lock().unwrap_or_else(PoisonError::into_inner).remove(id) {
            inside.end();
        }
    }
}

#[async_trait]
impl Provider for CustomProvider {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn capabilities(&self) -> Capabilities {
        let offered = self.known().unwrap_or_default();
        let agent = offered.has(Feature::Agent);
        Capabilities {
            pty: agent || offered.has(Feature::Terminal),
            watch: agent,
            dial: agent || offered.has(Feature::Dial),
            stats: offered.has(Feature::Stats),
            survives_restart: true,
            keeps_records: false,
            network: offered.said.network,
            pause: false,
            imitated: offered.said.imitated,
            oom_ends_sandbox: offered.said.oom_ends_sandbox,
            family: "remote_http",
            shares_host: false,
            rewrites_paths: false,
        }
    }

    fn shortfalls(&self) -> Shortfalls {
        let offered = self.known().unwrap_or_default();
        let lacks = |feature| !offered.has(Feature::Agent) && !offered.has(feature);
        Shortfalls {
            text_only: lacks(Feature::Bytes),
            plain_files: lacks(Feature::Details),
            no_archives: lacks(Feature::Archive),
            late_output: lacks(Feature::Exit),
            one_user: lacks(Feature::Spec),
            plain_failures: lacks(Feature::Errors),
            loose_limits: lacks(Feature::Spec),
        }
    }

    fn describe(&self) -> BTreeMap<String, String> {
        let mut shown = BTreeMap::from([
            ("type".to_owned(), "custom".to_owned()),
            ("base_url".to_owned(), self.http.base().to_string()),
            ("api_key".to_owned(), if self.options.api_key.is_some() { "set" } else { "none" }.to_owned()),
        ]);
        if let Some(offered) = self.known() {
            let names = offered.features.iter().filter_map(|it| serde_json::to_value(it).ok());
            let names: Vec<String> = names.filter_map(|name| name.as_str().map(str::to_owned)).collect();
            shown.insert("features".to_owned(), names.join(", "));
        }
        shown
    }

    async fn check(&self) -> HealthReport {
        health::check(self).await
    }

    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        _progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        const OPERATION: &str = "create the sandbox";
        let offered = self.offered_for(id, OPERATION).await?;
        let request = self.spawn_request(id, spec, &offered)?;
        let spawned = match self.order(id, &request).await {
            Ok(spawned) => spawned,
            Err(error @ CallError::Garbage(_)) if !offered.has(Feature::Spec) => {
                return Err(error.of_nonsense(self.name(), UNNAMED));
            }
            Err(error) if stranger::is_likely(&error) => {
                return Err(self.strange(error, id, "POST /spawn", OPERATION).await);
            }
            Err(error) => return Err(error.of_provider(self.name(), id, Some(&spec.image), OPERATION)),
        };
        if !is_plausible(&spawned.id) || (offered.has(Feature::Spec) && spawned.id != id.as_str()) {
            let freed = offered.has(Feature::Spec) && self.delete(id.as_str()).await.is_ok();
            let operation = if freed { OPERATION } else { UNNAMED };
            return Err(CallError::Garbage("the id of the sandbox cannot be one").of_nonsense(self.name(), operation));
        }
        let unknown =
            || LimitReport { unenforced: vec![Limit::Memory, Limit::Cpu, Limit::Pids], ..LimitReport::default() };
        let limits = spawned.limits.unwrap_or_else(unknown);
        if !offered.keeps_ids() {
            let env = if offered.has(Feature::Spec) { BTreeMap::new() } else { spec.env.clone() };
            let registered = Registered {
                backend_id: spawned.id.clone(),
                image: spec.image.clone(),
                created_at: Timestamp::now(),
                env,
                metadata: spec.metadata.clone(),
                limits: Some(limits.clone()),
            };
            match self.registry.claim(id, &registered) {
                Ok(true) => {}
                // Not deleted: the other sandbox would be.
                Ok(false) => {
                    let error = CallError::Garbage("the id of the sandbox is another sandbox's");
                    return Err(error.of_nonsense(self.name(), UNNAMED));
                }
                Err(error) => {
                    // What cannot be found again must not stay.
                    drop(self.delete(&spawned.id).await);
                    return Err(state_failure(OPERATION, error));
                }
            }
        }
        Ok(Created { limits, image_digest: spawned.image_digest })
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        const OPERATION: &str = "connect to the sandbox";
        let offered = self.offered_for(id, OPERATION).await?;
        let Registered { backend_id, env, .. } = self.locate(id, &offered)?;
        let state = self.registered_state(&backend_id).await;
        match state.map_err(|error| error.of_provider(self.name(), id, None, OPERATION))? {
            RuntimeState::Running | RuntimeState::Paused => {}
            RuntimeState::Dead => return Err(ProviderError::NotFound(id.clone())),
        }
        let http = self.http.clone();
        if offered.has(Feature::Agent) {
            return Ok(Connection::Envd(Arc::new(Tunnel { http, backend_id })));
        }
        let (features, inside) = (Arc::clone(&offered.features), self.inside(id));
        Ok(Connection::Native(Arc::new(BackendSession { http, backend_id, features, env, inside })))
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        const OPERATION: &str = "destroy the sandbox";
        let offered = self.offered_for(id, OPERATION).await?;
        let backend_id = match self.locate(id, &offered) {
            Ok(registered) => registered.backend_id,
            Err(ProviderError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.delete(&backend_id).await.map_err(|error| error.of_provider(self.name(), id, None, OPERATION))?;
        self.forget(id);
        self.registry.remove(id).map_err(|error| state_failure(OPERATION, error))
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        const OPERATION: &str = "list its sandboxes";
        let nobody = || "none".parse::<SandboxId>().unwrap_or_else(|_| SandboxId::random());
        let failed = |error: CallError| error.of_provider(self.name(), &nobody(), None, OPERATION);
        let offered = self.offered().await.map_err(failed)?;
        if offered.keeps_ids() {
            let all: Vec<Listed> = self.http.json(self.http.get(&["sandboxes"], &[])).await.map_err(failed)?;
            return Ok(all.into_iter().filter_map(|listed| self.ours(listed)).collect());
        }
        let all = self.registry.all().map_err(|error| state_failure(OPERATION, error))?;
        let looked_at = stream::iter(all).map(|(id, registered)| async move {
            let state = self.registered_state(&registered.backend_id).await?;
            let Registered { image, created_at, metadata, limits, .. } = registered;
            Ok(RuntimeSandbox { id, state, image: Some(image), created_at: Some(created_at), metadata, limits })
        });
        let states: Vec<Result<RuntimeSandbox, CallError>> = looked_at.buffered(STATUS_CALLS_MAX).collect().await;
        states.into_iter().collect::<Result<_, _>>().map_err(failed)
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        loop {
            let state = match self.offered().await {
                Ok(offered) => match self.locate(id, &offered) {
                    Ok(registered) => self.registered_state(&registered.backend_id).await,
                    Err(_) => return Ok(Ending::Died),
                },
                Err(error) => Err(error),
            };
            // A backend that does not answer says nothing about its sandboxes.
            if matches!(state, Ok(RuntimeState::Dead)) {
                self.forget(id);
                return Ok(Ending::Died);
            }
            tokio::time::sleep(self.options.poll_interval).await;
        }
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        const OPERATION: &str = "read the usage";
        let offered = self.offered_for(id, OPERATION).await?;
        if !offered.has(Feature::Stats) {
            return Err(self.unsupported("usage"));
        }
        let backend_id = self.locate(id, &offered)?.backend_id;
        let stats = self.http.json::<Stats>(self.http.get(&["sandboxes", &backend_id, "stats"], &[])).await;
        let stats = stats.map_err(|error| error.of_provider(self.name(), id, None, OPERATION))?;
        Ok(ResourceUsage {
            cpu_usec: stats.cpu_usec,
            memory_bytes: stats.memory_bytes,
            memory_limit_bytes: stats.memory_limit_bytes,
            pids: stats.pids,
            pids_limit: stats.pids_limit,
            oom_kills: stats.oom_kills,
            pids_refused: stats.pids_refused,
            pids_kills: stats.pids_kills,
            disk_kills: stats.disk_kills,
            disk_bytes: stats.disk_bytes,
            disk_limit_bytes: stats.disk_limit_bytes,
        })
    }
}

/// Whether the published spawn can say what was ordered. Leaving the rest out
/// would be less than was asked for.
fn plain_enough(spec: &SandboxSpec) -> Result<(), ProviderError> {
    let refused = |what: &str| {
        let message = format!("this backend cannot {what}; leave it out, or use a backend that takes `spec`");
        Err(ProviderError::InvalidSpec { message })
    };
    if spec.user.is_some() {
        return refused("choose the user");
    }
    if spec.disk.in_memory {
        return refused("keep the disk in memory");
    }
    if matches!(spec.network.mode, NetworkMode::Named(_)) || !spec.network.allow.is_empty() {
        return refused("choose the network");
    }
    if spec.requested.contains(&Limit::Pids) && !spec.allow_unenforced {
        return Err(ProviderError::LimitUnsupported {
            message: "this backend has no limit of processes".to_owned(),
            hint: "leave pids_limit out, or set allow_unenforced".to_owned(),
        });
    }
    Ok(())
}

fn state_of(state: Option<&str>) -> RuntimeState {
    match state {
        None | Some("" | "running" | "creating" | "restarting" | "unknown" | "idle" | "unhealthy") => {
            RuntimeState::Running
        }
        Some("paused") => RuntimeState::Paused,
        Some(_) => RuntimeState::Dead,
    }
}

/// An id that can stand in a path and in a log.
fn is_plausible(id: &str) -> bool {
    !id.is_empty() && id.len() <= BACKEND_ID_BYTES_MAX && !matches!(id, "." | "..") && !id.chars().any(char::is_control)
}

fn state_failure(operation: &'static str, error: std::io::Error) -> ProviderError {
    ProviderError::Failed { operation, cause: error.into() }
}

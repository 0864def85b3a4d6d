//! What the routes work with: the runtime, and the ways into its sandboxes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use stacyvm_api::backend::{SpawnRequest, SpawnSpec};
use stacyvm_api::{NetworkMode, NetworkRequest, SandboxId, Timestamp};
use stacyvm_sandbox::{
    AgentChannel, Connection, Created, DiskRequest, EnvdSession, NetworkPolicy, Provider, RuntimeState, SandboxSpec,
    Session,
};

use crate::BackendOptions;
use crate::error::{Answer, Refusal};
use crate::order;

const DEFAULT_MEMORY_MIB: u64 = 1024;
const DEFAULT_PIDS: u64 = 1024;

#[derive(Clone)]
pub(crate) struct App {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) options: Arc<BackendOptions>,
    known: Arc<Mutex<BTreeMap<SandboxId, Known>>>,
}

/// What is kept of a sandbox while this process lives.
#[derive(Default)]
struct Known {
    /// A token that the client chose; ours is derived. Never stored.
    token: Option<String>,
    session: Option<Arc<dyn Session>>,
}

impl App {
    pub(crate) fn new(provider: Arc<dyn Provider>, options: BackendOptions) -> Self {
        Self { provider, options: Arc::new(options), known: Arc::default() }
    }

    pub(crate) async fn create(&self, request: SpawnRequest) -> Answer<(SandboxId, Created)> {
        order::check(&request)?;
        let id = match &request.spec {
            Some(spec) => spec.id.parse().map_err(|_| Refusal::bad_request("the id cannot be one"))?,
            None => SandboxId::random(),
        };
        let spec = self.spec(&id, request);
        let token = spec.agent_token.clone();
        let created = self.provider.create(&id, &spec, &()).await?;
        self.known().insert(id.clone(), Known { token: Some(token), session: None });
        Ok((id, created))
    }

    fn spec(&self, id: &SandboxId, request: SpawnRequest) -> SandboxSpec {
        let mode = if self.provider.capabilities().network { NetworkMode::Bridge } else { NetworkMode::None };
        let full = request.spec.unwrap_or_else(|| SpawnSpec {
            id: id.to_string(),
            env: BTreeMap::new(),
            user: None,
            hostname: None,
            pids_limit: None,
            network: None,
            requested: Vec::new(),
            allow_unenforced: true,
            disk_in_memory: false,
            expires_at: Timestamp::now() + self.options.lifetime,
            generation: 1,
            agent_token: None,
        });
        let network = full.network.unwrap_or(NetworkRequest { mode, allow: Vec::new() });
        SandboxSpec {
            image: request.image,
            memory_mib: request.memory_mb.filter(|mib| *mib > 0).unwrap_or(DEFAULT_MEMORY_MIB),
            vcpus: request.vcpus.filter(|vcpus| *vcpus > 0.0).unwrap_or(1.0),
            pids_limit: full.pids_limit.filter(|pids| *pids > 0).unwrap_or(DEFAULT_PIDS),
            disk: DiskRequest { size_mib: request.disk_size_mb.filter(|mib| *mib > 0), in_memory: full.disk_in_memory },
            requested: full.requested.into_iter().collect::<BTreeSet<_>>(),
            network: NetworkPolicy { mode: network.mode, allow: network.allow },
            env: full.env,
            user: full.user,
            hostname: full.hostname.unwrap_or_else(|| id.to_string()),
            metadata: request.metadata.unwrap_or_default(),
            allow_unenforced: full.allow_unenforced,
            expires_at: full.expires_at,
            generation: full.generation.max(1),
            agent_token: full.agent_token.unwrap_or_else(|| self.derived_token(id)),
        }
    }

    /// A way into a sandbox that exists.
    pub(crate) async fn session(&self, id: &str) -> Answer<Arc<dyn Session>> {
        let id = parsed(id)?;
        if let Some(session) = self.known().get(&id).and_then(|known| known.session.clone()) {
            return Ok(session);
        }
        let session = match self.provider.connect(&id).await? {
            Connection::Native(session) => session,
            Connection::Envd(channel) => {
                let token = self.known().get(&id).and_then(|known| known.token.clone());
                let token = token.unwrap_or_else(|| self.derived_token(&id));
                Arc::new(EnvdSession::connect(channel, token)?) as Arc<dyn Session>
            }
        };
        // What has no agent is not kept: it may not notice its own end.
        self.known().entry(id).or_default().session = Some(Arc::clone(&session));
        Ok(session)
    }

    /// The agent of a sandbox, for a client that has its token.
    pub(crate) async fn agent(&self, id: &str) -> Answer<Arc<dyn AgentChannel>> {
        match self.provider.connect(&parsed(id)?).await? {
            Connection::Envd(channel) => Ok(channel),
            Connection::Native(_) => {
                Err(Refusal::new(501, stacyvm_api::backend::Code::Unsupported, "this runtime has no agent"))
            }
        }
    }

    pub(crate) async fn destroy(&self, id: &str) -> Answer<()> {
        let id = parsed(id)?;
        self.provider.destroy(&id).await?;
        self.known().remove(&id);
        Ok(())
    }

    /// Frees what ended by itself, and what no sandbox owns.
    pub(crate) async fn tend(&self) {
        let listed = match self.provider.list().await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the sandboxes cannot be listed");
                return;
            }
        };
        for sandbox in listed.iter().filter(|sandbox| sandbox.state == RuntimeState::Dead) {
            match self.provider.destroy(&sandbox.id).await {
                Ok(()) => tracing::info!(sandbox = %sandbox.id, "freed a sandbox that ended"),
                Err(error) => {
                    tracing::warn!(sandbox = %sandbox.id, error = &error as &dyn std::error::Error, "not freed");
                }
            }
        }
        match self.provider.sweep().await {
            Ok(freed) => freed.iter().for_each(|what| tracing::info!("freed {what}")),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "the sweep failed"),
        }
        let alive: BTreeSet<_> = listed.into_iter().map(|sandbox| sandbox.id).collect();
        self.known().retain(|id, known| known.session.is_none() || alive.contains(id));
    }

    /// Hex HMAC-SHA256 of the secret over the id, so that a restart knows it.
    fn derived_token(&self, id: &SandboxId) -> String {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.options.secret).expect("any key length is valid");
        mac.update(b"stacyvm backend agent\0");
        mac.update(id.as_str().as_bytes());
        mac.finalize().into_bytes().iter().fold(String::new(), |mut text, byte| {
            let _infallible = write!(text, "{byte:02x}");
            text
        })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn parsed(id: &str) -> Answer<SandboxId> {
    id.parse().map_err(|_| Refusal::not_found())
}

//! A provider in this process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use stacyvm_api::{Limit, NetworkMode, SandboxId, SandboxState, Timestamp};
use stacyvm_sandbox::{
    Connection, Created, DiskRequest, EnvdSession, NetworkPolicy, Provider, ProviderError, RuntimeState, SandboxSpec,
    Session,
};

use super::{MAX_SANDBOXES, Order, SandboxView, Target, TargetError};
use crate::Ability;

const DEFAULT_MEMORY_MIB: u64 = 512;
const DEFAULT_PIDS: u64 = 256;
/// Longer than any check; the sandboxes end by themselves if the run is killed.
const SANDBOX_LIFETIME: Duration = Duration::from_mins(30);

/// Makes sandboxes straight from a [`Provider`], without engine or server.
pub struct ProviderTarget {
    provider: Arc<dyn Provider>,
    made: Mutex<BTreeMap<SandboxId, Made>>,
}

/// What the engine would keep in its store.
#[derive(Clone)]
struct Made {
    created: Created,
    agent_token: String,
}

impl ProviderTarget {
    pub fn new(provider: Arc<dyn Provider>) -> Self {
        Self { provider, made: Mutex::default() }
    }

    fn spec(&self, id: &SandboxId, order: &Order, agent_token: String) -> SandboxSpec {
        let requested = [order.memory_mib.map(|_| Limit::Memory), order.pids_limit.map(|_| Limit::Pids)];
        let can = self.provider.capabilities();
        let mode = match (can.shares_host, can.network) {
            (true, _) => NetworkMode::Named("host".to_owned()),
            (false, true) => NetworkMode::Bridge,
            (false, false) => NetworkMode::None,
        };
        SandboxSpec {
            image: order.image.clone(),
            memory_mib: order.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
            vcpus: 1.0,
            pids_limit: order.pids_limit.unwrap_or(DEFAULT_PIDS),
            disk: DiskRequest { size_mib: None, in_memory: false },
            requested: requested.into_iter().flatten().collect(),
            network: NetworkPolicy { mode, allow: Vec::new() },
            env: order.env.clone(),
            user: None,
            hostname: id.as_str().to_owned(),
            metadata: BTreeMap::new(),
            allow_unenforced: true,
            expires_at: Timestamp::now() + SANDBOX_LIFETIME,
            generation: 1,
            agent_token,
        }
    }

    fn made(&self, id: &SandboxId) -> Option<Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

#[async_trait]
impl Target for ProviderTarget {
    fn label(&self) -> String {
        format!("provider {}", self.provider.name())
    }

    fn lacks(&self, ability: Ability) -> Option<String> {
        let (can, short) = (self.provider.capabilities(), self.provider.shortfalls());
        let has = match ability {
            Ability::Programs => !can.imitated,
            Ability::Terminal => can.pty,
            Ability::Watch => can.watch,
            Ability::Dial | Ability::Sockets | Ability::Ports => can.dial,
            Ability::Usage => can.stats,
            Ability::OutlivesOom => !can.oom_ends_sandbox,
            Ability::Bytes => !short.text_only,
            Ability::FileDetails => !short.plain_files,
            Ability::Archives => !short.no_archives,
            Ability::LiveOutput => !short.late_output,
            Ability::Users => !short.one_user,
            Ability::Failures => !short.plain_failures,
            Ability::Limits => !short.loose_limits,
            Ability::ExactFiles => !can.rewrites_paths,
            Ability::OwnProcesses => !can.shares_host,
        };
        (!has).then(|| format!("the `{}` runtime says that it lacks {ability}", self.provider.name()))
    }

    async fn create(&self, order: &Order) -> Result<SandboxId, TargetError> {
        let id = SandboxId::random();
        // As hard to guess as an id; the engine derives its own differently.
        let agent_token = format!("{}{}", SandboxId::random(), SandboxId::random());
        let spec = self.spec(&id, order, agent_token.clone());
        let created = self.provider.create(&id, &spec, &()).await.map_err(|error| translated(error, "create"))?;
        let made = Made { created, agent_token };
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), made);
        Ok(id)
    }

    async fn session(&self, id: &SandboxId) -> Result<Arc<dyn Session>, TargetError> {
        match self.provider.connect(id).await.map_err(|error| translated(error, "connect"))? {
            Connection::Native(session) => Ok(session),
            Connection::Envd(channel) => {
                let token = self.made(id).map(|made| made.agent_token).unwrap_or_default();
                let session = EnvdSession::connect(channel, token);
                Ok(Arc::new(
                    session.map_err(|error| TargetError::Failed { operation: "connect", cause: error.into() })?,
                ))
            }
        }
    }

    async fn view(&self, id: &SandboxId) -> Result<SandboxView, TargetError> {
        let found = self.provider.list().await.map_err(|error| translated(error, "list"))?;
        let Some(sandbox) = found.into_iter().find(|sandbox| sandbox.id == *id) else {
            return Err(TargetError::NotFound(id.clone()));
        };
        let state = match sandbox.state {
            RuntimeState::Running => SandboxState::Running,
            RuntimeState::Paused => SandboxState::Paused,
            RuntimeState::Dead => SandboxState::Error,
        };
        Ok(SandboxView { id: sandbox.id, state, limits: self.made(id).map(|made| made.created.limits) })
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), TargetError> {
        self.provider.destroy(id).await.map_err(|error| translated(error, "destroy"))
    }

    async fn list(&self) -> Result<Vec<SandboxId>, TargetError> {
        let found = self.provider.list().await.map_err(|error| translated(error, "list"))?;
        let ours: BTreeSet<SandboxId> =
            self.made.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        Ok(found.into_iter().map(|sandbox| sandbox.id).filter(|id| ours.contains(id)).collect())
    }

    async fn room(&self) -> Result<Option<u64>, TargetError> {
        let Some(most) = self.provider.describe().get(MAX_SANDBOXES).and_then(|most| most.parse::<u64>().ok()) else {
            return Ok(None);
        };
        let there = self.provider.list().await.map_err(|error| translated(error, "list"))?;
        Ok(Some(most.saturating_sub(there.len() as u64)))
    }

    async fn usage(&self, id: &SandboxId) -> Result<(u64, u64), TargetError> {
        let usage = self.provider.usage(id).await.map_err(|error| translated(error, "read usage"))?;
        Ok((usage.memory_bytes, usage.pids))
    }
}

fn translated(error: ProviderError, operation: &'static str) -> TargetError {
    let text = crate::check::chain(&error);
    match error {
        ProviderError::NotFound(id) => TargetError::NotFound(id),
        ProviderError::Unsupported { operation, .. } => TargetError::Unsupported(operation),
        ProviderError::InvalidSpec { .. } | ProviderError::LimitUnsupported { .. } => TargetError::Refused(text),
        ProviderError::Image { .. } | ProviderError::RegistryUnavailable { .. } => TargetError::Image(text),
        ProviderError::Exhausted { .. } | ProviderError::Unavailable { .. } => TargetError::Unavailable(text),
        ProviderError::BadAnswer { cause, .. } | ProviderError::Failed { cause, .. } => {
            TargetError::Failed { operation, cause }
        }
    }
}

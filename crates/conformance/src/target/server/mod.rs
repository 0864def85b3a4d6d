//! A running server, reached over its REST API.

mod session;
mod stream;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_api::{CreateRequest, Duration, ErrorCode, ListQuery, ProviderHealth, SandboxId};
use stacyvm_client::{Client, ClientError};
use stacyvm_sandbox::{Session, SessionError};

use self::session::ServerSession;
use super::{MAX_SANDBOXES, Order, SandboxView, Target, TargetError};
use crate::Ability;

/// Marks the sandboxes of one run, so that what an aborted request left behind
/// is found again.
const RUN_KEY: &str = "stacyvm.conformance";

/// Longer than any check.
const SANDBOX_TTL: Duration = Duration::from_secs(30 * 60);

/// Makes sandboxes over the REST API of a running server.
pub struct ServerTarget {
    client: Client,
    provider: ProviderHealth,
    run: String,
}

impl ServerTarget {
    /// Asks the server about the provider to test: the named one, or its default.
    pub async fn connect(client: Client, provider: Option<&str>) -> Result<Self, TargetError> {
        // A server tells everybody its health.
        client.health().await.map_err(|error| stranger(error, &client))?;
        let providers = client.providers().await.map_err(|error| target_error(error, "list its providers", None))?;
        let known: Vec<String> = providers.iter().map(|provider| provider.name.clone()).collect();
        let wanted = |candidate: &ProviderHealth| match provider {
            Some(name) => candidate.name == name,
            None => candidate.default,
        };
        let Some(provider) = providers.into_iter().find(wanted) else {
            let name = provider.unwrap_or("a default");
            return Err(TargetError::Refused(format!(
                "the server has no provider `{name}`, only {}",
                known.join(", ")
            )));
        };
        Ok(Self { client, provider, run: SandboxId::random().to_string() })
    }
}

/// Why one of a server's providers cannot do something, as the server says.
pub fn lack_of(provider: &ProviderHealth, ability: Ability) -> Option<String> {
    let has = |capability: &str| provider.capabilities.iter().any(|had| had == capability);
    let falls_short = |shortfall: &str| provider.shortfalls.iter().any(|had| had == shortfall);
    let can = match ability {
        Ability::Programs => !has("imitated"),
        Ability::Terminal => has("pty"),
        Ability::Watch => has("watch"),
        Ability::Sockets => return Some("the REST API has no call that dials a unix socket".to_owned()),
        Ability::Dial | Ability::Ports => has("dial"),
        Ability::Usage => has("stats"),
        Ability::OutlivesOom => !has("oom_ends_sandbox"),
        Ability::Bytes => !falls_short("text_only"),
        Ability::FileDetails => !falls_short("plain_files"),
        Ability::Archives => !falls_short("no_archives"),
        Ability::LiveOutput => !falls_short("late_output"),
        Ability::Users => !falls_short("one_user"),
        Ability::Failures => !falls_short("plain_failures"),
        Ability::Limits => !falls_short("loose_limits"),
        Ability::ExactFiles => !has("rewrites_paths"),
        Ability::OwnProcesses => !has("shares_host"),
    };
    (!can).then(|| format!("the server says that provider `{}` lacks {ability}", provider.name))
}

#[async_trait]
impl Target for ServerTarget {
    fn label(&self) -> String {
        format!("server {}, provider {}", self.client.server(), self.provider.name)
    }

    fn lacks(&self, ability: Ability) -> Option<String> {
        lack_of(&self.provider, ability)
    }

    async fn create(&self, order: &Order) -> Result<SandboxId, TargetError> {
        let request = CreateRequest {
            image: Some(order.image.clone()),
            provider: Some(self.provider.name.clone()),
            memory_mb: order.memory_mib,
            pids_limit: order.pids_limit,
            ttl: Some(SANDBOX_TTL),
            env: (!order.env.is_empty()).then(|| order.env.clone()),
            metadata: Some(BTreeMap::from([(RUN_KEY.to_owned(), self.run.clone())])),
            allow_unenforced: Some(true),
            ..CreateRequest::default()
        };
        match self.client.create(&request).await {
            Ok(sandbox) => Ok(sandbox.id),
            Err(error) => Err(target_error(error, "create", None)),
        }
    }

    async fn session(&self, id: &SandboxId) -> Result<Arc<dyn Session>, TargetError> {
        Ok(Arc::new(ServerSession::new(self.client.sandbox(id.clone()))))
    }

    async fn view(&self, id: &SandboxId) -> Result<SandboxView, TargetError> {
        let sandbox = self.client.sandbox(id.clone()).get().await;
        let sandbox = sandbox.map_err(|error| target_error(error, "show a sandbox", Some(id)))?;
        Ok(SandboxView { id: sandbox.id, state: sandbox.state, limits: sandbox.limits })
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), TargetError> {
        let destroyed = self.client.sandbox(id.clone()).destroy().await;
        destroyed.map(drop).map_err(|error| target_error(error, "destroy", Some(id)))
    }

    async fn list(&self) -> Result<Vec<SandboxId>, TargetError> {
        let query = ListQuery { metadata: Some(format!("{RUN_KEY}={}", self.run)), ..ListQuery::default() };
        let sandboxes = self.client.list_all(&query).await.map_err(|error| target_error(error, "list", None))?;
        // A server that ignores the filter must not make us destroy others' sandboxes.
        let ours = sandboxes.into_iter().filter(|sandbox| sandbox.metadata.get(RUN_KEY) == Some(&self.run));
        Ok(ours.map(|sandbox| sandbox.id).collect())
    }

    async fn room(&self) -> Result<Option<u64>, TargetError> {
        let name = &self.provider.name;
        let request = CreateRequest { provider: Some(name.clone()), ..CreateRequest::default() };
        let decision = self.client.admission(&request).await;
        let decision = decision.map_err(|error| target_error(error, "say how many sandboxes fit", None))?;
        let detail = self.client.provider(name).await;
        let detail = detail.map_err(|error| target_error(error, "show its provider", None))?;
        let bounds = [
            Some(decision.max_sandboxes).filter(|most| *most > 0).map(|most| (most, decision.active_sandboxes)),
            detail
                .config
                .get(MAX_SANDBOXES)
                .and_then(|most| most.parse().ok())
                .map(|most| (most, detail.sandbox_count)),
        ];
        Ok(bounds.into_iter().flatten().map(|(most, there): (u64, u64)| most.saturating_sub(there)).min())
    }

    async fn usage(&self, id: &SandboxId) -> Result<(u64, u64), TargetError> {
        let stats = self.client.sandbox(id.clone()).stats().await;
        let stats = stats.map_err(|error| target_error(error, "read usage", Some(id)))?;
        if !stats.supported {
            return Err(TargetError::Unsupported("reading usage"));
        }
        Ok((stats.mem_bytes.unwrap_or(0), stats.pids.unwrap_or(0)))
    }
}

/// What answers where a server was to be, and does not tell its health as one.
fn stranger(error: ClientError, client: &Client) -> TargetError {
    let server = client.server();
    match (&error, error.code()) {
        // A backend wants its key even here, or has no such route.
        (ClientError::Api(_), Some(ErrorCode::Unauthorized | ErrorCode::Unsupported)) => TargetError::Stranger {
            message: format!("what answers at {server} is a StacyVM backend, not a server"),
            hint: "check it through a server whose providers.custom.base_url is this address: `stacyvm conformance \
                   --url SERVER --provider custom`"
                .to_owned(),
        },
        (ClientError::Api(_) | ClientError::Protocol(_), None | Some(ErrorCode::NotFound)) => TargetError::Stranger {
            message: format!("what answers at {server} is not a StacyVM server"),
            hint: "`stacyvm serve` starts one, and says its address".to_owned(),
        },
        _ => target_error(error, "tell its health", None),
    }
}

fn target_error(error: ClientError, operation: &'static str, id: Option<&SandboxId>) -> TargetError {
    let text = crate::check::chain(&error);
    match (error.code(), id) {
        (Some(ErrorCode::NotFound), Some(id)) => TargetError::NotFound(id.clone()),
        (Some(ErrorCode::ImageNotFound | ErrorCode::RegistryUnavailable), _) => TargetError::Image(text),
        (Some(ErrorCode::BadRequest | ErrorCode::LimitUnsupported | ErrorCode::ResourceLimit), _) => {
            TargetError::Refused(text)
        }
        (Some(ErrorCode::Unsupported), _) => TargetError::Unsupported(operation),
        (Some(ErrorCode::Unavailable), _) => TargetError::Unavailable(text),
        _ => TargetError::Failed { operation, cause: Box::new(error) },
    }
}

/// The session error behind an answer of the API. Some codes of the API stand
/// for several session errors; the most general is taken.
fn session_error(error: ClientError, operation: &'static str) -> SessionError {
    let ClientError::Api(api) = &error else {
        return match error {
            ClientError::InvalidArgument { .. } => SessionError::InvalidArgument(error.to_string()),
            other => SessionError::Unavailable(Some(Box::new(other))),
        };
    };
    let message = api.message.clone();
    match api.code {
        Some(ErrorCode::NotFound) => SessionError::Gone,
        Some(ErrorCode::BadRequest | ErrorCode::RangeNotSatisfiable | ErrorCode::PayloadTooLarge) => {
            SessionError::InvalidArgument(message)
        }
        Some(ErrorCode::FileNotFound) => SessionError::FileNotFound(message),
        Some(ErrorCode::FileConflict) => SessionError::FileConflict(message),
        Some(ErrorCode::FileForbidden) => SessionError::FileForbidden(message),
        Some(ErrorCode::PortClosed) => SessionError::PortClosed(message),
        Some(ErrorCode::Timeout) => SessionError::DeadlineExceeded,
        Some(ErrorCode::SandboxPidsExhausted) => SessionError::PidsExhausted,
        Some(ErrorCode::SandboxOom) => SessionError::MemoryExhausted,
        Some(ErrorCode::SandboxDiskFull) => SessionError::DiskFull,
        Some(ErrorCode::Unsupported) => SessionError::Unsupported(operation),
        Some(ErrorCode::Unavailable) => SessionError::Unavailable(Some(Box::new(error))),
        _ => SessionError::Failed { operation, cause: Box::new(error) },
    }
}

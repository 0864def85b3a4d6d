//! Every way in which a call to the engine fails.
//!
//! `Display` is for the caller: no host paths, no backend output. Causes for
//! the log travel as `source`. The server maps [`EngineError::code`] to an HTTP
//! status in its one table.

use std::time::Duration;

use stacyvm_api::{ErrorCode, EventKind, ExecId, ExecResult, KeyId, OwnerId, SandboxId, SandboxState};
use stacyvm_sandbox::{ProviderError, SessionError};

use crate::store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{0}")]
    InvalidInput(String),
    #[error("sandbox {0} does not exist")]
    SandboxNotFound(SandboxId),
    #[error("sandbox {id} is {}", state_word(*.state))]
    SandboxNotReady { id: SandboxId, state: SandboxState, reason: Option<String> },
    #[error("command {exec_id} is not known in sandbox {id}")]
    ExecNotFound { id: SandboxId, exec_id: ExecId },
    #[error("provider `{0}` does not exist")]
    ProviderNotFound(String),
    #[error("template `{0}` does not exist")]
    TemplateNotFound(String),
    #[error("template `{0}` exists already")]
    TemplateExists(String),
    /// Secrets of templates cannot be filled in yet: refused instead of
    /// starting a sandbox that silently lacks them.
    #[error("template `{template}` needs secrets that this server has no source for: {}", .names.join(", "))]
    SecretsUnresolved { template: String, names: Vec<String> },
    #[error("quota of owner `{0}` does not exist")]
    QuotaNotFound(String),
    #[error("the key {0} does not exist, or is revoked")]
    KeyNotFound(KeyId),
    #[error("a key named `{0}` exists already")]
    KeyExists(String),
    #[error("`{0}` is the last key with the scope admin:*; without it nobody could make or revoke keys")]
    LastAdminKey(String),
    /// The body names somebody else than the key is bound to.
    #[error("this key acts for {0} only")]
    OwnerBound(OwnerId),
    #[error("setup command {index} of template `{template}` {outcome}")]
    SetupFailed { template: String, index: usize, outcome: String },
    #[error("{0}")]
    Limit(LimitExceeded),
    /// The command was killed; `partial` is what it had written.
    #[error("the command was killed at its deadline of {}", stacyvm_api::Duration::from(*.timeout))]
    ExecTimeout { timeout: Duration, partial: Box<ExecResult> },
    #[error("the idempotency key was used before for another request")]
    IdempotencyConflict,
    /// The caller's place in the event log is no longer kept.
    #[error("`{0}` is not an event id; it looks like evt-123")]
    BadEventId(String),
    #[error("the {operation} took longer than {} and was given up", stacyvm_api::Duration::from(*.after))]
    ProviderTimeout { operation: &'static str, after: Duration },
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("{}", store_failure(.0))]
    Store(#[from] StoreError),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// A bound that the request does not fit under.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LimitExceeded {
    #[error("resource limit exceeded: ttl {} is above the maximum of {}", text(*.asked), text(*.max))]
    Ttl { asked: Duration, max: Duration },
    #[error("resource limit exceeded: {max} sandboxes exist, which is the maximum")]
    Sandboxes { max: u64 },
    #[error("resource limit exceeded: owner has {max} sandboxes, which is the maximum")]
    OwnerSandboxes { max: u64 },
    #[error("resource limit exceeded: {waiting} creates wait already")]
    QueueFull { waiting: usize },
    #[error("resource limit exceeded: no sandbox became free within {}", text(*.waited))]
    QueueTimeout { waited: Duration },
    #[error("resource limit exceeded: timeout {} is above the maximum of {}", text(*.asked), text(*.max))]
    ExecTimeout { asked: Duration, max: Duration },
    #[error("resource limit exceeded: {what} {asked} is above the maximum of {max}")]
    Resource { what: &'static str, asked: f64, max: f64 },
    #[error("resource limit exceeded: {max} commands run in this sandbox, which is the maximum")]
    Execs { max: usize },
    #[error("resource limit exceeded: there are {max} keys, which is the maximum; revoke some first")]
    Keys { max: usize },
}

impl LimitExceeded {
    /// Published word for admission decisions (http-api 5.6).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Ttl { .. } => "max_ttl",
            Self::Sandboxes { .. } => "max_sandboxes",
            Self::OwnerSandboxes { .. } => "max_sandboxes_per_owner",
            Self::QueueFull { .. } => "spawn_queue_full",
            Self::QueueTimeout { .. } => "spawn_queue_timeout",
            Self::ExecTimeout { .. } => "max_exec_timeout",
            Self::Resource { what, .. } => what,
            Self::Execs { .. } => "max_execs",
            Self::Keys { .. } => "max_keys",
        }
    }
}

impl EngineError {
    /// The published code; the server pairs it with a status.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidInput(_) | Self::SecretsUnresolved { .. } | Self::SetupFailed { .. } | Self::BadEventId(_) => {
                ErrorCode::BadRequest
            }
            Self::SandboxNotFound(_)
            | Self::ExecNotFound { .. }
            | Self::ProviderNotFound(_)
            | Self::TemplateNotFound(_)
            | Self::QuotaNotFound(_)
            | Self::KeyNotFound(_) => ErrorCode::NotFound,
            Self::SandboxNotReady { .. }
            | Self::TemplateExists(_)
            | Self::KeyExists(_)
            | Self::LastAdminKey(_)
            | Self::IdempotencyConflict => ErrorCode::Conflict,
            Self::OwnerBound(_) => ErrorCode::Forbidden,
            Self::Limit(_) => ErrorCode::ResourceLimit,
            Self::ExecTimeout { .. } => ErrorCode::Timeout,
            Self::ProviderTimeout { .. } | Self::Store(_) | Self::ShuttingDown => ErrorCode::Unavailable,
            Self::Provider(error) => provider_code(error),
            Self::Session(error) => session_code(error),
            Self::Internal(_) => ErrorCode::InternalError,
        }
    }

    /// What the caller can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Provider(
                ProviderError::LimitUnsupported { hint, .. }
                | ProviderError::RegistryUnavailable { hint, .. }
                | ProviderError::BadAnswer { hint, .. },
            ) => Some(hint.clone()),
            Self::Provider(ProviderError::Image { hint, .. } | ProviderError::Unavailable { hint, .. }) => hint.clone(),
            Self::SandboxNotReady { id, state: SandboxState::Paused, reason: None } => {
                Some(format!("resume it where it was paused, as with `docker unpause {id}`"))
            }
            Self::SandboxNotReady { reason, .. } => reason.clone(),
            Self::SecretsUnresolved { .. } => {
                Some("remove `secrets` from the template and pass the values in `env` instead".to_owned())
            }
            Self::Session(error) => session_hint(error).map(str::to_owned),
            Self::ProviderNotFound(_) => Some(
                "`stacyvm providers` lists those of this server; others have to be enabled in its configuration, \
                 such as `providers.docker.enabled: true`"
                    .to_owned(),
            ),
            Self::KeyExists(_) => Some("revoke it first, or choose another name".to_owned()),
            Self::Store(error) if error.is_disk_full() => {
                Some("its operator has to free some space; sandboxes can be used and destroyed meanwhile".to_owned())
            }
            Self::Store(error) => error.is_damaged().then(|| {
                "its operator can look with `stacyvm db check`, stop the server, and put a backup in its place: \
                 `stacyvm db restore BACKUP --yes`"
                    .to_owned()
            }),
            Self::LastAdminKey(_) => {
                Some("make another one first, or insist with `force=true` (`stacyvm key revoke --force`)".to_owned())
            }
            Self::OwnerBound(_) => {
                Some("leave `owner_id` (`--owner`, STACYVM_OWNER) out, or use a key without an owner".to_owned())
            }
            Self::InvalidInput(_)
            | Self::SandboxNotFound(_)
            | Self::ExecNotFound { .. }
            | Self::KeyNotFound(_)
            | Self::TemplateNotFound(_)
            | Self::TemplateExists(_)
            | Self::QuotaNotFound(_)
            | Self::SetupFailed { .. }
            | Self::Limit(_)
            | Self::ExecTimeout { .. }
            | Self::IdempotencyConflict
            | Self::BadEventId(_)
            | Self::ProviderTimeout { .. }
            | Self::ShuttingDown
            | Self::Internal(_)
            | Self::Provider(
                ProviderError::NotFound(_)
                | ProviderError::Unsupported { .. }
                | ProviderError::InvalidSpec { .. }
                | ProviderError::Exhausted { .. }
                | ProviderError::Failed { .. },
            ) => None,
        }
    }
}

impl EngineError {
    /// The event that tells of a failed operation; none for what is only a
    /// mistake in the request.
    pub(crate) fn event_kind(&self) -> Option<EventKind> {
        match self {
            Self::Limit(_) => Some(EventKind::ResourceLimit),
            Self::Provider(ProviderError::Unavailable { .. })
            | Self::ProviderTimeout { .. }
            | Self::ProviderNotFound(_) => Some(EventKind::ProviderFailed),
            Self::Provider(
                ProviderError::NotFound(_)
                | ProviderError::Unsupported { .. }
                | ProviderError::InvalidSpec { .. }
                | ProviderError::LimitUnsupported { .. }
                | ProviderError::Image { .. }
                | ProviderError::RegistryUnavailable { .. }
                | ProviderError::Exhausted { .. }
                | ProviderError::BadAnswer { .. }
                | ProviderError::Failed { .. },
            )
            | Self::SetupFailed { .. }
            | Self::ExecTimeout { .. }
            | Self::Session(_)
            | Self::Store(_)
            | Self::Internal(_) => Some(EventKind::OperationFailed),
            Self::InvalidInput(_)
            | Self::SandboxNotFound(_)
            | Self::SandboxNotReady { .. }
            | Self::ExecNotFound { .. }
            | Self::TemplateNotFound(_)
            | Self::TemplateExists(_)
            | Self::SecretsUnresolved { .. }
            | Self::QuotaNotFound(_)
            | Self::KeyNotFound(_)
            | Self::KeyExists(_)
            | Self::LastAdminKey(_)
            | Self::OwnerBound(_)
            | Self::IdempotencyConflict
            | Self::BadEventId(_)
            | Self::ShuttingDown => None,
        }
    }
}

fn store_failure(error: &StoreError) -> &'static str {
    if error.is_disk_full() {
        "the disk that holds the server's data directory is full"
    } else {
        "the server's database failed"
    }
}

fn provider_code(error: &ProviderError) -> ErrorCode {
    match error {
        ProviderError::NotFound(_) => ErrorCode::NotFound,
        ProviderError::Unsupported { .. } => ErrorCode::Unsupported,
        ProviderError::InvalidSpec { .. } => ErrorCode::BadRequest,
        ProviderError::LimitUnsupported { .. } => ErrorCode::LimitUnsupported,
        ProviderError::Image { .. } => ErrorCode::ImageNotFound,
        ProviderError::RegistryUnavailable { .. } => ErrorCode::RegistryUnavailable,
        ProviderError::Exhausted { .. } => ErrorCode::ResourceLimit,
        ProviderError::Unavailable { .. } => ErrorCode::Unavailable,
        ProviderError::BadAnswer { .. } => ErrorCode::BadGateway,
        ProviderError::Failed { .. } => ErrorCode::InternalError,
    }
}

fn session_code(error: &SessionError) -> ErrorCode {
    match error {
        SessionError::Gone | SessionError::ProcessNotFound(_) => ErrorCode::NotFound,
        SessionError::PortClosed(_) => ErrorCode::PortClosed,
        SessionError::InvalidArgument(_) | SessionError::CommandNotFound(_) | SessionError::UserNotFound(_) => {
            ErrorCode::BadRequest
        }
        SessionError::FileNotFound(_) => ErrorCode::FileNotFound,
        SessionError::FileConflict(_) => ErrorCode::FileConflict,
        SessionError::FileForbidden(_) => ErrorCode::FileForbidden,
        SessionError::DeadlineExceeded => ErrorCode::Timeout,
        SessionError::PidsExhausted => ErrorCode::SandboxPidsExhausted,
        SessionError::MemoryExhausted => ErrorCode::SandboxOom,
        SessionError::DiskFull => ErrorCode::SandboxDiskFull,
        SessionError::Limited(_) => ErrorCode::ResourceLimit,
        SessionError::Unsupported(_) => ErrorCode::Unsupported,
        SessionError::Unavailable(_) => ErrorCode::Unavailable,
        SessionError::BadAnswer { .. } => ErrorCode::BadGateway,
        SessionError::Failed { .. } => ErrorCode::InternalError,
    }
}

/// What to do about a limit of the sandbox that is used up, or about its runtime.
fn session_hint(error: &SessionError) -> Option<&'static str> {
    match error {
        SessionError::PidsExhausted => Some("signal a command that runs, or make a sandbox with a larger pids_limit"),
        SessionError::MemoryExhausted => Some("end a command that runs, or make a sandbox with a larger memory_mb"),
        SessionError::DiskFull => Some("remove files, or make a sandbox with a larger disk_size_mb"),
        SessionError::Unavailable(_) => Some(
            "`stacyvm providers` says whether its runtime is there, and `stacyvm ps ID` whether a command that had \
             begun goes on",
        ),
        SessionError::BadAnswer { .. } | SessionError::Failed { .. } => {
            Some("`stacyvm providers` says whether its runtime works; the server's log has the cause")
        }
        SessionError::Gone
        | SessionError::InvalidArgument(_)
        | SessionError::FileNotFound(_)
        | SessionError::FileConflict(_)
        | SessionError::FileForbidden(_)
        | SessionError::ProcessNotFound(_)
        | SessionError::CommandNotFound(_)
        | SessionError::UserNotFound(_)
        | SessionError::DeadlineExceeded
        | SessionError::Limited(_)
        | SessionError::Unsupported(_)
        | SessionError::PortClosed(_) => None,
    }
}

fn state_word(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Creating => "still being created",
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
        SandboxState::Unhealthy => "not answering",
        SandboxState::Destroying => "being destroyed",
        SandboxState::Destroyed => "destroyed",
        SandboxState::Error => "broken",
    }
}

fn text(span: Duration) -> stacyvm_api::Duration {
    span.into()
}

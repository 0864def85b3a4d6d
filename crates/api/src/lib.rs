//! The public vocabulary of StacyVM: ids, states, error codes, and the request
//! and response bodies of the REST API.
//!
//! Data only. No I/O and no HTTP framework, so that the server, the CLI and the
//! Rust client share one definition. Field names are a contract with published
//! SDKs; a field that an SDK must not see is absent, never `null`.

mod audit;
pub mod backend;
mod duration;
mod error;
mod event;
mod exec;
mod file;
mod id;
mod key;
mod port;
mod provider;
mod quota;
mod sandbox;
mod system;
mod template;
mod timestamp;

pub use audit::{AuditQuery, AuditRecord};
pub use duration::{Duration, ParseDurationError};
pub use error::{ErrorBody, ErrorCode};
pub use event::{Event, EventKind};
pub use exec::{
    ExecMode, ExecRequest, ExecResult, ProcessStatus, ProcessSummary, ResizeRequest, SignalRequest, StdinRequest,
    StreamChunk, TerminalClientMessage, TerminalServerMessage,
};
pub use file::{
    ChmodRequest, ContentEncoding, FileInfo, FileKind, MakeDirRequest, MoveRequest, WatchEvent, WatchEventKind,
    WriteRequest,
};
pub use id::{ExecId, KeyId, OwnerId, ParseIdError, SandboxId};
pub use key::{ApiKey, ApiKeyQuery, ApiKeyRequest, CreatedApiKey, KeyRevokeQuery, KeyScope, ParseKeyScopeError};
pub use port::{Port, PortAccess, PortLink, PortLinkRequest, PortRequest};
pub use provider::{Finding, FindingLevel, ProviderDetail, ProviderHealth};
pub use quota::{OwnerQuota, OwnerQuotaRequest, OwnerUsage, QuotaSummary};
pub use sandbox::{
    AdmissionDecision, CreateRequest, Disk, ExtendRequest, Limit, LimitReport, ListQuery, NetworkMode, NetworkRequest,
    PruneResult, Sandbox, SandboxState, SandboxStats, StatusBody,
};
pub use system::{Health, HostStats, PoolStatus, Readiness, Version};
pub use template::{Template, TemplateSecret, TemplateSpawnRequest};
pub use timestamp::Timestamp;

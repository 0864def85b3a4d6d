//! Events as `GET /events` sends them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{SandboxId, Timestamp};

/// Kinds that this server sends. The list only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum EventKind {
    #[serde(rename = "sandbox.created")]
    SandboxCreated,
    #[serde(rename = "sandbox.running")]
    SandboxRunning,
    #[serde(rename = "sandbox.destroyed")]
    SandboxDestroyed,
    #[serde(rename = "sandbox.error")]
    SandboxError,
    #[serde(rename = "sandbox.extended")]
    SandboxExtended,
    #[serde(rename = "exec.started")]
    ExecStarted,
    #[serde(rename = "exec.completed")]
    ExecCompleted,
    #[serde(rename = "exec.failed")]
    ExecFailed,
    #[serde(rename = "exec.timeout")]
    ExecTimeout,
    #[serde(rename = "file.written")]
    FileWritten,
    #[serde(rename = "file.read")]
    FileRead,
    #[serde(rename = "operation.failed")]
    OperationFailed,
    #[serde(rename = "resource.limit")]
    ResourceLimit,
    #[serde(rename = "provider.failed")]
    ProviderFailed,
    #[serde(rename = "reconcile.action")]
    ReconcileAction,
    #[serde(rename = "image.progress")]
    ImageProgress,
    #[serde(rename = "spawn.queued")]
    SpawnQueued,
    #[serde(rename = "spawn.dequeued")]
    SpawnDequeued,
    #[serde(rename = "spawn.queue_timeout")]
    SpawnQueueTimeout,
    #[serde(rename = "quota.saved")]
    QuotaSaved,
    #[serde(rename = "quota.deleted")]
    QuotaDeleted,
}

/// Something that happened. Ids count up and never repeat within a data
/// directory, so that a client can go on after the last one it saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// `evt-` and a decimal counter.
    pub id: String,
    #[serde(rename = "type")]
    pub kind: EventKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<SandboxId>,
    pub timestamp: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub data: Option<serde_json::Map<String, serde_json::Value>>,
}

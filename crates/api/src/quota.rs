//! Per-owner limits.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Duration, OwnerId, Timestamp};

/// Limits of one owner. Zero inherits the server's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerQuota {
    pub owner_id: OwnerId,
    pub max_sandboxes: u64,
    pub max_ttl: Duration,
    pub max_exec_timeout: Duration,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// `PUT /quotas/{owner}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct OwnerQuotaRequest {
    pub max_sandboxes: u64,
    /// `""`, `0` and `0s` inherit.
    pub max_ttl: String,
    pub max_exec_timeout: String,
}

/// `GET /quotas/{owner}/usage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerUsage {
    pub owner_id: OwnerId,
    pub active_sandboxes: u64,
    pub max_sandboxes: u64,
    pub max_ttl: Duration,
    pub max_exec_timeout: Duration,
    pub quota_configured: bool,
}

/// `GET /quotas/summary`. A closed object: the published Python SDK refuses any
/// key beyond these four.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaSummary {
    pub total: u64,
    pub with_max_sandboxes: u64,
    pub with_max_ttl: u64,
    pub with_max_exec_timeout: u64,
}

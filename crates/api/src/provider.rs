//! Runtimes as the API shows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingLevel {
    Ok,
    /// Works, with less than it could have.
    Warning,
    /// Sandboxes cannot be made.
    Failure,
}

/// One thing that was looked at on the host, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// Stable name, such as `oci.user_namespace`.
    pub name: String,
    pub level: FindingLevel,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// An entry of `GET /providers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProviderHealth {
    pub name: String,
    pub healthy: bool,
    pub default: bool,
    pub latency_ms: u64,
    pub last_checked: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub capabilities: Vec<String>,
    /// What it does less well than others, such as `text_only` or `one_user`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shortfalls: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_count: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

/// `GET /providers/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProviderDetail {
    pub name: String,
    pub healthy: bool,
    pub default: bool,
    pub sandbox_count: u64,
    /// What it can do, as in `health`.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// What it does less well than others, as in `health`.
    #[serde(default)]
    pub shortfalls: Vec<String>,
    pub health: ProviderHealth,
    pub config: BTreeMap<String, String>,
}

//! Templates: named create requests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Disk, Duration, NetworkRequest, Timestamp};

/// A stored create request. Two vocabularies are in use and both are read and
/// written: `vcpus`/`ttl` (SDKs) and `cpu_cores`/`ttl_seconds` (the server).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Template {
    pub name: String,
    /// Counts up with every update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    pub image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Commands run in order, by `sh -c`, before the sandbox counts as running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup: Option<Vec<String>>,
    /// Destinations beyond the default network policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_hosts: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRequest>,
    /// Shorthand for `network.mode`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_mode: Option<String>,
    /// User (name or uid) that commands run as; the image's own by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// As of a create: 16 at least; 0 means the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// As of a create: 16 to 4194304; 0 means the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_limit: Option<u64>,
    /// Accept sandboxes on which some requested limits cannot be enforced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_unenforced: Option<bool>,
    /// As of a create: 0.01 at least; 0 means the default.
    #[serde(serialize_with = "crate::sandbox::maybe_whole_number", skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<f64>,
    #[serde(serialize_with = "crate::sandbox::maybe_whole_number", skip_serializing_if = "Option::is_none")]
    pub cpu_cores: Option<f64>,
    #[serde(deserialize_with = "crate::duration::blank_is_none", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Vec<TemplateSecret>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
}

/// Where a secret of the server goes inside the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TemplateSecret {
    pub name: String,
    pub inject_at: String,
}

/// `POST /templates/{name}/spawn`. The body may be empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TemplateSpawnRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(deserialize_with = "crate::duration::blank_is_none", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

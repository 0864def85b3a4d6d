//! Sandboxes: what is asked for, what is recorded, and the states between.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Duration, OwnerId, SandboxId, Timestamp};

/// Where a sandbox is in its life. The transitions are the engine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    Creating,
    Running,
    Paused,
    /// Its runtime does not answer; it may come back.
    Unhealthy,
    Destroying,
    /// Gone, and everything it used is freed.
    Destroyed,
    /// It could not be created, or it died by itself.
    Error,
}

/// `POST /sandboxes`. Everything is optional.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CreateRequest {
    /// Image reference, or `host` for the host's own `/usr`, read-only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// 16 at least; 0 means the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// Processors, at most. Fractions such as `0.5` are allowed, down to 0.01;
    /// 0 means the default.
    #[serde(serialize_with = "maybe_whole_number", skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Processes and threads, at most: 16 to 4194304; 0 means the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_limit: Option<u64>,
    #[serde(deserialize_with = "crate::duration::blank_is_none", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every command in the sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// User (name or uid) that commands run as; the image's own by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRequest>,
    /// Shorthand for `network.mode`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_mode: Option<String>,
    /// Accept a sandbox on which some requested limits cannot be enforced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_unenforced: Option<bool>,
}

/// Where a sandbox's writable files are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Disk {
    /// The best quota that the host offers.
    Auto,
    /// A memory file system, charged to the memory limit.
    Memory,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkRequest {
    pub mode: NetworkMode,
    /// Destinations (address or CIDR) allowed although they lie in a range that
    /// is denied by default: private, link-local and metadata addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Loopback only. The API's file, exec and preview calls still work.
    None,
    /// The internet through the host, but neither the host nor other sandboxes.
    Bridge,
    /// A network of the runtime, by its own name (container daemons).
    #[serde(untagged)]
    Named(String),
}

impl NetworkMode {
    pub fn parse(text: &str) -> Self {
        match text {
            "none" => Self::None,
            "bridge" => Self::Bridge,
            other => Self::Named(other.to_owned()),
        }
    }

    pub fn as_str(&self) -> &str {
        match self {
            Self::None => "none",
            Self::Bridge => "bridge",
            Self::Named(name) => name,
        }
    }
}

/// A sandbox as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    pub id: SandboxId,
    pub state: SandboxState,
    pub provider: String,
    /// As requested, not as resolved.
    pub image: String,
    pub memory_mb: u64,
    #[serde(serialize_with = "whole_numbers_without_point")]
    pub vcpus: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<OwnerId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// Always `local` on a single node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<String>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Ports are at `http://<port>-<id>.<preview_domain>`, which published SDKs
    /// write: with the port of the server where it is not 80.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview_domain: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRequest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitReport>,
    /// Why the state is `error` or `unhealthy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Which limits the kernel really holds for a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LimitReport {
    pub enforced: Vec<Limit>,
    pub unenforced: Vec<Limit>,
    /// How the disk is bounded: `project_quota`, `loop`, `memory`, `watched` or
    /// `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_backend: Option<String>,
    /// In force, where the runtime has a bound of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// In force, where the runtime has a bound of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Memory,
    Swap,
    Cpu,
    Pids,
    Disk,
}

/// `GET /sandboxes`: filters and pages. Without any, the answer is everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<SandboxState>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<String>,
    /// `key=value`; the sandbox's metadata must hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<String>,
    /// At most this many, 1 to 1000. The next page's cursor is in the response
    /// header `X-Next-Cursor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// `POST /sandboxes/{id}/extend`: the sandbox then lives `ttl` from now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExtendRequest {
    pub ttl: Duration,
}

/// `DELETE /sandboxes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PruneResult {
    pub pruned: u64,
}

/// Acknowledgement such as `{"status":"destroyed"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusBody {
    pub status: String,
}

impl StatusBody {
    pub fn new(status: &str) -> Self {
        Self { status: status.to_owned() }
    }
}

/// `POST /sandboxes/admission`. A closed object: the published Python SDK
/// refuses any key beyond these eight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AdmissionDecision {
    pub allowed: bool,
    pub queueable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub active_sandboxes: u64,
    pub max_sandboxes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_owner_sandboxes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_owner_sandboxes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ttl: Option<Duration>,
}

/// `GET /sandboxes/{id}/stats`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxStats {
    pub supported: bool,
    /// Percent of one processor since the last reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_pct: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_limit_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids_limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limit_bytes: Option<u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
/// Published SDKs declare `vcpus` as an integer: `1`, not `1.0`.
pub(crate) fn whole_numbers_without_point<S: serde::Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && (0.0..1e9).contains(value) {
        to.serialize_u64(*value as u64)
    } else {
        to.serialize_f64(*value)
    }
}

#[expect(clippy::ref_option, reason = "the signature is serde's")]
pub(crate) fn maybe_whole_number<S: serde::Serializer>(value: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => whole_numbers_without_point(value, to),
        None => to.serialize_none(),
    }
}

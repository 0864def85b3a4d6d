//! What a provider is asked to make. Everything is resolved: defaults are
//! applied and limits checked before a spec exists.

use std::collections::{BTreeMap, BTreeSet};

use stacyvm_api::{Limit, NetworkMode, Timestamp};

/// One sandbox, as the engine orders it.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxSpec {
    /// Image reference as the user wrote it, or `host`.
    pub image: String,
    pub memory_mib: u64,
    /// Processors at most, possibly a fraction.
    pub vcpus: f64,
    /// Processes and threads at most.
    pub pids_limit: u64,
    pub disk: DiskRequest,
    /// Which of the limits above somebody asked for, in the request or its
    /// template. The others are the server's defaults: held where the host can.
    pub requested: BTreeSet<Limit>,
    pub network: NetworkPolicy,
    /// Added to the image's environment; these win.
    pub env: BTreeMap<String, String>,
    /// Name or uid; the image's own user otherwise.
    pub user: Option<String>,
    pub hostname: String,
    /// Kept with the runtime object where the runtime has a place for it.
    pub metadata: BTreeMap<String, String>,
    /// Make the sandbox although a requested limit cannot be enforced.
    pub allow_unenforced: bool,
    /// When the sandbox ends unless the server extends it. The agent keeps
    /// this too and acts 60 s later on its own.
    pub expires_at: Timestamp,
    /// Counts up with fork and restore, so that an old token stops working.
    pub generation: u32,
    /// What the agent demands from whoever connects; never stored.
    pub agent_token: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRequest {
    /// Bound on the writable layer; `None` takes whatever the runtime gives.
    pub size_mib: Option<u64>,
    /// Keep the writable layer in memory, charged to the memory limit.
    pub in_memory: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    pub mode: NetworkMode,
    /// Addresses and CIDRs allowed although their range is denied by default.
    pub allow: Vec<String>,
}

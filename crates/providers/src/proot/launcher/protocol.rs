//! What the server tells the launcher, and what it answers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::cgroup::CgroupPlan;
use crate::host::process::Identity;

/// Longest message either way.
pub(super) const MAX_MESSAGE_BYTES: u64 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::proot) enum Job {
    Launch(Box<LaunchPlan>),
    /// Whether namespaces can be made: makes them, and nothing in them.
    Probe,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::proot) enum Reply {
    Launched(Identity),
    Probed,
    Failed { step: String, message: String },
}

/// One sandbox to start.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::proot) struct LaunchPlan {
    /// Where to write who PRoot is, before it runs.
    pub(in crate::proot) identity_file: PathBuf,
    /// Takes what PRoot writes.
    pub(in crate::proot) log_file: PathBuf,
    /// Its own processes, mounts, host name: unless the host's are shared.
    pub(in crate::proot) namespaces: Option<NamespacePlan>,
    /// Uid and gid to become, for root.
    pub(in crate::proot) become_id: Option<u32>,
    pub(in crate::proot) cgroup: CgroupPlan,
    /// Processes of this user (in this user namespace) at most.
    pub(in crate::proot) max_processes: Option<u64>,
    pub(in crate::proot) memory_is_watched: bool,
    /// Longest file that may be written.
    pub(in crate::proot) max_file_bytes: Option<u64>,
    pub(in crate::proot) reach: ReachPlan,
    pub(in crate::proot) program: PathBuf,
    pub(in crate::proot) argv: Vec<String>,
    pub(in crate::proot) env: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(in crate::proot) struct NamespacePlan {
    pub(in crate::proot) hostname: String,
    /// A network that is only loopback; otherwise the host's.
    pub(in crate::proot) own_network: bool,
    /// An empty directory over the first, with only the second shown in it: so
    /// that another user gets at his files and at nobody else's.
    pub(in crate::proot) hide: Option<(PathBuf, PathBuf)>,
}

/// What of this host's files a sandbox needs; what is not there is passed over.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(in crate::proot) struct ReachPlan {
    pub(in crate::proot) read: Vec<PathBuf>,
    pub(in crate::proot) write: Vec<PathBuf>,
}

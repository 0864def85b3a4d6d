//! What server and spawner say to each other.
//!
//! One JSON document per SEQPACKET message, descriptors beside it. Both ends
//! are the same binary, so there is no version to negotiate.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::cgroup::{BundleLimits, CgroupPlan};
use crate::host::process::Identity;
use crate::oci::external::Container;
use crate::oci::rootless::Authority;

/// Longest message in bytes: 128 layers with long paths fit many times.
pub(in crate::oci) const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// Most descriptors beside one message.
pub(in crate::oci) const MAX_FDS: usize = 8;

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) struct Request {
    /// Comes back in the reply.
    pub(in crate::oci) id: u64,
    pub(in crate::oci) job: Job,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) enum Job {
    /// Make a user namespace and a network namespace inside it. The reply
    /// carries both, in this order. Nobody waits for a spare one.
    Pair { uid_base: u32, spare: bool },
    /// Make `/dev` and `/sys` for a sandbox of this range, in the network
    /// namespace that comes along. The reply carries both, in this order.
    Mounts { scratch: PathBuf, uid_base: u32 },
    /// Start a sandbox. Descriptors: listener, boot configuration, user
    /// namespace, network namespace; its `/dev` and `/sys` if the plan has
    /// them; for [`DiskPlan::Mounted`] the mount. The reply carries a pidfd of
    /// its init.
    Launch(Box<LaunchPlan>),
    /// Have another program start a sandbox. Descriptors and reply are those of
    /// `Launch`.
    LaunchWith(Box<LaunchPlan>, Box<RuntimePlan>),
    /// Have that program delete what it remembers of a sandbox.
    Forget(Container),
    /// Say on whose rights sandboxes are made.
    Authority,
    /// Remove everything in this directory, whoever owns it.
    EmptyTrash { trash: PathBuf },
}

/// Everything the child of a launch has to know.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) struct LaunchPlan {
    /// Where the spawner notes who the sandbox's init is, before it runs.
    pub(in crate::oci) identity_file: PathBuf,
    /// All the environment that the sandbox's init has.
    pub(in crate::oci) label: String,
    pub(in crate::oci) hostname: String,
    pub(in crate::oci) root: RootPlan,
    /// `/dev` and `/sys` are there already.
    pub(in crate::oci) has_mounts: bool,
    pub(in crate::oci) cgroup: CgroupPlan,
    /// Name or uid that owns `/workspace`; root otherwise.
    pub(in crate::oci) user: Option<String>,
    /// Made if the image lacks it.
    pub(in crate::oci) workdir: Option<String>,
}

/// What another program is told beyond that.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) struct RuntimePlan {
    pub(in crate::oci) container: Container,
    /// The sandbox's group, the same in every hierarchy.
    pub(in crate::oci) cgroups_path: PathBuf,
    pub(in crate::oci) limits: BundleLimits,
}

/// What the sandbox sees as `/`.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) struct RootPlan {
    /// An empty directory of ours to mount things on, in the child only.
    pub(in crate::oci) scratch: PathBuf,
    /// The host's number for the sandbox's root.
    pub(in crate::oci) uid_base: u32,
    /// Read-only directories, bottom first.
    pub(in crate::oci) layers: Vec<PathBuf>,
    pub(in crate::oci) disk: DiskPlan,
    /// The host's programs, for image `host`.
    pub(in crate::oci) host: Option<HostPlan>,
    pub(in crate::oci) hosts: String,
    pub(in crate::oci) resolv_conf: String,
}

/// Where the writable layer lives.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) enum DiskPlan {
    /// In this directory, which exists.
    Directory(PathBuf),
    /// On a mount whose descriptor comes along.
    Mounted,
    /// In memory, charged to the sandbox.
    Memory { size_bytes: Option<u64>, inodes: Option<u64> },
}

/// Read-only pieces of the host inside image `host`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::oci) struct HostPlan {
    /// Shown at the same path.
    pub(in crate::oci) shown: Vec<PathBuf>,
    /// Below the shown ones, replaced by an empty directory.
    pub(in crate::oci) hidden: Vec<PathBuf>,
    /// Below the shown ones, replaced by a writable directory of the sandbox.
    pub(in crate::oci) private: Vec<(PathBuf, PathBuf)>,
    /// Directories of the skeleton, and whose they should be. Empty where they
    /// are already.
    pub(in crate::oci) owned: Vec<(PathBuf, u32)>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) struct Reply {
    pub(in crate::oci) id: u64,
    pub(in crate::oci) result: Result<Done, Failure>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::oci) enum Done {
    /// By the spawner with this process id.
    Paired {
        spawner: u32,
    },
    Mounted,
    Launched(Identity),
    Forgotten,
    Authority(Authority),
    /// How many trees there were.
    TrashEmptied(usize),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::oci) struct Failure {
    pub(in crate::oci) kind: FailureKind,
    /// What was being done, such as `mount the root`.
    pub(in crate::oci) step: String,
    pub(in crate::oci) message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::oci) enum FailureKind {
    /// The kernel refused something.
    System,
    /// The image has no such user.
    UnknownUser,
    /// The image's content does not allow it.
    Image,
    /// The kernel does not let this user have namespaces.
    NamespacesForbidden,
    /// The kernel does not let this user have a `/proc` or `/sys`.
    KernelFilesHidden,
    /// The file system of the image's layers cannot show them with other owners.
    OwnersFixed,
}

impl Failure {
    pub(in crate::oci) fn system(step: &str, error: &dyn std::fmt::Display) -> Self {
        Self { kind: FailureKind::System, step: step.to_owned(), message: error.to_string() }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, self.message)
    }
}

impl std::error::Error for Failure {}

/// Names the step a result belongs to.
pub(in crate::oci) trait Step<T> {
    fn step(self, step: &str) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Step<T> for Result<T, E> {
    fn step(self, step: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::system(step, &error))
    }
}

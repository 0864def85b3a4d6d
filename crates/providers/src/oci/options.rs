//! Settings of this provider, filled in by the program.

use std::net::SocketAddr;
use std::path::PathBuf;

use stacyvm_image::ImageStore;

pub use super::host_image::HostImageOptions;
pub use super::spawner::SpawnerCommand;

/// What the `oci` provider needs to know. It reads no environment itself.
#[derive(Debug, Clone)]
pub struct OciOptions {
    /// The server's data directory; this provider's own is `oci` in it.
    pub data_dir: PathBuf,
    /// Where servers on this host agree on numbers (uids, network slots). The
    /// same for all of them, and emptied at boot.
    pub run_dir: PathBuf,
    pub spawner: SpawnerCommand,
    /// What starts sandboxes.
    pub runtime: OciRuntime,
    /// Name of our directory in the host's control group hierarchies.
    pub cgroup_parent: String,
    pub host_image: HostImageOptions,
    /// Where images come from; without it there is only `host`.
    pub images: Option<ImageStore>,
    /// How many sandboxes without a network are prepared ahead.
    pub prepared: usize,
    pub disk: DiskOptions,
    /// The network `bridge`; without it there is only `none`.
    pub bridge: Option<BridgeOptions>,
}

impl OciOptions {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            run_dir: "/run/stacyvm".into(),
            spawner: SpawnerCommand::default(),
            runtime: OciRuntime::default(),
            cgroup_parent: "stacyvm".into(),
            host_image: HostImageOptions::default(),
            images: None,
            prepared: 4,
            disk: DiskOptions::default(),
            bridge: Some(BridgeOptions::default()),
        }
    }
}

/// What starts sandboxes. Those that run keep the one that started them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum OciRuntime {
    /// This program.
    #[default]
    Builtin,
    /// A program that follows the OCI runtime specification, such as `crun`.
    Program {
        /// Its name, or an absolute path.
        name: String,
        /// Where names are looked up: directories as in `PATH`.
        search: String,
    },
}

/// Disks with a size, where the data directory's file system has no project
/// quota.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// Whether they may be loop file systems. Needs root, `/dev/loop-control`
    /// and e2fsprogs.
    pub loop_images: bool,
    /// How many of those are prepared ahead.
    pub prepared: usize,
    /// The size that most sandboxes have, if they have one. Without it, and
    /// with other sizes, what is asked for decides what is prepared.
    pub expected_mib: Option<u64>,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { loop_images: true, prepared: 4, expected_mib: None }
    }
}

/// The network `bridge`. Needs root, nft, and a subnet of 198.18.0.0/15 that
/// the host does not use; lets the host forward packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeOptions {
    /// How many sandboxes are prepared ahead, so that a creation need not wait
    /// for namespaces, devices and addresses.
    pub prepared: usize,
    /// Whom to ask for names; the host's own name servers if empty.
    pub name_servers: Vec<SocketAddr>,
}

impl Default for BridgeOptions {
    fn default() -> Self {
        Self { prepared: 16, name_servers: Vec::new() }
    }
}

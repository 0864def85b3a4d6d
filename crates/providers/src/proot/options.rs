//! Settings of this provider, filled in by the program.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stacyvm_image::ImageStore;

use super::launcher::LauncherCommand;

/// Where `rootfs` is unless it is set.
pub(super) const DEFAULT_ROOTFS: &str = "/var/lib/stacyvm/rootfs";

/// What the `proot` provider needs to know. It reads no environment itself.
#[derive(Debug, Clone)]
pub struct ProotOptions {
    /// The server's data directory; this provider's own is `proot` in it.
    pub data_dir: PathBuf,
    /// Where sandboxes' files are kept instead of the own directory.
    pub workspace_base: Option<PathBuf>,
    /// Where servers on this host agree on uids. The same for all of them, and
    /// emptied at boot. Only root has uids to give.
    pub run_dir: PathBuf,
    pub launcher: LauncherCommand,
    /// PRoot, by name (looked up in `search_path`) or by path.
    pub program: PathBuf,
    /// Value of `PATH`.
    pub search_path: String,
    /// The directory that is image `rootfs`.
    pub rootfs: PathBuf,
    /// Where other images come from.
    pub images: Option<ImageStore>,
    /// Name of our directory in the host's control group hierarchies.
    pub cgroup_parent: String,
    /// Sandboxes at once; 0 is unlimited.
    pub max_sandboxes: usize,
    /// Largest memory limit, which is also what larger defaults become; 0 is
    /// unlimited.
    pub max_memory_mib: u64,
    /// The same for files.
    pub max_disk_mib: u64,
    /// Interpreters that should be in `rootfs`; reported by health.
    pub languages: Vec<String>,
    /// Whether to give sandboxes namespaces where the kernel lets us.
    pub namespaces: bool,
    /// Whether sandboxes may share the host's network. Only for a server that
    /// demands a key: a command there reaches whatever this host reaches.
    pub shared_network: Permission,
}

/// A yes that may come later: whether a server demands a key is known once it
/// listens. Copies are one and the same.
#[derive(Debug, Clone, Default)]
pub struct Permission(Arc<AtomicBool>);

impl Permission {
    pub fn given() -> Self {
        let permission = Self::default();
        permission.give();
        permission
    }

    pub fn give(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_given(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl ProotOptions {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            workspace_base: None,
            run_dir: "/run/stacyvm".into(),
            launcher: LauncherCommand::default(),
            program: "proot".into(),
            search_path: "/usr/local/bin:/usr/bin:/bin".to_owned(),
            rootfs: DEFAULT_ROOTFS.into(),
            images: None,
            cgroup_parent: "stacyvm".into(),
            max_sandboxes: 0,
            max_memory_mib: 0,
            max_disk_mib: 0,
            languages: Vec::new(),
            namespaces: true,
            shared_network: Permission::default(),
        }
    }
}

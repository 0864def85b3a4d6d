//! What this provider keeps on disk, and how it reads that after a restart.
//!
//! ```text
//! proot/instance                who this server is
//! proot/trash/                  destroyed sandboxes, removed in the background
//! sandboxes/ID/state.json       the record, written before anything runs
//!             /init.json        who PRoot is, written before it runs
//!             /agent            the agent's program
//!             /agent.sock       the host's way in
//!             /root/            the sandbox's private root
//!             /tmp/             PRoot's own
//!             /proot.log        what PRoot complained about
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stacyvm_api::{LimitReport, SandboxId, Timestamp};

use crate::host::on_disk;

/// Counts up when a record is no longer read by earlier versions.
const VERSION: u32 = 1;

/// Everything needed to take a sandbox up again, or to free it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) id: SandboxId,
    pub(super) image: String,
    pub(super) created_at: Timestamp,
    pub(super) metadata: BTreeMap<String, String>,
    /// A record of an earlier run of the kernel describes nobody.
    pub(super) boot_id: String,
    /// Uid and gid of all its processes, where root gave it one of its own.
    pub(super) uid: Option<u32>,
    /// Whether PRoot is the first process of a pid namespace.
    pub(super) namespaces: bool,
    pub(super) groups: Vec<PathBuf>,
    /// Limits in bytes and processes; zero is none.
    pub(super) memory_limit_bytes: u64,
    pub(super) pids_limit: u64,
    pub(super) disk_limit_bytes: u64,
    /// What a watcher has to hold, because the kernel does not.
    pub(super) watched: Watched,
    pub(super) limits: LimitReport,
}

/// Limits that are looked at from time to time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Watched {
    pub(super) memory: bool,
    pub(super) pids: bool,
    pub(super) disk: bool,
}

impl Record {
    pub(super) const VERSION: u32 = VERSION;
}

/// Paths of one server.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
    base: PathBuf,
}

impl Layout {
    pub(super) fn new(data_dir: &Path, workspace_base: Option<&Path>) -> Self {
        let root = data_dir.join("proot");
        let base = workspace_base.map_or_else(|| root.clone(), Path::to_owned);
        Self { root, base }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where sandboxes' directories are, below which everything is ours.
    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    pub(super) fn sandboxes(&self) -> PathBuf {
        self.base.join("sandboxes")
    }

    pub(super) fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// On the same file system as what goes there.
    pub(super) fn trash(&self) -> PathBuf {
        self.base.join("trash")
    }
}

pub(super) fn identity_file(sandbox: &Path) -> PathBuf {
    sandbox.join("init.json")
}

pub(super) fn root_dir(sandbox: &Path) -> PathBuf {
    sandbox.join("root")
}

pub(super) fn temporary_dir(sandbox: &Path) -> PathBuf {
    sandbox.join("tmp")
}

pub(super) fn agent_file(sandbox: &Path) -> PathBuf {
    sandbox.join("agent")
}

pub(super) fn log_file(sandbox: &Path) -> PathBuf {
    sandbox.join("proot.log")
}

/// Writes the record; a reader sees it whole or not at all.
pub(super) fn save(sandbox: &Path, record: &Record) -> io::Result<()> {
    let fresh = sandbox.join("state.new");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    std::fs::rename(fresh, sandbox.join("state.json"))
}

/// What a sandbox's directory says about it.
pub(super) type OnDisk = on_disk::OnDisk<Record>;

pub(super) fn load(sandbox: &Path) -> io::Result<OnDisk> {
    on_disk::load(sandbox, &identity_file(sandbox), |record: &Record| record.version == VERSION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::Identity;

    #[test]
    fn a_sandbox_counts_as_launched_only_with_both_files() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("sb");
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Nothing);
        std::fs::create_dir(&sandbox).unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Remains(None));
        let record = Record {
            version: Record::VERSION,
            id: SandboxId::random(),
            image: "rootfs".into(),
            created_at: Timestamp::now(),
            metadata: BTreeMap::new(),
            boot_id: on_disk::boot_id(),
            uid: Some(7),
            namespaces: true,
            groups: Vec::new(),
            memory_limit_bytes: 1,
            pids_limit: 2,
            disk_limit_bytes: 3,
            watched: Watched { memory: true, ..Watched::default() },
            limits: LimitReport::default(),
        };
        save(&sandbox, &record).unwrap();
        assert!(matches!(load(&sandbox).unwrap(), OnDisk::Remains(Some(_))));
        let identity = Identity { pid: 1, start_time: 2, pid_namespace: 3 };
        std::fs::write(identity_file(&sandbox), serde_json::to_vec(&identity).unwrap()).unwrap();
        let OnDisk::Launched(found, who) = load(&sandbox).unwrap() else { panic!("not launched") };
        assert_eq!((found.uid, found.watched, who), (record.uid, record.watched, identity));
        std::fs::write(sandbox.join("state.json"), "{").unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Remains(None));
    }
}

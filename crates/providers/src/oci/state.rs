//! What is known of a sandbox on disk.
//!
//! ```text
//! <data>/oci/                     0700 root
//!   instance, lock                whose directory this is
//!   scratch/                      empty; a launch mounts on it, in its own namespace
//!   host-image/<digest>/          skeletons of image `host`
//!   sandboxes/<id>/
//!     state.json                  written first: what the sandbox holds
//!     init.json                   written by the spawner: who its init is
//!     agent.sock                  where its agent listens
//!     runtime/                    what another runtime remembers of it
//!     disk/                       its writable layer, where that is a directory
//!   trash/<n>/                    on its way out
//! ```
//!
//! `state.json` without `init.json` is a creation that never finished. Nothing
//! is synced to the device: after a crash of the host no sandbox is left.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stacyvm_api::{LimitReport, SandboxId, Timestamp};

use super::disk::DiskRecord;
use super::external::{Binary, Container};
use super::network::{Connected, Destination};
use crate::host::on_disk;
use crate::host::process::Identity;

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) id: SandboxId,
    /// As requested.
    pub(super) image: String,
    pub(super) created_at: Timestamp,
    pub(super) metadata: BTreeMap<String, String>,
    /// Which run of the kernel it belongs to.
    pub(super) boot_id: String,
    pub(super) uid_base: u32,
    pub(super) network: NetworkRecord,
    pub(super) disk: DiskRecord,
    /// Its control groups.
    #[serde(default)]
    pub(super) groups: Vec<PathBuf>,
    /// Directories the root is made of, which must stay.
    pub(super) layers: Vec<PathBuf>,
    pub(super) memory_limit_bytes: u64,
    pub(super) pids_limit: u64,
    pub(super) limits: LimitReport,
    /// What started it, where that is not this program. It is also what has to
    /// delete it, whatever the server is configured to use by then.
    #[serde(default)]
    pub(super) runtime: Option<Binary>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum NetworkRecord {
    None,
    /// A veth of the router's.
    Bridge {
        port: u32,
        allow: Vec<String>,
    },
}

impl NetworkRecord {
    /// The sandbox's place in the network.
    pub(super) fn connected(&self) -> Option<Connected> {
        let Self::Bridge { port, allow } = self else { return None };
        // Only what was parsed before is ever written.
        let allowed = allow.iter().filter_map(|text| Destination::parse(text).ok()).collect();
        Some(Connected { port: *port, allowed })
    }
}

impl Record {
    pub(super) const fn version() -> u32 {
        VERSION
    }

    /// How its runtime knows it, if that is not this program.
    pub(super) fn container(&self, sandbox: &Path) -> Option<Container> {
        let runtime = self.runtime.as_ref()?;
        Some(Container {
            program: runtime.program.clone(),
            name: runtime.name.clone(),
            state_dir: runtime_dir(sandbox),
            id: self.id.to_string(),
        })
    }
}

/// Values for a new record; `Record` itself is only made here.
pub(super) struct NewRecord {
    pub(super) id: SandboxId,
    pub(super) image: String,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) uid_base: u32,
    pub(super) network: NetworkRecord,
    pub(super) disk: DiskRecord,
    pub(super) groups: Vec<PathBuf>,
    pub(super) layers: Vec<PathBuf>,
    pub(super) memory_limit_bytes: u64,
    pub(super) pids_limit: u64,
    pub(super) limits: LimitReport,
    pub(super) runtime: Option<Binary>,
}

impl From<NewRecord> for Record {
    fn from(new: NewRecord) -> Self {
        Self {
            version: VERSION,
            id: new.id,
            image: new.image,
            created_at: Timestamp::now(),
            metadata: new.metadata,
            boot_id: on_disk::boot_id(),
            uid_base: new.uid_base,
            network: new.network,
            disk: new.disk,
            groups: new.groups,
            layers: new.layers,
            memory_limit_bytes: new.memory_limit_bytes,
            pids_limit: new.pids_limit,
            limits: new.limits,
            runtime: new.runtime,
        }
    }
}

/// Paths below one data directory.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    pub(super) fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    pub(super) fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    pub(super) fn host_images(&self) -> PathBuf {
        self.root.join("host-image")
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }
}

pub(super) fn identity_file(sandbox: &Path) -> PathBuf {
    sandbox.join("init.json")
}

/// Where another runtime keeps what it remembers of a sandbox.
pub(super) fn runtime_dir(sandbox: &Path) -> PathBuf {
    sandbox.join("runtime")
}

pub(super) fn disk_dir(sandbox: &Path) -> PathBuf {
    sandbox.join("disk")
}

/// Writes the record; a reader sees it whole or not at all.
pub(super) fn save(sandbox: &Path, record: &Record) -> io::Result<()> {
    let fresh = sandbox.join("state.new");
    std::fs::write(&fresh, serde_json::to_vec(record)?)?;
    std::fs::rename(fresh, sandbox.join("state.json"))
}

/// Notes who a sandbox's init is; whole or not at all.
pub(super) fn note(identity_file: &Path, identity: &Identity) -> io::Result<()> {
    let fresh = identity_file.with_extension("new");
    std::fs::write(&fresh, serde_json::to_vec(identity)?)?;
    std::fs::rename(&fresh, identity_file)
}

/// What a sandbox's directory says about it.
pub(super) type OnDisk = on_disk::OnDisk<Record>;

pub(super) fn load(sandbox: &Path) -> io::Result<OnDisk> {
    on_disk::load(sandbox, &identity_file(sandbox), |record: &Record| record.version == Record::version())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        NewRecord {
            id: SandboxId::random(),
            image: "host".into(),
            metadata: BTreeMap::from([("team".into(), "a".into())]),
            uid_base: 0x7000_0000,
            network: NetworkRecord::Bridge { port: 3, allow: vec!["10.0.0.1".into()] },
            disk: DiskRecord::Directory,
            groups: vec!["/sys/fs/cgroup/sb".into()],
            layers: vec!["/layer".into()],
            memory_limit_bytes: 1 << 20,
            pids_limit: 10,
            limits: LimitReport::default(),
            runtime: None,
        }
        .into()
    }

    #[test]
    fn a_sandbox_counts_as_launched_only_with_both_files() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("sb");
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Nothing);
        std::fs::create_dir(&sandbox).unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Remains(None));
        let record = record();
        save(&sandbox, &record).unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Remains(Some(Box::new(record.clone()))));
        let identity = Identity { pid: 1, start_time: 2, pid_namespace: 3 };
        std::fs::write(identity_file(&sandbox), serde_json::to_vec(&identity).unwrap()).unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Launched(Box::new(record), identity));
        std::fs::write(sandbox.join("state.json"), "{").unwrap();
        assert_eq!(load(&sandbox).unwrap(), OnDisk::Remains(None));
    }
}

//! Where a sandbox's own files are, and what bounds them.
//!
//! ```text
//! project_quota   a directory that the file system bounds        where the host has it
//! loop_image      a file system in a sparse file, pooled         for a size that is asked for
//! memory          a tmpfs within the memory limit                `disk: memory`, or the last resort
//! (directory)     a directory that nothing bounds                when no size is asked for
//! ```
//!
//! What a host offers is looked up once. A disk is taken before its sandbox's
//! record is written, and the record says all that is needed to free it.

mod loop_image;
mod loop_pool;
mod memory;
mod project_quota;
mod sys;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use stacyvm_sandbox::{DiskRequest, HealthReport, ProviderError};

use super::error::OciError;
use super::options::DiskOptions;
use super::registry::Live;
use super::spawner::protocol::DiskPlan;
use super::state::{self, Layout};
use crate::host::process;
use loop_image::LoopName;
use loop_pool::LoopPool;
use project_quota::ProjectQuota;

/// Room for files grows with the size: one for so many bytes. It is the same
/// for every backend, so that a program meets the same bounds everywhere.
const BYTES_PER_INODE: u64 = 8192;
const MIN_INODES: u64 = 1024;

/// Largest size that may be asked for; making a file system of this size takes
/// a second.
const MAX_SIZE_MIB: u64 = 4 << 20;

/// Bound where a quota costs nothing and no size was asked for.
const DEFAULT_QUOTA_BYTES: u64 = 10 << 30;

/// What a host and a data directory offer.
pub(super) struct Disks {
    /// Or why not; the same below.
    project_quota: Result<ProjectQuota, String>,
    loop_images: Result<LoopPool, String>,
}

/// What a sandbox will get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskChoice {
    Directory,
    ProjectQuota { size_bytes: u64 },
    Loop { size_bytes: u64 },
    Memory { size_bytes: Option<u64> },
}

/// What a sandbox has, as its record says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "backend", rename_all = "snake_case")]
pub(super) enum DiskRecord {
    Directory,
    ProjectQuota {
        project: u32,
        size_bytes: u64,
    },
    Loop {
        #[serde(flatten)]
        name: LoopName,
    },
    Memory {
        size_bytes: Option<u64>,
    },
}

/// What a disk holds; a limit of zero is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DiskUsage {
    /// `None` where nobody counts.
    pub(super) bytes: Option<u64>,
    pub(super) limit_bytes: u64,
}

impl Disks {
    pub(super) fn open(layout: &Layout, options: &DiskOptions) -> Self {
        let root = layout.root();
        let project_quota = ProjectQuota::open(root);
        let expected_mib = options.expected_mib.filter(|mib| project_quota.is_err() && *mib <= MAX_SIZE_MIB);
        let loop_images = if options.loop_images {
            LoopPool::open(root.to_owned(), options.prepared, expected_mib.map(|mib| mib << 20))
        } else {
            Err("they are switched off".to_owned())
        };
        Self { project_quota, loop_images }
    }

    /// The best that can be had. `memory_limit_bytes` is what the kernel holds
    /// the sandbox to, or zero.
    pub(super) fn choose(&self, request: &DiskRequest, memory_limit_bytes: u64) -> Result<DiskChoice, ProviderError> {
        if request.size_mib.is_some_and(|mib| mib > MAX_SIZE_MIB) {
            let message = format!("disk_size_mb may be {MAX_SIZE_MIB} at most");
            return Err(ProviderError::InvalidSpec { message });
        }
        let size_bytes = request.size_mib.map(|mib| mib << 20);
        let has_quota = self.project_quota.is_ok();
        if request.in_memory {
            let size_bytes = size_bytes.or_else(|| memory::default_bytes(memory_limit_bytes));
            return Ok(DiskChoice::Memory { size_bytes });
        }
        Ok(match size_bytes {
            Some(size_bytes) if has_quota => DiskChoice::ProjectQuota { size_bytes },
            None if has_quota => DiskChoice::ProjectQuota { size_bytes: DEFAULT_QUOTA_BYTES },
            Some(size_bytes) if self.loop_images.is_ok() => DiskChoice::Loop { size_bytes },
            // Files that were not charged, or that would get the guest killed
            // before its disk is full, are no way out.
            Some(size_bytes) if size_bytes <= memory_limit_bytes => DiskChoice::Memory { size_bytes: Some(size_bytes) },
            Some(_) | None => DiskChoice::Directory,
        })
    }

    /// Takes what was chosen, with a mount where it is one. `uid_base` is the
    /// sandbox's.
    pub(super) async fn take(
        &self,
        choice: DiskChoice,
        uid_base: u32,
    ) -> Result<(DiskRecord, Option<OwnedFd>), OciError> {
        const OPERATION: &str = "make the disk";
        let made = match (choice, &self.project_quota, &self.loop_images) {
            (DiskChoice::Memory { size_bytes }, _, _) => Ok((DiskRecord::Memory { size_bytes }, None)),
            (DiskChoice::ProjectQuota { size_bytes }, Ok(quota), _) => {
                quota.choose_project(uid_base).map(|project| (DiskRecord::ProjectQuota { project, size_bytes }, None))
            }
            (DiskChoice::Loop { size_bytes }, _, Ok(pool)) => {
                pool.take(size_bytes).await.map(|image| (DiskRecord::Loop { name: image.name }, Some(image.mount)))
            }
            (DiskChoice::Directory, _, _) => Ok((DiskRecord::Directory, None)),
            (DiskChoice::ProjectQuota { .. }, Err(reason), _) | (DiskChoice::Loop { .. }, _, Err(reason)) => {
                Err(io::Error::new(io::ErrorKind::Unsupported, reason.as_str()))
            }
        };
        made.map_err(OciError::system(OPERATION))
    }

    /// Makes the directory in a sandbox's own, where its disk is one. The
    /// record is written before.
    pub(super) fn make_directory(&self, disk: &DiskRecord, sandbox: &Path) -> io::Result<()> {
        let path = state::disk_dir(sandbox);
        let make = || std::fs::DirBuilder::new().mode(0o700).create(&path);
        match disk {
            DiskRecord::Directory => make(),
            DiskRecord::ProjectQuota { project, size_bytes } => {
                make()?;
                let quota = self.project_quota.as_ref().map_err(|reason| io::Error::other(reason.as_str()))?;
                quota.bound(&path, *project, *size_bytes)
            }
            DiskRecord::Loop { .. } | DiskRecord::Memory { .. } => Ok(()),
        }
    }

    /// Gives back what the host counts, before a sandbox's directory goes.
    pub(super) fn release(&self, disk: &DiskRecord) -> io::Result<()> {
        match (disk, &self.project_quota) {
            (DiskRecord::ProjectQuota { project, .. }, Ok(quota)) => quota.release(*project),
            // Nobody counts any more: it was mounted anew, without quotas.
            (DiskRecord::ProjectQuota { .. }, Err(_))
            | (DiskRecord::Directory | DiskRecord::Loop { .. } | DiskRecord::Memory { .. }, _) => Ok(()),
        }
    }

    pub(super) fn usage(&self, live: &Live) -> DiskUsage {
        match (&live.record.disk, &self.project_quota) {
            (DiskRecord::ProjectQuota { project, size_bytes }, Ok(quota)) => {
                let bytes = quota.usage(*project).ok().map(|usage| usage.bytes);
                DiskUsage { bytes, limit_bytes: *size_bytes }
            }
            (DiskRecord::Loop { .. } | DiskRecord::Memory { .. }, _) => statfs(live).unwrap_or_default(),
            (DiskRecord::Directory | DiskRecord::ProjectQuota { .. }, _) => DiskUsage::default(),
        }
    }

    /// Keeps disks ready until the future is dropped.
    pub(super) async fn refill(&self) {
        if let Ok(pool) = &self.loop_images {
            pool.refill().await;
        }
    }

    /// How many disks are ready.
    pub(super) fn ready(&self) -> usize {
        self.loop_images.as_ref().map_or(0, LoopPool::ready)
    }

    /// Frees what is ready.
    pub(super) fn clear(&self) {
        if let Ok(pool) = &self.loop_images {
            pool.clear();
        }
    }

    /// Why a size that was asked for cannot be held, and what to do.
    pub(super) fn advice(&self) -> String {
        let because = |reason: Option<&String>| reason.map_or("", String::as_str).to_owned();
        format!(
            "take a size within the memory limit, or `disk: memory`; or mount the data directory's file system with \
             prjquota (now: {}); or let the server use /dev/loop-control with e2fsprogs installed (now: {}); \
             or accept it with allow_unenforced",
            because(self.project_quota.as_ref().err()),
            because(self.loop_images.as_ref().err()),
        )
    }

    pub(super) fn check(&self, report: &mut HealthReport) {
        const NAME: &str = "oci.disk";
        match (&self.project_quota, &self.loop_images) {
            (Ok(_), _) => report.ok(NAME, "every disk is bounded by a project quota"),
            (Err(no_quota), Ok(_)) => report.ok(
                NAME,
                format!(
                    "disks with a size are loop file systems, others are not bounded; no project quota: {no_quota}"
                ),
            ),
            (Err(no_quota), Err(no_loop)) => report.warn(
                NAME,
                format!(
                    "disks with a size are in memory, others are not bounded; \
                     no project quota: {no_quota}; no loop file systems: {no_loop}"
                ),
                "mount the data directory's file system with prjquota, or let the server use /dev/loop-control \
                 and install e2fsprogs",
            ),
        }
    }
}

impl DiskChoice {
    /// Name for the outside.
    pub(super) fn backend(self) -> &'static str {
        match self {
            Self::Directory => "none",
            Self::ProjectQuota { .. } => "project_quota",
            Self::Loop { .. } => "loop",
            Self::Memory { .. } => "memory",
        }
    }

    pub(super) fn is_bounded(self) -> bool {
        self != Self::Directory
    }
}

impl DiskRecord {
    /// What a launch makes of it.
    pub(super) fn plan(&self, sandbox: &Path) -> DiskPlan {
        match self {
            Self::Directory | Self::ProjectQuota { .. } => DiskPlan::Directory(state::disk_dir(sandbox)),
            Self::Loop { .. } => DiskPlan::Mounted,
            Self::Memory { size_bytes } => {
                DiskPlan::Memory { size_bytes: *size_bytes, inodes: size_bytes.map(memory::inodes) }
            }
        }
    }

    /// Whether it ends with its sandbox.
    pub(super) fn is_own_file_system(&self) -> bool {
        match self {
            Self::Loop { .. } | Self::Memory { .. } => true,
            Self::Directory | Self::ProjectQuota { .. } => false,
        }
    }

    /// Gives the host back the room of files that were deleted inside.
    pub(super) fn trim(&self) -> io::Result<()> {
        match self {
            Self::Loop { name } => name.trim(),
            Self::Directory | Self::ProjectQuota { .. } | Self::Memory { .. } => Ok(()),
        }
    }
}

/// What the file system says that is the sandbox's alone.
fn statfs(live: &Live) -> Option<DiskUsage> {
    let root = process::root(live.init()).ok().flatten()?;
    let numbers = rustix::fs::fstatfs(root.as_fd()).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(u64::try_from(numbers.f_bsize).unwrap_or(0));
    Some(DiskUsage {
        bytes: Some(bytes(numbers.f_blocks.saturating_sub(numbers.f_bfree))),
        limit_bytes: bytes(numbers.f_blocks),
    })
}

//! Ending a sandbox and freeing all it had.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use stacyvm_api::SandboxId;
use tokio::io::unix::AsyncFd;

use super::error::OciError;
use super::registry::Live;
use super::runtime::Runtime;
use super::state::{self, OnDisk, Record};
use crate::host::{cgroup, on_disk, process, trash};

/// How long a killed init may take to go: the kernel first ends everything in
/// its pid namespace and gives back its memory.
const DEATH_LIMIT: Duration = Duration::from_secs(20);

/// Ends a sandbox. One that is unknown, or gone already, is fine.
pub(super) async fn destroy(runtime: &Arc<Runtime>, id: &SandboxId) -> Result<(), OciError> {
    let alone = runtime.registry.alone(id).await;
    free(runtime, id, alone.live()).await?;
    alone.set_live(None);
    Ok(())
}

/// Frees whatever there is of a sandbox; the caller is alone with it.
pub(super) async fn free(runtime: &Arc<Runtime>, id: &SandboxId, live: Option<Arc<Live>>) -> Result<(), OciError> {
    let sandbox = runtime.layout.sandbox(id);
    let (live, record) = match live {
        Some(live) => (Some(Arc::clone(&live)), Some(live.record.clone())),
        None => find(runtime, id)?,
    };
    let mut directories = runtime.cgroups.directories(id.as_str());
    // The server may have been in another group when it made this one.
    directories.extend(record.iter().flat_map(|record| record.groups.clone()));
    if let Some(live) = live {
        let disk = hold_disk(&live);
        for group in &directories {
            cgroup::unthrottle(group);
        }
        end(id, live.init()).await?;
        if let Some(disk) = disk {
            runtime.let_go(disk);
        }
    }
    if let Some(record) = &record {
        runtime.forget(record).await;
    }
    let trash_dir = runtime.layout.trash();
    let (disks, disk) = (Arc::clone(&runtime.disks), record.as_ref().map(|record| record.disk.clone()));
    tokio::task::spawn_blocking(move || {
        for directory in &directories {
            cgroup::remove(directory).map_err(OciError::file("remove", directory))?;
        }
        if let Some(disk) = &disk {
            disks.release(disk).map_err(OciError::system("free the disk"))?;
        }
        // Last, because the record in it says what else there is to free.
        trash::discard(&trash_dir, &sandbox).map_err(OciError::file("discard", &sandbox))
    })
    .await
    .unwrap_or_else(|_| {
        Err(OciError::System { operation: "free the sandbox", source: std::io::ErrorKind::Other.into() })
    })?;
    runtime.release(id).await?;
    if let Some(record) = record {
        runtime.uids.give_back(record.uid_base);
        runtime.disconnect(&record);
    }
    runtime.empty_trash();
    Ok(())
}

/// Takes hold of a file system that would end with its sandbox, whose death
/// would wait until the kernel has written out, or freed, all that is in it.
/// Where that fails it takes longer, and that is all.
fn hold_disk(live: &Live) -> Option<OwnedFd> {
    if !live.record.disk.is_own_file_system() {
        return None;
    }
    process::root(live.init()).ok().flatten()
}

/// Kills a sandbox's init and waits until it is gone.
pub(super) async fn end(id: &SandboxId, init: &AsyncFd<OwnedFd>) -> Result<(), OciError> {
    process::kill(init).map_err(OciError::system("kill the sandbox's init"))?;
    match tokio::time::timeout(DEATH_LIMIT, init.readable()).await {
        Ok(ended) => ended.map(drop).map_err(OciError::system("wait for the sandbox's end")),
        Err(_) => Err(OciError::Unkillable(id.clone())),
    }
}

/// What an earlier process of this server left.
pub(super) fn find(runtime: &Runtime, id: &SandboxId) -> Result<(Option<Arc<Live>>, Option<Record>), OciError> {
    let sandbox = runtime.layout.sandbox(id);
    match state::load(&sandbox).map_err(OciError::file("read", &sandbox))? {
        OnDisk::Launched(record, identity) => {
            let init = if record.boot_id == on_disk::boot_id() {
                process::open(&identity).map_err(OciError::system("look at the sandbox's init"))?
            } else {
                None
            };
            let live = init
                .map(|init| Live::new((*record).clone(), init))
                .transpose()
                .map_err(OciError::system("watch the sandbox's init"))?;
            Ok((live.map(Arc::new), Some(*record)))
        }
        OnDisk::Remains(record) => Ok((None, record.map(|record| *record))),
        OnDisk::Nothing => Ok((None, None)),
    }
}

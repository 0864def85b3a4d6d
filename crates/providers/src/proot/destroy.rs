//! Ending a sandbox and freeing all it had.

use std::sync::Arc;

use stacyvm_api::SandboxId;

use super::error::ProotError;
use super::members;
use super::runtime::Runtime;
use crate::host::{cgroup, trash};

/// Ends a sandbox. One that is unknown, or gone already, is fine.
pub(super) async fn destroy(runtime: &Arc<Runtime>, id: &SandboxId) -> Result<(), ProotError> {
    let alone = runtime.registry.alone(id).await;
    free(runtime, id).await?;
    alone.set_live(None);
    Ok(())
}

/// Frees whatever there is of a sandbox; the caller is alone with it.
pub(super) async fn free(runtime: &Arc<Runtime>, id: &SandboxId) -> Result<(), ProotError> {
    let sandbox = runtime.layout.sandbox(id);
    let record = runtime.record(id);
    let mut directories = runtime.cgroups.directories(id.as_str());
    // The server may have been in another group when it made this one.
    directories.extend(record.iter().flat_map(|record| record.groups.clone()));
    for group in &directories {
        cgroup::unthrottle(group);
    }
    match (runtime.adopt(id)?, &record) {
        (Some(live), _) => members::end(&live, &sandbox).await?,
        (None, Some(record)) => members::end_stragglers(record, &sandbox).await?,
        (None, None) => {}
    }
    let trash_dir = runtime.layout.trash();
    let freed = tokio::task::spawn_blocking(move || {
        for directory in &directories {
            cgroup::remove(directory).map_err(ProotError::file("remove", directory))?;
        }
        // Last, because the record in it says what else there is to free.
        trash::discard(&trash_dir, &sandbox).map_err(ProotError::file("discard", &sandbox))
    });
    freed.await.unwrap_or_else(|_| {
        Err(ProotError::System { operation: "free the sandbox", source: std::io::ErrorKind::Other.into() })
    })?;
    if let Some(uid) = record.and_then(|record| record.uid) {
        runtime.uids.give_back(uid);
    }
    runtime.empty_trash();
    Ok(())
}

//! Finding what nobody owns.

use std::sync::Arc;

use stacyvm_api::SandboxId;

use super::destroy;
use super::error::ProotError;
use super::runtime::Runtime;
use super::state::{self, OnDisk};
use crate::host::cgroup;

/// Frees what no sandbox owns and says what that was.
pub(super) async fn sweep(runtime: &Arc<Runtime>) -> Result<Vec<String>, ProotError> {
    let mut freed = Vec::new();
    remains(runtime, &mut freed).await?;
    groups(runtime, &mut freed).await;
    match runtime.remove_trash().await {
        Ok(0) => {}
        Ok(trees) => freed.push(format!("the files of {trees} destroyed sandboxes")),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "what destroyed sandboxes left cannot be removed");
        }
    }
    Ok(freed)
}

/// Creations that never finished.
async fn remains(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), ProotError> {
    for id in runtime.known().map_err(ProotError::system("list sandboxes"))? {
        let entry = runtime.registry.entry(&id);
        // Somebody who holds the gate is making or freeing it right now.
        if let Ok(gate) = Arc::clone(&entry.gate).try_lock_owned() {
            let sandbox = runtime.layout.sandbox(&id);
            let on_disk = state::load(&sandbox).map_err(ProotError::file("read", &sandbox))?;
            if matches!(on_disk, OnDisk::Remains(_)) && entry.live().is_none() {
                destroy::free(runtime, &id).await?;
                freed.push(format!("what was left of {id}, whose creation never finished"));
            }
            drop(gate);
        }
        runtime.registry.forget(&id, entry);
    }
    Ok(())
}

/// Control groups without a sandbox, with all that still runs in them.
async fn groups(runtime: &Arc<Runtime>, freed: &mut Vec<String>) {
    for name in runtime.cgroups.sandboxes() {
        let Ok(id) = name.parse::<SandboxId>() else { continue };
        let entry = runtime.registry.entry(&id);
        if let Ok(gate) = Arc::clone(&entry.gate).try_lock_owned() {
            if !runtime.layout.sandbox(&id).exists() {
                let directories = runtime.cgroups.directories(&name);
                let removed = tokio::task::spawn_blocking(move || {
                    directories.iter().try_for_each(|directory| cgroup::remove(directory))
                });
                match removed.await {
                    Ok(Ok(())) => freed.push(format!("control groups of {id} and whatever ran in them")),
                    Ok(Err(error)) => tracing::warn!(sandbox = %id, %error, "control groups cannot be removed"),
                    Err(error) => tracing::warn!(sandbox = %id, %error, "control groups cannot be removed"),
                }
            }
            drop(gate);
        }
        runtime.registry.forget(&id, entry);
    }
}

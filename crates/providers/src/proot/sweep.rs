//! Finding what nobody owns.

use std::sync::Arc;

use stacyvm_api::SandboxId;

use super::destroy;
use super::error::ProotError;
use super::runtime::Runtime;
use super::state::{self, OnDisk};
use crate::host::sweep;

/// Frees what no sandbox owns and says what that was.
pub(super) async fn sweep(runtime: &Arc<Runtime>) -> Result<Vec<String>, ProotError> {
    let mut freed = Vec::new();
    remains(runtime, &mut freed).await?;
    let exists = |id: &SandboxId| runtime.layout.sandbox(id).exists();
    sweep::groups(&runtime.cgroups, &runtime.registry, exists, &mut freed).await;
    sweep::trash(runtime.remove_trash().await, &mut freed);
    Ok(freed)
}

/// Creations that never finished.
async fn remains(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), ProotError> {
    for id in runtime.known().map_err(ProotError::system("list sandboxes"))? {
        // Somebody who is at it makes or frees it right now.
        let Some(alone) = runtime.registry.try_alone(&id) else { continue };
        let sandbox = runtime.layout.sandbox(&id);
        let on_disk = state::load(&sandbox).map_err(ProotError::file("read", &sandbox))?;
        if matches!(on_disk, OnDisk::Remains(_)) && alone.live().is_none() {
            destroy::free(runtime, &id).await?;
            freed.push(format!("what was left of {id}, whose creation never finished"));
        }
    }
    Ok(())
}

//! Finding what nobody owns.

use std::sync::Arc;

use stacyvm_api::SandboxId;
use tokio::io::Interest;

use super::error::OciError;
use super::runtime::Runtime;
use super::state::{self, OnDisk};
use super::{destroy, strays};
use crate::host::{is_ordinary_user, sweep, sys, trash};

/// Frees what no sandbox owns and says what that was.
pub(super) async fn sweep(runtime: &Arc<Runtime>) -> Result<Vec<String>, OciError> {
    let mut freed = Vec::new();
    remains(runtime, &mut freed).await?;
    let exists = |id: &SandboxId| runtime.layout.sandbox(id).exists();
    sweep::groups(&runtime.cgroups, &runtime.registry, exists, &mut freed).await;
    if !runtime.cgroups.are_available() {
        stray_sandboxes(runtime, &mut freed).await?;
    }
    skeletons(runtime, &mut freed)?;
    leases(runtime, &mut freed).await?;
    networks(runtime, &mut freed).await;
    deleted_files(runtime).await?;
    sweep::trash(runtime.remove_trash().await, &mut freed);
    Ok(freed)
}

/// Creations that never finished.
async fn remains(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), OciError> {
    for id in runtime.known().map_err(OciError::system("list sandboxes"))? {
        // Somebody who is at it makes or frees it right now.
        let Some(alone) = runtime.registry.try_alone(&id) else { continue };
        let sandbox = runtime.layout.sandbox(&id);
        let on_disk = state::load(&sandbox).map_err(OciError::file("read", &sandbox))?;
        if matches!(on_disk, OnDisk::Remains(_)) && alone.live().is_none() {
            destroy::free(runtime, &id, None).await?;
            freed.push(format!("what was left of {id}, whose creation never finished"));
        }
    }
    Ok(())
}

/// Where there are no control groups: sandboxes that run without a record.
async fn stray_sandboxes(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), OciError> {
    let instance = runtime.instance.id().to_owned();
    let found = tokio::task::spawn_blocking(move || strays::find(&instance)).await.unwrap_or_default();
    for (id, init) in found {
        let init = sys::watch(init, Interest::READABLE).map_err(OciError::system("watch a stray sandbox"))?;
        let Some(_alone) = runtime.registry.try_alone(&id) else { continue };
        if !runtime.layout.sandbox(&id).exists() {
            destroy::end(&id, &init).await?;
            freed.push(format!("{id}, which ran without a record"));
        }
    }
    Ok(())
}

/// Holds on image layers of sandboxes that are gone.
async fn leases(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), OciError> {
    let Some(store) = &runtime.images else { return Ok(()) };
    for lease in store.leases().await.map_err(|error| OciError::Image(error.into()))? {
        let Ok(id) = lease.owner.parse::<SandboxId>() else { continue };
        let Some(_alone) = runtime.registry.try_alone(&id) else { continue };
        if !runtime.layout.sandbox(&id).exists() {
            runtime.release(&id).await?;
            freed.push(format!("the image layers that {id} held"));
        }
    }
    Ok(())
}

/// Networks that nobody uses any more: those of servers that are gone for good,
/// and this one's where it is no longer offered.
async fn networks(runtime: &Arc<Runtime>, freed: &mut Vec<String>) {
    if is_ordinary_user() {
        return;
    }
    match runtime.network.remove_abandoned().await {
        Ok(numbers) => {
            freed.extend(numbers.into_iter().map(|number| format!("network {number} of a server that is gone")));
        }
        Err(error) => tracing::warn!(%error, "the network of a server that is gone cannot be removed"),
    }
    // One that is offered is there to be used.
    if runtime.connected.is_some() {
        return;
    }
    match runtime.network.remove_unused().await {
        Ok(true) => freed.push("a network without sandboxes".into()),
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "a network without sandboxes cannot be removed"),
    }
}

/// Room of files that guests deleted in a disk of their own. Nobody misses it,
/// so it is not reported.
async fn deleted_files(runtime: &Arc<Runtime>) -> Result<(), OciError> {
    let records = runtime.records().map_err(OciError::system("list sandboxes"))?;
    let trimmed = tokio::task::spawn_blocking(move || {
        for record in records {
            if let Err(error) = record.disk.trim() {
                tracing::debug!(sandbox = %record.id, %error, "the host does not get deleted files' room back");
            }
        }
    });
    trimmed.await.map_err(|error| OciError::system("trim disks")(std::io::Error::other(error)))
}

/// Skeletons of image `host` that no sandbox is built on any more.
fn skeletons(runtime: &Arc<Runtime>, freed: &mut Vec<String>) -> Result<(), OciError> {
    let mut used = vec![runtime.host_image.skeleton.clone()];
    let records = runtime.records().map_err(OciError::system("list sandboxes"))?;
    used.extend(records.into_iter().flat_map(|record| record.layers));
    let directory = runtime.layout.host_images();
    for entry in std::fs::read_dir(&directory).map_err(OciError::file("read", &directory))?.flatten() {
        if !used.contains(&entry.path()) {
            trash::discard(&runtime.layout.trash(), &entry.path()).map_err(OciError::file("discard", entry.path()))?;
            freed.push(format!("an outdated copy of image `host` ({})", entry.file_name().to_string_lossy()));
        }
    }
    Ok(())
}

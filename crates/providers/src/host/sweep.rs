//! What every runtime of this machine looks for when it looks for what nobody
//! owns.

use stacyvm_api::SandboxId;

use super::cgroup::{self, Cgroups};
use super::registry::Registry;

/// Control groups without a sandbox, with all that still runs in them.
pub(crate) async fn groups<Live>(
    cgroups: &Cgroups,
    registry: &Registry<Live>,
    exists: impl Fn(&SandboxId) -> bool,
    freed: &mut Vec<String>,
) {
    for name in cgroups.sandboxes() {
        let Ok(id) = name.parse::<SandboxId>() else { continue };
        // Somebody who is at it makes or frees it right now.
        let Some(_alone) = registry.try_alone(&id) else { continue };
        if exists(&id) {
            continue;
        }
        let directories = cgroups.directories(&name);
        let removed =
            tokio::task::spawn_blocking(move || directories.iter().try_for_each(|directory| cgroup::remove(directory)));
        match removed.await {
            Ok(Ok(())) => freed.push(format!("control groups of {id} and whatever ran in them")),
            Ok(Err(error)) => tracing::warn!(sandbox = %id, %error, "control groups cannot be removed"),
            Err(error) => tracing::warn!(sandbox = %id, %error, "control groups cannot be removed"),
        }
    }
}

/// What became of the trash.
pub(crate) fn trash(emptied: Result<usize, impl std::error::Error + 'static>, freed: &mut Vec<String>) {
    match emptied {
        Ok(0) => {}
        Ok(1) => freed.push("the files of a destroyed sandbox".to_owned()),
        Ok(trees) => freed.push(format!("the files of {trees} destroyed sandboxes")),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "what destroyed sandboxes left cannot be removed");
        }
    }
}

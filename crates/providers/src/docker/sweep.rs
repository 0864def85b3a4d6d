//! Freeing what no sandbox owns: what brought the agent to the daemon, and
//! versions of it that no container uses any more.

use std::collections::{HashMap, HashSet};

use bollard::models::ContainerSummary;
use bollard::query_parameters::{ListVolumesOptionsBuilder, RemoveVolumeOptions};

use super::error::{DockerError, chain, status};
use super::label;
use super::server::Server;

/// Begin of the names of directories with the agent.
const AGENT_DIRECTORY: &str = "agent-";

/// Of a container's id, in words.
const SHORT_ID_CHARS: usize = 12;

/// Says in words what was freed.
pub(super) async fn sweep(server: &Server) -> Result<Vec<String>, DockerError> {
    let mut freed = Vec::new();
    let containers = server.containers().await?;
    let mounted: HashSet<&str> = containers
        .iter()
        .flat_map(|container| container.mounts.iter().flatten())
        .flat_map(|mount| [mount.source.as_deref(), mount.name.as_deref()])
        .flatten()
        .collect();
    volumes(server, &mounted, &mut freed).await?;
    directories(server, &mounted, &mut freed);
    drop(mounted);
    carriers(server, containers, &mut freed).await?;
    Ok(freed)
}

/// Containers that were to bring the agent to the daemon when a server ended.
async fn carriers(
    server: &Server,
    containers: Vec<ContainerSummary>,
    freed: &mut Vec<String>,
) -> Result<(), DockerError> {
    if server.program.is_placing() {
        return Ok(());
    }
    for container in containers {
        let labels = container.labels.unwrap_or_default();
        if let Some(id) = container.id.filter(|_| label::is_agents(&labels, &server.instance)) {
            server.daemon.remove(&id).await?;
            freed.push(format!("a container that carried the agent ({})", id.get(..SHORT_ID_CHARS).unwrap_or(&id)));
        }
    }
    Ok(())
}

async fn volumes(server: &Server, mounted: &HashSet<&str>, freed: &mut Vec<String>) -> Result<(), DockerError> {
    let filters = HashMap::from([("label", vec![label::filter_of(&server.instance)])]);
    let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
    let listed = server.daemon.client.list_volumes(Some(options)).await.map_err(DockerError::api("list volumes"))?;
    let current = server.program.volume_name(&server.instance);
    for volume in listed.volumes.unwrap_or_default() {
        if volume.name == current || mounted.contains(volume.name.as_str()) {
            continue;
        }
        match server.daemon.client.remove_volume(&volume.name, None::<RemoveVolumeOptions>).await {
            Ok(()) => freed.push(format!("the unused volume {}", volume.name)),
            // A container was made with it meanwhile, or somebody was quicker.
            Err(error) if matches!(status(&error), Some(404 | 409)) => {}
            Err(error) => return Err(DockerError::api("remove a volume")(error)),
        }
    }
    Ok(())
}

/// A mounted directory must keep its file: containers would lose it too.
fn directories(server: &Server, mounted: &HashSet<&str>, freed: &mut Vec<String>) {
    let current = server.program.directory();
    let Some(home) = current.parent() else { return };
    for entry in std::fs::read_dir(home).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let in_use = path == current || path.to_str().is_none_or(|path| mounted.contains(path));
        if in_use || !name.starts_with(AGENT_DIRECTORY) {
            continue;
        }
        match std::fs::remove_dir_all(&path) {
            Ok(()) => freed.push(format!("another version of the agent ({name})")),
            Err(error) => tracing::warn!(name, error = chain(&error), "another version of the agent stays"),
        }
    }
}

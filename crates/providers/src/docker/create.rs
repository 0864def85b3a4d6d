//! Making a sandbox.
//!
//! ```text
//! (caller) image ─▶ plan ─▶ (own task) place of the agent ─▶ container ─▶ boot ─▶ verified
//!                             any failure, or nobody waiting any more ─▶ removed
//! ```
//!
//! The part that makes things runs in a task of its own, because a future that
//! is dropped half-way cannot clean up after itself.

use std::sync::Arc;
use std::time::Duration;

use bollard::models::EndpointSettings;
use bollard::query_parameters::CreateContainerOptionsBuilder;
use stacyvm_api::{Limit, SandboxId};
use stacyvm_envd::GuestKernel;
use stacyvm_sandbox::{Created, ProgressSink, ProviderError, SandboxSpec};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::container::Plan;
use super::error::{DockerError, bounded, chain};
use super::place::Place;
use super::server::Server;
use super::{boot, image};

/// What was begun is removed within this time, or found by the sweep later.
const CLEAN_UP_TIME: Duration = Duration::from_secs(30);

pub(super) async fn create(
    server: &Arc<Server>,
    id: &SandboxId,
    spec: &SandboxSpec,
    progress: &dyn ProgressSink,
) -> Result<Created, ProviderError> {
    let of_create = |error: DockerError| error.of_create(&spec.image);
    let plan = prepare(server, id, spec, progress).await.inspect_err(|_| server.unasked.note(id))?;
    let image_digest = Some(plan.image.id.clone());

    let (sender, receiver) = oneshot::channel();
    let task = Arc::clone(server);
    server.background.spawn(async move {
        let id = plan.id.clone();
        let made = make_or_remove(&task, plan).await;
        let succeeded = made.is_ok();
        if sender.send(made).is_err() && succeeded {
            tracing::info!(sandbox = %id, "nobody waits for this sandbox any more; it is destroyed");
            remove(&task, &id).await;
        }
    });
    let made = receiver.await.unwrap_or(Err(DockerError::TaskEnded));
    Ok(Created { limits: made.map_err(of_create)?.report, image_digest })
}

/// All that is decided before anything is made.
async fn prepare(
    server: &Server,
    id: &SandboxId,
    spec: &SandboxSpec,
    progress: &dyn ProgressSink,
) -> Result<Plan, ProviderError> {
    let of_create = |error: DockerError| error.of_create(&spec.image);
    let docker_config = server.options.docker_config.as_deref();
    let image = image::ensure(&server.daemon, &spec.image, docker_config, progress).await.map_err(of_create)?;
    let facts = server.daemon.facts().await.map_err(of_create)?;
    Plan::new(id, spec, image, &facts, &server.options)
}

async fn make_or_remove(server: &Server, plan: Plan) -> Result<Plan, DockerError> {
    let id = plan.id.clone();
    match make(server, plan).await {
        // Not ours to remove.
        Err(error @ DockerError::Exists(_)) => Err(error),
        Err(error) => {
            remove(server, &id).await;
            Err(error)
        }
        made => made,
    }
}

async fn remove(server: &Server, id: &SandboxId) {
    match timeout(CLEAN_UP_TIME, server.destroy(id)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(sandbox = %id, error = chain(&error), "remains stay for the next comparison"),
        Err(_) => tracing::warn!(sandbox = %id, "remains stay for the next comparison: the daemon does not answer"),
    }
}

/// Returns the plan as it was carried out.
async fn make(server: &Server, plan: Plan) -> Result<Plan, DockerError> {
    let (plan, container) = make_container(server, plan).await?;
    let started = boot::start(&server.daemon, &container, &plan.boot(&server.options)).await;
    let kernel = started.map_err(|error| started_failure(error, server))?;
    verify(server, &plan, &container, &kernel).await?;
    Ok(plan)
}

/// Makes the container; gives way where the daemon turns out to be other than
/// it looked.
async fn make_container(server: &Server, mut plan: Plan) -> Result<(Plan, String), DockerError> {
    loop {
        let place = server.program.place(&server.daemon, &server.instance, &plan.image.id).await?;
        let error = match create_container(server, &plan, &place).await {
            Ok(container) => return Ok((plan, container)),
            Err(error) => error,
        };
        let said = error.refusal().unwrap_or_default().to_ascii_lowercase();
        if matches!(place, Place::Directory(_)) && said.contains("bind source path does not exist") {
            if server.program.not_shared() {
                tracing::info!("the docker daemon does not see this host's files; the agent goes into a volume");
            }
        } else if plan.bound_disk && (said.contains("storage-opt") || said.contains("pquota")) {
            if plan.spec.requested.contains(&Limit::Disk) && !plan.spec.allow_unenforced {
                return Err(DockerError::DiskUnbounded);
            }
            plan = plan.without_disk_bound();
        } else {
            return Err(refused_container(error, server, &plan));
        }
    }
}

async fn create_container(server: &Server, plan: &Plan, place: &Place) -> Result<String, DockerError> {
    let options = CreateContainerOptionsBuilder::default().name(plan.id.as_str()).build();
    let body = plan.container(&server.options, &server.instance, place);
    let made = server.daemon.client.create_container(Some(options), body).await;
    Ok(made.map_err(DockerError::api("create the container"))?.id)
}

fn refused_container(error: DockerError, server: &Server, plan: &Plan) -> DockerError {
    let said = error.refusal().unwrap_or_default().to_ascii_lowercase();
    match error.status() {
        Some(409) => DockerError::Exists(plan.id.clone()),
        Some(_) if said.contains("runtime") && (said.contains("unknown") || said.contains("invalid")) => {
            DockerError::UnknownRuntime(server.options.runtime.clone())
        }
        _ => error,
    }
}

/// Networks and runtimes are looked up when a container starts.
fn started_failure(error: DockerError, server: &Server) -> DockerError {
    let Some(said) = error.refusal() else { return error };
    let lower = said.to_ascii_lowercase();
    if lower.contains("network") && lower.contains("not found") {
        return DockerError::UnknownNetwork(server.options.network.to_string());
    }
    DockerError::Unstarted { runtime: server.options.runtime.clone(), why: why_unstarted(said), source: error.into() }
}

/// What a runtime says of a container that it does not start, out of the layers
/// that pass it on, and without the host's directories.
fn why_unstarted(said: &str) -> String {
    const LAYERS: [&str; 3] = ["OCI runtime create failed: ", "failed to create shim task: ", "failed to start shim: "];
    let innermost = LAYERS.iter().find_map(|layer| said.rsplit_once(layer)).map_or(said, |(_, rest)| rest);
    let innermost = innermost.trim_end().trim_end_matches(": unknown");
    let shown = innermost.split(' ').map(|word| match word.rsplit_once('/') {
        Some((directory, name)) if directory.starts_with('/') && !name.is_empty() => name,
        _ => word,
    });
    bounded(&shown.collect::<Vec<_>>().join(" "))
}

/// The container runs on the configured runtime and has the network that was
/// asked for, and the guest is what that runtime stands for.
async fn verify(server: &Server, plan: &Plan, container: &str, kernel: &GuestKernel) -> Result<(), DockerError> {
    let wanted = server.options.runtime.as_str();
    let found = server.daemon.client.inspect_container(container, None).await;
    let found = found.map_err(DockerError::api("look at the container"))?;
    let runtime = found.host_config.and_then(|config| config.runtime).unwrap_or_default();
    if runtime != wanted {
        return Err(DockerError::NotAsPromised(format!("the runtime is `{runtime}` instead of `{wanted}`")));
    }
    let networks = found.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    if networks.get(plan.network.mode()).is_some_and(is_unconnected) {
        return Err(DockerError::UnknownNetwork(plan.network.to_string()));
    }
    if !found.state.and_then(|state| state.running).unwrap_or(false) {
        return Err(DockerError::AgentEnded("it ended after its first answer".to_owned()));
    }
    let facts = server.daemon.facts().await?;
    facts.promise_of(wanted).check(kernel, &facts.kernel).map_err(DockerError::NotAsPromised)
}

/// A daemon that was started with `--bridge=none` says that a container has the
/// network `bridge`, and gives it none.
fn is_unconnected(endpoint: &EndpointSettings) -> bool {
    endpoint.network_id.as_deref() == Some("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_is_heard_without_what_passes_it_on() {
        let said = "failed to create task for container: failed to create shim task: OCI runtime create failed: \
                    unable to retrieve OCI runtime error (open /run/x/log.json: no such file or directory): \
                    fork/exec /opt/broken: exec format error: unknown";
        let why = why_unstarted(said);
        assert!(why.ends_with("fork/exec broken: exec format error") && why.starts_with("unable"), "{why}");
        assert!(!why.contains("/run") && !why.contains("/opt"), "{why}");
        assert_eq!(why_unstarted("no space left on device"), "no space left on device");
    }

    #[test]
    fn a_network_that_is_only_a_name_is_none() {
        let endpoint = |id: Option<&str>| EndpointSettings { network_id: id.map(str::to_owned), ..Default::default() };
        assert!(is_unconnected(&endpoint(Some(""))));
        assert!(!is_unconnected(&endpoint(Some("93e468b77a22"))));
        // Daemons that are not Docker's may leave it out.
        assert!(!is_unconnected(&endpoint(None)));
    }
}

//! What every part of this provider works on, and the containers that are this
//! server's.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummary, ContainerSummaryStateEnum,
};
use bollard::query_parameters::ListContainersOptionsBuilder;
use stacyvm_api::{SandboxId, Timestamp};
use stacyvm_sandbox::{RuntimeSandbox, RuntimeState};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use super::daemon::Daemon;
use super::endings::Endings;
use super::error::{DockerError, status};
use super::label;
use super::options::DockerOptions;
use super::place::Program;
use super::runtime::Promise;

/// How long a removal that somebody else began may take.
const REMOVAL_TIME: Duration = Duration::from_secs(20);
const REMOVAL_POLL: Duration = Duration::from_millis(50);

pub(super) struct Server {
    pub(super) options: DockerOptions,
    pub(super) daemon: std::sync::Arc<Daemon>,
    pub(super) program: Program,
    /// Which of the servers on this daemon we are.
    pub(super) instance: String,
    pub(super) endings: Endings,
    pub(super) unasked: Unasked,
    pub(super) background: TaskTracker,
}

/// Sandboxes whose creation failed before the daemon was asked to make anything:
/// there is nothing to destroy, also while it is away. Each is destroyed once.
#[derive(Default)]
pub(super) struct Unasked(Mutex<HashSet<SandboxId>>);

impl Unasked {
    pub(super) fn note(&self, id: &SandboxId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
    }

    fn take(&self, id: &SandboxId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id)
    }
}

/// A container that is one of this server's sandboxes.
pub(super) struct Found {
    pub(super) container: String,
    pub(super) pid: i64,
    pub(super) running: bool,
    pub(super) is_being_removed: bool,
    /// The kernel has killed in it for want of memory.
    pub(super) oom_killed: bool,
}

impl Server {
    /// The sandbox's container. One of that name that does not carry our labels
    /// is not it.
    pub(super) async fn find(&self, id: &SandboxId) -> Result<Option<Found>, DockerError> {
        match self.daemon.client.inspect_container(id.as_str(), None).await {
            Ok(container) => Ok(self.recognise(id, container)),
            Err(error) if status(&error) == Some(404) => Ok(None),
            Err(error) => Err(DockerError::api("look at the container")(error)),
        }
    }

    fn recognise(&self, id: &SandboxId, container: ContainerInspectResponse) -> Option<Found> {
        let labels = container.config?.labels?;
        if label::sandbox(&labels, &self.instance).as_ref() != Some(id) {
            return None;
        }
        let state = container.state.unwrap_or_default();
        Some(Found {
            container: container.id?,
            pid: state.pid.unwrap_or(0),
            running: state.running.unwrap_or(false),
            is_being_removed: state.status == Some(ContainerStateStatusEnum::REMOVING),
            oom_killed: state.oom_killed.unwrap_or(false),
        })
    }

    /// Memory of a guest is memory of the one process that is gVisor's kernel.
    pub(super) fn oom_ends_sandbox(&self) -> bool {
        self.daemon.known_promise(&self.options.runtime) == Promise::Gvisor
    }

    /// Ends a sandbox at once: there is nothing in it that would use a grace.
    pub(super) async fn destroy(&self, id: &SandboxId) -> Result<(), DockerError> {
        if self.unasked.take(id) {
            return Ok(());
        }
        let Some(found) = self.find(id).await? else { return Ok(()) };
        match self.daemon.remove(&found.container).await {
            // Somebody else removes it right now.
            Err(error) if error.status() == Some(409) => self.wait_until_removed(id).await,
            removed => removed,
        }?;
        self.endings.forget(id.as_str(), &found.container);
        Ok(())
    }

    pub(super) async fn wait_until_removed(&self, id: &SandboxId) -> Result<(), DockerError> {
        let deadline = Instant::now() + REMOVAL_TIME;
        while self.find(id).await?.is_some() {
            if Instant::now() >= deadline {
                return Err(DockerError::Unremovable(id.clone()));
            }
            sleep(REMOVAL_POLL).await;
        }
        Ok(())
    }

    /// Every container that carries this server's label, of whatever kind.
    pub(super) async fn containers(&self) -> Result<Vec<ContainerSummary>, DockerError> {
        let filters = HashMap::from([("label", vec![label::filter_of(&self.instance)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        self.daemon.client.list_containers(Some(options)).await.map_err(DockerError::api("list containers"))
    }

    pub(super) async fn list(&self) -> Result<Vec<RuntimeSandbox>, DockerError> {
        let containers = self.containers().await?;
        Ok(containers.into_iter().filter_map(|container| describe(container, &self.instance)).collect())
    }
}

fn describe(container: ContainerSummary, instance: &str) -> Option<RuntimeSandbox> {
    let labels = container.labels.unwrap_or_default();
    let id = label::sandbox(&labels, instance)?;
    let state = match container.state {
        Some(ContainerSummaryStateEnum::RUNNING) => RuntimeState::Running,
        Some(ContainerSummaryStateEnum::PAUSED) => RuntimeState::Paused,
        // Never started, ended, or about to go.
        Some(
            ContainerSummaryStateEnum::CREATED
            | ContainerSummaryStateEnum::EXITED
            | ContainerSummaryStateEnum::DEAD
            | ContainerSummaryStateEnum::REMOVING
            | ContainerSummaryStateEnum::STOPPING
            | ContainerSummaryStateEnum::RESTARTING
            | ContainerSummaryStateEnum::EMPTY,
        )
        | None => RuntimeState::Dead,
    };
    Some(RuntimeSandbox {
        id,
        state,
        image: labels.get(label::IMAGE).cloned(),
        created_at: container.created.map(|seconds| Timestamp::from_unix_ms(seconds.saturating_mul(1000))),
        metadata: label::metadata(&labels),
        limits: label::limits(&labels),
    })
}

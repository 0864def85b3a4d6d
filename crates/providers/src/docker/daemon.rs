//! The daemon: the one client, and what it says about itself.

use std::sync::{Arc, PoisonError, RwLock};

use bollard::models::SystemInfo;
use bollard::query_parameters::RemoveContainerOptions;
use bollard::{API_DEFAULT_VERSION, Docker};

use super::endpoint::Endpoint;
use super::error::DockerError;
use super::runtime::Promise;
use super::transport::Transport;

/// Until an answer begins. The longest is a start on a busy host.
const ANSWER_SECONDS: u64 = 60;

/// Only the scheme is looked at; where requests go is the transport's affair.
const ADDRESS: &str = "http://docker";

/// Storage drivers that bound a container's size; overlay2 only on [`QUOTA_FS`].
const BOUNDING_DRIVERS: [&str; 3] = ["btrfs", "zfs", "devicemapper"];
const OVERLAY: &str = "overlay2";
const QUOTA_FS: &str = "xfs";

pub(super) struct Daemon {
    pub(super) client: Docker,
    pub(super) endpoint: Endpoint,
    facts: RwLock<Option<Arc<Facts>>>,
}

/// What matters of `docker info`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, always read by name")]
pub(super) struct Facts {
    pub(super) version: String,
    pub(super) kernel: String,
    pub(super) architecture: String,
    pub(super) storage_driver: String,
    pub(super) backing_filesystem: String,
    pub(super) memory_limit: bool,
    pub(super) swap_limit: bool,
    pub(super) cpu_limit: bool,
    pub(super) pids_limit: bool,
    pub(super) seccomp: bool,
    pub(super) live_restore: bool,
    /// Name and program, in order.
    pub(super) runtimes: Vec<(String, Option<String>)>,
}

impl Daemon {
    pub(super) fn new(endpoint: Endpoint) -> Result<Self, String> {
        let transport = Transport::new(endpoint.clone())?;
        let send = move |request| transport.clone().send(request);
        let client = Docker::connect_with_custom_transport(send, Some(ADDRESS), ANSWER_SECONDS, API_DEFAULT_VERSION)
            .map_err(|error| error.to_string())?;
        Ok(Self { client, endpoint, facts: RwLock::default() })
    }

    /// What the daemon said last, or says now.
    pub(super) async fn facts(&self) -> Result<Arc<Facts>, DockerError> {
        let known = self.facts.read().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(facts) => Ok(facts),
            None => self.refresh().await,
        }
    }

    /// What a runtime stands for as far as that is known without asking: by its
    /// name, or by the program that the daemon was once heard to run for it.
    pub(super) fn known_promise(&self, runtime: &str) -> Promise {
        let facts = self.facts.read().unwrap_or_else(PoisonError::into_inner).clone();
        facts.map_or_else(|| Promise::of(runtime, None), |facts| facts.promise_of(runtime))
    }

    pub(super) async fn refresh(&self) -> Result<Arc<Facts>, DockerError> {
        let info = self.client.info().await.map_err(DockerError::api("ask the daemon about itself"))?;
        let facts = Arc::new(Facts::from(info));
        *self.facts.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&facts));
        Ok(facts)
    }

    /// Kills and removes a container with its anonymous volumes. One that is
    /// gone already is fine.
    pub(super) async fn remove(&self, container: &str) -> Result<(), DockerError> {
        let options = RemoveContainerOptions { force: true, v: true, ..RemoveContainerOptions::default() };
        match self.client.remove_container(container, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if super::error::status(&error) == Some(404) => Ok(()),
            Err(error) => Err(DockerError::api("remove the container")(error)),
        }
    }
}

impl Facts {
    pub(super) fn program_of(&self, runtime: &str) -> Option<&str> {
        self.runtimes.iter().find(|(name, _)| name == runtime)?.1.as_deref()
    }

    pub(super) fn has_runtime(&self, runtime: &str) -> bool {
        self.runtimes.iter().any(|(name, _)| name == runtime)
    }

    pub(super) fn promise_of(&self, runtime: &str) -> Promise {
        Promise::of(runtime, self.program_of(runtime))
    }

    /// Whether the storage driver may be able to bound a disk. For overlay2 only
    /// an attempt shows whether quotas are switched on.
    pub(super) fn may_bound_disks(&self) -> bool {
        let driver = self.storage_driver.as_str();
        BOUNDING_DRIVERS.contains(&driver) || (driver == OVERLAY && self.backing_filesystem == QUOTA_FS)
    }
}

impl From<SystemInfo> for Facts {
    fn from(info: SystemInfo) -> Self {
        let status = info.driver_status.unwrap_or_default();
        let of_driver = |name: &str| {
            let row = status.iter().find(|row| row.first().is_some_and(|key| key == name));
            row.and_then(|row| row.get(1)).cloned().unwrap_or_default()
        };
        let mut runtimes: Vec<_> =
            info.runtimes.unwrap_or_default().into_iter().map(|(name, runtime)| (name, runtime.path)).collect();
        runtimes.sort();
        let security = info.security_options.unwrap_or_default();
        Self {
            version: info.server_version.unwrap_or_default(),
            kernel: info.kernel_version.unwrap_or_default(),
            architecture: info.architecture.unwrap_or_default(),
            backing_filesystem: of_driver("Backing Filesystem"),
            storage_driver: info.driver.unwrap_or_default(),
            memory_limit: info.memory_limit.unwrap_or(false),
            swap_limit: info.swap_limit.unwrap_or(false),
            cpu_limit: info.cpu_cfs_quota.unwrap_or(false),
            pids_limit: info.pids_limit.unwrap_or(false),
            seccomp: security.iter().any(|option| option.starts_with("name=seccomp")),
            live_restore: info.live_restore_enabled.unwrap_or(false),
            runtimes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_bounded_where_the_driver_can() {
        let on = |driver: &str, filesystem: &str| Facts {
            storage_driver: driver.to_owned(),
            backing_filesystem: filesystem.to_owned(),
            ..Facts::default()
        };
        assert!(on("overlay2", "xfs").may_bound_disks() && on("btrfs", "").may_bound_disks());
        assert!(!on("overlay2", "extfs").may_bound_disks() && !on("vfs", "xfs").may_bound_disks());
    }
}

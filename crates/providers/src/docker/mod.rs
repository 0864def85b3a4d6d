//! Containers of a Docker-compatible daemon, with any OCI runtime that it knows.
//!
//! A sandbox is one container whose first program is our agent, mounted
//! read-only. The daemon makes, lists and removes it; everything inside goes
//! straight to the agent.
//!
//! ```text
//!            create                              destroy
//!  (nothing) ──────▶ created ─▶ started ─▶ agent answers ─▶ (nothing)
//!                       │           │            │
//!                       └─ failed: removed       └── ended by itself: dead ─▶ destroy
//! ```
//!
//! Files: `options` and `endpoint` say which daemon and what containers,
//! `daemon` and `transport` talk to it, `container` decides what it is asked
//! for, `create` and `boot` make a sandbox, `channel` (`direct`, `bridge`) leads
//! into it, `server` finds what is ours, `endings` notices what ends.

mod boot;
mod bridge;
mod capability;
mod channel;
mod container;
mod create;
mod daemon;
mod direct;
mod endings;
mod endpoint;
mod error;
mod health;
mod image;
mod label;
mod options;
mod place;
mod runtime;
mod server;
mod sweep;
mod transport;
mod usage;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_agent_embed::AGENT;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, LimitKills, ProgressSink, Provider, ProviderDefaults,
    ProviderError, ResourceUsage, RuntimeSandbox, SandboxSpec,
};
use tokio_util::task::TaskTracker;

pub use capability::CapabilitySet;
pub use endpoint::{ClientIdentity, Endpoint, TlsFiles};
pub use options::{DockerOptions, Network, Seccomp, check_tmpfs};

use channel::DockerChannel;
use daemon::Daemon;
use endings::Endings;
use error::DockerError;
use place::Program;
use server::{Found, Server, Unasked};

use crate::host::claims::Instance;

/// Stable name of this provider.
const NAME: &str = "docker";

/// A daemon, as a runtime.
pub struct DockerProvider {
    server: Arc<Server>,
}

impl DockerProvider {
    /// Takes up the data directory. The daemon need not be there yet.
    pub fn open(options: DockerOptions) -> Result<Self, ProviderError> {
        let failed = |operation| move |error: std::io::Error| DockerError::system(operation)(error).of(operation);
        let dir = options.data_dir.join(NAME);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(failed("make the provider's directory"))?;
        let instance = Instance::open(&dir).map_err(failed("read the server's name"))?.id().to_owned();
        let daemon = Daemon::new(options.endpoint.clone()).map_err(|message| ProviderError::Unavailable {
            provider: NAME.to_owned(),
            message,
            hint: Some("see DOCKER_CERT_PATH, or the context's certificates".to_owned()),
            cause: None,
        })?;
        let program =
            Program::open(&dir, AGENT, options.endpoint.is_local()).map_err(failed("write the agent's program"))?;
        let server = Server {
            options,
            daemon: Arc::new(daemon),
            program,
            instance,
            endings: Endings::default(),
            unasked: Unasked::default(),
            background: TaskTracker::new(),
        };
        Ok(Self { server: Arc::new(server) })
    }

    /// The sandbox's container while it runs, whoever made it.
    async fn running(&self, id: &SandboxId, operation: &'static str) -> Result<Found, ProviderError> {
        let found = self.server.find(id).await.map_err(|error| error.of(operation))?;
        found.filter(|found| found.running).ok_or_else(|| ProviderError::NotFound(id.clone()))
    }
}

#[async_trait]
impl Provider for DockerProvider {
    fn name(&self) -> &str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            pty: true,
            watch: true,
            dial: true,
            stats: true,
            survives_restart: true,
            keeps_records: true,
            network: self.server.options.network != Network::None,
            pause: true,
            oom_ends_sandbox: self.server.oom_ends_sandbox(),
            family: "container",
            ..Capabilities::default()
        }
    }

    fn defaults(&self) -> ProviderDefaults {
        self.server.options.defaults.clone()
    }

    fn describe(&self) -> BTreeMap<String, String> {
        let server = &self.server;
        [
            ("runtime", server.options.runtime.clone()),
            ("network", server.options.network.to_string()),
            ("endpoint", server.daemon.endpoint.to_string()),
            ("instance", server.instance.clone()),
            ("type", NAME.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    async fn check(&self) -> HealthReport {
        health::check(&self.server).await
    }

    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        create::create(&self.server, id, spec, progress).await
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        let found = self.running(id, "connect").await?;
        let channel = DockerChannel::new(Arc::clone(&self.server), found.container, found.pid).await;
        Ok(Connection::Envd(Arc::new(channel)))
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        self.server.destroy(id).await.map_err(|error| error.of("destroy the sandbox"))
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        self.server.list().await.map_err(|error| error.of("list sandboxes"))
    }

    async fn sweep(&self) -> Result<Vec<String>, ProviderError> {
        sweep::sweep(&self.server).await.map_err(|error| error.of("sweep"))
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        endings::wait(&self.server, id).await.map_err(|error| error.of("wait"))
    }

    /// The daemon tells of kills by itself.
    async fn kills(&self, id: &SandboxId) -> Result<LimitKills, ProviderError> {
        endings::follow(&self.server);
        Ok(LimitKills { memory: self.server.endings.oom_kills(id.as_str()), ..LimitKills::default() })
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        let found = self.running(id, "read usage").await?;
        endings::follow(&self.server);
        let reading = usage::read(&self.server.daemon, &found.container).await;
        let oom_kills = self.server.endings.oom_kills(id.as_str());
        Ok(ResourceUsage { oom_kills, ..reading.map_err(|error| error.of("read usage"))? })
    }

    async fn pause(&self, id: &SandboxId) -> Result<(), ProviderError> {
        let found = self.running(id, "pause").await?;
        let paused = self.server.daemon.client.pause_container(&found.container).await;
        paused.map_err(|error| DockerError::api("pause the container")(error).of("pause"))
    }

    async fn resume(&self, id: &SandboxId) -> Result<(), ProviderError> {
        let found = self.running(id, "resume").await?;
        let resumed = self.server.daemon.client.unpause_container(&found.container).await;
        resumed.map_err(|error| DockerError::api("resume the container")(error).of("resume"))
    }

    /// Creations that were begun end; sandboxes stay.
    async fn shutdown(&self) {
        self.server.background.close();
        self.server.background.wait().await;
    }
}

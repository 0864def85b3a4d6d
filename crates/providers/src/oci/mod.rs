//! OCI containers started by this binary itself: no daemon, milliseconds.
//!
//! A sandbox is a process tree in namespaces of its own whose first process is
//! our agent. What keeps it in, and what does not, is in `docs/security.md`.
//!
//! ```text
//!            create                    destroy
//!  (nothing) ──────▶ state.json ─launch─▶ init.json ──▶ killed ──▶ trash ──▶ (nothing)
//!                        │                    │
//!                        └── crash: remains   └── init ended by itself: dead
//!                              │                     │
//!                              └────── sweep ────────┘── destroy
//! ```
//!
//! Files: `spawner` forks, `launch` is what the fork does (`external` where an
//! OCI runtime of the host is to do it), `create` and `destroy` are the two ends
//! of a life, `state` is what is on disk, `sweep` finds what nobody owns. What
//! is named after what the kernel calls it and not here is in `host`.

mod capabilities;
mod create;
mod destroy;
mod disk;
mod error;
mod external;
mod health;
mod host_image;
mod launch;
mod network;
mod options;
mod pairs;
mod registry;
mod rootless;
mod runtime;
mod spawner;
mod state;
mod strays;
mod sweep;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, LimitKills, ProgressSink, Provider, ProviderError,
    ResourceUsage, RuntimeSandbox, RuntimeState, SandboxSpec,
};

use crate::host::channel::SocketChannel;
use crate::host::{process, usage};

pub use options::{BridgeOptions, DiskOptions, HostImageOptions, OciOptions, OciRuntime, SpawnerCommand};
pub use spawner::spawner_main;

use error::OciError;
use registry::Live;
use runtime::Runtime;
use state::OnDisk;

/// Stable name of this provider.
const NAME: &str = "oci";

/// Looks at what this provider needs of a host, without opening it: nothing is
/// made or changed.
pub fn check_host() -> HealthReport {
    health::check_host()
}

/// The embedded runtime.
pub struct OciProvider {
    runtime: Arc<Runtime>,
}

impl OciProvider {
    /// Takes up the data directory and the sandboxes in it. Needs a tokio
    /// runtime; starts background work that [`Provider::shutdown`] ends.
    pub async fn open(options: OciOptions) -> Result<Self, ProviderError> {
        Ok(Self { runtime: Runtime::open(&options).await? })
    }

    /// Process id of the spawner, while there is one.
    pub async fn spawner_pid(&self) -> Option<u32> {
        self.runtime.spawner.pid().await
    }

    /// The sandbox if its init lives, whichever process of this server made it.
    fn live(&self, id: &SandboxId) -> Result<Arc<Live>, ProviderError> {
        let found = self.adopt(id).map_err(|error| error.of("look at the sandbox"))?;
        found.ok_or_else(|| ProviderError::NotFound(id.clone()))
    }

    fn adopt(&self, id: &SandboxId) -> Result<Option<Arc<Live>>, OciError> {
        if let Some(live) = self.runtime.registry.find(id) {
            let ended = process::has_ended(live.init()).map_err(OciError::system("look at the sandbox's init"))?;
            return Ok((!ended).then_some(live));
        }
        let (live, _) = destroy::find(&self.runtime, id)?;
        if let Some(live) = &live {
            self.runtime.registry.add(id, Arc::clone(live));
        }
        Ok(live)
    }

    fn describe_on_disk(&self, id: SandboxId) -> Result<Option<RuntimeSandbox>, OciError> {
        let sandbox = self.runtime.layout.sandbox(&id);
        let OnDisk::Launched(record, _) = state::load(&sandbox).map_err(OciError::file("read", &sandbox))? else {
            return Ok(None);
        };
        let state = if self.adopt(&id)?.is_some() { RuntimeState::Running } else { RuntimeState::Dead };
        Ok(Some(RuntimeSandbox {
            id,
            state,
            image: Some(record.image),
            created_at: Some(record.created_at),
            metadata: record.metadata,
            limits: Some(record.limits),
        }))
    }
}

#[async_trait]
impl Provider for OciProvider {
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
            network: self.runtime.connected.is_some(),
            pause: false,
            family: "container",
            ..Capabilities::default()
        }
    }

    fn describe(&self) -> BTreeMap<String, String> {
        let mut described = BTreeMap::from([
            ("instance".to_owned(), self.runtime.instance.id().to_owned()),
            ("namespaces_ready".to_owned(), self.runtime.pairs_ready().to_string()),
            ("disks_ready".to_owned(), self.runtime.disks.ready().to_string()),
        ]);
        let (runtime, version) = match &self.runtime.external {
            Some(binary) => (binary.name.as_str(), binary.version.as_str()),
            None => ("builtin", env!("CARGO_PKG_VERSION")),
        };
        described.insert("runtime".to_owned(), runtime.to_owned());
        described.insert("runtime_version".to_owned(), version.to_owned());
        described
    }

    async fn check(&self) -> HealthReport {
        health::check(&self.runtime).await
    }

    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        let image = if spec.image == host_image::REFERENCE {
            create::resolve_host(&self.runtime)
        } else {
            create::resolve_stored(&self.runtime, &spec.image, progress).await?
        };
        create::create(&self.runtime, id, spec, image).await
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        self.live(id)?;
        let sandbox = self.runtime.layout.sandbox(id);
        let channel =
            SocketChannel::new(&sandbox).map_err(|source| OciError::file("open", sandbox)(source).of("connect"))?;
        Ok(Connection::Envd(Arc::new(channel)))
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        destroy::destroy(&self.runtime, id).await.map_err(|error| error.of("destroy the sandbox"))
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        let listed = self
            .runtime
            .known()
            .map_err(OciError::system("list sandboxes"))
            .and_then(|known| known.into_iter().map(|id| self.describe_on_disk(id)).collect::<Result<Vec<_>, _>>());
        Ok(listed.map_err(|error| error.of("list sandboxes"))?.into_iter().flatten().collect())
    }

    async fn sweep(&self) -> Result<Vec<String>, ProviderError> {
        sweep::sweep(&self.runtime).await.map_err(|error| error.of("sweep"))
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        let found = self.adopt(id).map_err(|error| error.of("look at the sandbox"))?;
        let Some(live) = found else { return Ok(Ending::Died) };
        let ended =
            live.ended().await.map_err(|source| OciError::system("wait for the sandbox's end")(source).of("wait"));
        ended.map(|()| Ending::Died)
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        let live = self.live(id)?;
        let reading = self.runtime.cgroups.read(id.as_str(), || usage::of_sandbox(live.init()));
        let held = |limit, value| if live.record.limits.enforced.contains(&limit) { value } else { 0 };
        let disk = self.runtime.disks.usage(&live);
        Ok(ResourceUsage {
            cpu_usec: reading.cpu_usec,
            memory_bytes: reading.memory_bytes,
            memory_limit_bytes: held(Limit::Memory, live.record.memory_limit_bytes),
            pids: reading.pids,
            pids_limit: held(Limit::Pids, live.record.pids_limit),
            oom_kills: reading.oom_kills,
            pids_refused: reading.pids_refused,
            pids_kills: 0,
            disk_kills: 0,
            disk_bytes: disk.bytes,
            disk_limit_bytes: disk.limit_bytes,
        })
    }

    async fn kills(&self, id: &SandboxId) -> Result<LimitKills, ProviderError> {
        Ok(LimitKills { memory: self.runtime.cgroups.oom_kills(id.as_str()), ..LimitKills::default() })
    }

    async fn shutdown(&self) {
        self.runtime.shutdown().await;
    }
}

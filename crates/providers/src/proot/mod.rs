//! Sandboxes for hosts with no root, no KVM and no Docker: our agent under
//! [PRoot](https://proot-me.github.io), which shows it another root by
//! rewriting the paths in its system calls.
//!
//! Everything inside is the agent's work, as on every runtime, so that file
//! calls see what commands see. What keeps a guest in is less than elsewhere,
//! and `docs/proot.md` says how much. Where the kernel gives namespaces to
//! whoever runs the server, sandboxes get them.
//!
//! ```text
//!            create                              destroy
//!  (nothing) ──────▶ state.json ─ copy ─ init.json ──▶ killed ──▶ trash ──▶ (nothing)
//!                        │                    │
//!                        └── crash: remains   └── PRoot ended by itself: dead
//!                              │                     │
//!                              └────── sweep ────────┘── destroy
//! ```
//!
//! Files: `rootfs` and `copy` make the private root, `launcher` becomes PRoot,
//! `members` knows who belongs to a sandbox, `limits` and `watcher` hold its
//! limits. What every provider on this kernel needs (control groups, uids,
//! telling processes apart, removing what guests wrote) is `oci`'s.

mod copy;
mod create;
mod destroy;
mod error;
mod health;
mod launcher;
mod limits;
mod loader;
mod members;
mod options;
mod program;
mod registry;
mod rootfs;
mod runtime;
mod state;
mod sweep;
mod watcher;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, LimitKills, ProgressSink, Provider, ProviderError,
    ResourceUsage, RuntimeSandbox, RuntimeState, SandboxSpec,
};

pub use launcher::{LauncherCommand, launcher_main};
pub use options::{Permission, ProotOptions};
pub use rootfs::unpack;

use crate::host::channel::SocketChannel;
use crate::host::usage;
use error::ProotError;
use registry::Live;
use runtime::Runtime;
use state::OnDisk;

/// Stable name of this provider.
const NAME: &str = "proot";

/// The network that is the host's own.
pub const SHARED_NETWORK: &str = "host";

/// Sandboxes under PRoot.
pub struct ProotProvider {
    runtime: Arc<Runtime>,
}

impl ProotProvider {
    /// Takes up the data directory and the sandboxes in it. Needs a tokio
    /// runtime; starts background work that [`Provider::shutdown`] ends.
    pub async fn open(options: &ProotOptions) -> Result<Self, ProviderError> {
        Ok(Self { runtime: Runtime::open(options).await? })
    }

    /// The sandbox if its PRoot lives, whichever process of this server made it.
    fn live(&self, id: &SandboxId) -> Result<Arc<Live>, ProviderError> {
        let found = self.runtime.adopt(id).map_err(|error| error.of("look at the sandbox"))?;
        found.ok_or_else(|| ProviderError::NotFound(id.clone()))
    }

    fn describe_on_disk(&self, id: SandboxId) -> Result<Option<RuntimeSandbox>, ProotError> {
        let sandbox = self.runtime.layout.sandbox(&id);
        let OnDisk::Launched(record, _) = state::load(&sandbox).map_err(ProotError::file("read", &sandbox))? else {
            return Ok(None);
        };
        let state = if self.runtime.adopt(&id)?.is_some() { RuntimeState::Running } else { RuntimeState::Dead };
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
impl Provider for ProotProvider {
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
            network: self.runtime.shared.is_some(),
            shares_host: self.runtime.shared.is_some(),
            rewrites_paths: true,
            family: "userspace_isolation",
            ..Capabilities::default()
        }
    }

    fn describe(&self) -> BTreeMap<String, String> {
        let options = &self.runtime.options;
        let bound = Some(options.max_sandboxes).filter(|most| *most > 0);
        let bound = bound.map(|most| ("max_sandboxes".to_owned(), most.to_string()));
        let always = BTreeMap::from([
            ("type".to_owned(), NAME.to_owned()),
            ("rootfs_path".to_owned(), options.rootfs.display().to_string()),
            ("proot_binary".to_owned(), options.program.display().to_string()),
            ("workspace_base".to_owned(), self.runtime.layout.base().display().to_string()),
            ("namespaces".to_owned(), self.runtime.shared.is_none().to_string()),
        ]);
        always.into_iter().chain(bound).collect()
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
        let options = &self.runtime.options;
        let source = rootfs::resolve(&options.rootfs, options.images.as_ref(), &spec.image, progress).await?;
        create::create(&self.runtime, id, spec, source).await
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        self.live(id)?;
        let sandbox = self.runtime.layout.sandbox(id);
        let channel =
            SocketChannel::new(&sandbox).map_err(|source| ProotError::file("open", sandbox)(source).of("connect"))?;
        Ok(Connection::Envd(Arc::new(channel)))
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        destroy::destroy(&self.runtime, id).await.map_err(|error| error.of("destroy the sandbox"))
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        let listed = self
            .runtime
            .known()
            .map_err(ProotError::system("list sandboxes"))
            .and_then(|known| known.into_iter().map(|id| self.describe_on_disk(id)).collect::<Result<Vec<_>, _>>());
        Ok(listed.map_err(|error| error.of("list sandboxes"))?.into_iter().flatten().collect())
    }

    async fn sweep(&self) -> Result<Vec<String>, ProviderError> {
        sweep::sweep(&self.runtime).await.map_err(|error| error.of("sweep"))
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        let found = self.runtime.adopt(id).map_err(|error| error.of("look at the sandbox"))?;
        let Some(live) = found else { return Ok(Ending::Died) };
        let ended =
            live.ended().await.map_err(|source| ProotError::system("wait for the sandbox's end")(source).of("wait"));
        ended.map(|()| Ending::Died)
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        let live = self.live(id)?;
        let reading = self.runtime.cgroups.read(id.as_str(), || usage::of_sandbox(live.proot()));
        let held = |limit, value| if live.record.limits.enforced.contains(&limit) { value } else { 0 };
        let root = state::root_dir(&self.runtime.layout.sandbox(id));
        let disk = tokio::task::spawn_blocking(move || watcher::disk_bytes(&root).ok()).await;
        Ok(ResourceUsage {
            cpu_usec: reading.cpu_usec,
            memory_bytes: reading.memory_bytes,
            memory_limit_bytes: held(Limit::Memory, live.record.memory_limit_bytes),
            pids: reading.pids,
            pids_limit: held(Limit::Pids, live.record.pids_limit),
            oom_kills: reading.oom_kills + live.kills(Limit::Memory),
            pids_refused: reading.pids_refused,
            pids_kills: live.kills(Limit::Pids),
            disk_kills: live.kills(Limit::Disk),
            disk_bytes: disk.ok().flatten(),
            disk_limit_bytes: live.record.disk_limit_bytes,
        })
    }

    async fn kills(&self, id: &SandboxId) -> Result<LimitKills, ProviderError> {
        let live = self.live(id)?;
        Ok(LimitKills {
            memory: self.runtime.cgroups.oom_kills(id.as_str()) + live.kills(Limit::Memory),
            pids: live.kills(Limit::Pids),
            disk: live.kills(Limit::Disk),
        })
    }

    async fn shutdown(&self) {
        self.runtime.shutdown().await;
    }
}

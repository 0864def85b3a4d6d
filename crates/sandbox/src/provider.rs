//! The contract of a runtime.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_api::{LimitReport, SandboxId, Timestamp};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{HealthReport, ProviderError, SandboxSpec, Session};

/// A runtime: something that can give a sandbox a place to run.
///
/// Guarantees that every implementation keeps, and that the contract suite
/// checks: `create` frees everything it made when it fails or is dropped;
/// `destroy` of an unknown id succeeds; `list` shows every sandbox of ours that
/// exists on the runtime, known to the store or not; nothing here needs the
/// server process that called `create` to be still alive.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Stable name, as in the configuration and in stored records.
    fn name(&self) -> &str;

    fn capabilities(&self) -> Capabilities;

    /// What it does less well than the contract has it.
    fn shortfalls(&self) -> Shortfalls {
        Shortfalls::default()
    }

    /// Settings worth showing (`GET /providers/{name}`); never a secret.
    fn describe(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// What sandboxes on this runtime get that ask for nothing, before the
    /// server's own defaults.
    fn defaults(&self) -> ProviderDefaults {
        ProviderDefaults::default()
    }

    /// Looks at everything a sandbox needs, without side effects.
    async fn check(&self) -> HealthReport;

    /// Makes a sandbox whose agent can be connected to.
    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError>;

    /// A way into a sandbox, also one that an earlier server process made.
    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError>;

    /// Ends a sandbox and frees all it used. Unknown ids succeed.
    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError>;

    /// Every sandbox of ours on this runtime.
    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError>;

    /// Frees what no sandbox owns (processes, mounts, cgroups, namespaces,
    /// devices, directories) and says in words what it freed. Called at start
    /// and on a timer; sandboxes that `list` shows are not orphans.
    async fn sweep(&self) -> Result<Vec<String>, ProviderError> {
        Ok(Vec::new())
    }

    /// Resolves when the sandbox has ended without our doing; at once for one
    /// that has already, or is not known.
    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError>;

    async fn usage(&self, _id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        Err(self.unsupported("usage"))
    }

    /// What limits have killed, asked before every command: only where it costs
    /// next to nothing to know. Elsewhere the last [`usage`](Self::usage) counts.
    async fn kills(&self, _id: &SandboxId) -> Result<LimitKills, ProviderError> {
        Err(self.unsupported("kills"))
    }

    async fn pause(&self, _id: &SandboxId) -> Result<(), ProviderError> {
        Err(self.unsupported("pause"))
    }

    async fn resume(&self, _id: &SandboxId) -> Result<(), ProviderError> {
        Err(self.unsupported("resume"))
    }

    /// Ends background work (pools, helpers) but no sandbox.
    async fn shutdown(&self) {}

    fn unsupported(&self, operation: &'static str) -> ProviderError {
        ProviderError::Unsupported { provider: self.name().to_owned(), operation }
    }
}

/// Defaults of one runtime; `None` leaves it to the server's.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProviderDefaults {
    pub image: Option<String>,
    pub memory_mib: Option<u64>,
    pub vcpus: Option<f64>,
    pub pids_limit: Option<u64>,
}

/// What a runtime can do beyond create, connect, destroy and list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent yes-or-no facts, always built by field name")]
pub struct Capabilities {
    /// Terminals, stdin and signals.
    pub pty: bool,
    pub watch: bool,
    /// Reaching ports inside.
    pub dial: bool,
    pub stats: bool,
    /// Sandboxes outlive the server process.
    pub survives_restart: bool,
    /// Every sandbox it has ever begun to make is listed or swept, also after a
    /// crash in the middle: nothing is lost without a record of the engine's.
    pub keeps_records: bool,
    /// An outgoing network.
    pub network: bool,
    pub pause: bool,
    /// A command that uses up the memory takes its whole sandbox with it: the
    /// kernel of the guest is itself a process that the limit counts.
    pub oom_ends_sandbox: bool,
    /// Sandboxes see the host's processes and host name, and the one network
    /// there is, `host`, is the host's own.
    pub shares_host: bool,
    /// Paths in system calls are rewritten on their way to the kernel, for a
    /// root that is pretended: names have at most 254 bytes, and a file's owner
    /// always has the right to read and write it.
    pub rewrites_paths: bool,
    /// Commands and images are imitated, not run. Only the fake in `mock` says
    /// so: the contract suite then leaves out what needs real programs, and
    /// keeps to `echo`, `printf`, `cat`, `sleep`, `pwd`, `exit`, `true`,
    /// `false`, `$NAME`, `;` and `>&2`.
    pub imitated: bool,
    /// Published word for the family: `container`, `microvm`, `remote_http`.
    pub family: &'static str,
}

/// What a runtime honestly cannot do of what all others can. Only somebody
/// else's service over a narrow protocol has any; the contract suite leaves out
/// what needs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent yes-or-no facts, always built by field name")]
pub struct Shortfalls {
    /// Output and files are text.
    pub text_only: bool,
    /// Files have no owner and no kind but file and directory.
    pub plain_files: bool,
    /// Trees cannot be had as archives.
    pub no_archives: bool,
    /// Output of a command comes at its end, and is lost at its deadline.
    pub late_output: bool,
    /// Commands have one user.
    pub one_user: bool,
    /// Failures do not tell what exactly was wrong.
    pub plain_failures: bool,
    /// Nobody says which limits hold.
    pub loose_limits: bool,
}

/// What `create` reports back for the record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Created {
    pub limits: LimitReport,
    /// The image's digest or content id, where there is one.
    pub image_digest: Option<String>,
}

/// A sandbox as the runtime sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeSandbox {
    pub id: SandboxId,
    pub state: RuntimeState,
    pub image: Option<String>,
    pub created_at: Option<Timestamp>,
    pub metadata: BTreeMap<String, String>,
    /// As [`Created`] had it; `None` where that was not kept.
    pub limits: Option<LimitReport>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeState {
    Running,
    Paused,
    /// Its init is gone; only remains are left.
    Dead,
}

/// How a sandbox ended that nobody asked us to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its first process is gone; remains may be left.
    Died,
    /// It used up its memory, which ends all of it on this runtime.
    OutOfMemory,
    /// Somebody else removed it, remains and all.
    Removed,
}

/// Times something in a sandbox was killed by a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitKills {
    pub memory: u64,
    pub pids: u64,
    pub disk: u64,
}

/// A reading of a sandbox's resources. Zero limits mean unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResourceUsage {
    /// Processor time used so far.
    pub cpu_usec: u64,
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    pub pids: u64,
    pub pids_limit: u64,
    /// Times the kernel killed something here for want of memory.
    pub oom_kills: u64,
    /// Times a fork was refused by the process limit.
    pub pids_refused: u64,
    /// Times commands were killed because more processes ran than may, where
    /// nobody refuses forks.
    pub pids_kills: u64,
    /// Times commands were killed because the files took more than they may,
    /// where nobody refuses writes.
    pub disk_kills: u64,
    /// `None` where nobody counts, as in a plain directory.
    pub disk_bytes: Option<u64>,
    pub disk_limit_bytes: u64,
}

impl ResourceUsage {
    pub fn kills(&self) -> LimitKills {
        LimitKills { memory: self.oom_kills, pids: self.pids_kills, disk: self.disk_kills }
    }
}

/// How the engine talks to what is inside.
#[derive(Clone)]
pub enum Connection {
    /// Our agent, over byte streams.
    Envd(Arc<dyn AgentChannel>),
    /// A runtime with a protocol of its own.
    Native(Arc<dyn Session>),
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Envd(_) => "Connection::Envd",
            Self::Native(_) => "Connection::Native",
        })
    }
}

/// Opens byte streams to one sandbox's agent.
#[async_trait]
pub trait AgentChannel: Send + Sync + 'static {
    async fn open(&self) -> std::io::Result<Box<dyn AgentIo>>;
}

/// A byte stream to an agent.
pub trait AgentIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> AgentIo for T {}

/// One step of a long creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// `resolve`, `pull`, `unpack`, `start`.
    pub phase: &'static str,
    pub message: String,
    pub done_bytes: u64,
    /// Zero when not known.
    pub total_bytes: u64,
}

/// Takes progress; must not block.
pub trait ProgressSink: Send + Sync {
    fn report(&self, progress: Progress);
}

/// Nobody is watching.
impl ProgressSink for () {
    fn report(&self, _progress: Progress) {}
}

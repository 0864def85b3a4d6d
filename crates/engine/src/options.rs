//! Everything that can be set about an engine. The binary fills this from the
//! configuration; the engine itself reads no environment.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use stacyvm_api::NetworkMode;

use crate::clock::Clock;

/// How an engine runs. `EngineOptions::new` gives the published defaults.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The SQLite file; made with its parent directory when missing.
    pub database_path: PathBuf,
    pub server_secret: ServerSecret,
    /// Name of the provider for requests that name none.
    pub default_provider: String,
    pub defaults: SandboxDefaults,
    pub limits: Limits,
    pub spawn_overflow: SpawnOverflow,
    pub retention: Retention,
    pub timing: Timing,
    /// What happens to a sandbox of ours that the runtime has and the store
    /// does not know.
    pub unknown_sandboxes: UnknownSandboxes,
    /// Bytes of each command's output kept in the exec log; zero keeps only
    /// the command, its times and how it ended.
    pub exec_log_output_bytes: usize,
    pub clock: Clock,
}

impl EngineOptions {
    pub fn new(database_path: impl Into<PathBuf>, server_secret: ServerSecret, default_provider: &str) -> Self {
        Self {
            database_path: database_path.into(),
            server_secret,
            default_provider: default_provider.to_owned(),
            defaults: SandboxDefaults::default(),
            limits: Limits::default(),
            spawn_overflow: SpawnOverflow::Reject,
            retention: Retention::default(),
            timing: Timing::default(),
            unknown_sandboxes: UnknownSandboxes::Remove,
            exec_log_output_bytes: 0,
            clock: Clock::default(),
        }
    }
}

/// Key from which every agent's token is derived. Whoever has it can enter
/// every sandbox of this server, so it is never shown.
#[derive(Clone)]
pub struct ServerSecret([u8; 32]);

impl ServerSecret {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn random() -> Self {
        Self(rand::random())
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for ServerSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerSecret(hidden)")
    }
}

/// What a create request gets where it says nothing (control-plane 3.2,
/// `defaults.*`).
#[derive(Debug, Clone)]
pub struct SandboxDefaults {
    pub image: String,
    pub memory_mb: u64,
    pub vcpus: f64,
    pub pids_limit: u64,
    /// `None` takes whatever bound the runtime has.
    pub disk_size_mb: Option<u64>,
    pub ttl: Duration,
    /// `None` is `bridge` where the provider has a network, else `none`.
    pub network: Option<NetworkMode>,
}

impl Default for SandboxDefaults {
    fn default() -> Self {
        Self {
            image: "alpine:latest".to_owned(),
            memory_mb: 1024,
            vcpus: 1.0,
            pids_limit: 1024,
            disk_size_mb: None,
            ttl: Duration::from_mins(30),
            network: None,
        }
    }
}

/// Bounds on what callers may ask for. `None` means unlimited.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_sandboxes: Option<u64>,
    pub max_sandboxes_per_owner: Option<u64>,
    pub max_ttl: Option<Duration>,
    /// Deadline of a command that names none; `None` gives it the maximum.
    pub default_exec_timeout: Option<Duration>,
    pub max_exec_timeout: Option<Duration>,
    /// Output of one buffered exec, stdout and stderr together.
    pub max_output_bytes: usize,
    pub max_memory_mb: Option<u64>,
    pub max_vcpus: Option<f64>,
    pub max_disk_size_mb: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_sandboxes: None,
            max_sandboxes_per_owner: None,
            max_ttl: Some(Duration::from_hours(24)),
            default_exec_timeout: None,
            max_exec_timeout: Some(Duration::from_mins(10)),
            max_output_bytes: 16 << 20,
            max_memory_mb: None,
            max_vcpus: None,
            max_disk_size_mb: None,
        }
    }
}

/// What happens to a create beyond the sandbox limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnOverflow {
    Reject,
    /// Wait in order of arrival, at most `max_waiters` at once and at most
    /// `timeout` each.
    Queue {
        max_waiters: usize,
        timeout: Duration,
    },
}

/// How long finished things stay in the store.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    pub destroyed_sandboxes: Duration,
    pub exec_log: Duration,
    pub operation_log: Duration,
    /// `None` keeps audit records for ever, as far as their number is not
    /// bounded.
    pub audit_log: Option<Duration>,
    /// The newest this many changes and refusals stay in the audit log.
    pub audit_calls: u32,
    pub audit_refusals: u32,
    /// Events are bounded by number: the newest this many can be replayed.
    pub events: u64,
}

impl Default for Retention {
    fn default() -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            destroyed_sandboxes: 7 * DAY,
            exec_log: 7 * DAY,
            operation_log: 30 * DAY,
            audit_log: None,
            audit_calls: 1_000_000,
            audit_refusals: 100_000,
            events: 100_000,
        }
    }
}

/// Periods of background work and deadlines of provider calls.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    pub reap_interval: Duration,
    pub reconcile_interval: Duration,
    pub health_interval: Duration,
    /// How soon a provider that was found to be away is looked at again; doubled
    /// up to `health_interval` while it stays so.
    pub health_retry_first: Duration,
    pub retention_interval: Duration,
    /// A health check that takes longer counts as failed.
    pub health_timeout: Duration,
    /// Longest create, image pull included.
    pub create_timeout: Duration,
    pub connect_timeout: Duration,
    pub destroy_timeout: Duration,
    pub list_timeout: Duration,
    /// Longest wait for an agent's answer to a ping.
    pub ping_timeout: Duration,
    /// Longest that `Engine::start` waits for what an earlier process left
    /// behind; the rest is taken in while requests are served.
    pub recovery_wait: Duration,
    /// First and longest pause between attempts to destroy.
    pub retry_first: Duration,
    pub retry_longest: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            reap_interval: seconds(5),
            reconcile_interval: seconds(60),
            health_interval: seconds(15),
            health_retry_first: seconds(1),
            retention_interval: seconds(3600),
            health_timeout: seconds(5),
            create_timeout: seconds(15 * 60),
            connect_timeout: seconds(10),
            destroy_timeout: seconds(30),
            list_timeout: seconds(30),
            ping_timeout: seconds(5),
            recovery_wait: seconds(10),
            retry_first: Duration::from_millis(500),
            retry_longest: seconds(60),
        }
    }
}

/// Ids come from the engine, so a sandbox that the store does not know is what
/// a lost database left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownSandboxes {
    /// Destroy it.
    Remove,
    /// Take it in with default limits and a fresh default TTL.
    Adopt,
}

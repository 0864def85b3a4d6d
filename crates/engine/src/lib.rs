//! What happens to a sandbox over time: lifecycle, deadlines, recovery, limits,
//! templates, the exec log, events and the store.
//!
//! [`Engine`] is the one entry point. It knows neither concrete providers nor
//! HTTP: it drives whatever implements [`stacyvm_sandbox::Provider`], and the
//! server turns its results and [`EngineError`]s into responses.

mod admission;
mod audit;
mod clock;
mod end;
mod engine;
mod error;
mod event;
mod exec;
mod file;
mod health;
mod idempotency;
mod key;
mod lifecycle;
mod metrics;
mod missing;
mod options;
mod order;
mod page;
mod port;
mod progress;
mod query;
mod quota;
mod record;
mod recovery;
mod shared;
mod spawn;
mod start;
mod store;
mod template;
mod token;

pub use audit::{AuditEntry, AuditKind, AuditPage};
pub use clock::Clock;
pub use engine::{Caller, CreateOptions, Destroyed, Engine, SandboxPage};
pub use error::{EngineError, LimitExceeded};
pub use event::{EventItem, EventStream};
pub use exec::{ExecEvent, ExecExit, ExecPage, ExecStream, OutputChannel, RunningExec, StartOptions};
pub use file::{FileOperation, FileOperationKind};
pub use key::{KEY_DIGITS, KEY_PREFIX, KeyLookup, Keys, LastAdminKey, RevokedKeys, StoredKey, has_key_form};
pub use metrics::{
    BUCKET_BOUNDS_MS, EventStats, MetricsSnapshot, OperationMetric, QueueStats, ReadinessReport, SandboxCounts,
    StoreHealth,
};
pub use options::{
    EngineOptions, Limits, Retention, SandboxDefaults, ServerSecret, SpawnOverflow, Timing, UnknownSandboxes,
};
pub use order::{DISK_RANGE_MIB, MEMORY_RANGE_MIB, PIDS_RANGE, VCPUS_RANGE, check_image};
pub use store::{MigrationState, StoreError, StoreFile, StoreKeys, StoreMigration, StoreStatistics};

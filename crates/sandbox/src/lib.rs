//! What a runtime offers, and what can be done inside a sandbox.
//!
//! A [`Provider`] makes a place where our agent runs and hands back a byte
//! stream to it. Everything that happens *inside* is a [`Session`]: processes,
//! files, watching, dialing a port. There is one session for all runtimes that
//! run our agent, [`EnvdSession`], and a native one where the runtime is
//! somebody else's HTTP service.
//!
//! This crate leaves time to the engine (deadlines, recovery, quotas) and HTTP
//! to the server.

mod envd;
mod error;
mod health;
mod provider;
mod session;
mod spec;

pub use envd::EnvdSession;
pub use error::{Cause, ProviderError, SessionError};
pub use health::HealthReport;
pub use provider::{
    AgentChannel, AgentIo, Capabilities, Connection, Created, Ending, LimitKills, Progress, ProgressSink, Provider,
    ProviderDefaults, ResourceUsage, RuntimeSandbox, RuntimeState, Shortfalls,
};
pub use session::{
    AttachRequest, ByteStream, DialTarget, EntryKind, Exit, FileContent, FileEntry, ListedProcess, ProcessEvent,
    ProcessInput, ProcessSelector, ProcessStream, RemoveOptions, Session, StartRequest, TerminalSize, WatchChange,
    WatchStream, WriteOptions,
};
pub use spec::{DiskRequest, NetworkPolicy, SandboxSpec};

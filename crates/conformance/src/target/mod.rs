//! What a run is pointed at: something that makes sandboxes.

mod provider;
mod server;

pub use provider::ProviderTarget;
pub use server::{ServerTarget, lack_of};

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_api::{LimitReport, SandboxId, SandboxState};
use stacyvm_sandbox::{Cause, Session};

use crate::Ability;

/// Where a runtime says in its settings how many sandboxes it has at most.
const MAX_SANDBOXES: &str = "max_sandboxes";

/// Makes sandboxes and opens sessions into them.
#[async_trait]
pub trait Target: Send + Sync + 'static {
    /// For the report: `provider oci`, `server http://…`.
    fn label(&self) -> String;

    /// Why the target cannot do something, in its own words; `None` when it can.
    fn lacks(&self, ability: Ability) -> Option<String>;

    async fn create(&self, order: &Order) -> Result<SandboxId, TargetError>;

    /// A new session, over a connection of its own.
    async fn session(&self, id: &SandboxId) -> Result<Arc<dyn Session>, TargetError>;

    async fn view(&self, id: &SandboxId) -> Result<SandboxView, TargetError>;

    async fn destroy(&self, id: &SandboxId) -> Result<(), TargetError>;

    /// The sandboxes that this target made and that still exist.
    async fn list(&self) -> Result<Vec<SandboxId>, TargetError>;

    /// How many more sandboxes fit, where the target says so.
    async fn room(&self) -> Result<Option<u64>, TargetError> {
        Ok(None)
    }

    /// Memory in bytes and processes, as the runtime counts them.
    async fn usage(&self, id: &SandboxId) -> Result<(u64, u64), TargetError>;
}

/// A sandbox as a check orders it; what is not said is the target's default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    pub image: String,
    pub env: BTreeMap<String, String>,
    pub memory_mib: Option<u64>,
    pub pids_limit: Option<u64>,
}

/// A sandbox as the target shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxView {
    pub id: SandboxId,
    pub state: SandboxState,
    /// Which limits are really held, where the target says so.
    pub limits: Option<LimitReport>,
}

#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("sandbox {0} does not exist")]
    NotFound(SandboxId),
    /// The image does not exist, its name is malformed, or its registry cannot
    /// be reached.
    #[error("the image cannot be had: {0}")]
    Image(String),
    #[error("the request was refused: {0}")]
    Refused(String),
    /// What answers is not what was to be checked.
    #[error("{message}")]
    Stranger { message: String, hint: String },
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("the target is unavailable: {0}")]
    Unavailable(String),
    #[error("the target failed to {operation}")]
    Failed {
        operation: &'static str,
        #[source]
        cause: Cause,
    },
}

//! A sandbox that runs, as this process holds it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::state::Record;
use crate::host::process::Identity;
use crate::host::sys;

/// A sandbox whose PRoot was found alive.
pub(super) struct Live {
    pub(super) record: Record,
    pub(super) identity: Identity,
    proot: AsyncFd<OwnedFd>,
    /// The agent: when it ends, so does the sandbox.
    pub(super) agent: Option<Identity>,
    /// Times something was killed for want of memory.
    oom_kills: AtomicU64,
}

impl Live {
    pub(super) fn new(
        record: Record,
        identity: Identity,
        proot: OwnedFd,
        agent: Option<Identity>,
    ) -> std::io::Result<Self> {
        let proot = sys::watch(proot, Interest::READABLE)?;
        Ok(Self { record, identity, proot, agent, oom_kills: AtomicU64::new(0) })
    }

    pub(super) fn with_agent(self, agent: Option<Identity>) -> Self {
        Self { agent, ..self }
    }

    pub(super) fn proot(&self) -> &AsyncFd<OwnedFd> {
        &self.proot
    }

    /// Resolves when PRoot has ended.
    pub(super) async fn ended(&self) -> std::io::Result<()> {
        self.proot.readable().await.map(drop)
    }

    pub(super) fn oom_kills(&self) -> u64 {
        self.oom_kills.load(Ordering::Relaxed)
    }

    pub(super) fn count_oom_kill(&self) {
        self.oom_kills.fetch_add(1, Ordering::Relaxed);
    }
}

pub(super) type Registry = crate::host::registry::Registry<Live>;

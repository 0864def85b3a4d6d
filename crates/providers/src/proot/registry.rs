//! The sandboxes this process knows, and who may change them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stacyvm_api::SandboxId;
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

#[derive(Default)]
pub(super) struct Registry {
    entries: Mutex<HashMap<SandboxId, Arc<Entry>>>,
}

/// One sandbox's place. Whoever creates or destroys it holds the gate.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) gate: Arc<tokio::sync::Mutex<()>>,
    live: Mutex<Option<Arc<Live>>>,
}

impl Entry {
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_live(&self, live: Option<Arc<Live>>) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = live;
    }
}

impl Registry {
    pub(super) fn entry(&self, id: &SandboxId) -> Arc<Entry> {
        Arc::clone(self.lock().entry(id.clone()).or_default())
    }

    pub(super) fn find(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        self.lock().get(id).cloned()
    }

    /// All that live.
    pub(super) fn live(&self) -> Vec<Arc<Live>> {
        self.lock().values().filter_map(|entry| entry.live()).collect()
    }

    /// Forgets a sandbox unless somebody else is at it.
    pub(super) fn forget(&self, id: &SandboxId, entry: Arc<Entry>) {
        let mut entries = self.lock();
        drop(entry);
        if entries.get(id).is_some_and(|entry| Arc::strong_count(entry) == 1 && entry.live().is_none()) {
            entries.remove(id);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

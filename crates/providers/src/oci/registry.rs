//! The sandboxes this process knows, and who may change them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use stacyvm_api::SandboxId;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::state::Record;
use crate::host::sys;

/// A sandbox whose init was found alive.
pub(super) struct Live {
    pub(super) record: Record,
    init: AsyncFd<OwnedFd>,
}

impl Live {
    pub(super) fn new(record: Record, init: OwnedFd) -> std::io::Result<Self> {
        Ok(Self { record, init: sys::watch(init, Interest::READABLE)? })
    }

    pub(super) fn init(&self) -> &AsyncFd<OwnedFd> {
        &self.init
    }

    /// Resolves when its init has ended.
    pub(super) async fn ended(&self) -> std::io::Result<()> {
        self.init.readable().await.map(drop)
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

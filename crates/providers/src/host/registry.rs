//! The sandboxes this process knows, and who may change them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stacyvm_api::SandboxId;

/// Of sandboxes that a runtime holds as `Live` while they run.
pub(crate) struct Registry<Live> {
    entries: Mutex<HashMap<SandboxId, Arc<Entry<Live>>>>,
}

/// One sandbox's place. Whoever creates or destroys it holds the gate.
pub(crate) struct Entry<Live> {
    pub(crate) gate: Arc<tokio::sync::Mutex<()>>,
    live: Mutex<Option<Arc<Live>>>,
}

impl<Live> Default for Registry<Live> {
    fn default() -> Self {
        Self { entries: Mutex::default() }
    }
}

impl<Live> Default for Entry<Live> {
    fn default() -> Self {
        Self { gate: Arc::default(), live: Mutex::default() }
    }
}

impl<Live> Entry<Live> {
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_live(&self, live: Option<Arc<Live>>) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = live;
    }
}

impl<Live> Registry<Live> {
    pub(crate) fn entry(&self, id: &SandboxId) -> Arc<Entry<Live>> {
        Arc::clone(self.lock().entry(id.clone()).or_default())
    }

    pub(crate) fn find(&self, id: &SandboxId) -> Option<Arc<Entry<Live>>> {
        self.lock().get(id).cloned()
    }

    /// All that live.
    pub(crate) fn live(&self) -> Vec<Arc<Live>> {
        self.lock().values().filter_map(|entry| entry.live()).collect()
    }

    /// Forgets a sandbox unless somebody else is at it.
    pub(crate) fn forget(&self, id: &SandboxId, entry: Arc<Entry<Live>>) {
        let mut entries = self.lock();
        drop(entry);
        if entries.get(id).is_some_and(|entry| Arc::strong_count(entry) == 1 && entry.live().is_none()) {
            entries.remove(id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Entry<Live>>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! The sandboxes this process knows, and who may change them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stacyvm_api::SandboxId;
use tokio::sync::OwnedMutexGuard;

/// Of sandboxes that a runtime holds as `Live` while they run.
pub(crate) struct Registry<Live> {
    entries: Mutex<HashMap<SandboxId, Arc<Entry<Live>>>>,
}

/// One sandbox's place. Whoever creates or destroys it holds the gate.
struct Entry<Live> {
    gate: Arc<tokio::sync::Mutex<()>>,
    live: Mutex<Option<Arc<Live>>>,
}

/// A sandbox that nobody else creates, frees or destroys until this is dropped.
/// If it does not run then, its place is forgotten.
pub(crate) struct Alone<'a, Live> {
    place: Place<'a, Live>,
    _gate: OwnedMutexGuard<()>,
}

/// A sandbox's place, in use.
struct Place<'a, Live> {
    registry: &'a Registry<Live>,
    id: SandboxId,
    /// `None` only while it is dropped.
    entry: Option<Arc<Entry<Live>>>,
}

impl<Live> Default for Registry<Live> {
    fn default() -> Self {
        Self { entries: Mutex::default() }
    }
}

impl<Live> Registry<Live> {
    /// Waits until nobody else is at a sandbox.
    pub(crate) async fn alone(&self, id: &SandboxId) -> Alone<'_, Live> {
        let place = self.place(id);
        let gate = place.gate().lock_owned().await;
        Alone { place, _gate: gate }
    }

    /// The same, if nobody is at it now.
    pub(crate) fn try_alone(&self, id: &SandboxId) -> Option<Alone<'_, Live>> {
        let place = self.place(id);
        let gate = place.gate().try_lock_owned().ok()?;
        Some(Alone { place, _gate: gate })
    }

    /// A sandbox that is known to run.
    pub(crate) fn find(&self, id: &SandboxId) -> Option<Arc<Live>> {
        let entry = Arc::clone(self.lock().get(id)?);
        entry.live()
    }

    /// Takes in a sandbox that was found to run.
    pub(crate) fn add(&self, id: &SandboxId, live: Arc<Live>) {
        self.lock().entry(id.clone()).or_default().set_live(Some(live));
    }

    /// All that live.
    pub(crate) fn live(&self) -> Vec<Arc<Live>> {
        self.lock().values().filter_map(|entry| entry.live()).collect()
    }

    fn place(&self, id: &SandboxId) -> Place<'_, Live> {
        let entry = Arc::clone(self.lock().entry(id.clone()).or_default());
        Place { registry: self, id: id.clone(), entry: Some(entry) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Entry<Live>>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Live> Alone<'_, Live> {
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.place.entry.as_ref().and_then(|entry| entry.live())
    }

    pub(crate) fn set_live(&self, live: Option<Arc<Live>>) {
        if let Some(entry) = &self.place.entry {
            entry.set_live(live);
        }
    }
}

impl<Live> Place<'_, Live> {
    fn gate(&self) -> Arc<tokio::sync::Mutex<()>> {
        self.entry.as_ref().map(|entry| Arc::clone(&entry.gate)).unwrap_or_default()
    }
}

impl<Live> Drop for Place<'_, Live> {
    fn drop(&mut self) {
        let mut entries = self.registry.lock();
        self.entry = None;
        // The one that is left is the table's own.
        if entries.get(&self.id).is_some_and(|entry| Arc::strong_count(entry) == 1 && entry.live().is_none()) {
            entries.remove(&self.id);
        }
    }
}

impl<Live> Default for Entry<Live> {
    fn default() -> Self {
        Self { gate: Arc::default(), live: Mutex::default() }
    }
}

impl<Live> Entry<Live> {
    fn live(&self) -> Option<Arc<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_live(&self, live: Option<Arc<Live>>) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = live;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_is_alone_with_a_sandbox_and_empty_places_are_forgotten() {
        let registry = Registry::<u32>::default();
        let id = SandboxId::random();
        let alone = registry.alone(&id).await;
        assert!(registry.try_alone(&id).is_none());
        assert!(registry.try_alone(&SandboxId::random()).is_some());
        let waiting = registry.alone(&id);
        let gave_up = tokio::time::timeout(std::time::Duration::from_millis(1), waiting).await;
        assert!(gave_up.is_err());

        alone.set_live(Some(Arc::new(7)));
        drop(alone);
        assert_eq!((registry.find(&id).as_deref(), registry.live().len()), (Some(&7), 1));
        registry.try_alone(&id).expect("nobody is at it").set_live(None);
        assert!(registry.lock().is_empty());
    }
}

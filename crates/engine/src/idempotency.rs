//! Creates with an idempotency key: the second one gets the first one's
//! sandbox.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use stacyvm_api::SandboxId;
use tokio::sync::watch;

use crate::store::Idempotency;
use crate::token::digest;
use crate::{Caller, EngineError};

/// Longest key accepted.
const KEY_MAX_BYTES: usize = 255;

type Entries = Arc<Mutex<HashMap<String, Entry>>>;

/// Keys of creates under way and of sandboxes that live.
#[derive(Debug, Default)]
pub(crate) struct Creates(Entries);

#[derive(Debug)]
struct Entry {
    request_digest: String,
    /// Closed when the create failed.
    made: watch::Sender<Option<SandboxId>>,
}

/// Who goes on with a create.
#[derive(Debug)]
pub(crate) enum Claim {
    Ours(OurClaim),
    Made(SandboxId),
}

/// Held while a create runs; dropping it before `made` frees the key.
#[derive(Debug)]
pub(crate) struct OurClaim {
    entries: Entries,
    key: String,
    made: bool,
}

/// The key as stored: a digest of who uses it and what they wrote, so that no
/// two callers share one.
pub(crate) fn scoped(caller: &Caller, key: &str, request: &impl Serialize) -> Result<Idempotency, EngineError> {
    if key.is_empty() || key.len() > KEY_MAX_BYTES || key.chars().any(char::is_control) {
        let message = format!("an idempotency key has 1 to {KEY_MAX_BYTES} bytes without control characters");
        return Err(EngineError::InvalidInput(message));
    }
    let key = digest_of(&(&caller.tenant, &caller.actor, &caller.owner, key));
    Ok(Idempotency { key, request_digest: digest_of(request) })
}

fn digest_of(value: &impl Serialize) -> String {
    digest(serde_json::to_string(value).unwrap_or_default().as_bytes())
}

impl Creates {
    /// Takes the key, or waits for whoever has it.
    pub(crate) async fn claim(&self, idempotency: &Idempotency) -> Result<Claim, EngineError> {
        loop {
            let mut made = {
                let mut entries = lock(&self.0);
                let Some(entry) = entries.get(&idempotency.key) else {
                    let request_digest = idempotency.request_digest.clone();
                    let entry = Entry { request_digest, made: watch::Sender::new(None) };
                    entries.insert(idempotency.key.clone(), entry);
                    let claim = OurClaim { entries: Arc::clone(&self.0), key: idempotency.key.clone(), made: false };
                    return Ok(Claim::Ours(claim));
                };
                if entry.request_digest != idempotency.request_digest {
                    return Err(EngineError::IdempotencyConflict);
                }
                entry.made.subscribe()
            };
            // An error means that the create failed: this one tries itself.
            if let Ok(id) = made.wait_for(Option::is_some).await
                && let Some(id) = id.clone()
            {
                return Ok(Claim::Made(id));
            }
        }
    }

    /// A sandbox from before a restart.
    pub(crate) fn restore(&self, idempotency: &Idempotency, id: &SandboxId) {
        let entry =
            Entry { request_digest: idempotency.request_digest.clone(), made: watch::Sender::new(Some(id.clone())) };
        lock(&self.0).insert(idempotency.key.clone(), entry);
    }

    /// The sandbox is gone: the key may make another.
    pub(crate) fn forget(&self, key: &str, id: &SandboxId) {
        let mut entries = lock(&self.0);
        if entries.get(key).is_some_and(|entry| entry.made.borrow().as_ref() == Some(id)) {
            entries.remove(key);
        }
    }
}

impl OurClaim {
    pub(crate) fn made(mut self, id: &SandboxId) {
        self.made = true;
        if let Some(entry) = lock(&self.entries).get(&self.key) {
            entry.made.send_replace(Some(id.clone()));
        }
    }
}

impl Drop for OurClaim {
    fn drop(&mut self) {
        if !self.made {
            lock(&self.entries).remove(&self.key);
        }
    }
}

fn lock(entries: &Entries) -> MutexGuard<'_, HashMap<String, Entry>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

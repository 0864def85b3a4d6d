//! API keys: made, found by what a caller presents, revoked.
//!
//! A key is 160 random bits. Only its SHA-256 is kept, which is also how it is
//! found: one look into a hash map, however many keys there are. A slow hash
//! (Argon2, scrypt) protects secrets that people think of, because those can be
//! guessed; nobody gets through 2^160 of anything, so it would only make every
//! request slow. Nor does the time of the look-up tell anything: it depends on
//! the hash, which a caller cannot steer towards a stored one.
//!
//! The keys in force are all in memory, written through, and this process is
//! the only one that uses the database, so that a key stops working the moment
//! it is revoked or expires, also for what is under way with it.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use stacyvm_api::{ApiKey, ApiKeyRequest, CreatedApiKey, KeyId, KeyScope, OwnerId, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::store::{KEYS_MADE, KeyHash, KeyRow, Store};
use crate::{Clock, EngineError, LimitExceeded};

/// Begins every key, so that E2B's SDKs take it and scanners find it.
pub const KEY_PREFIX: &str = "e2b_";
/// Hexadecimal digits behind the prefix: 160 bits.
pub const KEY_DIGITS: usize = 40;

/// Digits that are shown to recognise a key by; 128 bits stay unknown.
const SHOWN_DIGITS: usize = 8;
/// Keys in force at once.
const KEYS_MAX: usize = 10_000;
/// Longest name.
const NAME_MAX_CHARS: usize = 64;
/// A use is written at most this often for each key.
const USE_RESOLUTION: Duration = Duration::from_mins(1);

/// The keys of one server. Clones are the same keys.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    store: Store,
    clock: Clock,
    in_force: RwLock<InForce>,
    /// A key was stored once, if only to be revoked.
    ever_made: watch::Sender<bool>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

/// The keys that are neither revoked nor deleted, found either way.
#[derive(Default)]
struct InForce {
    by_hash: HashMap<KeyHash, Arc<StoredKey>>,
    by_id: HashMap<KeyId, KeyHash>,
}

impl InForce {
    fn insert(&mut self, hash: KeyHash, key: Arc<StoredKey>) {
        self.by_id.insert(key.about.id.clone(), hash);
        self.by_hash.insert(hash, key);
    }

    fn get(&self, id: &KeyId) -> Option<&Arc<StoredKey>> {
        self.by_hash.get(self.by_id.get(id)?)
    }

    fn remove(&mut self, id: &KeyId) {
        if let Some(hash) = self.by_id.remove(id) {
            self.by_hash.remove(&hash);
        }
    }

    fn keys(&self) -> impl Iterator<Item = &Arc<StoredKey>> {
        self.by_hash.values()
    }
}

/// A key that is in force. It does not hold the key itself.
#[derive(Debug)]
pub struct StoredKey {
    about: ApiKey,
    clock: Clock,
    /// Milliseconds since 1970; zero before the first use.
    last_used: AtomicI64,
    last_written: AtomicI64,
    revoked: CancellationToken,
}

/// What came of looking a presented key up.
#[derive(Debug, Clone)]
pub enum KeyLookup {
    Valid(Arc<StoredKey>),
    Expired,
    /// It was never made, or it is revoked.
    Unknown,
}

impl Keys {
    /// The keys of a database that no server uses now, for making the first one.
    pub async fn open(database_path: &Path) -> Result<Self, EngineError> {
        Self::load(Store::open(database_path).await?, Clock::default()).await
    }

    pub(crate) async fn load(store: Store, clock: Clock) -> Result<Self, EngineError> {
        let rows = store.keys().await?;
        let ever_made = watch::Sender::new(store.counter(KEYS_MADE).await? > 0);
        let mut in_force = InForce::default();
        for row in rows.into_iter().filter(|row| row.about.revoked_at.is_none()) {
            in_force.insert(row.hash, Arc::new(StoredKey::new(row.about, clock.clone())));
        }
        let changing = tokio::sync::Mutex::default();
        Ok(Self(Arc::new(Inner { store, clock, in_force: RwLock::new(in_force), ever_made, changing })))
    }

    /// Makes a key on behalf of `creator`. The answer is the only place that ever
    /// holds it.
    pub async fn create(&self, creator: &str, request: ApiKeyRequest) -> Result<CreatedApiKey, EngineError> {
        let (keys, creator) = (self.clone(), creator.to_owned());
        to_the_end(async move { keys.make(&creator, request).await }).await
    }

    /// The key stops working before this returns, and what is under way with it
    /// is told.
    pub async fn revoke(&self, id: &KeyId, last_admin: LastAdminKey) -> Result<(), EngineError> {
        let (keys, id) = (self.clone(), id.clone());
        to_the_end(async move { keys.end(&id, last_admin).await }).await
    }

    /// The newest first, those that expired included.
    pub async fn list(&self, revoked: RevokedKeys) -> Result<Vec<ApiKey>, EngineError> {
        let mut all: Vec<ApiKey> = self.0.store.keys().await?.into_iter().map(|row| row.about).collect();
        all.retain(|about| revoked == RevokedKeys::Included || about.revoked_at.is_none());
        let used: HashMap<KeyId, Timestamp> =
            self.read().keys().filter_map(|key| Some((key.about.id.clone(), key.last_used()?))).collect();
        for about in &mut all {
            about.last_used_at = about.last_used_at.max(used.get(&about.id).copied());
        }
        Ok(all)
    }

    /// Looks up what a caller presents as a key, and notes the use.
    pub fn look_up(&self, presented: &[u8]) -> KeyLookup {
        if !has_key_form(presented) {
            return KeyLookup::Unknown;
        }
        let Some(key) = self.read().by_hash.get(&hash(presented)).cloned() else { return KeyLookup::Unknown };
        let now = self.0.clock.now();
        if key.is_expired(now) {
            return KeyLookup::Expired;
        }
        if key.note_use(now) {
            self.0.store.writer().save_key_use(key.about.id.clone(), now);
        }
        KeyLookup::Valid(key)
    }

    /// The key of an id, while it works: for what was made with it and must not
    /// outlive it.
    pub fn valid(&self, id: &KeyId) -> Option<Arc<StoredKey>> {
        let now = self.0.clock.now();
        self.read().get(id).filter(|key| !key.is_expired(now)).cloned()
    }

    /// Whether any key was ever stored: a server that had one stays closed when
    /// the last one is revoked or expires.
    pub fn ever_made(&self) -> bool {
        *self.0.ever_made.borrow()
    }

    /// Resolves once a key was ever stored.
    pub async fn first_made(&self) {
        // The sender lives as long as the keys.
        let _ = self.0.ever_made.subscribe().wait_for(|made| *made).await;
    }

    /// Whether a key with this scope works right now.
    pub fn any_usable(&self, scope: Option<KeyScope>) -> bool {
        let now = self.0.clock.now();
        self.read().keys().any(|key| !key.is_expired(now) && scope.is_none_or(|scope| key.grants(scope)))
    }

    /// Closes the database, for keys that were opened without an engine.
    pub async fn close(&self) -> Result<(), EngineError> {
        Ok(self.0.store.close().await?)
    }

    async fn make(&self, creator: &str, request: ApiKeyRequest) -> Result<CreatedApiKey, EngineError> {
        let _changing = self.0.changing.lock().await;
        let name = self.check_name(&request.name)?;
        let now = self.0.clock.now();
        let key = random_key();
        let about = ApiKey {
            id: KeyId::random(),
            name,
            prefix: key[..KEY_PREFIX.len() + SHOWN_DIGITS].to_owned(),
            scopes: scopes(request.scopes)?,
            owner_id: request.owner_id,
            created_at: now,
            created_by: creator.to_owned(),
            expires_at: expiry(now, request.ttl)?,
            last_used_at: None,
            revoked_at: None,
        };
        let row = KeyRow { hash: hash(key.as_bytes()), about };
        self.0.store.add_key(&row).await?;
        let stored = Arc::new(StoredKey::new(row.about.clone(), self.0.clock.clone()));
        self.0.in_force.write().unwrap_or_else(PoisonError::into_inner).insert(row.hash, stored);
        self.0.ever_made.send_replace(true);
        Ok(CreatedApiKey { about: row.about, key })
    }

    async fn end(&self, id: &KeyId, last_admin: LastAdminKey) -> Result<(), EngineError> {
        let _changing = self.0.changing.lock().await;
        let key = self.read().get(id).cloned().ok_or_else(|| EngineError::KeyNotFound(id.clone()))?;
        if last_admin == LastAdminKey::Kept && self.is_last_admin(&key) {
            return Err(EngineError::LastAdminKey(key.about.name.clone()));
        }
        self.0.store.revoke_key(id, self.0.clock.now()).await?;
        self.0.in_force.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        key.revoked.cancel();
        Ok(())
    }

    fn is_last_admin(&self, key: &StoredKey) -> bool {
        let now = self.0.clock.now();
        let administers = |key: &StoredKey| key.grants(KeyScope::Admin) && !key.is_expired(now);
        let is_other = |other: &StoredKey| other.about.id != key.about.id;
        administers(key) && !self.read().keys().any(|other| is_other(other) && administers(other))
    }

    fn check_name(&self, name: &str) -> Result<String, EngineError> {
        let keys = self.read();
        let well_formed = !name.is_empty()
            && name.len() <= NAME_MAX_CHARS
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte));
        if !well_formed {
            return Err(EngineError::InvalidInput(format!(
                "name must be 1 to {NAME_MAX_CHARS} characters of letters, digits and `.`, `_`, `-`, `@`"
            )));
        }
        if keys.keys().any(|key| key.about.name == name) {
            return Err(EngineError::KeyExists(name.to_owned()));
        }
        if keys.by_hash.len() >= KEYS_MAX {
            return Err(EngineError::Limit(LimitExceeded::Keys { max: KEYS_MAX }));
        }
        Ok(name.to_owned())
    }

    fn read(&self) -> RwLockReadGuard<'_, InForce> {
        self.0.in_force.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("in_force", &self.read().by_hash.len()).finish_non_exhaustive()
    }
}

/// What happens to the only key that can still make and revoke keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastAdminKey {
    /// It is not revoked: without it nobody could undo that over the API.
    Kept,
    /// It is a key like any other: there is another way in, or somebody insists.
    Revoked,
}

/// Which keys a listing shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevokedKeys {
    Included,
    LeftOut,
}

impl StoredKey {
    fn new(about: ApiKey, clock: Clock) -> Self {
        let last_used = about.last_used_at.map_or(0, Timestamp::unix_ms);
        Self {
            about,
            clock,
            last_used: AtomicI64::new(last_used),
            last_written: AtomicI64::new(last_used),
            revoked: CancellationToken::new(),
        }
    }

    pub fn id(&self) -> &KeyId {
        &self.about.id
    }

    pub fn name(&self) -> &str {
        &self.about.name
    }

    /// Whom everything done with it is accounted to.
    pub fn owner(&self) -> Option<&OwnerId> {
        self.about.owner_id.as_ref()
    }

    pub fn expires_at(&self) -> Option<Timestamp> {
        self.about.expires_at
    }

    pub fn grants(&self, scope: KeyScope) -> bool {
        self.about.scopes.contains(&scope)
    }

    /// Resolves when the key stops working, for what takes longer than a check.
    pub async fn ended(&self) {
        let Some(expires_at) = self.about.expires_at else { return self.revoked.cancelled().await };
        let expiry = async {
            // The clock can be set while this waits, so it is looked at again.
            while !self.is_expired(self.clock.now()) {
                tokio::time::sleep(expires_at.since(self.clock.now()).min(USE_RESOLUTION)).await;
            }
        };
        tokio::select! {
            () = self.revoked.cancelled() => {}
            () = expiry => {}
        }
    }

    fn is_expired(&self, now: Timestamp) -> bool {
        self.about.expires_at.is_some_and(|expires_at| expires_at <= now)
    }

    fn last_used(&self) -> Option<Timestamp> {
        let at = self.last_used.load(Ordering::Relaxed);
        (at > 0).then(|| Timestamp::from_unix_ms(at))
    }

    /// Whether this use is to be written.
    fn note_use(&self, now: Timestamp) -> bool {
        let now_ms = now.unix_ms();
        self.last_used.fetch_max(now_ms, Ordering::Relaxed);
        let written = self.last_written.load(Ordering::Relaxed);
        let due = now.since(Timestamp::from_unix_ms(written)) >= USE_RESOLUTION;
        due && self.last_written.compare_exchange(written, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// A caller that goes away must not leave a change half done: a key that is
/// revoked in the database and still works.
async fn to_the_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(change).await.unwrap_or(Err(EngineError::Internal("a change of the keys broke off")))
}

/// Whether a text could be one of our keys.
pub fn has_key_form(text: &[u8]) -> bool {
    text.strip_prefix(KEY_PREFIX.as_bytes()).is_some_and(|digits| {
        digits.len() == KEY_DIGITS && digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn random_key() -> String {
    let (high, low): (u128, u32) = (rand::random(), rand::random());
    format!("{KEY_PREFIX}{high:032x}{low:08x}")
}

fn hash(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

fn scopes(asked: Option<Vec<KeyScope>>) -> Result<Vec<KeyScope>, EngineError> {
    let mut scopes = asked.unwrap_or_else(|| vec![KeyScope::Read, KeyScope::Api]);
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() {
        return Err(EngineError::InvalidInput("scopes must name at least one scope".to_owned()));
    }
    Ok(scopes)
}

fn expiry(now: Timestamp, ttl: Option<stacyvm_api::Duration>) -> Result<Option<Timestamp>, EngineError> {
    match ttl {
        Some(ttl) if ttl.is_zero() => Err(EngineError::InvalidInput("ttl must be longer than zero".to_owned())),
        ttl => Ok(ttl.map(|ttl| now + ttl.get())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_different_and_of_the_form_that_e2b_takes() {
        let keys: std::collections::BTreeSet<String> = (0..100).map(|_| random_key()).collect();
        assert_eq!(keys.len(), 100);
        for key in &keys {
            assert!(has_key_form(key.as_bytes()), "{key}");
            assert_eq!(key.len(), KEY_PREFIX.len() + KEY_DIGITS);
        }
    }

    #[test]
    fn other_texts_do_not_have_the_form() {
        let digits = "0123456789abcdef0123456789abcdef01234567";
        assert!(has_key_form(format!("e2b_{digits}").as_bytes()));
        for text in ["", "e2b_", digits, &format!("e2b_{digits}0"), &format!("e2b_{}", digits.to_uppercase())] {
            assert!(!has_key_form(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn a_use_is_written_once_a_minute() {
        let about = ApiKey {
            id: KeyId::random(),
            name: "n".to_owned(),
            prefix: String::new(),
            scopes: vec![KeyScope::Read],
            owner_id: None,
            created_at: Timestamp::from_unix_ms(0),
            created_by: String::new(),
            expires_at: None,
            last_used_at: None,
            revoked_at: None,
        };
        let key = StoredKey::new(about, Clock::default());
        let at = |seconds: i64| Timestamp::from_unix_ms(1_000_000_000 + seconds * 1000);
        assert_eq!([0, 1, 59, 60, 61].map(|seconds| key.note_use(at(seconds))), [true, false, false, true, false]);
        assert_eq!(key.last_used(), Some(at(61)));
    }
}

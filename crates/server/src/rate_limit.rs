//! How often a caller may call.
//!
//! A token bucket for each caller: `burst` tokens, filled up again at a steady
//! rate, one token for each request. Written here because the crates for it
//! (`governor` and its relatives) bound neither how many buckets there are nor
//! say how many tokens are left, and both are needed.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use stacyvm_api::{ErrorCode, KeyId, KeyScope, OwnerId};

use crate::auth::{ConfiguredKey, Identity};
use crate::error::ApiError;
use crate::options::{RateLimitKey, RateLimitOptions};
use crate::peer::subscriber;

/// Buckets at once. At about 200 bytes each this bounds the memory; beyond it
/// those that were used longest ago go.
const MAX_BUCKETS: usize = 100_000;
/// How many go at a time then.
const EVICTED_AT_ONCE: usize = MAX_BUCKETS / 8;

/// How long a bucket is kept that nobody takes from, and how often that is
/// looked at, where the configuration has no say.
const IDLE: Duration = Duration::from_mins(15);
const SWEEP_INTERVAL: Duration = Duration::from_mins(1);

const LIMIT_HEADER: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING_HEADER: HeaderName = HeaderName::from_static("x-ratelimit-remaining");

/// A bucket's size and how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) burst: u32,
    pub(crate) per_minute: u32,
}

/// What came of asking for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    Token {
        remaining: u32,
    },
    /// The next one is there after this long.
    Empty {
        next_after: Duration,
    },
}

/// One bucket for each key.
#[derive(Debug)]
pub(crate) struct Buckets<K> {
    rate: Rate,
    idle: Duration,
    sweep_interval: Duration,
    state: Mutex<State<K>>,
    evicted: AtomicU64,
}

#[derive(Debug)]
struct State<K> {
    buckets: HashMap<K, Bucket>,
    swept: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    /// When `tokens` was true, which is also the last use.
    at: Instant,
}

impl<K: Eq + Hash + Clone> Buckets<K> {
    pub(crate) fn new(rate: Rate) -> Self {
        Self::kept_for(rate, IDLE, SWEEP_INTERVAL)
    }

    fn kept_for(rate: Rate, idle: Duration, sweep_interval: Duration) -> Self {
        let state = State { buckets: HashMap::new(), swept: Instant::now() };
        Self { rate, idle, sweep_interval, state: Mutex::new(state), evicted: AtomicU64::new(0) }
    }

    pub(crate) fn take(&self, key: K, now: Instant) -> Taken {
        let mut state = self.state();
        self.sweep(&mut state, now);
        if state.buckets.len() >= MAX_BUCKETS && !state.buckets.contains_key(&key) {
            self.evict(&mut state);
        }
        let bucket = state.buckets.entry(key).or_insert(Bucket { tokens: f64::from(self.rate.burst), at: now });
        *bucket = self.filled(*bucket, now);
        if bucket.tokens < 1.0 {
            return Taken::Empty { next_after: Duration::from_secs_f64((1.0 - bucket.tokens) / self.per_second()) };
        }
        bucket.tokens -= 1.0;
        Taken::Token { remaining: bucket.tokens as u32 }
    }

    /// Whether the next `take` would find nothing.
    pub(crate) fn is_empty(&self, key: &K, now: Instant) -> bool {
        self.state().buckets.get(key).is_some_and(|bucket| self.filled(*bucket, now).tokens < 1.0)
    }

    fn filled(&self, bucket: Bucket, now: Instant) -> Bucket {
        let gained = now.saturating_duration_since(bucket.at).as_secs_f64() * self.per_second();
        Bucket { tokens: (bucket.tokens + gained).min(f64::from(self.rate.burst)), at: bucket.at.max(now) }
    }

    fn per_second(&self) -> f64 {
        f64::from(self.rate.per_minute) / 60.0
    }

    /// Forgets buckets that are full and idle: they say nothing.
    fn sweep(&self, state: &mut State<K>, now: Instant) {
        if now.saturating_duration_since(state.swept) < self.sweep_interval {
            return;
        }
        state.swept = now;
        let before = state.buckets.len();
        let full = f64::from(self.rate.burst);
        state.buckets.retain(|_, bucket| {
            now.saturating_duration_since(bucket.at) < self.idle || self.filled(*bucket, now).tokens < full
        });
        self.evicted.fetch_add((before - state.buckets.len()) as u64, Ordering::Relaxed);
    }

    fn evict(&self, state: &mut State<K>) {
        let mut uses: Vec<Instant> = state.buckets.values().map(|bucket| bucket.at).collect();
        let (_, &mut oldest_kept, _) = uses.select_nth_unstable(EVICTED_AT_ONCE);
        let before = state.buckets.len();
        state.buckets.retain(|_, bucket| bucket.at >= oldest_kept);
        // All may have been used at the same moment.
        if state.buckets.len() == before {
            state.buckets.clear();
        }
        self.evicted.fetch_add((before - state.buckets.len()) as u64, Ordering::Relaxed);
    }

    fn len(&self) -> usize {
        self.state().buckets.len()
    }

    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limit on everybody's requests (http-api 4.4).
#[derive(Debug)]
pub(crate) struct RateLimiter {
    options: RateLimitOptions,
    buckets: Buckets<Payer>,
    allowed: AtomicU64,
    limited: AtomicU64,
}

/// Whose bucket a request takes from. Made of what was authenticated: a header
/// alone never leads to another caller's bucket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Payer {
    /// The owner that a key is bound to.
    Owner(OwnerId),
    /// An owner whom a caller named that is trusted to.
    Named(Box<Self>, OwnerId),
    Key(KeyId),
    Configured(ConfiguredKey),
    Address(IpAddr),
}

/// What a limited response says about the limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance {
    limit: u32,
    remaining: u32,
}

/// The limiter's state, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RateLimitStats {
    pub(crate) active_buckets: u64,
    pub(crate) allowed_total: u64,
    pub(crate) limited_total: u64,
    pub(crate) evicted_total: u64,
}

impl RateLimiter {
    pub(crate) fn new(options: &RateLimitOptions) -> Self {
        let rate = Rate { burst: options.burst.get(), per_minute: options.requests_per_minute.get() };
        let buckets = Buckets::kept_for(rate, options.bucket_ttl, options.cleanup_interval);
        Self { options: options.clone(), buckets, allowed: AtomicU64::new(0), limited: AtomicU64::new(0) }
    }

    /// `named` is whom the caller says that it acts for.
    pub(crate) fn take(
        &self,
        identity: &Identity,
        named: Option<&OwnerId>,
        address: IpAddr,
    ) -> Result<Allowance, (ApiError, Allowance)> {
        let limit = self.options.burst.get();
        match self.buckets.take(self.payer(identity, named, address), Instant::now()) {
            Taken::Token { remaining } => {
                self.allowed.fetch_add(1, Ordering::Relaxed);
                Ok(Allowance { limit, remaining })
            }
            Taken::Empty { next_after } => {
                self.limited.fetch_add(1, Ordering::Relaxed);
                let message = format!(
                    "resource limit exceeded: {} requests a minute are allowed",
                    self.options.requests_per_minute
                );
                Err((too_many(message, next_after), Allowance { limit, remaining: 0 }))
            }
        }
    }

    pub(crate) fn options(&self) -> &RateLimitOptions {
        &self.options
    }

    pub(crate) fn stats(&self) -> RateLimitStats {
        RateLimitStats {
            active_buckets: self.buckets.len() as u64,
            allowed_total: self.allowed.load(Ordering::Relaxed),
            limited_total: self.limited.load(Ordering::Relaxed),
            evicted_total: self.buckets.evicted.load(Ordering::Relaxed),
        }
    }

    fn payer(&self, identity: &Identity, named: Option<&OwnerId>, address: IpAddr) -> Payer {
        let address = Payer::Address(subscriber(address));
        let caller = match identity {
            Identity::Anonymous(_) => address.clone(),
            Identity::Configured(key) => Payer::Configured(*key),
            Identity::Stored(key) => Payer::Key(key.id().clone()),
        };
        match (self.options.key_by, identity.owner(), named) {
            (RateLimitKey::Address, _, _) => address,
            (RateLimitKey::Owner, Some(bound), _) => Payer::Owner(bound.clone()),
            (RateLimitKey::Owner, None, Some(named)) if is_trusted_to_name(identity) => {
                Payer::Named(Box::new(caller), named.clone())
            }
            (RateLimitKey::Owner, None, _) | (RateLimitKey::ApiKey, _, _) => caller,
        }
    }
}

/// Who acts for many owners. Everybody else could escape the limit by naming a
/// new one each time.
fn is_trusted_to_name(identity: &Identity) -> bool {
    match identity {
        Identity::Anonymous(_) => false,
        Identity::Configured(_) => true,
        Identity::Stored(key) => key.grants(KeyScope::Admin),
    }
}

impl Allowance {
    pub(crate) fn show(self, headers: &mut HeaderMap) {
        headers.insert(LIMIT_HEADER, self.limit.into());
        headers.insert(REMAINING_HEADER, self.remaining.into());
    }
}

/// 429, with the time after which it is worth trying again.
pub(crate) fn too_many(message: String, next_after: Duration) -> ApiError {
    let seconds = next_after.as_secs_f64().ceil().max(1.0) as u64;
    ApiError::new(ErrorCode::ResourceLimit, message)
        .hint(format!("try again in {seconds} s"))
        .header(header::RETRY_AFTER, HeaderValue::from(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 3, per_minute: 60 };

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_burst_then_the_steady_rate() {
        let (buckets, start) = (Buckets::new(RATE), Instant::now());
        let take = |ms| buckets.take("a", after(start, ms));
        assert_eq!([take(0), take(0), take(0)].map(|taken| matches!(taken, Taken::Token { .. })), [true; 3]);
        assert_eq!(take(0), Taken::Empty { next_after: Duration::from_secs(1) });
        assert!(buckets.is_empty(&"a", after(start, 900)) && !buckets.is_empty(&"b", after(start, 900)));
        assert!(matches!(take(500), Taken::Empty { .. }), "asking does not cost anything");
        assert_eq!(take(1000), Taken::Token { remaining: 0 });
        assert_eq!(take(60_000), Taken::Token { remaining: 2 }, "never more than the burst");
        assert_eq!(buckets.take("b", start), Taken::Token { remaining: 2 }, "others are not affected");
    }

    #[test]
    fn idle_buckets_are_forgotten_only_when_they_are_full() {
        let slow = Rate { burst: 3, per_minute: 1 };
        let buckets = Buckets::kept_for(slow, Duration::from_secs(10), Duration::from_secs(1));
        let start = Instant::now();
        buckets.take("a", start);
        buckets.take("b", after(start, 30_000));
        assert_eq!(buckets.len(), 2, "idle, but not full again");
        buckets.take("b", after(start, 61_000));
        assert_eq!(buckets.len(), 1);
        assert_eq!(buckets.evicted.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_number_of_buckets_is_bounded_and_the_oldest_go_first() {
        let (buckets, start) = (Buckets::new(RATE), Instant::now());
        for number in 0..MAX_BUCKETS as u64 {
            buckets.take(number, start + Duration::from_micros(number));
        }
        let newest = MAX_BUCKETS as u64 - 1;
        buckets.take(u64::MAX, after(start, 101));
        assert_eq!(buckets.len(), MAX_BUCKETS - EVICTED_AT_ONCE + 1);
        let state = buckets.state();
        assert!(state.buckets.contains_key(&newest) && !state.buckets.contains_key(&0));
    }

    #[test]
    fn waiting_is_at_least_a_second_and_rounded_up() {
        for (ms, seconds) in [(1, "1"), (1000, "1"), (1001, "2")] {
            let response =
                axum::response::IntoResponse::into_response(too_many(String::new(), Duration::from_millis(ms)));
            assert_eq!(response.headers()[header::RETRY_AFTER], seconds);
        }
    }
}

//! The wall clock, which tests can put forward.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use stacyvm_api::Timestamp;

/// What time it is. Clones show the same time.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    ahead_ms: Arc<AtomicI64>,
}

impl Clock {
    pub fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(Timestamp::now().unix_ms() + self.ahead_ms.load(Ordering::Relaxed))
    }

    /// Puts the clock forward, for tests of deadlines.
    pub fn advance(&self, span: Duration) {
        self.ahead_ms.fetch_add(i64::try_from(span.as_millis()).unwrap_or(i64::MAX), Ordering::Relaxed);
    }
}

//! Waiting for conditions, never for a fixed time.

use std::fmt::Debug;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// How long something may take on a loaded machine before it counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The result of `work`; a test fails rather than hangs.
pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what}: not after {PATIENCE:?}"))
}

/// Looks again and again until there is something.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not after {PATIENCE:?}");
        sleep(POLL_INTERVAL).await;
    }
}

/// Looks until what is seen is as expected; the message shows what it stays.
pub(crate) async fn eventually_equal<T: PartialEq + Debug>(what: &str, expected: &T, mut look: impl AsyncFnMut() -> T) {
    let end = Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        if seen == *expected {
            return;
        }
        assert!(Instant::now() < end, "{what}: still {seen:#?} after {PATIENCE:?}, not {expected:#?}");
        sleep(POLL_INTERVAL).await;
    }
}

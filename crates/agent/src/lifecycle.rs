//! The sandbox's end: by signal, or by a deadline that nobody extended.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stacyvm_envd::boot::EXPIRY_GRACE_MS;
use tokio::time::{Instant, sleep, timeout};

use crate::Sandbox;
use crate::signals::Signals;

/// What a polite signal gives commands before they are killed.
const TERMINATION_GRACE: Duration = Duration::from_secs(5);

/// The wall clock is looked at this often: it may jump when a machine wakes up.
const CLOCK_CHECK: Duration = Duration::from_mins(10);

const POLL: Duration = Duration::from_millis(20);

/// Returns when the sandbox is over and everything in it is dead or dying.
pub(crate) async fn until_ended(sandbox: Arc<Sandbox>) -> io::Result<()> {
    // Nobody means a sandbox's first process with a key press. A lost terminal
    // means nothing to a server.
    let polite: &[_] = if sandbox.is_init() { &[libc::SIGTERM] } else { &[libc::SIGTERM, libc::SIGINT] };
    let signals = Signals::of(polite)?;
    tokio::select! {
        signal = signals.next() => forward(&sandbox, signal?).await,
        () = expired(&sandbox) => {}
    }
    if sandbox.is_init() {
        let _ = crate::process::signal_everybody(rustix::process::Signal::KILL);
    }
    sandbox.processes.kill_all().await;
    Ok(())
}

/// Passes a signal on and waits a little for what runs to end by itself.
async fn forward(sandbox: &Sandbox, signal: i32) {
    let passed_on = async {
        // What sent it may have come before the word that it runs.
        while sandbox.processes.are_starting() {
            sleep(POLL).await;
        }
        for process in sandbox.processes.list() {
            if process.exit().is_none() {
                let _ = crate::process::signal(process, signal).await;
            }
        }
        while !sandbox.processes.are_ended() {
            sleep(POLL).await;
        }
        // Their ends are still to be told.
        sleep(POLL).await;
    };
    let _ = timeout(TERMINATION_GRACE, passed_on).await;
}

/// Waits until the expiry and its grace have passed.
async fn expired(sandbox: &Sandbox) {
    let mut expiry = sandbox.expires_at_unix_ms.subscribe();
    loop {
        let expires_at = *expiry.borrow_and_update();
        let left = time_left(expires_at, now_unix_ms());
        match left {
            Some(Duration::ZERO) => return,
            Some(left) => {
                let until = Instant::now() + left.min(CLOCK_CHECK);
                tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    _ = expiry.changed() => {}
                }
            }
            None => {
                let _ = expiry.changed().await;
            }
        }
    }
}

/// Until the sandbox is ended; `None` without an expiry.
fn time_left(expires_at_unix_ms: i64, now_unix_ms: i64) -> Option<Duration> {
    if expires_at_unix_ms <= 0 {
        return None;
    }
    let end = expires_at_unix_ms.saturating_add(EXPIRY_GRACE_MS);
    Some(Duration::from_millis(u64::try_from(end.saturating_sub(now_unix_ms)).unwrap_or(0)))
}

fn now_unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_ends_a_minute_after_its_expiry() {
        assert_eq!(time_left(0, 5), None);
        assert_eq!(time_left(1_000, 61_000), Some(Duration::ZERO));
        assert_eq!(time_left(1_000, 60_999), Some(Duration::from_millis(1)));
        assert_eq!(time_left(i64::MAX, 0), Some(Duration::from_millis(i64::MAX as u64)));
    }
}

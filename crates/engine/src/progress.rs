//! Progress that a person can follow: not every block of a download.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use stacyvm_sandbox::{Progress, ProgressSink};

/// Shortest time between two reports of the same phase.
const INTERVAL: Duration = Duration::from_millis(250);
/// Quick creates report nothing: this much time passes before the first.
const QUIET: Duration = Duration::from_millis(100);

/// Passes on a report when its phase is new or some time has passed.
pub(crate) struct ThrottledProgress<S> {
    sink: S,
    begun: Instant,
    last: Mutex<Option<(&'static str, Instant)>>,
}

impl<S: ProgressSink> ThrottledProgress<S> {
    pub(crate) fn new(sink: S) -> Self {
        Self { sink, begun: Instant::now(), last: Mutex::new(None) }
    }
}

impl<S: ProgressSink> ProgressSink for ThrottledProgress<S> {
    fn report(&self, progress: Progress) {
        let now = Instant::now();
        let downloads = progress.total_bytes > 0;
        if !downloads && now - self.begun < QUIET {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let finished = downloads && progress.done_bytes >= progress.total_bytes;
        if let Some((phase, at)) = *last
            && phase == progress.phase
            && now - at < INTERVAL
            && !finished
        {
            return;
        }
        *last = Some((progress.phase, now));
        drop(last);
        self.sink.report(progress);
    }
}

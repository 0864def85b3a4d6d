//! One worker for callers that want the same thing at the same time.
//!
//! The work belongs to all who wait for it: each sees its progress and gets
//! its outcome, and when the last of them goes away it is ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stacyvm_sandbox::{Progress, ProgressSink};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::ImageError;

type Outcome<T> = Result<T, ImageError>;

pub(crate) struct Flights<T>(Mutex<HashMap<String, Weak<Flight<T>>>>);

struct Flight<T> {
    progress: watch::Receiver<Option<Progress>>,
    outcome: watch::Receiver<Option<Outcome<T>>>,
    task: AbortHandle,
}

/// Where the work reports to. Slow watchers miss steps, never the latest.
#[derive(Clone)]
pub(crate) struct Reporter(watch::Sender<Option<Progress>>);

impl Reporter {
    pub(crate) fn report(&self, progress: Progress) {
        self.0.send_replace(Some(progress));
    }
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Waits for the work named `key`, starting it if nobody does it already.
    pub(crate) async fn join<F>(
        &self,
        key: String,
        sink: &dyn ProgressSink,
        start: impl FnOnce(Reporter) -> F,
    ) -> Outcome<T>
    where
        F: Future<Output = Outcome<T>> + Send + 'static,
    {
        let flight = self.find_or_start(&key, start);
        let mut progress = flight.progress.clone();
        let mut outcome = flight.outcome.clone();
        progress.mark_changed();
        let mut reporting = true;
        loop {
            tokio::select! {
                changed = progress.changed(), if reporting => match changed {
                    Ok(()) => {
                        let latest = progress.borrow_and_update().clone();
                        if let Some(latest) = latest {
                            sink.report(latest);
                        }
                    }
                    Err(_) => reporting = false,
                },
                landed = outcome.wait_for(Option::is_some) => {
                    let landed = landed.ok().and_then(|outcome| outcome.clone());
                    return landed.unwrap_or(Err(ImageError::Cancelled { reference: key }));
                }
            }
        }
    }

    fn find_or_start<F>(&self, key: &str, start: impl FnOnce(Reporter) -> F) -> Arc<Flight<T>>
    where
        F: Future<Output = Outcome<T>> + Send + 'static,
    {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.strong_count() > 0);
        // One that has landed is history: who comes now wants a fresh look.
        if let Some(flight) = flights.get(key).and_then(Weak::upgrade)
            && flight.outcome.borrow().is_none()
        {
            return flight;
        }
        let (report, progress) = watch::channel(None);
        let (land, outcome) = watch::channel(None);
        let work = start(Reporter(report));
        let task = tokio::spawn(async move {
            let result = work.await;
            land.send_replace(Some(result));
        });
        let flight = Arc::new(Flight { progress, outcome, task: task.abort_handle() });
        flights.insert(key.to_owned(), Arc::downgrade(&flight));
        flight
    }
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn failure() -> Outcome<()> {
        Err(ImageError::NotStored { reference: "x".into() })
    }

    #[tokio::test]
    async fn callers_share_one_worker() {
        let flights = Flights::<()>::default();
        let started = AtomicUsize::new(0);
        let (release, released) = watch::channel(false);
        let join = || {
            let mut released = released.clone();
            flights.join("k".into(), &(), |_| {
                started.fetch_add(1, Ordering::SeqCst);
                async move {
                    released.wait_for(|go| *go).await.unwrap();
                    failure()
                }
            })
        };
        let (first, second, ()) = tokio::join!(join(), join(), async { release.send(true).unwrap() });
        assert!(matches!(first, Err(ImageError::NotStored { .. })));
        assert!(matches!(second, Err(ImageError::NotStored { .. })));
        assert_eq!(started.load(Ordering::SeqCst), 1);
        assert!(join().await.is_err());
        assert_eq!(started.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn work_ends_with_its_last_caller() {
        let flights = Flights::<()>::default();
        let (alive, mut gone) = watch::channel(());
        {
            let waiting = flights.join("k".into(), &(), |_| async move {
                let _alive = alive;
                std::future::pending().await
            });
            tokio::select! {
                _ = waiting => panic!("nothing can land"),
                () = tokio::task::yield_now() => {}
            }
        }
        // The sender lives in the work; its end shows here.
        assert!(gone.changed().await.is_err());
    }
}

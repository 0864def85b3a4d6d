//! Who may make another sandbox now, and who waits.
//!
//! Capacity is reserved before anything is made and given back when the
//! [`Reservation`] is dropped, whatever happened in between; no lock is held
//! meanwhile. Waiters are served in order of arrival, except that one who is
//! held up only by its own owner's limit does not hold up others.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stacyvm_api::OwnerId;
use tokio::sync::oneshot;

use crate::LimitExceeded;
use crate::metrics::QueueStats;
use crate::options::{Limits, SpawnOverflow};
use crate::quota::Quotas;

#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    overflow: SpawnOverflow,
    quotas: Arc<Quotas>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    total: u64,
    by_owner: HashMap<OwnerId, u64>,
    queue: VecDeque<Waiter>,
    next_waiter: u64,
    stats: QueueStats,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    owner: Option<OwnerId>,
    granted: oneshot::Sender<Reservation>,
}

/// Room for one sandbox, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// `None` once it was given back.
    admission: Option<Arc<Admission>>,
    owner: Option<OwnerId>,
}

/// How many there are, and what fits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Occupancy {
    pub(crate) active: u64,
    pub(crate) active_of_owner: u64,
    pub(crate) exceeded: Option<LimitExceeded>,
}

/// What a create that has to wait tells about it.
pub(crate) trait QueueObserver: Send + Sync {
    fn queued(&self, depth: usize);
    fn dequeued(&self, waited: Duration);
    fn timed_out(&self, waited: Duration);
}

impl Admission {
    pub(crate) fn new(limits: Limits, overflow: SpawnOverflow, quotas: Arc<Quotas>) -> Arc<Self> {
        Arc::new(Self { limits, overflow, quotas, state: Mutex::default() })
    }

    /// Room for one more, at once or, in queue mode, after a wait.
    pub(crate) async fn reserve(
        self: &Arc<Self>,
        owner: Option<&OwnerId>,
        observer: &dyn QueueObserver,
    ) -> Result<Reservation, LimitExceeded> {
        let (mut ticket, timeout) = {
            let mut state = self.lock();
            let Some(exceeded) = self.exceeded(&state, owner) else {
                return Ok(self.take(&mut state, owner.cloned()));
            };
            let SpawnOverflow::Queue { max_waiters, timeout } = self.overflow else { return Err(exceeded) };
            if state.queue.len() >= max_waiters {
                return Err(LimitExceeded::QueueFull { waiting: state.queue.len() });
            }
            (self.enqueue(&mut state, owner.cloned()), timeout)
        };
        observer.queued(self.lock().queue.len());
        let since = Instant::now();
        let granted = tokio::time::timeout(timeout, &mut ticket.granted).await;
        let waited = since.elapsed();
        let Ok(Ok(reservation)) = granted else {
            self.lock().stats.timeout_total += 1;
            observer.timed_out(waited);
            return Err(LimitExceeded::QueueTimeout { waited: timeout });
        };
        self.note_wait(waited);
        observer.dequeued(waited);
        Ok(reservation)
    }

    /// Room for what exists already, limits or not.
    pub(crate) fn reserve_existing(self: &Arc<Self>, owner: Option<&OwnerId>) -> Reservation {
        self.take(&mut self.lock(), owner.cloned())
    }

    pub(crate) fn occupancy(&self, owner: Option<&OwnerId>) -> Occupancy {
        let state = self.lock();
        Occupancy {
            active: state.total,
            active_of_owner: owner.map_or(0, |owner| state.of_owner(owner)),
            exceeded: self.exceeded(&state, owner),
        }
    }

    /// After a change of limits: who fits now goes on.
    pub(crate) fn reconsider(self: &Arc<Self>) {
        self.admit_waiting(&mut self.lock());
    }

    pub(crate) fn stats(&self) -> QueueStats {
        let state = self.lock();
        let (enabled, capacity, timeout) = match self.overflow {
            SpawnOverflow::Reject => (false, 0, Duration::ZERO),
            SpawnOverflow::Queue { max_waiters, timeout } => (true, max_waiters, timeout),
        };
        QueueStats {
            enabled,
            depth: state.queue.len() as u64,
            capacity: capacity as u64,
            timeout_ms: timeout.as_millis() as u64,
            ..state.stats
        }
    }

    fn exceeded(&self, state: &State, owner: Option<&OwnerId>) -> Option<LimitExceeded> {
        if let Some(max) = self.limits.max_sandboxes.filter(|max| state.total >= *max) {
            return Some(LimitExceeded::Sandboxes { max });
        }
        let owner = owner?;
        let max = self.quotas.effective(Some(owner), &self.limits).max_sandboxes?;
        (state.of_owner(owner) >= max).then_some(LimitExceeded::OwnerSandboxes { max })
    }

    fn take(self: &Arc<Self>, state: &mut State, owner: Option<OwnerId>) -> Reservation {
        state.total += 1;
        if let Some(owner) = &owner {
            *state.by_owner.entry(owner.clone()).or_default() += 1;
        }
        Reservation { admission: Some(Arc::clone(self)), owner }
    }

    fn enqueue(self: &Arc<Self>, state: &mut State, owner: Option<OwnerId>) -> Ticket {
        let (sender, receiver) = oneshot::channel();
        let id = state.next_waiter;
        state.next_waiter += 1;
        state.stats.enqueued_total += 1;
        state.queue.push_back(Waiter { id, owner, granted: sender });
        Ticket { admission: Arc::clone(self), id, granted: receiver }
    }

    fn admit_waiting(self: &Arc<Self>, state: &mut State) {
        let mut at = 0;
        while at < state.queue.len() {
            let owner = state.queue[at].owner.clone();
            match self.exceeded(state, owner.as_ref()) {
                None => {}
                Some(LimitExceeded::OwnerSandboxes { .. }) => {
                    at += 1;
                    continue;
                }
                Some(_) => return,
            }
            let Some(waiter) = state.queue.remove(at) else { return };
            let reservation = self.take(state, owner);
            if let Err(mut refused) = waiter.granted.send(reservation) {
                // It gave up just now. Dropping what it was given would take
                // the lock that is held here.
                refused.admission = None;
                state.release(refused.owner.as_ref());
            }
        }
    }

    fn note_wait(&self, waited: Duration) {
        let waited_ms = waited.as_millis() as u64;
        let stats = &mut self.lock().stats;
        stats.dequeued_total += 1;
        stats.wait_count += 1;
        stats.wait_total_ms += waited_ms;
        stats.wait_max_ms = stats.wait_max_ms.max(waited_ms);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn of_owner(&self, owner: &OwnerId) -> u64 {
        self.by_owner.get(owner).copied().unwrap_or(0)
    }

    fn release(&mut self, owner: Option<&OwnerId>) {
        self.total = self.total.saturating_sub(1);
        let Some(owner) = owner else { return };
        if let Some(count) = self.by_owner.get_mut(owner) {
            *count -= 1;
            if *count == 0 {
                self.by_owner.remove(owner);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(admission) = self.admission.take() else { return };
        let mut state = admission.lock();
        state.release(self.owner.as_ref());
        admission.admit_waiting(&mut state);
    }
}

/// A place in the queue; whoever gives up leaves it.
struct Ticket {
    admission: Arc<Admission>,
    id: u64,
    granted: oneshot::Receiver<Reservation>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.lock().queue.retain(|waiter| waiter.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    struct Silent;
    impl QueueObserver for Silent {
        fn queued(&self, _depth: usize) {}
        fn dequeued(&self, _waited: Duration) {}
        fn timed_out(&self, _waited: Duration) {}
    }

    fn admission(total: u64, per_owner: u64, max_waiters: usize) -> Arc<Admission> {
        let limits =
            Limits { max_sandboxes: Some(total), max_sandboxes_per_owner: Some(per_owner), ..Limits::default() };
        let overflow = SpawnOverflow::Queue { max_waiters, timeout: Duration::from_mins(1) };
        Admission::new(limits, overflow, Arc::default())
    }

    fn owner(name: &str) -> OwnerId {
        name.parse().unwrap()
    }

    #[tokio::test]
    async fn waiters_are_served_in_order_and_an_owner_at_its_limit_holds_up_nobody() {
        let admission = admission(2, 1, 10);
        let (alice, bob, carol) = (owner("alice"), owner("bob"), owner("carol"));
        let first = admission.reserve(Some(&alice), &Silent).await.unwrap();
        let mut second_of_alice = Box::pin(admission.reserve(Some(&alice), &Silent));
        assert!((&mut second_of_alice).now_or_never().is_none());
        // Alice waits for Alice; Bob passes.
        let of_bob = admission.reserve(Some(&bob), &Silent).now_or_never().unwrap().unwrap();
        let mut of_carol = Box::pin(admission.reserve(Some(&carol), &Silent));
        assert!((&mut of_carol).now_or_never().is_none());
        drop(first);
        let second_of_alice = second_of_alice.now_or_never().expect("first in the queue").unwrap();
        assert!((&mut of_carol).now_or_never().is_none());
        drop(of_bob);
        let of_carol = of_carol.now_or_never().unwrap().unwrap();
        assert_eq!(admission.occupancy(Some(&carol)).active, 2);
        drop((second_of_alice, of_carol));
        let occupancy = admission.occupancy(Some(&carol));
        assert_eq!(occupancy, Occupancy { active: 0, active_of_owner: 0, exceeded: None });
        assert_eq!(admission.stats().dequeued_total, 2);
    }

    #[tokio::test]
    async fn who_gives_up_leaves_the_queue_and_loses_no_room() {
        let admission = admission(1, 9, 2);
        let held = admission.reserve(None, &Silent).await.unwrap();
        let mut gives_up = Box::pin(admission.reserve(None, &Silent));
        assert!((&mut gives_up).now_or_never().is_none());
        let mut granted_unseen = Box::pin(admission.reserve(None, &Silent));
        assert!((&mut granted_unseen).now_or_never().is_none());
        let full = admission.reserve(None, &Silent).await.unwrap_err();
        assert_eq!(full, LimitExceeded::QueueFull { waiting: 2 });
        drop(gives_up);
        assert_eq!(admission.stats().depth, 1);
        drop(held);
        // Granted, but dropped before it was seen.
        drop(granted_unseen);
        assert_eq!(admission.occupancy(None).active, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_limit_and_a_raised_quota_lets_in() {
        let admission = admission(5, 1, 2);
        let alice = owner("alice");
        let _held = admission.reserve(Some(&alice), &Silent).await.unwrap();
        let timeout = admission.reserve(Some(&alice), &Silent).await.unwrap_err();
        assert_eq!(timeout, LimitExceeded::QueueTimeout { waited: Duration::from_mins(1) });
        assert_eq!(admission.stats().timeout_total, 1);
        let mut waiting = Box::pin(admission.reserve(Some(&alice), &Silent));
        assert!((&mut waiting).now_or_never().is_none());
        let request = stacyvm_api::OwnerQuotaRequest { max_sandboxes: 2, ..Default::default() };
        let now = stacyvm_api::Timestamp::from_unix_ms(0);
        admission.quotas.put(crate::quota::parse(&alice, &request, None, now).unwrap());
        admission.reconsider();
        assert!(waiting.now_or_never().unwrap().is_ok());
    }
}

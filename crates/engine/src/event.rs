//! Events: a numbered sequence that is kept, so that a client can go on after
//! the last one it saw.
//!
//! The newest events are in memory, all of them (up to the retention) in the
//! store. A subscriber has a position and no buffer of its own: however slow it
//! is, it costs nothing and misses nothing that is still kept.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::{Stream, stream};
use serde_json::{Map, Value};
use stacyvm_api::{Event, EventKind, SandboxId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::EngineError;
use crate::clock::Clock;
use crate::metrics::EventStats;
use crate::store::{EVENTS_USED_TO, Store, StoreError, StoredEvent, event_id};

/// Events kept in memory.
const RING_EVENTS: usize = 4096;
/// Events read from the store at once.
const REPLAY_EVENTS: u32 = 512;
/// After a crash this many numbers are skipped: events that clients saw may not
/// have been written, and a number must never name two events.
const NUMBERS_SKIPPED: u64 = 100_000;
/// Counter with one more than the newest number when the engine ended in
/// order; zero while it runs.
const EVENTS_CLEAN_AT: &str = "events_clean_at";

/// One item of a subscription.
#[derive(Debug, Clone, PartialEq)]
pub enum EventItem {
    Event(Event),
    /// At most so many events lie between the last item and the next one and
    /// are no longer kept. After a crash of the server, a large number: what
    /// was not yet written is lost, and how much that was is not known.
    Missed {
        events: u64,
    },
}

/// Replay of what is kept, then live events, in order and without gaps other
/// than those announced as `Missed`. Ends when the engine shuts down.
pub struct EventStream {
    inner: Pin<Box<dyn Stream<Item = EventItem> + Send>>,
}

impl Stream for EventStream {
    type Item = EventItem;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<EventItem>> {
        self.inner.as_mut().poll_next(context)
    }
}

/// What an event is about.
#[derive(Debug, Default)]
pub(crate) struct Subject {
    pub(crate) sandbox: Option<SandboxId>,
    pub(crate) tenant: Option<String>,
    pub(crate) data: Map<String, Value>,
}

pub(crate) struct EventBus {
    store: Store,
    clock: Clock,
    ring: Mutex<Ring>,
    head: watch::Sender<u64>,
    /// Number of the first event of this process.
    first: u64,
    subscribers: AtomicU64,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Ring {
    next: u64,
    events: VecDeque<Arc<StoredEvent>>,
}

impl EventBus {
    pub(crate) async fn open(store: Store, clock: Clock, stop: CancellationToken) -> Result<Arc<Self>, StoreError> {
        let newest = store.newest_event().await?.max(store.counter(EVENTS_USED_TO).await?);
        let clean_at = store.counter(EVENTS_CLEAN_AT).await?;
        let first = match clean_at.checked_sub(1) {
            Some(clean) => clean.max(newest) + 1,
            // A new file, or a crash.
            None if newest == 0 => 1,
            None => newest + NUMBERS_SKIPPED,
        };
        // A crash before anything is written must not hand these out again.
        store.set_counter(EVENTS_USED_TO, first).await?;
        store.set_counter(EVENTS_CLEAN_AT, 0).await?;
        Ok(Arc::new(Self {
            store,
            clock,
            ring: Mutex::new(Ring { next: first, events: VecDeque::new() }),
            head: watch::Sender::new(first - 1),
            first,
            subscribers: AtomicU64::new(0),
            stop,
        }))
    }

    /// Notes that everything was written, at an orderly end.
    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        self.store.set_counter(EVENTS_CLEAN_AT, self.newest() + 1).await
    }

    pub(crate) fn emit(&self, kind: EventKind, subject: Subject) {
        let mut ring = self.ring();
        let number = ring.next;
        ring.next += 1;
        let event = Event {
            id: event_id(number),
            kind,
            sandbox_id: subject.sandbox,
            timestamp: self.clock.now(),
            data: (!subject.data.is_empty()).then_some(subject.data),
        };
        let stored = Arc::new(StoredEvent { number, tenant: subject.tenant, event });
        if ring.events.len() == RING_EVENTS {
            ring.events.pop_front();
        }
        ring.events.push_back(Arc::clone(&stored));
        // Under the lock, so that the store sees them in order.
        self.store.writer().log_event(stored);
        drop(ring);
        self.head.send_replace(number);
    }

    /// Number of the newest event.
    pub(crate) fn newest(&self) -> u64 {
        self.ring().next - 1
    }

    pub(crate) fn stats(&self) -> EventStats {
        let ring = self.ring();
        EventStats {
            subscribers: self.subscribers.load(Ordering::Relaxed),
            history_size: ring.events.len() as u64,
            events_total: ring.next - self.first,
        }
    }

    pub(crate) fn subscribe(
        self: &Arc<Self>,
        tenant: Option<String>,
        after: Option<&str>,
    ) -> Result<EventStream, EngineError> {
        let after = after.map(parse_event_id).transpose()?;
        let mut head = self.head.subscribe();
        head.mark_changed();
        self.subscribers.fetch_add(1, Ordering::Relaxed);
        let newest = self.newest();
        // A number from the future is another server's: begin with what is new.
        let position = after.unwrap_or(newest).min(newest);
        let subscriber = Subscriber { bus: Arc::clone(self), head, tenant, position, ready: VecDeque::new() };
        let inner = stream::unfold(subscriber, |mut subscriber| async move {
            let item = subscriber.next().await?;
            Some((item, subscriber))
        });
        Ok(EventStream { inner: Box::pin(inner) })
    }

    /// Events after a number that are in memory, if none is missing before
    /// them.
    fn in_ring(&self, after: u64) -> Option<Vec<Arc<StoredEvent>>> {
        let ring = self.ring();
        let skip = (after + 1).checked_sub(ring.oldest())?;
        Some(ring.events.iter().skip(skip as usize).cloned().collect())
    }

    fn oldest_in_ring(&self) -> u64 {
        self.ring().oldest()
    }

    /// Stored events after a number, as many as one read brings.
    async fn replay(&self, after: u64) -> Result<Vec<StoredEvent>, StoreError> {
        self.store.writer().committed().await?;
        self.store.events_after(after, REPLAY_EVENTS).await
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Number of the oldest event in memory, or of the next one.
    fn oldest(&self) -> u64 {
        self.events.front().map_or(self.next, |event| event.number)
    }
}

struct Subscriber {
    bus: Arc<EventBus>,
    head: watch::Receiver<u64>,
    tenant: Option<String>,
    /// Number of the last event that was handed out or passed over.
    position: u64,
    ready: VecDeque<EventItem>,
}

impl Subscriber {
    async fn next(&mut self) -> Option<EventItem> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Some(item);
            }
            tokio::select! {
                biased;
                () = self.bus.stop.cancelled() => return None,
                changed = self.head.changed() => changed.ok()?,
            }
            self.read().await;
        }
    }

    /// Takes in what follows the position. Numbers have no gaps but those left
    /// by deleted or lost events, so a gap is what was missed.
    async fn read(&mut self) {
        loop {
            if let Some(events) = self.bus.in_ring(self.position) {
                for event in events {
                    self.take(&event);
                }
                return;
            }
            let stored = self.bus.replay(self.position).await.unwrap_or_else(|error| {
                tracing::error!(error = ?error, "stored events cannot be replayed");
                Vec::new()
            });
            if !stored.is_empty() {
                for event in stored {
                    self.pass_over(event.number - 1);
                    self.take(&event);
                }
                // More may follow than one read brings.
                self.head.mark_changed();
                return;
            }
            // Nothing more in the store: what follows is in memory.
            self.pass_over(self.bus.oldest_in_ring() - 1);
        }
    }

    /// Goes on to a position, and says so if that leaves something out.
    fn pass_over(&mut self, position: u64) {
        if position > self.position {
            self.ready.push_back(EventItem::Missed { events: position - self.position });
            self.position = position;
        }
    }

    fn take(&mut self, stored: &StoredEvent) {
        self.position = self.position.max(stored.number);
        if self.tenant.is_none() || self.tenant == stored.tenant {
            self.ready.push_back(EventItem::Event(stored.event.clone()));
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.bus.subscribers.fetch_sub(1, Ordering::Relaxed);
    }
}

fn parse_event_id(text: &str) -> Result<u64, EngineError> {
    let number = text.trim().strip_prefix("evt-").and_then(|number| number.parse().ok());
    number.filter(|number| *number < u64::MAX / 2).ok_or_else(|| EngineError::BadEventId(text.to_owned()))
}

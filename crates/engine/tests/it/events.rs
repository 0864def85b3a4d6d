//! The sequence of events: order, replay, restart.

use std::time::Duration;

use futures_util::StreamExt as _;
use stacyvm_api::{CreateRequest, ErrorCode, Event, EventKind};
use stacyvm_engine::{Caller, CreateOptions, EventItem, EventStream};

use crate::harness::{Host, PATIENCE, caller, create, run};

async fn next(events: &mut EventStream) -> EventItem {
    tokio::time::timeout(PATIENCE, events.next()).await.expect("an event in time").expect("an event")
}

async fn next_event(events: &mut EventStream) -> Event {
    match next(events).await {
        EventItem::Event(event) => event,
        EventItem::Missed { events } => panic!("{events} were missed"),
    }
}

fn number(event: &Event) -> u64 {
    event.id.strip_prefix("evt-").unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_life_is_told_in_order() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    run(&engine, &id, "true").await;
    engine.extend(&caller(), &id, "1h".parse().unwrap()).await.unwrap();
    engine.destroy(&caller(), &id).await.unwrap();
    let expected = [
        EventKind::SandboxCreated,
        EventKind::SandboxRunning,
        EventKind::ExecStarted,
        EventKind::ExecCompleted,
        EventKind::SandboxExtended,
        EventKind::SandboxDestroyed,
    ];
    let mut last = 0;
    for kind in expected {
        let event = next_event(&mut events).await;
        assert_eq!((event.kind, event.sandbox_id.as_ref()), (kind, Some(&id)));
        assert!(number(&event) > last);
        last = number(&event);
    }
    assert_eq!(engine.metrics().await.events.subscribers, 1);
    drop(events);
    assert_eq!(engine.metrics().await.events.subscribers, 0);
}

#[tokio::test]
async fn a_client_goes_on_after_the_last_event_it_saw() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut live = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    let first = next_event(&mut live).await;
    let mut replayed = engine.subscribe(&caller(), Some(&first.id)).unwrap();
    assert_eq!(next_event(&mut replayed).await.kind, EventKind::SandboxRunning);
    run(&engine, &id, "true").await;
    assert_eq!(next_event(&mut replayed).await.kind, EventKind::ExecStarted);
    assert_eq!(next_event(&mut replayed).await.kind, EventKind::ExecCompleted);
    for bad in ["", "12", "evt-", "evt-x", "evt--1", "evt-99999999999999999999"] {
        let refused = engine.subscribe(&caller(), Some(bad)).err().unwrap();
        assert_eq!(refused.code(), ErrorCode::BadRequest, "{bad:?}");
    }

    // Over an orderly restart nothing is missing and no number repeats.
    engine.shutdown().await;
    assert!(tokio::time::timeout(PATIENCE, replayed.next()).await.unwrap().is_none());
    let engine = host.engine().await;
    create(&engine).await;
    let mut replayed = engine.subscribe(&caller(), Some(&first.id)).unwrap();
    let expected = [
        EventKind::SandboxRunning,
        EventKind::ExecStarted,
        EventKind::ExecCompleted,
        EventKind::SandboxCreated,
        EventKind::SandboxRunning,
    ];
    for (kind, expected_number) in expected.into_iter().zip(number(&first) + 1..) {
        let event = next_event(&mut replayed).await;
        assert_eq!((event.kind, number(&event)), (kind, expected_number));
    }
}

#[tokio::test]
async fn numbers_never_repeat_after_a_crash_and_the_loss_is_told() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut live = engine.subscribe(&caller(), None).unwrap();
    create(&engine).await;
    next_event(&mut live).await;
    let seen = next_event(&mut live).await;
    // Nothing may have been written of this.
    drop(engine);
    let engine = host.engine().await;
    let mut replayed = engine.subscribe(&caller(), Some(&seen.id)).unwrap();
    create(&engine).await;
    let item = loop {
        match next(&mut replayed).await {
            EventItem::Missed { events } => break events,
            EventItem::Event(event) => assert!(number(&event) > number(&seen)),
        }
    };
    assert!(item > 0);
    let after = next_event(&mut replayed).await;
    assert!(number(&after) > number(&seen) + 1000);
}

#[tokio::test]
async fn a_slow_reader_loses_nothing_that_is_kept() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let mut slow = engine.subscribe(&caller(), None).unwrap();
    // More than memory holds; the rest comes from the store.
    for _ in 0..5000 {
        engine.extend(&caller(), &id, "1h".parse().unwrap()).await.unwrap();
    }
    let first = next_event(&mut slow).await;
    for expected_number in (number(&first) + 1..).take(4999) {
        let event = next_event(&mut slow).await;
        assert_eq!((event.kind, number(&event)), (EventKind::SandboxExtended, expected_number));
    }
}

#[tokio::test]
async fn what_is_too_old_is_deleted_and_said_to_be_missing() {
    let host = Host::new();
    let mut options = host.options();
    options.retention.events = 3;
    options.retention.exec_log = Duration::from_secs(1);
    options.timing.retention_interval = Duration::from_millis(20);
    let engine = host.engine_with(options.clone()).await;
    let id = create(&engine).await.id;
    for _ in 0..10 {
        run(&engine, &id, "true").await;
    }
    assert_eq!(engine.exec_log(&caller(), &id, None, None).await.unwrap().items.len(), 10);
    host.clock.advance(Duration::from_secs(5));
    let deadline = std::time::Instant::now() + PATIENCE;
    while !engine.exec_log(&caller(), &id, None, None).await.unwrap().items.is_empty() {
        assert!(std::time::Instant::now() < deadline, "old commands are still in the log");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    engine.shutdown().await;
    // The next one has only the store to replay from.
    let engine = host.engine_with(options).await;
    let deadline = std::time::Instant::now() + PATIENCE;
    let (mut replayed, events) = loop {
        let mut replayed = engine.subscribe(&caller(), Some("evt-1")).unwrap();
        if let EventItem::Missed { events } = next(&mut replayed).await {
            break (replayed, events);
        }
        assert!(std::time::Instant::now() < deadline, "old events are still kept");
    };
    assert!(events > 10, "{events}");
    assert!(number(&next_event(&mut replayed).await) > 10);
}

#[tokio::test]
async fn a_tenant_sees_its_own_events() {
    let host = Host::new();
    let engine = host.engine().await;
    let red = Caller { tenant: Some("red".to_owned()), ..caller() };
    let mut events = engine.subscribe(&red, None).unwrap();
    create(&engine).await;
    let mine = engine.create(&red, CreateRequest::default(), CreateOptions::default()).await.unwrap();
    assert_eq!(next_event(&mut events).await.sandbox_id, Some(mine.id));
}

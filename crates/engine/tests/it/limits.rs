//! How many sandboxes there may be, who waits, and quotas.

use std::time::Duration;

use stacyvm_api::{CreateRequest, ErrorCode, EventKind, OwnerQuotaRequest};
use stacyvm_engine::{CreateOptions, Engine, EngineError, LimitExceeded, SpawnOverflow};
use stacyvm_providers::mock::{Fault, MockOperation, Times};

use crate::harness::{Host, caller, create, create_with, data, event_of, eventually, of_owner, sh};

async fn create_as(engine: &Engine, owner: &str) -> Result<stacyvm_api::Sandbox, EngineError> {
    engine.create(&of_owner(owner), CreateRequest::default(), CreateOptions::default()).await
}

#[tokio::test]
async fn limits_hold_for_all_and_for_each_owner() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(3);
    options.limits.max_sandboxes_per_owner = Some(2);
    let engine = host.engine_with(options).await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let first = create_as(&engine, "alice").await.unwrap();
    create_as(&engine, "alice").await.unwrap();
    let third = create_as(&engine, "alice").await.unwrap_err();
    assert!(matches!(third, EngineError::Limit(LimitExceeded::OwnerSandboxes { max: 2 })));
    let refusal = event_of(&mut events, EventKind::ResourceLimit, None).await;
    assert!(data(&refusal, "error").contains("2 sandboxes"));
    let admission = engine.admission(&of_owner("alice"), &CreateRequest::default()).await.unwrap();
    assert_eq!((admission.allowed, admission.queueable), (false, false));
    assert_eq!(admission.reason.as_deref(), Some("max_sandboxes_per_owner"));
    assert_eq!((admission.active_owner_sandboxes, admission.max_owner_sandboxes), (Some(2), Some(2)));
    create_as(&engine, "bob").await.unwrap();
    let full = create_as(&engine, "bob").await.unwrap_err();
    assert_eq!((full.code(), full.to_string().contains("maximum")), (ErrorCode::ResourceLimit, true));
    engine.destroy(&caller(), &first.id).await.unwrap();
    create_as(&engine, "bob").await.unwrap();
    let usage = engine.owner_usage(&"alice".parse().unwrap());
    assert_eq!((usage.active_sandboxes, usage.max_sandboxes, usage.quota_configured), (1, 2, false));
}

#[tokio::test]
async fn room_is_counted_while_sandboxes_are_still_being_made() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(10);
    let engine = host.engine_with(options).await;
    host.mock.faults().inject(MockOperation::Create, Fault::Delay(Duration::from_millis(50)), Times::Always);
    let creates = (0..30).map(|_| create_with(&engine, CreateRequest::default()));
    let made = futures_util::future::join_all(creates).await;
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 10);
    assert_eq!(host.mock.calls(MockOperation::Create).started, 10);
}

#[tokio::test]
async fn a_queued_create_goes_on_when_there_is_room() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(1);
    options.spawn_overflow = SpawnOverflow::Queue { max_waiters: 2, timeout: Duration::from_secs(20) };
    let engine = host.engine_with(options).await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let first = create(&engine).await;
    let decision = engine.admission(&caller(), &CreateRequest::default()).await.unwrap();
    assert_eq!((decision.allowed, decision.queueable), (false, true));
    let waiting = |owner: &'static str| {
        let engine = engine.clone();
        tokio::spawn(async move { create_as(&engine, owner).await })
    };
    let second = waiting("second");
    let queued = event_of(&mut events, EventKind::SpawnQueued, None).await;
    assert_eq!((data(&queued, "operation"), data(&queued, "owner_id")), ("spawn", "second"));
    let third = waiting("third");
    event_of(&mut events, EventKind::SpawnQueued, None).await;
    let fourth = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert!(matches!(fourth, EngineError::Limit(LimitExceeded::QueueFull { waiting: 2 })));
    assert_eq!(engine.metrics().await.queue.depth, 2);

    engine.destroy(&caller(), &first.id).await.unwrap();
    let second = second.await.unwrap().unwrap();
    assert_eq!(data(&event_of(&mut events, EventKind::SpawnDequeued, None).await, "owner_id"), "second");
    assert!(!third.is_finished());
    engine.destroy(&caller(), &second.id).await.unwrap();
    third.await.unwrap().unwrap();
    let queue = engine.metrics().await.queue;
    assert_eq!((queue.depth, queue.enqueued_total, queue.dequeued_total), (0, 2, 2));
}

#[tokio::test]
async fn a_wait_in_the_queue_ends_at_its_limit() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(1);
    options.spawn_overflow = SpawnOverflow::Queue { max_waiters: 2, timeout: Duration::from_millis(30) };
    let engine = host.engine_with(options).await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    create(&engine).await;
    let late = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert!(matches!(late, EngineError::Limit(LimitExceeded::QueueTimeout { .. })));
    event_of(&mut events, EventKind::SpawnQueueTimeout, None).await;
    // A caller that goes away leaves the queue.
    let waiting = engine.clone();
    let task = tokio::spawn(async move { create_as(&waiting, "gone").await });
    event_of(&mut events, EventKind::SpawnQueued, None).await;
    task.abort();
    let left = std::time::Instant::now() + crate::harness::PATIENCE;
    while engine.metrics().await.queue.depth > 0 {
        assert!(std::time::Instant::now() < left);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn quotas_override_the_limits_and_survive_a_restart() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes_per_owner = Some(1);
    let engine = host.engine_with(options.clone()).await;
    let alice = "alice".parse().unwrap();
    let request = |max_sandboxes, max_ttl: &str, max_exec_timeout: &str| OwnerQuotaRequest {
        max_sandboxes,
        max_ttl: max_ttl.to_owned(),
        max_exec_timeout: max_exec_timeout.to_owned(),
    };
    assert_eq!(engine.get_quota(&alice).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(engine.delete_quota(&caller(), &alice).await.unwrap_err().code(), ErrorCode::NotFound);
    assert!(engine.put_quota(&caller(), &alice, &request(1, "1.5s", "")).await.is_err());
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let first = engine.put_quota(&caller(), &alice, &request(2, "10m", "5s")).await.unwrap();
    assert_eq!(data(&event_of(&mut events, EventKind::QuotaSaved, None).await, "max_ttl"), "10m0s");
    host.clock.advance(Duration::from_secs(1));
    let second = engine.put_quota(&caller(), &alice, &request(2, "10m", "3s")).await.unwrap();
    assert_eq!(second.created_at, first.created_at);
    assert!(second.updated_at > first.updated_at);
    drop(engine);

    let engine = host.engine_with(options).await;
    assert_eq!(engine.list_quotas(), [second]);
    let summary = engine.quota_summary();
    assert_eq!((summary.total, summary.with_max_sandboxes, summary.with_max_ttl), (1, 1, 1));
    let sandbox = create_as(&engine, "alice").await.unwrap();
    // The default of 30 minutes is above this owner's maximum.
    assert_eq!(sandbox.expires_at.since(sandbox.created_at), Duration::from_mins(10));
    create_as(&engine, "alice").await.unwrap();
    assert_eq!(create_as(&engine, "alice").await.unwrap_err().code(), ErrorCode::ResourceLimit);
    let long = engine.extend(&of_owner("alice"), &sandbox.id, "11m".parse().unwrap()).await.unwrap_err();
    assert_eq!(long.code(), ErrorCode::ResourceLimit);
    let slow = stacyvm_api::ExecRequest { timeout: Some("4s".parse().unwrap()), ..sh("true") };
    assert_eq!(engine.exec(&caller(), &sandbox.id, slow).await.unwrap_err().code(), ErrorCode::ResourceLimit);
    engine.delete_quota(&caller(), &alice).await.unwrap();
    eventually("the quota is gone", || engine.list_quotas().is_empty()).await;
    assert_eq!(engine.owner_usage(&alice).max_sandboxes, 1);
}

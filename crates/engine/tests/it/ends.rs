//! Expiry, extension, deaths, and destroys that fail.

use std::time::{Duration, Instant};

use stacyvm_api::{CreateRequest, ErrorCode, EventKind, SandboxState};
use stacyvm_engine::{Destroyed, EngineError};
use stacyvm_providers::mock::{Fault, MockOperation, Times};

use crate::harness::{Host, PATIENCE, caller, create, create_with, data, event_of, eventually, run, sh, state};

#[tokio::test]
async fn what_expires_is_destroyed_and_what_is_extended_is_not() {
    let host = Host::new();
    let engine = host.engine().await;
    let ttl = |text: &str| CreateRequest { ttl: Some(text.parse().unwrap()), ..CreateRequest::default() };
    let short = create_with(&engine, ttl("1m")).await.unwrap();
    let kept = create_with(&engine, ttl("1m")).await.unwrap();
    let extended = engine.extend(&caller(), &kept.id, "1h".parse().unwrap()).await.unwrap();
    assert!(extended.expires_at > kept.expires_at);
    assert_eq!(host.mock.expires_at(&kept.id), Some(extended.expires_at), "the agent knows");
    host.clock.advance(Duration::from_secs(61));
    eventually("the short one is gone", || state(&engine, &short.id).is_none()).await;
    assert_eq!(host.mock.sandbox_ids(), std::slice::from_ref(&kept.id));
    assert_eq!(state(&engine, &kept.id), Some(SandboxState::Running));
    host.clock.advance(Duration::from_hours(1));
    host.assert_empty().await;
}

#[tokio::test]
async fn an_extension_stays_within_the_limits() {
    let host = Host::new();
    let engine = host.engine().await;
    let sandbox = create(&engine).await;
    let extend = |ttl: &str| {
        let (engine, id, ttl) = (engine.clone(), sandbox.id.clone(), ttl.parse().unwrap());
        async move { engine.extend(&caller(), &id, ttl).await }
    };
    assert_eq!(extend("25h").await.unwrap_err().code(), ErrorCode::ResourceLimit);
    assert_eq!(extend("0s").await.unwrap_err().code(), ErrorCode::BadRequest);
    assert_eq!(engine.get(&caller(), &sandbox.id).unwrap().expires_at, sandbox.expires_at);
    assert!(extend("24h").await.unwrap().expires_at > sandbox.expires_at);
    // It can also be shortened.
    assert!(extend("10s").await.unwrap().expires_at < sandbox.expires_at);
    engine.destroy(&caller(), &sandbox.id).await.unwrap();
    assert_eq!(extend("1h").await.unwrap_err().code(), ErrorCode::NotFound);
}

#[tokio::test]
async fn an_agent_that_missed_an_extension_hears_of_it_later() {
    let host = Host::new();
    let engine = host.engine().await;
    let sandbox = create(&engine).await;
    host.mock.faults().inject(MockOperation::SetDeadline, Fault::Fail("busy".to_owned()), Times::Count(3));
    let extended = engine.extend(&caller(), &sandbox.id, "2h".parse().unwrap()).await.unwrap();
    eventually("the agent knows", || host.mock.expires_at(&sandbox.id) == Some(extended.expires_at)).await;
}

#[tokio::test]
async fn a_provider_that_hangs_on_one_sandbox_holds_up_no_other() {
    let host = Host::new();
    let engine = host.engine().await;
    for _ in 0..5 {
        create(&engine).await;
    }
    host.mock.faults().inject(MockOperation::Destroy, Fault::Hang, Times::Once);
    host.clock.advance(Duration::from_hours(1));
    eventually("four of five are gone", || host.mock.sandbox_ids().len() == 1).await;
    // And the fifth at the provider's deadline, by another attempt.
    host.assert_empty().await;
}

#[tokio::test]
async fn prune_destroys_what_has_expired() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.reap_interval = Duration::from_hours(1);
    let engine = host.engine_with(options).await;
    let long = CreateRequest { ttl: Some("10h".parse().unwrap()), ..CreateRequest::default() };
    let kept = create_with(&engine, long).await.unwrap();
    for _ in 0..3 {
        create(&engine).await;
    }
    assert_eq!(engine.prune(&caller()).await.unwrap(), 0);
    host.clock.advance(Duration::from_hours(1));
    assert_eq!(engine.prune(&caller()).await.unwrap(), 3);
    assert_eq!(host.mock.sandbox_ids(), [kept.id]);
}

#[tokio::test]
async fn a_destroy_that_fails_is_tried_until_it_works() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(1);
    let engine = host.engine_with(options).await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    host.mock.faults().inject(MockOperation::Destroy, Fault::Fail("stuck".to_owned()), Times::Always);
    assert_eq!(engine.destroy(&caller(), &id).await.unwrap(), Destroyed::Retrying);
    assert_eq!(state(&engine, &id), Some(SandboxState::Destroying));
    let failure = event_of(&mut events, EventKind::OperationFailed, Some(&id)).await;
    assert_eq!((data(&failure, "operation"), data(&failure, "provider")), ("destroy", "mock"));
    eventually("it is tried again", || host.mock.calls(MockOperation::Destroy).failed >= 4).await;
    // It still holds its room, and nothing works in it.
    assert_eq!(create_with(&engine, CreateRequest::default()).await.unwrap_err().code(), ErrorCode::ResourceLimit);
    assert_eq!(engine.exec(&caller(), &id, sh("true")).await.unwrap_err().code(), ErrorCode::NotFound);
    host.mock.faults().clear(MockOperation::Destroy);
    event_of(&mut events, EventKind::SandboxDestroyed, Some(&id)).await;
    host.assert_empty().await;
    create(&engine).await;
}

#[tokio::test]
async fn a_sandbox_that_somebody_removed_is_destroyed_at_once() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    host.mock.vanish(&id);
    event_of(&mut events, EventKind::SandboxDestroyed, Some(&id)).await;
    assert_eq!(state(&engine, &id), None, "it is no error");
    host.assert_empty().await;
}

#[tokio::test]
async fn a_sandbox_that_ends_for_want_of_memory_says_so_to_its_commands() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let running = {
        let (engine, id) = (engine.clone(), id.clone());
        tokio::spawn(async move { engine.exec(&caller(), &id, sh("echo on; sleep 1000")).await })
    };
    eventually("it runs", || host.mock.calls(MockOperation::Start).succeeded > 0).await;
    host.mock.run_out_of_memory(&id);
    assert_eq!(running.await.unwrap().unwrap_err().code(), ErrorCode::SandboxOom);
    let dead = engine.get(&caller(), &id).unwrap();
    assert_eq!((dead.state, dead.reason.as_deref()), (SandboxState::Error, Some("it used up its memory and ended")));
}

#[tokio::test]
async fn a_sandbox_that_dies_is_an_error_with_nothing_left() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(1);
    let engine = host.engine_with(options).await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    host.mock.die(&id);
    let event = event_of(&mut events, EventKind::SandboxError, Some(&id)).await;
    assert_eq!(data(&event, "error"), "it ended by itself");
    host.assert_empty().await;
    let dead = engine.get(&caller(), &id).unwrap();
    assert_eq!((dead.state, dead.reason.as_deref()), (SandboxState::Error, Some("it ended by itself")));
    let refused = engine.exec(&caller(), &id, sh("true")).await.unwrap_err();
    assert!(matches!(&refused, EngineError::SandboxNotReady { .. }), "{refused:?}");
    assert_eq!(refused.hint().as_deref(), Some("it ended by itself"));
    // What it used is free again; the record stays until somebody removes it
    // or it expires.
    let deadline = Instant::now() + PATIENCE;
    while !engine.admission(&caller(), &CreateRequest::default()).await.unwrap().allowed {
        assert!(Instant::now() < deadline, "its room is not free");
        tokio::task::yield_now().await;
    }
    let next = create(&engine).await.id;
    assert_eq!(engine.destroy(&caller(), &id).await.unwrap(), Destroyed::Done);
    assert_eq!(state(&engine, &id), None);
    host.mock.die(&next);
    eventually("it is an error", || state(&engine, &next) == Some(SandboxState::Error)).await;
    host.clock.advance(Duration::from_hours(1));
    eventually("its record expired", || state(&engine, &next).is_none()).await;
}

#[tokio::test]
async fn what_dies_without_an_event_is_found_on_the_timer() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.reconcile_interval = Duration::from_millis(20);
    options.timing.ping_timeout = Duration::from_millis(50);
    let engine = host.engine_with(options).await;
    let (silent, orphan) = (create(&engine).await.id, "sb-0rphan000000000000000".parse().unwrap());
    let spec = host.mock.spec(&silent).unwrap();
    host.mock.faults().inject(MockOperation::Ping, Fault::Hang, Times::Always);
    eventually("it is unhealthy", || state(&engine, &silent) == Some(SandboxState::Unhealthy)).await;
    assert!(engine.get(&caller(), &silent).unwrap().reason.unwrap().contains("does not answer"));
    host.mock.faults().clear(MockOperation::Ping);
    eventually("it is back", || state(&engine, &silent) == Some(SandboxState::Running)).await;
    assert_eq!(engine.get(&caller(), &silent).unwrap().reason, None);
    assert_eq!(run(&engine, &silent, "echo alive").await.stdout, "alive\n");

    host.mock.plant(orphan, spec);
    host.mock.plant_orphan("a network namespace");
    eventually("what nobody owns is gone", || host.mock.sandbox_ids() == [silent.clone()] && host.mock.orphans() == 0)
        .await;
}

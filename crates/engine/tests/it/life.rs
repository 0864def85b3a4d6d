//! Creating, listing, working in and destroying sandboxes.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use stacyvm_api::{
    CreateRequest, Disk, ErrorCode, ExecRequest, Limit, ListQuery, NetworkMode, NetworkRequest, SandboxState,
};
use stacyvm_engine::{Caller, CreateOptions, Destroyed, EngineError, FileOperation, FileOperationKind};
use stacyvm_providers::mock::{Exhausted, Fault, MockOperation, Times};
use stacyvm_sandbox::{SessionError, WriteOptions};

use crate::harness::{Host, caller, create, create_with, eventually, of_owner, run, state};

#[tokio::test]
async fn a_sandbox_lives_from_create_to_destroy() {
    let host = Host::new();
    let engine = host.engine().await;
    let sandbox = create(&engine).await;
    assert_eq!(sandbox.state, SandboxState::Running);
    assert_eq!((sandbox.provider.as_str(), sandbox.image.as_str()), ("mock", "alpine:latest"));
    assert_eq!((sandbox.memory_mb, sandbox.worker_id.as_deref()), (1024, Some("local")));
    assert_eq!(sandbox.expires_at.since(sandbox.created_at), Duration::from_mins(30));
    let limits = sandbox.limits.as_ref().unwrap();
    assert!(limits.enforced.is_empty() && limits.unenforced.contains(&Limit::Memory), "{limits:?}");
    assert_eq!(engine.get(&caller(), &sandbox.id).unwrap(), sandbox);

    let result = run(&engine, &sandbox.id, "echo hello; echo oops >&2; exit 3").await;
    assert_eq!((result.stdout.as_str(), result.stderr.as_str(), result.exit_code), ("hello\n", "oops\n", 3));
    assert_eq!(engine.console(&caller(), &sandbox.id, 1).await.unwrap(), ["oops"]);
    let stats = engine.stats(&caller(), &sandbox.id).await.unwrap();
    assert_eq!((stats.supported, stats.mem_limit_bytes), (true, Some(1024 << 20)));

    assert_eq!(engine.destroy(&caller(), &sandbox.id).await.unwrap(), Destroyed::Done);
    host.assert_empty().await;
    assert!(matches!(engine.get(&caller(), &sandbox.id), Err(EngineError::SandboxNotFound(_))));
    let after = engine.exec(&caller(), &sandbox.id, ExecRequest::default()).await.unwrap_err();
    assert_eq!(after.code(), ErrorCode::NotFound);
    // Again, and something that never was.
    assert_eq!(engine.destroy(&caller(), &sandbox.id).await.unwrap(), Destroyed::Done);
    let unknown = "sb-00000000000000000000".parse().unwrap();
    assert_eq!(engine.destroy(&caller(), &unknown).await.unwrap(), Destroyed::Done);
}

#[tokio::test]
async fn what_is_asked_for_reaches_the_provider() {
    let host = Host::new();
    let engine = host.engine().await;
    let request = CreateRequest {
        image: Some("debian:12".to_owned()),
        memory_mb: Some(256),
        vcpus: Some(0.5),
        disk_size_mb: Some(64),
        disk: Some(Disk::Memory),
        pids_limit: Some(99),
        ttl: Some("90s".parse().unwrap()),
        owner_id: Some("alice".to_owned()),
        metadata: Some(BTreeMap::from([("team".to_owned(), "blue".to_owned())])),
        env: Some(BTreeMap::from([("GREETING".to_owned(), "hi".to_owned())])),
        user: Some("nobody".to_owned()),
        network: Some(NetworkRequest { mode: NetworkMode::None, allow: vec!["10.0.0.0/8".to_owned()] }),
        allow_unenforced: Some(true),
        ..CreateRequest::default()
    };
    let sandbox = create_with(&engine, request).await.unwrap();
    let spec = host.mock.spec(&sandbox.id).unwrap();
    assert_eq!((spec.image.as_str(), spec.memory_mib, spec.vcpus, spec.pids_limit), ("debian:12", 256, 0.5, 99));
    assert_eq!((spec.disk.size_mib, spec.disk.in_memory), (Some(64), true));
    assert_eq!(
        (spec.network.mode.clone(), spec.network.allow.clone()),
        (NetworkMode::None, vec!["10.0.0.0/8".to_owned()])
    );
    assert_eq!((spec.user.as_deref(), spec.allow_unenforced, spec.generation), (Some("nobody"), true, 1));
    assert_eq!(spec.hostname, sandbox.id.to_string());
    assert_eq!(spec.agent_token.len(), 64);
    assert_eq!(spec.expires_at, sandbox.expires_at);
    assert_eq!(sandbox.owner_id.as_ref().map(ToString::to_string).as_deref(), Some("alice"));
    assert_eq!(run(&engine, &sandbox.id, "echo $GREETING; whoami").await.stdout, "hi\nnobody\n");
    let other = create(&engine).await;
    assert_ne!(host.mock.spec(&other.id).unwrap().agent_token, spec.agent_token);
    assert_eq!(host.mock.spec(&other.id).unwrap().network.mode, NetworkMode::Bridge);
}

#[tokio::test]
async fn bad_requests_are_refused_before_anything_is_made() {
    let host = Host::new();
    let engine = host.engine().await;
    let default = CreateRequest::default;
    let refused = [
        CreateRequest { ttl: Some(stacyvm_api::Duration::ZERO), ..default() },
        CreateRequest { owner_id: Some("a/b".to_owned()), ..default() },
        CreateRequest { vcpus: Some(-1.0), ..default() },
        CreateRequest { vcpus: Some(f64::NAN), ..default() },
        CreateRequest { image: Some("two words".to_owned()), ..default() },
        CreateRequest { env: Some(BTreeMap::from([("A=B".to_owned(), String::new())])), ..default() },
        CreateRequest {
            network: Some(NetworkRequest { mode: NetworkMode::Bridge, allow: vec!["example.com".to_owned()] }),
            ..default()
        },
        CreateRequest { metadata: Some((0..65).map(|n| (n.to_string(), String::new())).collect()), ..default() },
    ];
    for request in refused {
        let error = create_with(&engine, request.clone()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::BadRequest, "{request:?}");
    }
    let unknown = CreateRequest { provider: Some("nope".to_owned()), ..default() };
    assert_eq!(create_with(&engine, unknown).await.unwrap_err().code(), ErrorCode::NotFound);
    let unknown = CreateRequest { template: Some("nope".to_owned()), ..default() };
    assert_eq!(create_with(&engine, unknown).await.unwrap_err().code(), ErrorCode::NotFound);
    let long = CreateRequest { ttl: Some("25h".parse().unwrap()), ..default() };
    assert_eq!(create_with(&engine, long).await.unwrap_err().code(), ErrorCode::ResourceLimit);
    assert_eq!(host.mock.calls(MockOperation::Create).started, 0);
}

#[tokio::test]
async fn lists_are_newest_first_filtered_and_paged() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut ids = Vec::new();
    for number in 0..5 {
        host.clock.advance(Duration::from_secs(1));
        let request = CreateRequest {
            owner_id: Some(if number % 2 == 0 { "even" } else { "odd" }.to_owned()),
            metadata: Some(BTreeMap::from([("n".to_owned(), number.to_string())])),
            ..CreateRequest::default()
        };
        ids.insert(0, create_with(&engine, request).await.unwrap().id);
    }
    let list = |query: ListQuery| {
        let engine = engine.clone();
        async move {
            let page = engine.list(&caller(), &query).await.unwrap();
            (page.items.into_iter().map(|sandbox| sandbox.id).collect::<Vec<_>>(), page.next_cursor)
        }
    };
    assert_eq!(list(ListQuery::default()).await, (ids.clone(), None));
    let (first, cursor) = list(ListQuery { limit: Some(2), ..ListQuery::default() }).await;
    let (second, cursor) = list(ListQuery { limit: Some(2), cursor, ..ListQuery::default() }).await;
    let (third, cursor) = list(ListQuery { limit: Some(2), cursor, ..ListQuery::default() }).await;
    assert_eq!([first, second, third].concat(), ids);
    assert_eq!(cursor, None);
    let odd = ListQuery { owner_id: Some("odd".to_owned()), ..ListQuery::default() };
    assert_eq!(list(odd).await.0, [ids[1].clone(), ids[3].clone()]);
    let third = ListQuery { metadata: Some("n=2".to_owned()), ..ListQuery::default() };
    assert_eq!(list(third).await.0, [ids[2].clone()]);
    for query in [
        ListQuery { limit: Some(0), ..ListQuery::default() },
        ListQuery { limit: Some(1001), ..ListQuery::default() },
        ListQuery { cursor: Some("x".to_owned()), ..ListQuery::default() },
        ListQuery { metadata: Some("n".to_owned()), ..ListQuery::default() },
    ] {
        assert_eq!(engine.list(&caller(), &query).await.unwrap_err().code(), ErrorCode::BadRequest, "{query:?}");
    }

    for id in &ids[..3] {
        engine.destroy(&caller(), id).await.unwrap();
    }
    let destroyed = ListQuery { state: Some(SandboxState::Destroyed), limit: Some(2), ..ListQuery::default() };
    let (first, cursor) = list(destroyed.clone()).await;
    let (second, none) = list(ListQuery { cursor, ..destroyed }).await;
    assert_eq!(([first, second].concat(), none), (ids[..3].to_vec(), None));
    assert_eq!(list(ListQuery::default()).await.0, ids[3..]);
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_says_why() {
    let host = Host::new();
    let engine = host.engine().await;
    let faults = host.mock.faults();
    faults.inject(MockOperation::Create, Fault::MissingImage, Times::Once);
    assert_eq!(create_with(&engine, CreateRequest::default()).await.unwrap_err().code(), ErrorCode::ImageNotFound);
    faults.inject(MockOperation::Create, Fault::FailAfter("lost answer".to_owned()), Times::Once);
    let error = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InternalError);
    assert!(!error.to_string().contains("lost answer"), "causes are for the log: {error}");
    faults.inject(MockOperation::Connect, Fault::Fail("no way in".to_owned()), Times::Once);
    create_with(&engine, CreateRequest::default()).await.unwrap_err();
    host.assert_empty().await;
    assert!(engine.list(&caller(), &ListQuery::default()).await.unwrap().items.is_empty());
    let destroyed = ListQuery { state: Some(SandboxState::Destroyed), ..ListQuery::default() };
    let destroyed = engine.list(&caller(), &destroyed).await.unwrap().items;
    assert_eq!(destroyed.len(), 3);
    assert!(destroyed.iter().all(|sandbox| sandbox.reason.is_some()));
    assert_eq!(engine.metrics().await.sandboxes.total, 0);
    assert_eq!(create(&engine).await.state, SandboxState::Running);
}

#[tokio::test]
async fn a_create_that_hangs_ends_at_its_deadline() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.create_timeout = Duration::from_millis(50);
    let engine = host.engine_with(options).await;
    host.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let error = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert!(matches!(error, EngineError::ProviderTimeout { operation: "create", .. }), "{error:?}");
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert_eq!(create(&engine).await.state, SandboxState::Running);
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_sandbox_behind() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_sandboxes = Some(1);
    let engine = host.engine_with(options).await;
    host.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let (creating, owner) = (engine.clone(), of_owner("alice"));
    let task =
        tokio::spawn(async move { creating.create(&owner, CreateRequest::default(), CreateOptions::default()).await });
    eventually("the provider is asked", || host.mock.calls(MockOperation::Create).in_flight == 1).await;
    task.abort();
    eventually("the create is given up", || host.mock.calls(MockOperation::Create).in_flight == 0).await;
    eventually("its room is free again", || engine.owner_usage(&"alice".parse().unwrap()).active_sandboxes == 0).await;
    host.assert_empty().await;
    assert_eq!(create(&engine).await.state, SandboxState::Running);
}

#[tokio::test]
async fn a_destroy_stops_a_create_that_is_under_way() {
    let host = Host::new();
    let engine = host.engine().await;
    host.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    let creating = engine.clone();
    let task = tokio::spawn(async move { create_with(&creating, CreateRequest::default()).await });
    eventually("the provider is asked", || host.mock.calls(MockOperation::Create).in_flight == 1).await;
    let id = engine.list(&caller(), &ListQuery::default()).await.unwrap().items[0].id.clone();
    assert_eq!(state(&engine, &id), Some(SandboxState::Creating));
    let early = engine.exec(&caller(), &id, ExecRequest::default()).await.unwrap_err();
    assert_eq!(early.code(), ErrorCode::Conflict);
    assert_eq!(engine.destroy(&caller(), &id).await.unwrap(), Destroyed::Done);
    assert_eq!(task.await.unwrap().unwrap_err().code(), ErrorCode::NotFound);
    host.assert_empty().await;
}

#[tokio::test]
async fn a_hundred_creates_run_at_the_same_time() {
    let host = Host::new();
    let engine = host.engine().await;
    host.mock.faults().inject(MockOperation::Create, Fault::Delay(Duration::from_secs(1)), Times::Always);
    let creates = stream::iter(0..100).map(|_| create(&engine)).buffer_unordered(100);
    let ids: std::collections::HashSet<_> = creates.map(|sandbox| sandbox.id).collect().await;
    assert_eq!(ids.len(), 100);
    let calls = host.mock.calls(MockOperation::Create);
    assert_eq!((calls.succeeded, calls.most_in_flight), (100, 100));
    assert_eq!(engine.destroy_all().await, 100);
    host.assert_empty().await;
    assert_eq!(host.mock.calls(MockOperation::Destroy).succeeded, 100);
    let late = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert!(matches!(late, EngineError::ShuttingDown));
}

#[tokio::test]
async fn an_idempotency_key_makes_one_sandbox() {
    let host = Host::new();
    let engine = host.engine().await;
    let keyed = |engine: stacyvm_engine::Engine, caller: Caller, image: &'static str| async move {
        let request = CreateRequest { image: Some(image.to_owned()), ..CreateRequest::default() };
        engine.create(&caller, request, CreateOptions { idempotency_key: Some("once".to_owned()) }).await
    };
    host.mock.faults().inject(MockOperation::Create, Fault::Fail("first try".to_owned()), Times::Once);
    let (a, b) = tokio::join!(keyed(engine.clone(), caller(), "a"), keyed(engine.clone(), caller(), "a"));
    // One of them failed, the other tried itself.
    let made = [a, b].into_iter().flatten().map(|sandbox| sandbox.id).collect::<Vec<_>>();
    assert_eq!(made.len(), 1);
    assert_eq!(keyed(engine.clone(), caller(), "a").await.unwrap().id, made[0]);
    let other = keyed(engine.clone(), caller(), "b").await.unwrap_err();
    assert!(matches!(other, EngineError::IdempotencyConflict));
    assert_ne!(keyed(engine.clone(), of_owner("bob"), "a").await.unwrap().id, made[0]);

    // The key is kept over a restart, and ends with the sandbox.
    engine.shutdown().await;
    let engine = host.engine().await;
    assert_eq!(keyed(engine.clone(), caller(), "a").await.unwrap().id, made[0]);
    engine.destroy(&caller(), &made[0]).await.unwrap();
    assert_ne!(keyed(engine.clone(), caller(), "a").await.unwrap().id, made[0]);
    let bad = CreateOptions { idempotency_key: Some(String::new()) };
    assert!(engine.create(&caller(), CreateRequest::default(), bad).await.is_err());
}

#[tokio::test]
async fn tenants_do_not_see_each_other() {
    let host = Host::new();
    let engine = host.engine().await;
    let tenant = |name: &str| Caller { tenant: Some(name.to_owned()), ..caller() };
    let (red, blue) = (tenant("red"), tenant("blue"));
    let sandbox = engine.create(&red, CreateRequest::default(), CreateOptions::default()).await.unwrap();
    assert_eq!(sandbox.tenant_id.as_deref(), Some("red"));
    assert!(engine.get(&red, &sandbox.id).is_ok() && engine.get(&caller(), &sandbox.id).is_ok());
    assert!(matches!(engine.get(&blue, &sandbox.id), Err(EngineError::SandboxNotFound(_))));
    assert!(matches!(engine.destroy(&blue, &sandbox.id).await, Err(EngineError::SandboxNotFound(_))));
    assert!(engine.list(&blue, &ListQuery::default()).await.unwrap().items.is_empty());
    host.clock.advance(Duration::from_hours(1));
    assert_eq!(engine.prune(&blue).await.unwrap(), 0);
}

#[tokio::test]
async fn file_operations_are_counted_and_typed() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let operation = |kind, path: &str| FileOperation { kind, path: path.to_owned() };
    let written = engine
        .file_operation(&caller(), &id, operation(FileOperationKind::Write, "/workspace/f"), |session| async move {
            let body = Box::pin(stream::iter([Ok(Bytes::from_static(b"content"))]));
            session.write("/workspace/f", body, WriteOptions::default()).await
        })
        .await
        .unwrap();
    assert_eq!(written.size, 7);
    assert_eq!(run(&engine, &id, "cat f").await.stdout, "content");
    let missing = engine
        .file_operation(&caller(), &id, operation(FileOperationKind::Stat, "/nope"), |session| async move {
            session.stat("/nope").await
        })
        .await
        .unwrap_err();
    assert_eq!(missing.code(), ErrorCode::FileNotFound);
    host.mock.fill_disk(&id, Exhausted::Yes);
    let full = engine
        .file_operation(&caller(), &id, operation(FileOperationKind::MakeDir, "/d"), |session| async move {
            session.make_dir("/d").await
        })
        .await
        .unwrap_err();
    assert!(matches!(full, EngineError::Session(SessionError::DiskFull)));
    let unknown = "sb-00000000000000000000".parse().unwrap();
    let nowhere = engine
        .file_operation(&caller(), &unknown, operation(FileOperationKind::Read, "/f"), |session| async move {
            session.stat("/f").await
        })
        .await;
    assert_eq!(nowhere.unwrap_err().code(), ErrorCode::NotFound);
    let operations = engine.metrics().await.operations;
    let count = |operation: &str, provider: &str| {
        let found = operations.iter().find(|metric| metric.operation == operation && metric.provider == provider);
        found.map(|metric| (metric.success_total, metric.failure_total))
    };
    assert_eq!(count("file_write", "mock"), Some((1, 0)));
    assert_eq!(count("file_stat", "mock"), Some((0, 1)));
    assert_eq!(count("file_read", "unknown"), Some((0, 1)));
    assert_eq!(count("spawn", "mock"), Some((1, 0)));
}

#[tokio::test]
async fn health_is_cached_and_readiness_needs_the_default_provider() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.health_interval = Duration::from_millis(20);
    options.timing.health_timeout = Duration::from_millis(50);
    let engine = host.engine_with(options).await;
    create(&engine).await;
    let ready = engine.readiness().await;
    assert!(ready.ready && ready.store.healthy);
    let health = &engine.providers()[0];
    assert!(health.healthy && health.default && health.findings[0].name == "mock");
    assert_eq!(health.runtime_count, Some(1));
    for capability in ["spawn", "exec_stream", "runtime_inventory", "pty", "test_provider"] {
        assert!(health.capabilities.iter().any(|found| found == capability), "{capability}");
    }
    host.mock.faults().inject(MockOperation::Check, Fault::Hang, Times::Always);
    eventually("the default provider counts as broken", || !engine.providers()[0].healthy).await;
    assert!(!engine.readiness().await.ready);
    let detail = engine.provider("mock").unwrap();
    assert_eq!((detail.healthy, detail.sandbox_count), (false, 1));
    assert!(detail.health.error.unwrap().contains("no answer within 50ms"));
    assert!(matches!(engine.provider("nope"), Err(EngineError::ProviderNotFound(_))));
    host.mock.faults().clear(MockOperation::Check);
    assert_eq!(engine.test_providers().await, BTreeMap::from([("mock".to_owned(), true)]));
    assert!(engine.readiness().await.ready);
}

/// What a call finds out is known at once, whenever the next check is due.
#[tokio::test]
async fn a_runtime_that_goes_away_and_comes_back_is_looked_at_out_of_turn() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.create_timeout = Duration::from_millis(50);
    options.timing.health_timeout = Duration::from_millis(50);
    options.timing.health_interval = Duration::from_hours(1);
    options.timing.health_retry_first = Duration::from_hours(1);
    let engine = host.engine_with(options).await;
    assert!(engine.providers()[0].healthy);
    host.mock.faults().inject(MockOperation::Create, Fault::Hang, Times::Once);
    host.mock.faults().inject(MockOperation::Check, Fault::Hang, Times::Always);
    let error = create_with(&engine, CreateRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    eventually("it counts as broken", || !engine.providers()[0].healthy).await;
    host.mock.faults().clear(MockOperation::Check);
    create(&engine).await;
    eventually("it counts as well", || engine.providers()[0].healthy).await;
}

#[tokio::test]
async fn a_runtime_that_is_away_is_looked_for_sooner_than_usual() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.health_timeout = Duration::from_millis(50);
    options.timing.health_interval = Duration::from_hours(1);
    options.timing.health_retry_first = Duration::from_millis(1);
    host.mock.faults().inject(MockOperation::Check, Fault::Hang, Times::Always);
    let engine = host.engine_with(options).await;
    assert!(!engine.providers()[0].healthy);
    host.mock.faults().clear(MockOperation::Check);
    eventually("it counts as well", || engine.providers()[0].healthy).await;
}

//! Crashes: the engine is dropped in the middle of something, and another one
//! takes over the same database and the same runtime.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use stacyvm_api::{CreateRequest, EventKind, Limit, ListQuery, ProcessStatus, SandboxId, SandboxState, Template};
use stacyvm_engine::{CreateOptions, Engine, ExecEvent, StartOptions, UnknownSandboxes};
use stacyvm_providers::mock::{Fault, MockOperation, MockProvider, Times};
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, ProgressSink, Provider, ProviderError, RuntimeSandbox,
    SandboxSpec, TerminalSize,
};

use crate::harness::{
    Host, PATIENCE, caller, create, create_with, data, event_of, eventually, of_owner, run, sh, state,
};

/// What is pending in the store is written, as it would be a moment later.
async fn settle(engine: &Engine) {
    let destroyed = ListQuery { state: Some(SandboxState::Destroyed), ..ListQuery::default() };
    engine.list(&caller(), &destroyed).await.unwrap();
}

/// A create that is under way when the engine is dropped.
async fn begin_create(host: &Host, engine: &Engine, request: CreateRequest, stuck_in: MockOperation) {
    let (creating, before) = (engine.clone(), host.mock.calls(stuck_in).started);
    tokio::spawn(async move {
        let _never = create_with(&creating, request).await;
    });
    eventually("the create is under way", || host.mock.calls(stuck_in).started > before).await;
}

#[tokio::test]
async fn running_sandboxes_and_their_commands_are_taken_over() {
    let host = Host::new();
    let engine = host.engine().await;
    let request = CreateRequest { ttl: Some("2h".parse().unwrap()), ..CreateRequest::default() };
    let sandbox = engine.create(&of_owner("alice"), request, CreateOptions::default()).await.unwrap();
    run(&engine, &sandbox.id, "echo kept > file").await;
    let open = StartOptions { keep_stdin_open: true, ..StartOptions::default() };
    let command = "echo begun; read X; echo got $X; exit 3";
    let running = engine.start_exec(&caller(), &sandbox.id, sh(command), open).await.unwrap();
    let ended =
        engine.start_exec(&caller(), &sandbox.id, sh("sleep 0.05; exit 4"), StartOptions::default()).await.unwrap();
    settle(&engine).await;
    let (running, ended) = (running.exec_id.clone(), ended.exec_id.clone());
    drop(engine);

    let engine = host.engine().await;
    let found = engine.get(&caller(), &sandbox.id).unwrap();
    assert_eq!(found, sandbox);
    assert_eq!(run(&engine, &sandbox.id, "cat file").await.stdout, "kept\n");
    assert_eq!(engine.owner_usage(&"alice".parse().unwrap()).active_sandboxes, 1);
    let mut attached = engine.attach_exec(&caller(), &sandbox.id, &running, 0).await.unwrap();
    engine.send_input(&caller(), &sandbox.id, &running, "there\n".into()).await.unwrap();
    let mut output = Vec::new();
    let exit = loop {
        match attached.stream.next().await.unwrap().unwrap() {
            ExecEvent::Output { data, .. } => output.extend_from_slice(&data),
            ExecEvent::Exited(exit) => break exit,
            ExecEvent::Dropped { .. } | ExecEvent::Keepalive => {}
        }
    };
    assert_eq!((output.as_slice(), exit.exit_code), (&b"begun\ngot there\n"[..], 3));
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let summary = engine.exec_summary(&caller(), &sandbox.id, &ended).await.unwrap();
        if summary.status == ProcessStatus::Exited {
            assert_eq!(summary.exit_code, Some(4));
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{summary:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Its own death is noticed by the new engine too.
    host.mock.die(&sandbox.id);
    eventually("it is an error", || state(&engine, &sandbox.id) == Some(SandboxState::Error)).await;
    host.assert_empty().await;
}

/// What is still to be written when the server is killed is lost.
#[tokio::test]
async fn commands_that_began_in_the_last_moment_are_taken_up_too() {
    let host = Host::new();
    let engine = host.engine().await;
    let sandbox = create(&engine).await;
    settle(&engine).await;
    let open = StartOptions { keep_stdin_open: true, ..StartOptions::default() };
    let running = engine.start_exec(&caller(), &sandbox.id, sh("echo begun; read X; echo got $X"), open).await.unwrap();
    let ended = engine.start_exec(&caller(), &sandbox.id, sh("exit 4"), StartOptions::default()).await.unwrap();
    let on_terminal = StartOptions { terminal: Some(TerminalSize { cols: 80, rows: 24 }), ..open };
    let asking = engine.start_exec(&caller(), &sandbox.id, sh("read X; echo got $X"), on_terminal).await.unwrap();
    let (running, ended, asking) = (running.exec_id.clone(), ended.exec_id.clone(), asking.exec_id.clone());
    engine.crash();
    drop(engine);

    let engine = host.engine().await;
    let log = engine.exec_log(&caller(), &sandbox.id, None, None).await.unwrap();
    let status_of = |id| log.items.iter().find(|row| row.exec_id == id).map(|row| (row.status, row.exit_code));
    assert_eq!(status_of(running.clone()), Some((ProcessStatus::Running, None)));
    assert_eq!(status_of(ended), Some((ProcessStatus::Exited, Some(4))));
    engine.send_input(&caller(), &sandbox.id, &running, "there\n".into()).await.unwrap();
    let mut attached = engine.attach_exec(&caller(), &sandbox.id, &running, 0).await.unwrap();
    let mut output = Vec::new();
    while let Some(event) = attached.stream.next().await {
        if let ExecEvent::Output { data, .. } = event.unwrap() {
            output.extend_from_slice(&data);
        }
    }
    assert_eq!(output, b"begun\ngot there\n");

    // What is typed on a terminal shows there.
    engine.send_input(&caller(), &sandbox.id, &asking, "typed\n".into()).await.unwrap();
    let mut attached = engine.attach_exec(&caller(), &sandbox.id, &asking, 0).await.unwrap();
    let mut shown = Vec::new();
    while let Some(event) = attached.stream.next().await {
        if let ExecEvent::Output { data, .. } = event.unwrap() {
            shown.extend_from_slice(&data);
        }
    }
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.starts_with("typed\r\n") && shown.contains("got typed"), "{shown:?}");
    engine.destroy(&caller(), &sandbox.id).await.unwrap();
    host.assert_empty().await;
}

#[tokio::test]
async fn a_crash_at_any_step_of_a_create_is_settled() {
    for stuck in [Stuck::BeforeProvider, Stuck::AfterProvider, Stuck::InConnect, Stuck::InSetup] {
        let host = Host::new();
        let mut options = host.options();
        options.limits.max_sandboxes = Some(1);
        let engine = host.engine_with(options.clone()).await;
        let setup = Template {
            name: "t".to_owned(),
            image: "i".to_owned(),
            setup: Some(vec!["sleep 1000".to_owned()]),
            ..Template::default()
        };
        engine.create_template(&caller(), setup).await.unwrap();
        let (fault, template, reached) = match stuck {
            Stuck::BeforeProvider => (Some((MockOperation::Create, Fault::Hang)), None, MockOperation::Create),
            Stuck::AfterProvider => (Some((MockOperation::Connect, Fault::Hang)), None, MockOperation::Connect),
            Stuck::InConnect => (Some((MockOperation::Connect, Fault::Delay(PATIENCE))), None, MockOperation::Connect),
            Stuck::InSetup => (None, Some("t".to_owned()), MockOperation::Start),
        };
        if let Some((operation, fault)) = fault {
            host.mock.faults().inject(operation, fault, Times::Once);
        }
        let request = CreateRequest { template, ..CreateRequest::default() };
        begin_create(&host, &engine, request, reached).await;
        let id = engine.list(&caller(), &ListQuery::default()).await.unwrap().items[0].id.clone();
        engine.crash();
        drop(engine);

        let engine = host.engine_with(options).await;
        match stuck {
            // It works, and whoever asked for it may have had the answer.
            Stuck::AfterProvider | Stuck::InConnect => {
                assert_eq!(state(&engine, &id), Some(SandboxState::Running), "{stuck:?}");
                let limits = engine.get(&caller(), &id).unwrap().limits;
                assert!(limits.is_some_and(|limits| limits.unenforced.contains(&Limit::Memory)), "{stuck:?}");
                assert_eq!(run(&engine, &id, "echo alive").await.stdout, "alive\n");
                engine.destroy(&caller(), &id).await.unwrap();
            }
            Stuck::BeforeProvider | Stuck::InSetup => {
                eventually("it is gone", || state(&engine, &id).is_none()).await;
            }
        }
        host.assert_empty().await;
        create(&engine).await;
    }
}

#[derive(Debug, Clone, Copy)]
enum Stuck {
    BeforeProvider,
    AfterProvider,
    InConnect,
    InSetup,
}

#[tokio::test]
async fn a_crash_in_the_middle_of_a_destroy_is_finished() {
    for fault in [Fault::Hang, Fault::FailAfter("the answer was lost".to_owned())] {
        let host = Host::new();
        let engine = host.engine().await;
        let id = create(&engine).await.id;
        host.mock.faults().inject(MockOperation::Destroy, fault, Times::Once);
        let destroying = engine.clone();
        let target = id.clone();
        let task = tokio::spawn(async move { destroying.destroy(&caller(), &target).await });
        eventually("the provider is asked", || host.mock.calls(MockOperation::Destroy).started == 1).await;
        settle(&engine).await;
        task.abort();
        engine.crash();
        drop(engine);
        let engine = host.engine().await;
        host.assert_empty().await;
        eventually("its row is settled", || state(&engine, &id).is_none()).await;
    }
}

#[tokio::test]
async fn what_died_or_vanished_meanwhile_is_marked() {
    let host = Host::new();
    let engine = host.engine().await;
    let (dead, vanished, expired) = (create(&engine).await.id, create(&engine).await.id, create(&engine).await.id);
    let long = CreateRequest { ttl: Some("20h".parse().unwrap()), ..CreateRequest::default() };
    let kept = create_with(&engine, long).await.unwrap().id;
    let lost = engine.start_exec(&caller(), &dead, sh("sleep 1000"), StartOptions::default()).await.unwrap().exec_id;
    settle(&engine).await;
    engine.crash();
    drop(engine);
    host.mock.die(&dead);
    host.mock.vanish(&vanished);

    let engine = host.engine().await;
    assert_eq!(state(&engine, &dead), Some(SandboxState::Error));
    assert_eq!(engine.exec_summary(&caller(), &dead, &lost).await.unwrap().status, ProcessStatus::Lost);
    eventually("what vanished is destroyed", || state(&engine, &vanished).is_none()).await;
    let destroyed = ListQuery { state: Some(SandboxState::Destroyed), ..ListQuery::default() };
    let destroyed = engine.list(&caller(), &destroyed).await.unwrap().items;
    assert_eq!(destroyed[0].reason.as_deref(), Some("its runtime no longer has it"));
    eventually("remains are freed", || !host.mock.sandbox_ids().contains(&dead)).await;
    let mut replayed = engine.subscribe(&caller(), Some("evt-0")).unwrap();
    let mut actions = Vec::new();
    while actions.len() < 2 {
        let event = event_of(&mut replayed, EventKind::ReconcileAction, None).await;
        actions.push((event.sandbox_id.clone().unwrap(), data(&event, "action").to_owned()));
    }
    assert!(actions.contains(&(dead.clone(), "marked_dead".to_owned())), "{actions:?}");
    assert!(actions.contains(&(vanished, "marked_destroyed".to_owned())), "{actions:?}");
    host.clock.advance(Duration::from_hours(1));
    eventually("what expires afterwards is reaped", || state(&engine, &expired).is_none()).await;
    assert_eq!(host.mock.sandbox_ids(), [kept]);
}

#[tokio::test]
async fn what_nobody_knows_is_removed_or_adopted_as_configured() {
    let host = Host::new();
    let engine = host.engine().await;
    let known = create(&engine).await.id;
    let spec = host.mock.spec(&known).unwrap();
    settle(&engine).await;
    drop(engine);
    let stranger = || "sb-stranger000000000000".parse().unwrap();
    host.mock.plant(stranger(), spec.clone());
    host.mock.plant_orphan("a cgroup");
    let engine = host.engine().await;
    eventually("the stranger is gone", || host.mock.sandbox_ids() == [known.clone()]).await;
    eventually("what nobody owns is freed", || host.mock.orphans() == 0).await;
    drop(engine);

    host.mock.plant(stranger(), spec);
    let mut options = host.options();
    options.unknown_sandboxes = UnknownSandboxes::Adopt;
    let engine = host.engine_with(options).await;
    let adopted = engine.get(&caller(), &stranger()).unwrap();
    assert_eq!((adopted.state, adopted.image.as_str()), (SandboxState::Running, "alpine:latest"));
    assert!(adopted.limits.is_some());
    assert_eq!(run(&engine, &stranger(), "echo hi").await.stdout, "hi\n");
    eventually("its agent knows the new expiry", || host.mock.expires_at(&stranger()) == Some(adopted.expires_at))
        .await;
}

#[tokio::test]
async fn a_sandbox_whose_destroy_was_recorded_but_that_exists_is_destroyed() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let spec = host.mock.spec(&id).unwrap();
    engine.destroy(&caller(), &id).await.unwrap();
    engine.shutdown().await;
    host.mock.plant(id, spec);
    let mut options = host.options();
    options.unknown_sandboxes = UnknownSandboxes::Adopt;
    let _engine = host.engine_with(options).await;
    host.assert_empty().await;
}

#[tokio::test]
async fn one_bad_sandbox_or_provider_does_not_stop_a_start() {
    let host = Host::new();
    let engine = host.engine().await;
    let (silent, fine) = (create(&engine).await.id, create(&engine).await.id);
    settle(&engine).await;
    drop(engine);
    let mut options = host.options();
    options.timing.ping_timeout = Duration::from_millis(50);
    options.timing.reconcile_interval = Duration::from_millis(50);
    host.mock.faults().inject(MockOperation::Ping, Fault::Hang, Times::Once);
    let engine = host.engine_with(options.clone()).await;
    let states = [state(&engine, &silent), state(&engine, &fine)];
    assert!(
        states.contains(&Some(SandboxState::Unhealthy)) && states.contains(&Some(SandboxState::Running)),
        "{states:?}"
    );
    eventually("both run", || [&silent, &fine].into_iter().all(|id| state(&engine, id) == Some(SandboxState::Running)))
        .await;
    drop(engine);

    host.mock.faults().inject(MockOperation::List, Fault::Fail("down".to_owned()), Times::Once);
    let engine = host.engine_with(options).await;
    eventually("both run once the runtime answers", || {
        [&silent, &fine].into_iter().all(|id| state(&engine, id) == Some(SandboxState::Running))
    })
    .await;
    host.mock.die(&fine);
    eventually("the watch began late, but it did", || state(&engine, &fine) == Some(SandboxState::Error)).await;
    assert_eq!(run(&engine, &silent, "echo ok").await.stdout, "ok\n");
}

#[tokio::test]
async fn while_a_runtime_is_away_only_what_does_not_answer_is_unhealthy() {
    let host = Host::new();
    let mut options = host.options();
    options.timing.reconcile_interval = Duration::from_millis(20);
    let engine = host.engine_with(options).await;
    let id = create(&engine).await.id;
    host.mock.faults().inject(MockOperation::List, Fault::Fail("the daemon is away".to_owned()), Times::Always);
    let rounds = || host.mock.calls(MockOperation::List).started;
    let before = rounds();
    eventually("it was not listed for a while", || rounds() > before + 3).await;
    assert_eq!(state(&engine, &id), Some(SandboxState::Running), "it still answers");
    assert_eq!(run(&engine, &id, "echo on").await.stdout, "on\n");

    host.mock.faults().inject(MockOperation::Ping, Fault::Fail("no way in".to_owned()), Times::Always);
    eventually("it is unhealthy", || state(&engine, &id) == Some(SandboxState::Unhealthy)).await;
    let reason = engine.get(&caller(), &id).unwrap().reason.unwrap();
    assert!(reason.starts_with("its runtime does not answer"), "{reason}");
    host.mock.faults().clear(MockOperation::Ping);
    eventually("it answers again, although it is not listed", || state(&engine, &id) == Some(SandboxState::Running))
        .await;
    host.mock.faults().clear(MockOperation::List);
    host.mock.plant("sb-stranger000000000000".parse().unwrap(), host.mock.spec(&id).unwrap());
    eventually("the runtime is listened to again", || host.mock.sandbox_ids() == [id.clone()]).await;
    assert_eq!(state(&engine, &id), Some(SandboxState::Running));
}

#[tokio::test]
async fn sandboxes_of_a_provider_that_is_not_configured_stay_on_record() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    settle(&engine).await;
    drop(engine);
    let other = MockProvider::new("other");
    let mut options = host.options();
    options.default_provider = "other".to_owned();
    let engine = Engine::start(options, vec![Arc::new(other)]).await.unwrap();
    let found = engine.get(&caller(), &id).unwrap();
    assert_eq!(found.state, SandboxState::Unhealthy);
    assert!(found.reason.unwrap().contains("not configured"));
    engine.shutdown().await;
    let engine = host.engine().await;
    assert_eq!(state(&engine, &id), Some(SandboxState::Running));
}

#[tokio::test]
async fn an_orderly_restart_changes_nothing() {
    let host = Host::new();
    let engine = host.engine().await;
    let sandboxes = [create(&engine).await, create(&engine).await];
    engine.shutdown().await;
    engine.shutdown().await;
    assert_eq!(host.mock.sandbox_ids().len(), 2);
    let engine = host.engine().await;
    for sandbox in &sandboxes {
        assert_eq!(&engine.get(&caller(), &sandbox.id).unwrap(), sandbox);
    }
    assert_eq!(host.mock.calls(MockOperation::Destroy).started, 0);
}

/// As where a killed server has left much to remove.
#[tokio::test]
async fn a_sweep_that_takes_long_does_not_hold_up_the_start() {
    let host = Host::new();
    host.mock.faults().inject(MockOperation::Sweep, Fault::Hang, Times::Once);
    // As long as the sweep hangs, which is as long as this waits otherwise.
    let engine = tokio::time::timeout(PATIENCE / 2, host.engine()).await.expect("it does not wait for the sweep");
    eventually("it is swept all the same", || host.mock.calls(MockOperation::Sweep).started == 1).await;
    create(&engine).await;
}

#[tokio::test]
async fn a_sandbox_that_was_resumed_elsewhere_works_with_the_next_call() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    settle(&engine).await;
    drop(engine);
    host.mock.pause(&id).await.unwrap();
    let engine = host.engine().await;
    eventually("it is found paused", || state(&engine, &id) == Some(SandboxState::Paused)).await;
    let refused = engine.exec(&caller(), &id, sh("true")).await.unwrap_err();
    assert!(refused.hint().is_some_and(|hint| hint.contains("unpause")), "{refused:?}");
    assert!(engine.reachable_port(&id, 3000).await.is_err());

    host.mock.resume(&id).await.unwrap();
    assert_eq!(engine.reachable_port(&id, 3000).await.unwrap(), None);
    host.mock.pause(&id).await.unwrap();
    drop(engine);
    let engine = host.engine().await;
    eventually("it is found paused again", || state(&engine, &id) == Some(SandboxState::Paused)).await;
    host.mock.resume(&id).await.unwrap();
    assert_eq!(run(&engine, &id, "echo here").await.stdout, "here\n");
    assert_eq!(state(&engine, &id), Some(SandboxState::Running));
}

/// A runtime of another machine, which takes every call and answers none.
struct Elsewhere;

#[async_trait]
impl Provider for Elsewhere {
    fn name(&self) -> &'static str {
        "elsewhere"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { family: "remote_http", ..Capabilities::default() }
    }

    async fn check(&self) -> HealthReport {
        std::future::pending().await
    }

    async fn create(
        &self,
        _id: &SandboxId,
        _spec: &SandboxSpec,
        _progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        std::future::pending().await
    }

    async fn connect(&self, _id: &SandboxId) -> Result<Connection, ProviderError> {
        std::future::pending().await
    }

    async fn destroy(&self, _id: &SandboxId) -> Result<(), ProviderError> {
        std::future::pending().await
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        std::future::pending().await
    }

    async fn wait(&self, _id: &SandboxId) -> Result<Ending, ProviderError> {
        std::future::pending().await
    }
}

#[tokio::test]
async fn a_runtime_elsewhere_that_hangs_does_not_hold_up_the_start() {
    let host = Host::new();
    let mut options = host.options();
    // What the start would wait for otherwise.
    for limit in
        [&mut options.timing.list_timeout, &mut options.timing.health_timeout, &mut options.timing.recovery_wait]
    {
        *limit = PATIENCE * 10;
    }
    let providers: Vec<Arc<dyn Provider>> = vec![Arc::new(host.mock.clone()), Arc::new(Elsewhere)];
    let started = tokio::time::timeout(PATIENCE, Engine::start(options, providers)).await;
    let engine = started.expect("it does not wait for the other machine").unwrap();
    create(&engine).await;
}

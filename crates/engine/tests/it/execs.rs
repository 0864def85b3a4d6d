//! Commands: policy, ends, log, input, and attaching again.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use stacyvm_api::{ErrorCode, EventKind, ExecId, ExecRequest, Limit, ProcessStatus, SandboxId};
use stacyvm_engine::{Engine, EngineError, ExecEvent, ExecExit, ExecStream, OutputChannel, StartOptions};
use stacyvm_providers::mock::{Exhausted, Fault, MockOperation, Times};
use stacyvm_sandbox::TerminalSize;

use crate::harness::{Host, caller, create, data, event_of, run, sh};

struct Seen {
    output: Vec<u8>,
    stderr: Vec<u8>,
    dropped: u64,
    end_offset: u64,
    exit: Option<ExecExit>,
}

async fn read(mut stream: ExecStream) -> Seen {
    let mut seen = Seen { output: Vec::new(), stderr: Vec::new(), dropped: 0, end_offset: 0, exit: None };
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            ExecEvent::Output { channel, data, offset } => {
                seen.end_offset = offset;
                match channel {
                    OutputChannel::Stdout | OutputChannel::Terminal => seen.output.extend_from_slice(&data),
                    OutputChannel::Stderr => seen.stderr.extend_from_slice(&data),
                }
            }
            ExecEvent::Dropped { bytes, .. } => seen.dropped += bytes,
            ExecEvent::Keepalive => {}
            ExecEvent::Exited(exit) => seen.exit = Some(exit),
        }
    }
    seen
}

async fn start(engine: &Engine, id: &SandboxId, command: &str) -> stacyvm_engine::RunningExec {
    engine.start_exec(&caller(), id, sh(command), StartOptions::default()).await.unwrap()
}

async fn status(engine: &Engine, id: &SandboxId, exec_id: &ExecId) -> ProcessStatus {
    engine.exec_summary(&caller(), id, exec_id).await.unwrap().status
}

/// Waits until the log says how a command ended.
async fn settled(engine: &Engine, id: &SandboxId, exec_id: &ExecId) -> ProcessStatus {
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    loop {
        let status = status(engine, id, exec_id).await;
        if status != ProcessStatus::Running {
            return status;
        }
        assert!(std::time::Instant::now() < deadline, "{exec_id} still runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn modes_environment_and_directories_are_as_documented() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let exec = |request: ExecRequest| {
        let (engine, id) = (engine.clone(), id.clone());
        async move { engine.exec(&caller(), &id, request).await }
    };
    let args = |args: &[&str]| Some(args.iter().map(|&argument| argument.to_owned()).collect());
    let quoted = ExecRequest { args: args(&["a  b", "it's", "$HOME"]), ..sh("echo") };
    assert_eq!(exec(quoted).await.unwrap().stdout, "a  b it's $HOME\n");
    let literal = ExecRequest { args: args(&["$HOME;", "|"]), mode: Some("argv".to_owned()), ..sh("echo") };
    assert_eq!(exec(literal).await.unwrap().stdout, "$HOME; |\n");
    let set = ExecRequest {
        env: Some(BTreeMap::from([("A".to_owned(), "1".to_owned())])),
        workdir: Some("/tmp".to_owned()),
        user: Some("nobody".to_owned()),
        ..sh("echo $A; pwd; whoami")
    };
    assert_eq!(exec(set).await.unwrap().stdout, "1\n/tmp\nnobody\n");
    assert_eq!(exec(sh("")).await.unwrap().exit_code, 0);
    assert_eq!(exec(sh("pwd")).await.unwrap().stdout, "/workspace\n");
    let input = ExecRequest { stdin: Some("typed".to_owned()), ..sh("cat") };
    assert_eq!(exec(input).await.unwrap().stdout, "typed");
    for (request, code) in [
        (ExecRequest { mode: Some("argv".to_owned()), ..sh("  ") }, ErrorCode::BadRequest),
        (ExecRequest { mode: Some("bash".to_owned()), ..sh("true") }, ErrorCode::BadRequest),
        (ExecRequest { mode: Some("argv".to_owned()), ..sh("nosuchprogram") }, ErrorCode::BadRequest),
        (ExecRequest { user: Some("stranger".to_owned()), ..sh("true") }, ErrorCode::BadRequest),
        (ExecRequest { workdir: Some("/nowhere".to_owned()), ..sh("true") }, ErrorCode::FileNotFound),
        (ExecRequest { timeout: Some("11m".parse().unwrap()), ..sh("true") }, ErrorCode::ResourceLimit),
    ] {
        assert_eq!(exec(request.clone()).await.unwrap_err().code(), code, "{request:?}");
    }
}

#[tokio::test]
async fn a_deadline_is_an_error_that_carries_what_was_written() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    let slow = ExecRequest { timeout: Some("50ms".parse().unwrap()), ..sh("echo before; sleep 1000") };
    let error = engine.exec(&caller(), &id, slow.clone()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Timeout);
    let EngineError::ExecTimeout { timeout, partial } = error else { panic!("{error:?}") };
    assert_eq!((timeout, partial.stdout.as_str()), (Duration::from_millis(50), "before\n"));
    let exec_id = partial.exec_id.unwrap();
    assert_eq!(status(&engine, &id, &exec_id).await, ProcessStatus::TimedOut);
    let event = event_of(&mut events, EventKind::ExecTimeout, Some(&id)).await;
    assert_eq!(data(&event, "exec_id"), exec_id.as_str());

    let running = engine.start_exec(&caller(), &id, slow, StartOptions::default()).await.unwrap();
    let exit = read(running.stream).await.exit.unwrap();
    assert_eq!((exit.error, exit.exit_code), (Some(ErrorCode::Timeout), 137));
}

#[tokio::test]
async fn output_above_the_cap_is_cut_and_flagged() {
    let host = Host::new();
    let mut options = host.options();
    options.limits.max_output_bytes = 1000;
    options.exec_log_output_bytes = 10;
    let engine = host.engine_with(options).await;
    let id = create(&engine).await.id;
    let result = run(&engine, &id, "echo start; head -c 5000 /dev/zero; echo end >&2; exit 4").await;
    assert_eq!((result.truncated, result.exit_code), (true, 4));
    assert_eq!(result.stdout.len() + result.stderr.len(), 1000);
    let kept = engine.exec_output(&caller(), &id, &result.exec_id.unwrap()).await.unwrap().unwrap();
    assert_eq!(kept, b"start\n\0\0\0\0");
    assert!(!run(&engine, &id, "echo small").await.truncated);
}

#[tokio::test]
async fn memory_and_process_limits_are_told_apart() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    // Killed, but not for want of memory.
    let killed = run(&engine, &id, "kill -9 $$").await;
    assert_eq!((killed.exit_code, killed.signal, killed.error), (137, Some(9), None));
    let starved = run(&engine, &id, "echo x; mock-oom").await;
    assert_eq!((starved.stdout.as_str(), starved.error), ("x\n", Some(ErrorCode::SandboxOom)));
    // The kill before is not this command's.
    assert_eq!(run(&engine, &id, "kill -9 $$").await.error, None);
    // Nor is one that no command's end has shown.
    host.mock.count_kill(&id, Limit::Memory);
    assert_eq!(run(&engine, &id, "kill -9 $$").await.error, None);
    for (program, error) in
        [("mock-disk-full", ErrorCode::SandboxDiskFull), ("mock-pids", ErrorCode::SandboxPidsExhausted)]
    {
        let killed = run(&engine, &id, program).await;
        assert_eq!((killed.exit_code, killed.error), (137, Some(error)), "{program}");
        assert_eq!(run(&engine, &id, "kill -9 $$").await.error, None);
    }
    host.mock.exhaust_pids(&id, Exhausted::Yes);
    let refused = engine.exec(&caller(), &id, sh("true")).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::SandboxPidsExhausted);
    assert_eq!(engine.destroy(&caller(), &id).await.unwrap(), stacyvm_engine::Destroyed::Done);
}

#[tokio::test]
async fn the_log_shows_every_command_newest_first() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    for number in 0..5 {
        host.clock.advance(Duration::from_secs(1));
        run(&engine, &id, &format!("exit {number}")).await;
    }
    let first = engine.exec_log(&caller(), &id, Some(2), None).await.unwrap();
    let rest = engine.exec_log(&caller(), &id, None, first.next_cursor.as_deref()).await.unwrap();
    let commands: Vec<_> =
        first.items.iter().chain(&rest.items).map(|entry| (entry.command.as_str(), entry.exit_code)).collect();
    let expected =
        [("exit 4", Some(4)), ("exit 3", Some(3)), ("exit 2", Some(2)), ("exit 1", Some(1)), ("exit 0", Some(0))];
    assert_eq!(commands, expected);
    assert!(rest.next_cursor.is_none());
    assert!(first.items.iter().all(|entry| entry.status == ProcessStatus::Exited && entry.duration.is_some()));
    let unknown = "ex-00000000000000000000".parse().unwrap();
    let missing = engine.exec_summary(&caller(), &id, &unknown).await.unwrap_err();
    assert!(matches!(missing, EngineError::ExecNotFound { .. }));
    assert!(engine.exec_log(&caller(), &id, Some(0), None).await.is_err());
}

#[tokio::test]
async fn a_command_outlives_its_reader_and_can_be_attached_to() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    let open = StartOptions { keep_stdin_open: true, ..StartOptions::default() };
    let request =
        ExecRequest { stdin: Some("one\n".to_owned()), ..sh("read A; echo got $A; read B; echo got $B; exit 5") };
    let mut running = engine.start_exec(&caller(), &id, request, open).await.unwrap();
    let exec_id = running.exec_id.clone();
    let first = running.stream.next().await.unwrap().unwrap();
    assert_eq!(first, ExecEvent::Output { channel: OutputChannel::Stdout, data: Bytes::from("got one\n"), offset: 8 });
    drop(running);
    assert_eq!(status(&engine, &id, &exec_id).await, ProcessStatus::Running);
    assert_eq!(engine.metrics().await.running_execs, 1);

    let attached = engine.attach_exec(&caller(), &id, &exec_id, 4).await.unwrap();
    engine.send_input(&caller(), &id, &exec_id, Bytes::from_static(b"two\n")).await.unwrap();
    let seen = read(attached.stream).await;
    assert_eq!((seen.output.as_slice(), seen.end_offset), (&b"one\ngot two\n"[..], 16));
    assert_eq!(seen.exit.unwrap().exit_code, 5);
    event_of(&mut events, EventKind::ExecCompleted, Some(&id)).await;
    // Also after its end, with the same answer.
    let late = read(engine.attach_exec(&caller(), &id, &exec_id, 0).await.unwrap().stream).await;
    assert_eq!((late.output.as_slice(), late.exit.unwrap().exit_code), (&b"got one\ngot two\n"[..], 5));
    assert_eq!(engine.metrics().await.running_execs, 0);
    let ended = engine.send_input(&caller(), &id, &exec_id, Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(ended.code(), ErrorCode::NotFound);
}

#[tokio::test]
async fn the_end_of_a_command_that_nobody_reads_is_recorded() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let quick = start(&engine, &id, "head -c 3000000 /dev/zero; exit 7").await;
    let exec_id = quick.exec_id.clone();
    drop(quick.stream);
    assert_eq!(settled(&engine, &id, &exec_id).await, ProcessStatus::Exited);
    assert_eq!(engine.exec_summary(&caller(), &id, &exec_id).await.unwrap().exit_code, Some(7));
    // A caller that goes away in the middle of a buffered exec.
    let (running, sandbox) = (engine.clone(), id.clone());
    let task = tokio::spawn(async move { running.exec(&caller(), &sandbox, sh("sleep 0.05; exit 8")).await });
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    while engine.metrics().await.running_execs == 0 {
        assert!(std::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    task.abort();
    let newest = engine.exec_log(&caller(), &id, Some(1), None).await.unwrap().items.remove(0);
    assert_eq!(settled(&engine, &id, &newest.exec_id).await, ProcessStatus::Exited);
    assert_eq!(engine.exec_summary(&caller(), &id, &newest.exec_id).await.unwrap().exit_code, Some(8));
}

#[tokio::test]
async fn signals_terminals_and_closed_input_reach_the_command() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let sleeping = start(&engine, &id, "sleep 1000").await;
    assert!(engine.signal(&caller(), &id, &sleeping.exec_id, "NOPE").await.is_err());
    engine.signal(&caller(), &id, &sleeping.exec_id, "SIGTERM").await.unwrap();
    let exit = read(sleeping.stream).await.exit.unwrap();
    assert_eq!((exit.exit_code, exit.signal, exit.error), (143, Some(15), None));

    let open = StartOptions { keep_stdin_open: true, ..StartOptions::default() };
    let cat = engine.start_exec(&caller(), &id, sh("cat"), open).await.unwrap();
    engine.send_input(&caller(), &id, &cat.exec_id, Bytes::from_static(b"in and out")).await.unwrap();
    engine.close_stdin(&caller(), &id, &cat.exec_id).await.unwrap();
    assert_eq!(read(cat.stream).await.output, b"in and out");

    let size = TerminalSize { cols: 80, rows: 24 };
    let terminal = StartOptions { terminal: Some(size), ..StartOptions::default() };
    let shell = engine.start_exec(&caller(), &id, sh("sh"), terminal).await.unwrap();
    engine.resize(&caller(), &id, &shell.exec_id, TerminalSize { cols: 132, rows: 50 }).await.unwrap();
    engine.send_input(&caller(), &id, &shell.exec_id, Bytes::from_static(b"stty size\rexit\r")).await.unwrap();
    let seen = String::from_utf8(read(shell.stream).await.output).unwrap();
    assert!(seen.contains("50 132\r\n"), "{seen:?}");
}

#[tokio::test]
async fn commands_end_with_their_sandbox() {
    let host = Host::new();
    let engine = host.engine().await;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    let id = create(&engine).await.id;
    let mut sleeping = start(&engine, &id, "sleep 1000").await;
    let unread = start(&engine, &id, "sleep 1000").await.exec_id;
    engine.destroy(&caller(), &id).await.unwrap();
    let ended = tokio::time::timeout(crate::harness::PATIENCE, sleeping.stream.next()).await.unwrap();
    assert_eq!(ended.unwrap().unwrap_err().code(), ErrorCode::NotFound);
    assert!(sleeping.stream.next().await.is_none());
    let mut lost = Vec::new();
    while lost.len() < 2 {
        let event = event_of(&mut events, EventKind::ExecFailed, Some(&id)).await;
        lost.push(data(&event, "exec_id").to_owned());
    }
    assert!(lost.contains(&unread.to_string()));
}

#[tokio::test]
async fn a_start_that_fails_is_logged_and_the_next_one_works() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let mut events = engine.subscribe(&caller(), None).unwrap();
    host.mock.faults().inject(MockOperation::Start, Fault::Fail("broken".to_owned()), Times::Once);
    let error = engine.exec(&caller(), &id, sh("true")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InternalError);
    assert_eq!(data(&event_of(&mut events, EventKind::ExecFailed, Some(&id)).await, "operation"), "exec");
    assert_eq!(run(&engine, &id, "echo fine").await.stdout, "fine\n");
    let exec = engine.metrics().await.operations.into_iter().find(|metric| metric.operation == "exec").unwrap();
    assert_eq!((exec.success_total, exec.failure_total), (1, 1));
    let total: u64 = exec.latency_buckets.iter().sum();
    assert_eq!(total, exec.latency_count);
}

#[tokio::test]
async fn commands_run_at_the_same_time_and_do_not_mix() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let many = (0..50).map(|number| {
        let (engine, id) = (engine.clone(), id.clone());
        async move { run(&engine, &id, &format!("sleep 0.01; echo {number}")).await.stdout }
    });
    let outputs = futures_util::future::join_all(many).await;
    let expected: Vec<String> = (0..50).map(|number| format!("{number}\n")).collect();
    assert_eq!(outputs, expected);
    assert!(host.mock.calls(MockOperation::Start).succeeded >= 50);
}

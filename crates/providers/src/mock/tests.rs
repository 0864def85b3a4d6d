use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use stacyvm_api::{NetworkMode, SandboxId, Timestamp, WatchEventKind};
use stacyvm_sandbox::{
    AttachRequest, Connection, DialTarget, DiskRequest, Exit, NetworkPolicy, ProcessEvent, ProcessInput,
    ProcessSelector, ProcessStream, Provider, RemoveOptions, RuntimeState, SandboxSpec, Session, SessionError,
    StartRequest, TerminalSize, WriteOptions,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn spec() -> SandboxSpec {
    SandboxSpec {
        image: "alpine:latest".to_owned(),
        memory_mib: 64,
        vcpus: 1.0,
        pids_limit: 64,
        disk: DiskRequest { size_mib: None, in_memory: false },
        requested: BTreeSet::new(),
        network: NetworkPolicy { mode: NetworkMode::None, allow: Vec::new() },
        env: BTreeMap::from([("FROM_SPEC".to_owned(), "spec".to_owned())]),
        user: None,
        hostname: "box".to_owned(),
        metadata: BTreeMap::new(),
        allow_unenforced: false,
        expires_at: Timestamp::now() + Duration::from_hours(1),
        generation: 1,
        agent_token: String::new(),
    }
}

async fn session() -> (MockProvider, SandboxId, Arc<dyn Session>) {
    let (provider, id) = (MockProvider::default(), SandboxId::random());
    provider.create(&id, &spec(), &()).await.unwrap();
    let session = connect(&provider, &id).await;
    (provider, id, session)
}

async fn connect(provider: &MockProvider, id: &SandboxId) -> Arc<dyn Session> {
    match provider.connect(id).await.unwrap() {
        Connection::Native(session) => session,
        Connection::Envd(_) => panic!("the mock has a native session"),
    }
}

fn sh(script: &str) -> StartRequest {
    StartRequest { argv: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()], ..StartRequest::default() }
}

#[derive(Debug, Default, PartialEq)]
struct Outcome {
    stdout: String,
    stderr: String,
    terminal: String,
    dropped: u64,
    exit: Option<Exit>,
}

async fn collect(mut stream: ProcessStream) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(event) = stream.next().await {
        let text = |bytes: Bytes| String::from_utf8_lossy(&bytes).into_owned();
        match event.unwrap() {
            ProcessEvent::Started { .. } | ProcessEvent::Keepalive => {}
            ProcessEvent::Stdout(bytes) => outcome.stdout += &text(bytes),
            ProcessEvent::Stderr(bytes) => outcome.stderr += &text(bytes),
            ProcessEvent::Terminal(bytes) => outcome.terminal += &text(bytes),
            ProcessEvent::Dropped { bytes } => outcome.dropped += bytes,
            ProcessEvent::Exited(exit) => outcome.exit = Some(exit),
        }
    }
    outcome
}

async fn run(session: &Arc<dyn Session>, script: &str) -> (String, String, i32) {
    let outcome = collect(session.start(sh(script)).await.unwrap()).await;
    (outcome.stdout, outcome.stderr, outcome.exit.unwrap().shell_code())
}

#[tokio::test]
async fn scripts_behave_as_in_a_shell() {
    let (_provider, _id, session) = session().await;
    let table = [
        ("echo conformance-ok", "conformance-ok\n", "", 0),
        ("exit 7", "", "", 7),
        ("printf stream-ok", "stream-ok", "", 0),
        ("printf '%s=%d\\n' a 1 b 2", "a=1\nb=2\n", "", 0),
        ("echo a; echo b >&2; false", "a\n", "b\n", 1),
        ("false && echo no || echo yes", "yes\n", "", 0),
        ("true || echo no; echo $?", "0\n", "", 0),
        ("pwd; cd /tmp && pwd", "/workspace\n/tmp\n", "", 0),
        ("echo \"$FROM_SPEC-${FROM_SPEC}\" '$FROM_SPEC'", "spec-spec $FROM_SPEC\n", "", 0),
        ("A=1 env | cat | head -n 1; echo [$A]", "A=1\n[]\n", "", 0),
        ("B=2; echo $B; sh -c 'echo inner; exit 3'; echo $?", "2\ninner\n3\n", "", 0),
        ("echo hi > f; echo more >> f; cat f; wc -c < f", "hi\nmore\n8\n", "", 0),
        ("cat nothing", "", "cat: nothing: No such file or directory\n", 1),
        ("echo x > /no/such/file", "", "sh: /no/such/file: No such file or directory\n", 1),
        ("nosuchprogram; echo $?", "127\n", "sh: nosuchprogram: not found\n", 0),
        ("echo $(echo deep $(echo er))", "deep er\n", "", 0),
        ("(cd /tmp; exit 4); echo $? $(pwd)", "4 /workspace\n", "", 0),
        ("echo err 2>&1 >/dev/null; echo gone > /dev/null", "", "", 0),
        ("sleep 1000 & echo started", "started\n", "", 0),
        ("sleep 0 & wait; echo waited", "waited\n", "", 0),
        ("echo a | (read LINE; echo got $LINE)", "got a\n", "", 0),
        ("mkdir -p d && touch d/f && ls d && rm -r d && test ! -e d && echo clean", "f\nclean\n", "", 0),
        ("echo 'open", "", "sh: syntax error: unterminated quoted string\n", 2),
        ("kill -9 $$; echo no", "", "", 137),
        ("", "", "", 0),
    ];
    for (script, stdout, stderr, code) in table {
        let expected = (stdout.to_owned(), stderr.to_owned(), code);
        assert_eq!(run(&session, script).await, expected, "{script}");
    }
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_an_error_before_it_starts() {
    let (provider, id, session) = session().await;
    let argv = |argv: &[&str]| StartRequest {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        ..StartRequest::default()
    };
    let missing = session.start(argv(&["nosuchprogram"])).await.err();
    assert!(matches!(missing, Some(SessionError::CommandNotFound(_))));
    assert!(matches!(session.start(argv(&[" "])).await.err(), Some(SessionError::InvalidArgument(_))));
    let literal = collect(session.start(argv(&["echo", "$HOME;", "a  b"])).await.unwrap()).await;
    assert_eq!(literal.stdout, "$HOME; a  b\n");
    let user = StartRequest { user: Some("stranger".to_owned()), ..sh("true") };
    assert!(matches!(session.start(user).await.err(), Some(SessionError::UserNotFound(_))));
    let workdir = StartRequest { workdir: Some("/nowhere".to_owned()), ..sh("true") };
    assert!(matches!(session.start(workdir).await.err(), Some(SessionError::FileNotFound(_))));
    provider.exhaust_pids(&id, Exhausted::Yes);
    assert!(matches!(session.start(sh("true")).await.err(), Some(SessionError::PidsExhausted)));
}

#[tokio::test]
async fn a_deadline_kills_and_keeps_what_was_written() {
    let (_provider, _id, session) = session().await;
    let request = StartRequest { deadline: Some(Duration::from_millis(30)), ..sh("echo before; sleep 1000") };
    let outcome = collect(session.start(request).await.unwrap()).await;
    assert_eq!(outcome.stdout, "before\n");
    assert_eq!(outcome.exit, Some(Exit { code: None, signal: Some(9), timed_out: true }));
}

#[tokio::test]
async fn a_reader_that_follows_loses_nothing_and_a_late_one_is_told_what_it_missed() {
    const BYTES: usize = 3 << 20;
    let (_provider, _id, session) = session().await;
    let request = StartRequest { tag: Some("flood".to_owned()), ..sh(&format!("head -c {BYTES} /dev/zero; sleep 0")) };
    let outcome = collect(session.start(request).await.unwrap()).await;
    assert_eq!((outcome.stdout.len(), outcome.dropped), (BYTES, 0));

    let attach = AttachRequest { process: ProcessSelector::Tag("flood".to_owned()), offset: 10 };
    let late = collect(session.attach(attach).await.unwrap()).await;
    assert_eq!(late.dropped as usize + late.stdout.len(), BYTES - 10);
    assert!(late.dropped > 0);
    assert_eq!(late.exit.and_then(|exit| exit.code), Some(0));
}

#[tokio::test]
async fn a_dropped_stream_leaves_the_command_running_and_attachable() {
    let (provider, id, session) = session().await;
    let request = StartRequest { tag: Some("job".to_owned()), stdin: true, ..sh("echo one; read X; echo two $X") };
    drop(session.start(request).await.unwrap());
    let again = connect(&provider, &id).await;
    let listed = again.processes().await.unwrap();
    assert!(listed.iter().any(|process| process.tag.as_deref() == Some("job") && process.exit.is_none()));
    let job = ProcessSelector::Tag("job".to_owned());
    let stream = again.attach(AttachRequest { process: job.clone(), offset: 4 }).await.unwrap();
    again.send_input(&job, ProcessInput::Stdin(Bytes::from_static(b"three\n"))).await.unwrap();
    let outcome = collect(stream).await;
    assert_eq!(outcome.stdout, "two three\n");
    assert!(matches!(again.close_stdin(&ProcessSelector::Pid(99)).await, Err(SessionError::ProcessNotFound(_))));
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_interrupts() {
    let (_provider, _id, session) = session().await;
    let size = TerminalSize { cols: 80, rows: 24 };
    let request = StartRequest {
        argv: vec!["sh".to_owned()],
        terminal: Some(size),
        tag: Some("tty".to_owned()),
        ..StartRequest::default()
    };
    let stream = session.start(request).await.unwrap();
    let tty = ProcessSelector::Tag("tty".to_owned());
    session.resize(&tty, TerminalSize { cols: 100, rows: 40 }).await.unwrap();
    let keys = |text: &'static str| ProcessInput::Terminal(Bytes::from_static(text.as_bytes()));
    session.send_input(&tty, keys("stty size\rexit 5\r")).await.unwrap();
    let outcome = collect(stream).await;
    assert!(outcome.terminal.contains("stty size\r\n"), "{:?}", outcome.terminal);
    assert!(outcome.terminal.contains("40 100\r\n"), "{:?}", outcome.terminal);
    assert_eq!(outcome.exit.and_then(|exit| exit.code), Some(5));

    let request = StartRequest { terminal: Some(size), tag: Some("nap".to_owned()), ..sh("sleep 1000") };
    let stream = session.start(request).await.unwrap();
    session.send_input(&ProcessSelector::Tag("nap".to_owned()), keys("\u{3}")).await.unwrap();
    assert_eq!(collect(stream).await.exit.and_then(|exit| exit.signal), Some(2));
}

#[tokio::test]
async fn files_stream_in_ranges_and_trees_travel_as_tar() {
    let (provider, id, session) = session().await;
    let body = |bytes: &[u8]| -> stacyvm_sandbox::ByteStream {
        Box::pin(stream::iter(vec![Ok(Bytes::copy_from_slice(bytes))]))
    };
    let every_byte: Vec<u8> = (0..=255).collect();
    session.write("/workspace/d/bytes", body(&every_byte), WriteOptions::default()).await.unwrap();
    session.chmod("/workspace/d/bytes", 0o750).await.unwrap();
    let read = |path: &'static str, range| {
        let session = Arc::clone(&session);
        async move {
            let content = session.read(path, range).await.unwrap();
            let pieces: Vec<Bytes> = content.stream.map(Result::unwrap).collect().await;
            (content.range, pieces.concat())
        }
    };
    assert_eq!(read("/workspace/d/bytes", Some(250..999)).await, (250..256, every_byte[250..].to_vec()));
    assert_eq!(run(&session, "ln -s bytes /workspace/d/link").await.2, 0);

    let archive = session.archive("/workspace/d").await.unwrap();
    session.extract("/tmp/copy", archive).await.unwrap();
    assert_eq!(read("/tmp/copy/link", None).await.1, every_byte);
    assert_eq!(session.stat("/tmp/copy/bytes").await.unwrap().mode, 0o750);
    assert_eq!(session.glob("/tmp/**/b*").await.unwrap(), ["/tmp/copy/bytes"]);
    assert!(matches!(
        session.extract("/tmp", body(b"not a tar, and far too short")).await,
        Err(SessionError::InvalidArgument(_))
    ));
    provider.fill_disk(&id, Exhausted::Yes);
    let refused = session.write("/tmp/x", body(b"x"), WriteOptions::default()).await;
    assert!(matches!(refused, Err(SessionError::DiskFull)));
    session.remove("/tmp/copy", RemoveOptions { recursive: true }).await.unwrap();
}

#[tokio::test]
async fn watching_and_dialing_end_with_the_sandbox() {
    let (provider, id, session) = session().await;
    let mut changes = session.watch("/workspace", false).await.unwrap();
    run(&session, "mkdir sub; echo x > sub/deep; echo x > seen").await;
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let change = changes.next().await.unwrap().unwrap();
        seen.push((change.name, change.kind));
    }
    let expected = [("sub", WatchEventKind::Create), ("seen", WatchEventKind::Create), ("seen", WatchEventKind::Write)];
    assert_eq!(seen, expected.map(|(name, kind)| (name.to_owned(), kind)));

    let mut echo = session.dial(DialTarget::Port(7)).await.unwrap();
    echo.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    echo.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
    provider.listen(&id, 3000, MockService::Http("hello".to_owned()));
    assert_eq!(session.ports().await.unwrap(), [7, 3000]);
    assert!(matches!(session.dial(DialTarget::Port(81)).await.err(), Some(SessionError::PortClosed(_))));

    let sleeping = session.start(sh("sleep 1000")).await.unwrap();
    provider.die(&id);
    let events: Vec<_> = sleeping.collect().await;
    assert!(matches!(events.last(), Some(Err(SessionError::Gone))));
    while changes.next().await.is_some() {}
    assert_eq!(echo.read(&mut answer).await.unwrap(), 0);
    assert!(matches!(session.ping().await, Err(SessionError::Gone)));
    assert_eq!(provider.list().await.unwrap()[0].state, RuntimeState::Dead);
    provider.wait(&id).await.unwrap();
    provider.destroy(&id).await.unwrap();
    provider.destroy(&id).await.unwrap();
    assert!(provider.sandbox_ids().is_empty());
}

#[tokio::test]
async fn memory_kills_are_counted_and_the_console_keeps_lines() {
    let (provider, id, session) = session().await;
    assert_eq!(run(&session, "echo working; mock-oom").await.2, 137);
    assert_eq!(run(&session, "mock-disk-full").await.2, 137);
    let usage = provider.usage(&id).await.unwrap();
    assert_eq!((usage.oom_kills, usage.disk_kills, usage.pids_kills), (1, 1, 0));
    run(&session, "echo two; echo three >&2").await;
    assert_eq!(session.console(2).await.unwrap(), ["two", "three"]);
}

#[tokio::test]
async fn an_expired_sandbox_ends_itself_a_minute_later() {
    let (provider, id, session) = session().await;
    session.set_deadline(Timestamp::now() - Duration::from_secs(59)).await.unwrap();
    session.ping().await.unwrap();
    session.set_deadline(Timestamp::now() - Duration::from_secs(61)).await.unwrap();
    provider.wait(&id).await.unwrap();
    assert!(matches!(session.ping().await, Err(SessionError::Gone)));
}

#[tokio::test]
async fn faults_strike_and_calls_are_counted() {
    let (provider, id) = (MockProvider::default(), SandboxId::random());
    provider.faults().inject(MockOperation::Create, Fault::Fail("no".to_owned()), Times::Once);
    provider.faults().inject(MockOperation::Create, Fault::FailAfter("late".to_owned()), Times::Once);
    assert!(provider.create(&id, &spec(), &()).await.is_err());
    assert!(provider.sandbox_ids().is_empty());
    assert!(provider.create(&id, &spec(), &()).await.is_err());
    assert_eq!(provider.sandbox_ids(), std::slice::from_ref(&id));
    provider.faults().inject(MockOperation::Check, Fault::Fail("broken".to_owned()), Times::Once);
    assert!(!provider.check().await.is_healthy());
    assert!(provider.check().await.is_healthy());
    let calls = provider.calls(MockOperation::Create);
    assert_eq!((calls.started, calls.failed, calls.most_in_flight), (2, 2, 1));
}

#[tokio::test]
async fn every_call_inside_can_be_made_to_fail_and_to_take_long() {
    let (provider, id, session) = session().await;
    let mut events = session.start(StartRequest { stdin: true, ..sh("cat") }).await.unwrap();
    let Some(Ok(ProcessEvent::Started { pid })) = events.next().await else { panic!("it did not start") };
    let process = ProcessSelector::Pid(pid);
    let fault = || Fault::Fail("as planned".to_owned());
    provider.faults().inject(MockOperation::Input, fault(), Times::Count(4));
    let failures = [
        session.send_input(&process, ProcessInput::Stdin("x".into())).await,
        session.close_stdin(&process).await,
        session.resize(&process, TerminalSize { cols: 1, rows: 1 }).await,
        session.signal(&process, 15).await,
    ];
    assert!(failures.iter().all(|it| matches!(it, Err(SessionError::Failed { .. }))), "{failures:?}");
    provider.faults().inject(MockOperation::Dial, Fault::Delay(Duration::from_millis(1)), Times::Once);
    assert!(session.dial(DialTarget::Port(7)).await.is_ok());
    provider.faults().inject(MockOperation::Dial, fault(), Times::Once);
    assert!(matches!(session.dial(DialTarget::Port(7)).await, Err(SessionError::Failed { .. })));
    provider.faults().inject(MockOperation::Pause, fault(), Times::Once);
    provider.faults().inject(MockOperation::Resume, fault(), Times::Once);
    assert!(provider.pause(&id).await.is_err() && provider.resume(&id).await.is_err());
    assert!(provider.pause(&id).await.is_ok() && provider.resume(&id).await.is_ok());
    assert_eq!(provider.calls(MockOperation::Dial).started, 2);
}

/// Whatever a test makes the mock run, nothing of the host is started or read.
#[test]
fn the_mock_has_no_way_to_the_host() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mock");
    for entry in std::fs::read_dir(here).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for way in ["std::process", "tokio::process", "std::fs", "tokio::fs", "std::env", "libc::", "rustix::"] {
            assert!(!text.contains(way), "{} names {way}", path.display());
        }
    }
}

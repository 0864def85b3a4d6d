//! `kill -9` of the server, and what the next one finds.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use stacyvm_api::{CreateRequest, ErrorCode, ExecId, ExecRequest, ListQuery, ProcessStatus, SandboxId, SandboxState};
use stacyvm_client::{Client, ExecEvent, SandboxClient, Terminal, TerminalSize};
use tokio::time::sleep;

use crate::support::{Server, Site, create, eventually, eventually_equal, output, run, script, sh, small, within};

/// Writes numbered lines until it is told to end.
pub(crate) const COUNT: &str =
    "i=0; while [ ! -e /tmp/stop ]; do echo line $i; i=$((i+1)); sleep 0.01; done; echo end; exit 6";

/// A server in the middle of things, killed with all of them under way.
struct Killed {
    site: Arc<Site>,
    port: String,
    sandboxes: Vec<SandboxId>,
    counting: ExecId,
    /// What of the count's output arrived, and up to where.
    seen: Vec<u8>,
    offset: u64,
    terminal: ExecId,
}

impl Killed {
    async fn in_the_middle() -> Self {
        let server = Server::start(&Site::with_image(), &[]).await;
        let client = server.client();
        let wanted = small();
        let made = join_all((0..3).map(|_| create(&client, &wanted))).await;
        let mut stream = made[0].exec_stream(&script(COUNT)).await.expect("it starts");
        let counting = stream.exec_id().expect("an id").clone();
        let (mut seen, mut offset) = (Vec::new(), 0);
        while seen.len() < 200 {
            if let Some(ExecEvent::Output { data, offset: end, .. }) = stream.next().await.expect("an event") {
                seen.extend_from_slice(&data);
                offset = end.expect("a position");
            }
        }
        let shell =
            ExecRequest { command: "read answer; echo got $answer; exit 7".to_owned(), ..ExecRequest::default() };
        let mut shell = made[0].terminal(&shell, Some(TerminalSize { cols: 80, rows: 24 })).await.expect("a terminal");
        let terminal = match shell.output.next().await.expect("an event") {
            Some(ExecEvent::Started { exec_id, .. }) => exec_id,
            other => panic!("{other:?}"),
        };
        output(&made[1], "echo kept > file; sleep 1234 >/dev/null 2>&1 &").await;
        made[2].exec_background(&script("sleep 1234")).await.expect("it starts");
        // Reading the log waits until it is written.
        assert_eq!(made[2].exec_log().await.expect("its log").len(), 1);
        let sandboxes = made.iter().map(|sandbox| sandbox.id().clone()).collect();
        let port = server.url.rsplit(':').next().expect("a port").to_owned();
        Self { site: server.kill(), port, sandboxes, counting, seen, offset, terminal }
    }

    /// What a host without the server does to a sandbox.
    fn end_sandbox(&self, id: &SandboxId) {
        let record = fs::read(self.site.sandbox_dir(id.as_str()).join("init.json")).expect("readable");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
        let pid = record["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).expect("a pid");
        kill_process(pid, Signal::KILL).expect("killed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_and_their_commands_survive_and_what_died_is_marked() {
    let killed = Killed::in_the_middle().await;
    killed.end_sandbox(&killed.sandboxes[2]);
    let server = Server::start(&killed.site, &["--port", &killed.port, "--destroy-on-exit"]).await;
    let client = server.client();
    let [counting, idle, dead] = [0, 1, 2].map(|number| client.sandbox(killed.sandboxes[number].clone()));

    let listed = client.list_all(&ListQuery::default()).await.expect("listed");
    let states: BTreeSet<_> = listed.iter().map(|sandbox| (sandbox.id.clone(), sandbox.state)).collect();
    let expected = [SandboxState::Running, SandboxState::Running, SandboxState::Error];
    assert_eq!(states, killed.sandboxes.iter().cloned().zip(expected).collect());

    assert_eq!(output(&idle, "cat file; ps | grep -c '[s]leep 1234'").await, "kept\n1");
    let reason = dead.get().await.expect("it is known").reason;
    assert_eq!(reason.as_deref(), Some("it ended by itself"));
    let code = dead.exec(&script("true")).await.expect_err("it is dead").code();
    assert_eq!(code, Some(ErrorCode::Conflict));
    let lost = dead.exec_log().await.expect("its log");
    assert_eq!(lost.iter().map(|row| row.status).collect::<Vec<_>>(), [ProcessStatus::Lost]);

    // The count goes on from the last byte that was seen; none is missing.
    output(&counting, "touch /tmp/stop").await;
    let (rest, exit) = read_on(&counting, &killed.counting, killed.offset).await;
    let whole = String::from_utf8([killed.seen.clone(), rest].concat()).expect("text");
    let lines: Vec<&str> = whole.lines().collect();
    let expected: Vec<String> = (0..lines.len() - 1).map(|i| format!("line {i}")).chain(["end".to_owned()]).collect();
    assert_eq!((lines, exit), (expected.iter().map(String::as_str).collect(), 6));
    // Also from its beginning, and when it has ended.
    assert_eq!(read_on(&counting, &killed.counting, 0).await, (whole.into_bytes(), 6));

    let Terminal { mut input, output: mut out } = counting.attach(killed.terminal.clone(), 0).await.expect("attached");
    input.write(b"typed\n").await.expect("it reads");
    let mut typed = Vec::new();
    let exit = loop {
        match within("the terminal", out.next()).await.expect("an event").expect("an exit first") {
            ExecEvent::Output { data, .. } => typed.extend_from_slice(&data),
            ExecEvent::Exit(exit) => break exit.code,
            ExecEvent::Started { .. } | ExecEvent::Dropped { .. } => {}
        }
    };
    assert_eq!((String::from_utf8_lossy(&typed).as_ref(), exit), ("typed\r\ngot typed\r\n", 7));
    dead.destroy().await.expect("destroyed");
    let site = Arc::clone(&server.site);
    assert!(server.stop(Signal::TERM).await.status.success());
    assert_eq!(site.remains(), Vec::<String>::new());
}

/// Output of a command from an offset to its end, and its exit.
pub(crate) async fn read_on(sandbox: &SandboxClient, command: &ExecId, offset: u64) -> (Vec<u8>, i32) {
    let mut attached = sandbox.attach(command.clone(), offset).await.expect("attached");
    let (mut bytes, mut position) = (Vec::new(), offset);
    loop {
        match within("the rest of the output", attached.output.next()).await.expect("an event").expect("an exit first")
        {
            ExecEvent::Started { exec_id, .. } => assert_eq!(&exec_id, command),
            ExecEvent::Output { data, offset, .. } => {
                bytes.extend_from_slice(&data);
                position += data.len() as u64;
                assert_eq!(offset, Some(position));
            }
            ExecEvent::Dropped { bytes } => panic!("{bytes} bytes are lost"),
            ExecEvent::Exit(exit) => return (bytes, exit.code),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_line_that_waits_for_a_command_waits_on() {
    let site = Site::with_image();
    let server = Server::start(&site, &[]).await;
    let sandbox = create(&server.client(), &small()).await;
    let id = sandbox.id().clone();
    let waiting = server.program(&["exec", id.as_str(), "--shell", "--", COUNT]);
    let waiting = tokio::spawn(run(waiting, b""));
    eventually("it runs", async || {
        let log = sandbox.exec_log().await.ok()?;
        log.iter().any(|row| row.status == ProcessStatus::Running).then_some(())
    })
    .await;
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    server.kill();
    let server = Server::start(&site, &["--port", &port, "--destroy-on-exit"]).await;
    output(&server.client().sandbox(id), "touch /tmp/stop").await;
    let ran = waiting.await.expect("no panic");
    assert_eq!(ran.status(), Some(6), "{ran}");
    let lines: Vec<&str> = ran.stdout().lines().collect();
    let expected: Vec<String> = (0..lines.len() - 1).map(|i| format!("line {i}")).chain(["end".to_owned()]).collect();
    assert_eq!(lines, expected);
    assert!(ran.stderr().contains("reconnecting"), "{ran}");
}

/// A store that knows nothing: what runs belongs to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_record_explains_is_freed() {
    let killed = Killed::in_the_middle().await;
    for file in ["stacyvm.db", "stacyvm.db-wal", "stacyvm.db-shm"] {
        let _ = fs::remove_file(killed.site.data_dir().join(file));
    }
    // And the beginning of a sandbox that was never finished.
    fs::create_dir(killed.site.sandbox_dir("sb-00000000000000000000")).expect("made");
    let server = Server::start(&killed.site, &[]).await;
    eventually_equal("what runs is ended", &Vec::new(), async || killed.site.sandboxes_on_host()).await;
    assert_eq!(server.client().list_all(&ListQuery::default()).await.expect("listed").len(), 0);
    let sandbox = create(&server.client(), &small()).await;
    assert_eq!(output(&sandbox, "echo fresh").await, "fresh");
    sandbox.destroy().await.expect("destroyed");
    let site = Arc::clone(&server.site);
    assert!(server.stop(Signal::TERM).await.status.success());
    assert_eq!(site.remains(), Vec::<String>::new());
}

/// However far creates and destroys had come.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_at_any_moment_leaves_nothing_that_is_not_found_again() {
    const ROUNDS: u64 = 8;
    let site = Site::with_image();
    for round in 0..ROUNDS {
        let with_network = CreateRequest { network_mode: Some("bridge".to_owned()), ..small() };
        let request = if round % 2 == 0 { small() } else { with_network };
        let server = Server::start(&site, &[]).await;
        let client = server.client();
        let mut busy = tokio::task::JoinSet::new();
        for number in 0..6 {
            let (client, request) = (client.clone(), request.clone());
            busy.spawn(async move { keep_busy(&client, &request, number).await });
        }
        // Not a wait for anything: the moment at which it dies.
        sleep(Duration::from_millis(5 + round * 17)).await;
        server.kill();
        busy.shutdown().await;

        let server = Server::start(&site, &[]).await;
        let client = server.client();
        for sandbox in client.list_all(&ListQuery::default()).await.expect("listed") {
            if sandbox.state == SandboxState::Running {
                assert_eq!(sh(&client.sandbox(sandbox.id), "echo works").await.stdout, "works\n");
            }
        }
        server.run(&["kill", "--all"]).await.ok();
        eventually_equal("all is destroyed", &Vec::new(), async || site.sandboxes_on_host()).await;
        server.kill();
    }
    let server = Server::start(&site, &[]).await;
    assert!(server.stop(Signal::TERM).await.status.success());
    assert_eq!(site.remains(), Vec::<String>::new());
}

/// Creates, uses and destroys until the server is gone.
async fn keep_busy(client: &Client, request: &CreateRequest, number: usize) {
    while let Ok(made) = client.create(request).await {
        let sandbox = client.sandbox(made.id);
        let used = sandbox.exec_background(&script("sleep 1234")).await;
        if number.is_multiple_of(2) && used.is_ok() && sandbox.destroy().await.is_err() {
            return;
        }
    }
}

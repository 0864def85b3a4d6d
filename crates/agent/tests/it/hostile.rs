//! Whoever has no token, or no manners; and users without privileges.

use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use stacyvm_envd::BootConfig;
use stacyvm_sandbox::{EnvdSession, Exit, ProcessSelector, Session as _, SessionError, StartRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::envd::Client;
use crate::harness::{Agent, Output, PATIENCE, SocketChannel, collect, eventually, is_alive, next, shell};

const KILL: i32 = 9;

#[tokio::test]
async fn without_the_token_nothing_but_health_answers() {
    let agent = Agent::start();
    for token in ["", "wrong", "test-token-012345678", "test-token-01234567890"] {
        let client = Client::with_token(&agent, token);
        assert_eq!(client.get("/health").await.status, 204);
        for target in ["/files?path=/etc/hostname", "/metrics", "/envs", "/stacyvm/archive?path=/etc"] {
            assert_eq!(client.get(target).await.status, 401, "{target}");
        }
        assert_eq!(client.call("process.Process/List", "{}").await.status, 401);
        assert_eq!(client.send("POST", "/init", &[], b"{}").await.status, 401);
    }
    let channel = Arc::new(SocketChannel(agent.socket.clone()));
    let session = EnvdSession::connect(channel, "wrong".to_owned()).expect("a header value");
    assert!(matches!(session.ping().await, Err(SessionError::Unavailable(_))));
    assert!(matches!(session.read("/etc/hostname", None).await.err(), Some(SessionError::Unavailable(_))));
}

#[tokio::test]
async fn garbage_on_the_socket_hurts_nobody() {
    let agent = Agent::start();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut noise: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = move || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise as u8
    };
    for round in 0..40 {
        let mut stream = UnixStream::connect(&agent.socket).await.expect("it listens");
        let mut bytes = match round % 4 {
            0 => Vec::new(),
            1 => preface.to_vec(),
            2 => b"POST /process.Process/Start HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".to_vec(),
            _ => b"GET ".to_vec(),
        };
        bytes.extend((0..4000).map(|_| random()));
        // It may hang up at any time.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it hangs up");
    }
    // Connections that say nothing at all.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(UnixStream::connect(&agent.socket).await.expect("it listens"));
    }
    assert_eq!(agent.shell("echo fine").await.text(), "fine\n");
}

#[tokio::test]
async fn malformed_messages_are_answered() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    for (method, json) in [
        ("process.Process/List", "{"),
        ("process.Process/SendInput", r#"{"process":{"pid":"x"}}"#),
        ("process.Process/SendSignal", r#"{"process":{},"signal":"NO_SUCH"}"#),
        ("filesystem.Filesystem/Stat", r#"{"path":""}"#),
        ("filesystem.Filesystem/Stat", r#"{"path":"a\u0000b"}"#),
        ("stacyvm.agent.v1.Agent/Chmod", r#"{"path":"/tmp","mode":99999}"#),
    ] {
        let answer = client.call(method, json).await;
        assert_eq!((answer.status, &answer.json()["code"]), (400, &"invalid_argument".into()), "{method} {json}");
    }
    let long = format!(r#"{{"path":"{}"}}"#, "a/".repeat(4 << 20));
    assert!(client.call("filesystem.Filesystem/Stat", &long).await.status >= 400);
    assert_eq!(agent.shell("echo fine").await.text(), "fine\n");
}

#[tokio::test]
async fn commands_run_as_the_user_and_files_belong_to_it() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root, to have two users");
    let agent = Agent::start_with(BootConfig { default_user: Some("65534:65534".to_owned()), ..BootConfig::default() });
    let ids = agent.shell("id -u; id -g; id -G; cat /proc/self/oom_score_adj").await.text();
    let own: i32 = std::fs::read_to_string("/proc/self/oom_score_adj").expect("readable").trim().parse().expect("i32");
    assert_eq!(ids, format!("65534\n65534\n65534\n{}\n", (own + 500).min(1000)));
    let root = StartRequest { user: Some("root".to_owned()), ..shell("id -u; echo $HOME") };
    assert_eq!(agent.run(root).await.expect("root is known").text(), "0\n/root\n");

    agent.session.make_dir(&agent.path("d/e")).await.expect("new");
    let owner = std::fs::metadata(agent.path("d")).expect("made").uid();
    assert_eq!(owner, 65534);
    assert_eq!(agent.shell("touch d/e/f && echo mine").await.text(), "mine\n");
}

#[tokio::test]
async fn a_command_that_stops_its_supervisor_is_killed_as_any_other() {
    let agent = Agent::start();
    let script = "kill -STOP $PPID; echo $PPID; exec sleep 1000";
    let request = StartRequest { deadline: Some(Duration::from_millis(700)), ..shell(script) };
    let overdue = agent.run(request).await.expect("it starts");
    assert_eq!(overdue.exit, Some(Exit { code: None, signal: Some(KILL), timed_out: true }));

    // Many at once: some stop it before it has told of the start.
    let killed = join_all((0..20).map(async |_| {
        let mut events = agent.session.start(shell(script)).await.expect("it starts");
        let mut output = Output::default();
        while output.stdout.is_empty() {
            output.add(next(&mut events).await.expect("an event"));
        }
        agent.session.signal(&ProcessSelector::Pid(output.pid), KILL).await.expect("it runs");
        let exit = collect(events).await.expect("it ends").exit;
        assert_eq!(exit, Some(Exit { code: None, signal: Some(KILL), timed_out: false }));
        output
    }));
    for output in killed.await.into_iter().chain([overdue]) {
        let supervisor = output.text().trim().parse().expect("a number");
        eventually("the supervisor is gone too", async || !is_alive(supervisor)).await;
    }
}

#[tokio::test]
async fn a_stopped_supervisor_keeps_no_end_from_the_caller() {
    let agent = Agent::start();
    let output = agent.shell("kill -STOP $PPID; echo done; exit 3").await;
    assert_eq!((output.text().as_str(), output.exit.and_then(|exit| exit.code)), ("done\n", Some(3)));
}

#[tokio::test]
async fn a_command_that_kills_its_supervisor_ends_with_it() {
    let agent = Agent::start();
    let output = agent.shell("kill -9 $PPID; exec sleep 1000").await;
    assert_eq!(output.exit, Some(Exit { code: None, signal: Some(KILL), timed_out: false }));
    eventually("the command is dead", async || !is_alive(output.pid)).await;
}

#[tokio::test]
async fn the_agents_memory_and_token_stay_hidden() {
    let agent = Agent::start_with(BootConfig { default_user: Some("65534".to_owned()), ..BootConfig::default() });
    let pid = agent.child.id();
    let peek =
        format!("cat /proc/{pid}/environ /proc/{pid}/maps; cat /proc/{pid}/cmdline | tr '\\0' ' '; ls /proc/{pid}/fd");
    let output = agent.shell(&peek).await;
    assert!(!output.text().contains(crate::harness::TOKEN), "{}", output.text());
    assert!(!output.text().contains("stack"), "its maps cannot be read: {}", output.text());
    let own = agent.shell("env; ls -l /proc/self/fd").await.text();
    assert!(!own.contains(crate::harness::TOKEN) && !own.contains("socket:"), "nothing is inherited: {own}");
}

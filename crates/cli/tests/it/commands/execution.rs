//! `run` and `exec`: as if the command ran here.

use std::collections::BTreeSet;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stacyvm_api::{ListQuery, ProcessStatus};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use super::Fixture;
use crate::support::{Server, eventually, output, run, within};

#[tokio::test(flavor = "multi_thread")]
async fn status_streams_and_signals_pass_through() {
    let fixture = Fixture::start().await;
    let exec = async |script: &str| fixture.server.run(&["exec", &fixture.id, "--shell", "--", script]).await;
    let both = exec("echo out; echo err >&2; exit 7").await;
    assert_eq!((both.status(), both.stdout(), both.stderr()), (Some(7), "out\n", "err\n"));
    assert_eq!(exec("kill -9 $$").await.status(), Some(137));
    assert_eq!(exec("kill -TERM $$").await.status(), Some(143));
    assert_eq!(exec("exit 255").await.status(), Some(255));
    let bytes = exec("printf '\\377\\000\\200'; printf '\\376' >&2").await;
    assert_eq!(bytes.stdout_bytes(), b"\xff\0\x80");

    let words = ["exec", &fixture.id, "--", "printf", "%s|", "$HOME", "a  b", "", "-n", "it's"];
    assert_eq!(fixture.server.run(&words).await.ok().stdout(), "$HOME|a  b||-n|it's|");
    let options = ["exec", &fixture.id, "-e", "A=one two", "-u", "1000", "-w", "/tmp", "--shell", "--"];
    let shown = fixture.server.run(&[&options[..], &["echo $A; id -u; pwd"]].concat()).await.ok();
    assert_eq!(shown.stdout(), "one two\n1000\n/tmp\n");

    let late = ["exec", &fixture.id, "--timeout", "300ms", "--shell", "--", "echo so far; sleep 60"];
    let late = fixture.server.run(&late).await;
    assert_eq!((late.status(), late.stdout()), (Some(124), "so far\n"), "{late}");
    late.says("its deadline passed");
    fixture.server.run(&["exec", &fixture.id, "--", "no-such-program"]).await.says("no-such-program");
    for words in [&["no-such-program"][..], &["/etc/passwd"], &[" "], &[""]] {
        let refused = fixture.server.run(&[&["exec", &*fixture.id, "--"][..], words].concat()).await;
        assert_eq!(refused.status(), Some(125), "{refused}");
        assert!(refused.stderr().starts_with("error: ") && refused.stdout().is_empty(), "{refused}");
    }
    fixture.server.run(&["exec", &fixture.id]).await.failed(2).says("stacyvm shell").says(" -- ls -l");
    fixture.finish().await;
}

/// The agent keeps what it has read of the user database only while it is true.
#[tokio::test(flavor = "multi_thread")]
async fn users_are_those_the_sandbox_has_now() {
    let fixture = Fixture::start().await;
    let as_ada = async || fixture.server.run(&["exec", &fixture.id, "-u", "ada", "--", "id", "-u"]).await;
    let change = async |script: &str| fixture.server.run(&["exec", &fixture.id, "--shell", "--", script]).await.ok();
    as_ada().await.says("ada");
    change("echo ada:x:1234:1234::/tmp:/bin/sh >> /etc/passwd").await;
    assert_eq!(as_ada().await.ok().stdout(), "1234\n");
    // The same file of the same size, changed within the grain of its clock.
    change("sed s/1234/1235/g /etc/passwd > /tmp/new && cat /tmp/new > /etc/passwd").await;
    assert_eq!(as_ada().await.ok().stdout(), "1235\n");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn input_of_any_size_reaches_the_command() {
    let fixture = Fixture::start().await;
    let input: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let echoed = fixture.server.run_with_input(&["exec", &fixture.id, "--", "cat"], &input).await.ok();
    assert!(echoed.stdout_bytes() == input, "{} of {} bytes came back", echoed.stdout_bytes().len(), input.len());
    let taken = fixture.server.run_with_input(&["exec", &fixture.id, "--", "head", "-c", "3"], b"abcdef").await.ok();
    assert_eq!(taken.stdout(), "abc", "a command that reads less ends all the same");
    let counted =
        fixture.server.run_with_input(&["exec", &fixture.id, "-n", "--", "wc", "-c"], b"not for it").await.ok();
    assert_eq!(counted.stdout().trim(), "0");
    let scripted = fixture.server.run_with_input(&["run", "--memory", "128"], b"echo from a script\nexit 9\n").await;
    assert_eq!((scripted.status(), scripted.stdout()), (Some(9), "from a script\n"), "{scripted}");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_json_where_that_is_asked_for() {
    let fixture = Fixture::start().await;
    let exec = async |script: &str| {
        let ran = fixture.server.run(&["--json", "exec", &fixture.id, "--shell", "--", script]).await;
        (ran.status(), serde_json::from_str::<Value>(ran.stdout()).expect("one JSON object"))
    };
    let (status, result) = exec("echo out; echo err >&2; exit 7").await;
    assert_eq!((status, &result["exit_code"]), (Some(7), &Value::from(7)));
    assert_eq!((&result["stdout"], &result["stderr"]), (&Value::from("out\n"), &Value::from("err\n")));
    assert_eq!((&result["sandbox_id"], &result["truncated"]), (&Value::from(&*fixture.id), &Value::from(false)));
    assert!(result["duration"].as_str().is_some_and(|duration| duration.ends_with('s')), "{result}");
    assert_eq!(exec("printf '\\377'").await.1["stdout_b64"], "/w==");
    let ran: Value = fixture.server.run(&["run", "--json", "--", "echo", "hi"]).await.json();
    assert_eq!(ran["stdout"], "hi\n");
    fixture.finish().await;
}

/// Sandboxes there are, by id.
async fn ids(server: &Server) -> BTreeSet<String> {
    let listed = server.client().list_all(&ListQuery::default()).await.expect("listed");
    listed.into_iter().map(|sandbox| sandbox.id.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_command_has_a_sandbox_of_its_own_that_is_gone_afterwards() {
    let server = Server::shared().await;
    let hostname = server.run(&["run", "--", "hostname"]).await.ok();
    let id = hostname.stdout().trim().to_owned();
    assert!(id.starts_with("sb-") && !ids(&server).await.contains(&id), "{id} is still there");
    assert_eq!(server.run(&["run", "--", "sh", "-c", "exit 7"]).await.status(), Some(7));
    let limited = ["run", "-e", "A=b", "--memory", "100", "--pids-limit", "33", "--metadata", "job=42", "--keep"];
    let kept = server.run(&[&limited[..], &["--shell", "--", "echo $A; hostname"]].concat()).await.ok();
    let id = kept.stdout().strip_prefix("b\n").expect("its environment").trim().to_owned();
    assert!(kept.stderr().contains(&format!("stacyvm kill {id}")), "{kept}");
    let record: Value = server.run(&["inspect", "--json", &id]).await.json();
    assert_eq!((&record["memory_mb"], &record["metadata"]["job"]), (&Value::from(100), &Value::from("42")));
    server.run(&["kill", &id]).await.ok();

    server.run(&["run", "--image", "127.0.0.1:1/nothing", "--", "true"]).await.failed(125).says("--image host");
    server.run(&["run", "--network", "lan", "--", "true"]).await.says("`lan`");
    let local = server.run(&["run", "--server", "http://127.0.0.1:1", "--", "true"]).await.failed(125);
    assert!(local.stderr().contains("stacyvm serve"), "{local}");
    // A reader that goes away ends it, as it would end any program.
    let piped = format!("'{}' run -- yes | head -n 1", env!("CARGO_BIN_EXE_stacyvm"));
    let before = ids(&server).await;
    let mut shell = server.site.command("bash");
    shell.args(["-c", &piped]).env("STACYVM_URL", &server.url);
    assert_eq!(run(shell.into(), b"").await.ok().stdout(), "y\n");
    eventually("its sandbox goes", async || ids(&server).await.is_subset(&before).then_some(())).await;
}

/// A command in a sandbox that stays is ended too, quietly.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pipe_ends_the_command() {
    let fixture = Fixture::start().await;
    let program = env!("CARGO_BIN_EXE_stacyvm");
    let piped = format!("'{program}' exec {} -- yes | head -n 1; echo ${{PIPESTATUS[0]}}", fixture.id);
    let mut shell = fixture.server.site.command("bash");
    shell.args(["-c", &piped]).env("STACYVM_URL", &fixture.server.url);
    let ran = run(shell.into(), b"").await.ok();
    assert_eq!((ran.stdout(), ran.stderr()), ("y\n141\n", ""));
    let look = ["exec", &fixture.id, "--shell", "--", "pidof yes || echo none"];
    eventually("it ends", async || (fixture.server.run(&look).await.ok().stdout() == "none\n").then_some(())).await;
}

/// There is nothing to reconnect to.
#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_dies_under_a_command_ends_the_command_line() {
    let fixture = Fixture::start().await;
    let waiting = fixture.server.program(&["exec", &fixture.id, "--", "sleep", "987"]);
    let waiting = tokio::spawn(run(waiting, b""));
    let state = fixture.server.site.sandbox_dir(&fixture.id).join("init.json");
    let init: Value = serde_json::from_slice(&std::fs::read(state).expect("its first process")).expect("JSON");
    let look = ["exec", &fixture.id, "--", "pidof", "sleep"];
    eventually("it runs", async || (fixture.server.run(&look).await.status() == Some(0)).then_some(())).await;
    let pid = init["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    kill_process(pid.expect("a pid"), Signal::KILL).expect("it is there");
    let ran = waiting.await.expect("no panic");
    assert!(ran.status() != Some(0) && ran.stderr().lines().count() < 8, "{ran}");
    assert!(ran.stderr().contains("error: "), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_asks_and_then_kills() {
    let fixture = Fixture::start().await;
    // What is said on the second line depends on what reached the command.
    for (trap, interrupts, expected) in
        [("trap 'echo asked; exit 3' INT", 1, (3, "asked\n")), ("trap 'echo asked' INT", 2, (137, "asked\n"))]
    {
        let script = format!("{trap}; echo ready; while :; do sleep 0.05; done");
        let mut command = fixture.server.program(&["exec", &fixture.id, "--shell", "--", &script]);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("it starts");
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        within("it is ready", out.read_line(&mut line)).await.expect("a line");
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
        let mut rest = String::new();
        for number in 0..interrupts {
            kill_process(pid, Signal::INT).expect("told");
            if number == 0 {
                within("it was asked", out.read_line(&mut rest)).await.expect("a line");
            }
        }
        within("the rest", out.read_to_string(&mut rest)).await.expect("its output");
        let status = within("its end", child.wait()).await.expect("its status");
        assert_eq!((status.code(), rest.as_str()), (Some(expected.0), expected.1), "{trap}");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_told_to_end_takes_its_sandbox_with_it() {
    let server = Server::shared().await;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut command = server.program(&["run", "--shell", "--", "hostname; sleep 1234"]);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("it starts");
        let mut id = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        within("it runs", out.read_line(&mut id)).await.expect("a line");
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
        kill_process(pid, signal).expect("told");
        let status = within("its end", child.wait()).await.expect("its status");
        assert!(!status.success() && status.code().is_some(), "{signal:?}: {status}");
        assert!(!ids(&server).await.contains(id.trim()), "{signal:?}: {id} is still there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_of_a_sandbox_are_listed_with_what_they_wrote() {
    let fixture = Fixture::start().await;
    output(&fixture.sandbox, "echo first line; echo second line").await;
    fixture.server.run(&["exec", &fixture.id, "--", "false"]).await;
    let mut running = fixture.server.program(&["exec", &fixture.id, "--", "sleep", "1234"]);
    let running = running.stdin(std::process::Stdio::null()).kill_on_drop(true).spawn().expect("it starts");
    eventually("it runs", async || {
        let log = fixture.sandbox.exec_log().await.ok()?;
        log.iter().any(|row| row.status == ProcessStatus::Running).then_some(())
    })
    .await;
    let table = fixture.server.run(&["ps", &fixture.id]).await.ok();
    let lines: Vec<&str> = table.stdout().lines().collect();
    assert!(lines.len() == 4 && lines[0].starts_with("ID "), "{table}");
    assert!(lines[1].contains("running") && lines[1].ends_with("sleep 1234"), "{table}");
    assert!(lines[2].contains("exited 1") && lines[3].contains("exited 0"), "{table}");
    let rows: Vec<Value> = fixture.server.run(&["ps", "--running", "--json", &fixture.id]).await.json();
    assert_eq!((rows.len(), &rows[0]["status"]), (1, &Value::from("running")));
    drop(running);

    assert_eq!(fixture.server.run(&["logs", &fixture.id, "-n", "1"]).await.ok().stdout(), "second line\n");
    let lines: Vec<String> = fixture.server.run(&["logs", "--json", &fixture.id]).await.json();
    assert_eq!(lines, ["first line", "second line"]);
    fixture.server.run(&["logs", "sb-00000000000000000000"]).await.says("does not exist");
    fixture.finish().await;
}

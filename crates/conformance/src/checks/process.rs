//! Processes that run: input, signals, re-attaching, listing.

use std::time::Duration;

use bytes::Bytes;
use stacyvm_sandbox::{AttachRequest, Exit, ProcessInput, ProcessSelector, SessionError, StartRequest};

use super::check;
use crate::check::{ensure, expect_eq, expect_error};
use crate::context::{argv, eventually, shell};
use crate::output::Reader;
use crate::{Check, Checked, Context, Failure, Subject, pattern};

const SIGTERM: i32 = 15;
const SIGUSR1: i32 = 10;

/// More than a pipe holds, so that writing input and reading output must overlap.
const LARGE_INPUT_BYTES: usize = 1 << 20;
const INPUT_CHUNK_BYTES: usize = 32 << 10;

const LIMIT: Duration = Duration::from_secs(10);

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("S40", "standard input reaches the command while it runs", [Terminal], stdin_echo),
        check!("S41", "closing standard input ends a command that reads it", [Terminal], stdin_close),
        check!("S42", "a megabyte of input passes through unchanged", [Terminal, Programs], large_stdin),
        check!("S43", "signals reach the command", [Terminal, Programs], signals),
        check!("S44", "output can be read again from any offset", [Terminal, Programs], attach_by_offset),
        check!("S45", "a second reader of a running command gets all of it", [Terminal, Programs], second_reader),
        check!("S46", "running commands are listed, and unknown ones not found", [Terminal], listing),
        check!("S47", "a command goes on when its reader goes away", [Terminal], reader_leaves),
    ]
}

fn with_stdin(request: StartRequest) -> StartRequest {
    StartRequest { stdin: true, ..request }
}

async fn send(subject: &Subject, pid: u32, input: impl Into<Bytes>) -> Checked {
    Ok(subject.session.send_input(&ProcessSelector::Pid(pid), ProcessInput::Stdin(input.into())).await?)
}

async fn stdin_echo(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let mut reader = subject.open(with_stdin(argv(["cat"]))).await?;
    for line in ["first\n", "second ü\n"] {
        send(&subject, reader.pid(), line).await?;
        reader.until(&format!("it echoed {line:?}"), |output| output.stdout.ends_with(line.as_bytes())).await?;
    }
    subject.session.close_stdin(&ProcessSelector::Pid(reader.pid())).await?;
    let output = reader.finish().await?;
    expect_eq("all it echoed", output.text().as_str(), "first\nsecond ü\n")?;
    expect_eq("exit", &output.exit.code, &Some(0))
}

async fn stdin_close(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let reader = subject.open(with_stdin(shell("cat >/dev/null; echo end of input; exit 3"))).await?;
    subject.session.close_stdin(&ProcessSelector::Pid(reader.pid())).await?;
    let output = reader.finish().await?;
    expect_eq("stdout", output.text().as_str(), "end of input\n")?;
    expect_eq("exit", &output.exit.code, &Some(3))
}

async fn large_stdin(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let content = pattern::collect(pattern::stream_of(LARGE_INPUT_BYTES as u64, 42), LARGE_INPUT_BYTES).await?;
    let reader = subject.open(with_stdin(argv(["cat"]))).await?;
    let pid = reader.pid();
    let feed = async {
        for chunk in content.chunks(INPUT_CHUNK_BYTES) {
            send(&subject, pid, chunk.to_vec()).await?;
        }
        Ok::<_, Failure>(subject.session.close_stdin(&ProcessSelector::Pid(pid)).await?)
    };
    let (input, output) = tokio::join!(feed, reader.finish());
    input?;
    let output = output?;
    expect_eq("dropped", &output.dropped, &0)?;
    expect_eq("length", &output.stdout.len(), &content.len())?;
    expect_eq("hash", &pattern::sha256(&output.stdout), &pattern::sha256(&content))
}

async fn signals(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let script =
        "trap 'echo got usr1' USR1; trap 'echo got term; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let mut reader = subject.open(shell(script)).await?;
    let process = ProcessSelector::Pid(reader.pid());
    reader.until("it is ready", |output| output.stdout == b"ready\n").await?;
    subject.session.signal(&process, SIGUSR1).await?;
    reader.until("it got USR1", |output| output.stdout.ends_with(b"got usr1\n")).await?;
    subject.session.signal(&process, SIGTERM).await?;
    let output = reader.finish().await?;
    expect_eq("stdout", output.text().as_str(), "ready\ngot usr1\ngot term\n")?;
    expect_eq("exit", &output.exit, &Exit { code: Some(5), signal: None, timed_out: false })
}

/// A command that writes ten numbered lines and then waits to be told to end.
const TEN_LINES: &str = "for i in 0 1 2 3 4 5 6 7 8 9; do echo line $i; done; read answer; echo answer $answer";

async fn attach_by_offset(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let mut reader = subject.open(with_stdin(shell(TEN_LINES))).await?;
    let pid = reader.pid();
    reader.until("it wrote ten lines", |output| output.stdout.ends_with(b"line 9\n")).await?;
    drop(reader);
    let all = (0..10).fold(String::new(), |text, i| text + &format!("line {i}\n"));
    for offset in [0, 7, 33, all.len()] {
        let mut again = attach(&subject, pid, offset as u64).await?;
        let expected = &all[offset..];
        again.until("the rest came again", |output| output.stdout.len() >= expected.len()).await?;
        expect_eq(&format!("output from {offset}"), &*String::from_utf8_lossy(&again.seen().stdout), expected)?;
    }
    let last = attach(&subject, pid, all.len() as u64).await?;
    send(&subject, pid, "yes\n").await?;
    let output = last.finish().await?;
    expect_eq("live output after attaching", output.text().as_str(), "answer yes\n")?;
    expect_eq("exit", &output.exit.code, &Some(0))
}

async fn attach(subject: &Subject, pid: u32, offset: u64) -> Result<Reader, Failure> {
    let request = AttachRequest { process: ProcessSelector::Pid(pid), offset };
    Reader::open(subject.session.attach(request).await?).await
}

async fn second_reader(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let mut one = subject.open(with_stdin(shell(TEN_LINES))).await?;
    one.until("it wrote a line", |output| output.stdout.starts_with(b"line 0\n")).await?;
    // Over a session of its own, as another client would.
    let other = Subject { id: subject.id.clone(), session: cx.target.session(&subject.id).await? };
    let two = attach(&other, one.pid(), 0).await?;
    send(&subject, one.pid(), "both\n").await?;
    let (one, two) = tokio::try_join!(one.finish(), two.finish())?;
    expect_eq("what the two read", &two.text(), &one.text())?;
    ensure!(one.text().ends_with("line 9\nanswer both\n"), "the output is {:?}", one.text());
    Ok(())
}

async fn listing(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let request =
        StartRequest { tag: Some("conformance-tag".to_owned()), ..with_stdin(shell("echo up; read end; exit 4")) };
    let mut reader = subject.open(request).await?;
    reader.until("it is up", |output| output.stdout == b"up\n").await?;
    let pid = reader.pid();
    let running = subject.session.processes().await?;
    let Some(entry) = running.iter().find(|process| process.pid == pid) else {
        return Err(Failure(format!("process {pid} is not listed: {running:?}")));
    };
    expect_eq("exit while it runs", &entry.exit, &None)?;
    send(&subject, pid, "\n").await?;
    expect_eq("exit", &reader.finish().await?.exit.code, &Some(4))?;
    eventually("it is no longer listed as running", LIMIT, || async {
        let processes = subject.session.processes().await?;
        Ok(processes.iter().all(|process| process.pid != pid || process.exit.is_some()).then_some(()))
    })
    .await?;
    let unknown = subject.session.signal(&ProcessSelector::Pid(4_000_000), SIGTERM).await;
    expect_error("signal to an unknown process", unknown, "ProcessNotFound", |error| {
        matches!(error, SessionError::ProcessNotFound(_))
    })
}

async fn reader_leaves(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let flag = format!("{}/went-on", cx.dir());
    subject.session.make_dir(&cx.dir()).await?;
    let mut reader = subject.open(with_stdin(shell(&format!("echo up; read go; echo on > {flag}")))).await?;
    reader.until("it is up", |output| output.stdout == b"up\n").await?;
    let pid = reader.pid();
    drop(reader);
    send(&subject, pid, "go\n").await?;
    eventually("the command went on", LIMIT, || async { Ok(subject.session.stat(&flag).await.ok()) }).await?;
    Ok(())
}

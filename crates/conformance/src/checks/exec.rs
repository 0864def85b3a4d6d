//! Commands: what goes in, what comes out, how they end.

use std::time::Duration;

use futures_util::future::join_all;
use stacyvm_sandbox::{Exit, SessionError, StartRequest};

use super::check;
use crate::check::{ensure, expect_eq, expect_error};
use crate::context::{argv, eventually, shell};
use crate::{Check, Checked, Context, Failure, Subject};

/// A user that no image has by name.
const OTHER_UID: u64 = 12_345;

/// Commands that S21 runs at the same time.
const PARALLEL_EXECS: usize = 20;

/// What S30 makes a command write.
const FLOOD_BYTES: u64 = 50 << 20;

/// Deadline that checks give to commands that would otherwise never end.
const COMMAND_DEADLINE: Duration = Duration::from_secs(2);

/// How long killing a command's processes may take to be seen.
const KILL_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("C07", "`echo conformance-ok` exits with 0", [], c07),
        check!("C08", "its standard output is exactly that line", [], c08),
        check!("C09", "`exit 7` is exit code 7 and no error", [], c09),
        check!("C10", "a streamed exec opens with the command's pid", [], c10),
        check!("C11", "the stream carries exactly the output, then the exit, then ends", [], c11),
        check!("S21", "commands run in parallel, each with its own output", [], parallel_execs),
        check!("S22", "arguments reach the command literally", [], literal_arguments),
        check!("S23", "environment and working directory apply", [], environment_and_workdir),
        check!("S24", "standard error is kept apart", [], stderr_is_separate),
        check!("S25", "an exit by signal is reported as such", [], exit_by_signal),
        check!("S26", "a command that does not exist is a typed error", [Failures], command_not_found),
        check!("S27", "a working directory that does not exist is an error", [Failures], missing_workdir),
        check!(
            "S28",
            "a deadline kills re-parented and setsid children too",
            [Programs, LiveOutput],
            deadline_kills_all
        ),
        check!("S29", "a deadline keeps the output so far and is marked", [LiveOutput], deadline_keeps_output),
        check!("S30", "a flood of output arrives complete, or says what was dropped", [Programs], output_flood, long),
        check!("S31", "output is bytes: every value arrives", [Bytes], binary_output),
        check!("S32", "a background child does not hold the exec", [Programs], background_child),
        check!("S33", "a command runs as the user that was asked for", [Programs, Users], other_user),
        check!("S34", "an unknown user is a typed error", [Users], unknown_user),
        check!("S35", "standard input is empty unless asked for", [Programs], empty_stdin),
        check!("S36", "the sandbox's console holds the last lines written", [], console),
        check!("S37", "a running stream does not hold up other calls", [LiveOutput], streams_do_not_block),
    ]
}

async fn c07(cx: &Context) -> Checked {
    let output = cx.sandbox().await?.shell("echo conformance-ok").await?;
    expect_eq("exit", &output.exit, &exited(0))
}

async fn c08(cx: &Context) -> Checked {
    let output = cx.sandbox().await?.shell("echo conformance-ok").await?;
    expect_eq("stdout", output.text().as_str(), "conformance-ok\n")?;
    expect_eq("stderr", output.error_text().as_str(), "")
}

async fn c09(cx: &Context) -> Checked {
    let output = cx.sandbox().await?.shell("exit 7").await?;
    expect_eq("exit", &output.exit, &exited(7))
}

async fn c10(cx: &Context) -> Checked {
    let reader = cx.sandbox().await?.open(shell("printf stream-ok")).await?;
    ensure!(reader.pid() > 0, "the pid is zero");
    Ok(())
}

async fn c11(cx: &Context) -> Checked {
    // The reader refuses a second start, anything after the exit, and an end
    // without exit.
    let output = cx.sandbox().await?.open(shell("printf stream-ok")).await?.finish().await?;
    expect_eq("joined chunks", output.text().as_str(), "stream-ok")?;
    expect_eq("exit", &output.exit, &exited(0))
}

async fn parallel_execs(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let runs = (0..PARALLEL_EXECS).map(|number| {
        let subject = subject.clone();
        async move { subject.shell(&format!("echo out {number}; echo err {number} >&2; exit {number}")).await }
    });
    for (number, output) in join_all(runs).await.into_iter().enumerate() {
        let output = output?;
        expect_eq("stdout", &output.text(), &format!("out {number}\n"))?;
        expect_eq("stderr", &output.error_text(), &format!("err {number}\n"))?;
        expect_eq("exit", &output.exit, &exited(number as i32))?;
    }
    Ok(())
}

async fn literal_arguments(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let arguments = ["$HOME", "a  b", "*", "it's", "\"quoted\"", ";", "`id`", "a\nb", "\\n", "", "ü→漢"];
    let mut request = argv(["printf", "%s|"]);
    request.argv.extend(arguments.map(str::to_owned));
    let expected = arguments.iter().fold(String::new(), |text, argument| text + argument + "|");
    expect_eq("what printf wrote", &subject.run(request).await?.success()?, &expected)
}

async fn environment_and_workdir(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let text = subject.shell("pwd").await?.success()?;
    expect_eq("default working directory", text.as_str(), "/workspace\n")?;
    subject.session.make_dir(&cx.dir()).await?;
    let mut request = shell("pwd; echo \"$STACYVM_A\"; echo \"$STACYVM_B\"");
    request.workdir = Some(cx.dir());
    request.env.insert("STACYVM_A".to_owned(), "one two  three".to_owned());
    request.env.insert("STACYVM_B".to_owned(), "ü=$x".to_owned());
    let text = subject.run(request).await?.success()?;
    expect_eq("output", &text, &format!("{}\none two  three\nü=$x\n", cx.dir()))
}

async fn stderr_is_separate(cx: &Context) -> Checked {
    let output = cx.sandbox().await?.shell("echo to-out; echo to-err >&2").await?;
    expect_eq("stdout", output.text().as_str(), "to-out\n")?;
    expect_eq("stderr", output.error_text().as_str(), "to-err\n")
}

async fn exit_by_signal(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    for signal in [9, 15] {
        let output = subject.shell(&format!("kill -{signal} $$; sleep 60")).await?;
        expect_eq("exit", &output.exit, &Exit { code: None, signal: Some(signal), timed_out: false })?;
        expect_eq("exit code for a shell", &output.exit.shell_code(), &(128 + signal))?;
    }
    Ok(())
}

async fn command_not_found(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    for program in ["stacyvm-no-such-program", "/workspace/no/such/program"] {
        let outcome = subject.session.start(argv([program])).await;
        let outcome = match outcome {
            Ok(mut stream) => super::lifecycle::first(&mut stream).await,
            Err(error) => Err(error),
        };
        let expected =
            |error: &SessionError| matches!(error, SessionError::CommandNotFound(_) | SessionError::InvalidArgument(_));
        expect_error(program, outcome, "CommandNotFound", expected)?;
    }
    for blank in ["", "  "] {
        let outcome = subject.session.start(argv([blank])).await.map(drop);
        let expected =
            |error: &SessionError| matches!(error, SessionError::InvalidArgument(_) | SessionError::CommandNotFound(_));
        expect_error("a blank command", outcome, "InvalidArgument", expected)?;
    }
    Ok(())
}

async fn missing_workdir(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let request = StartRequest { workdir: Some("/no/such/directory".to_owned()), ..shell("pwd") };
    let outcome = match subject.session.start(request).await {
        Ok(mut stream) => super::lifecycle::first(&mut stream).await,
        Err(error) => Err(error),
    };
    let expected =
        |error: &SessionError| matches!(error, SessionError::InvalidArgument(_) | SessionError::FileNotFound(_));
    expect_error("start", outcome, "InvalidArgument or FileNotFound", expected)
}

/// Three kinds of descendants: a child, one that left the session, and one
/// whose parent is gone.
async fn deadline_kills_all(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let marker = "stacyvm-marker-s28";
    let script = format!(
        "cat > /workspace/loop.sh <<'EOF'\necho up >> /workspace/up\nwhile :; do sleep 1; done\nEOF\n\
         sh /workspace/loop.sh {marker}-child &\n\
         setsid sh /workspace/loop.sh {marker}-session &\n\
         (sh /workspace/loop.sh {marker}-orphan &)\n\
         echo ready; wait"
    );
    let request = StartRequest { deadline: Some(COMMAND_DEADLINE), ..shell(&script) };
    let mut running = subject.open(request).await?;
    running.until("it said ready", |output| output.stdout == b"ready\n").await?;
    eventually("all three children run", COMMAND_DEADLINE, || async {
        Ok((subject.shell("cat /workspace/up").await?.text() == "up\n".repeat(3)).then_some(()))
    })
    .await?;
    let output = running.finish().await?;
    ensure!(output.exit.timed_out, "not marked as timed out: {:?}", output.exit);
    eventually("none of the command's processes is left", KILL_LIMIT, || async {
        Ok((subject.marked_processes(marker).await? == 0).then_some(()))
    })
    .await?;
    expect_eq("the sandbox afterwards", subject.shell("echo alive").await?.text().as_str(), "alive\n")
}

async fn deadline_keeps_output(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let script = "echo before; echo also >&2; sleep 300; echo after";
    let output = subject.run(StartRequest { deadline: Some(COMMAND_DEADLINE), ..shell(script) }).await?;
    ensure!(output.exit.timed_out, "not marked as timed out: {:?}", output.exit);
    expect_eq("stdout", output.text().as_str(), "before\n")?;
    expect_eq("stderr", output.error_text().as_str(), "also\n")?;
    // A command that ends in time is not marked.
    let request = StartRequest { deadline: Some(Duration::from_mins(1)), ..shell("echo quick") };
    expect_eq("exit of a quick command", &subject.run(request).await?.exit, &exited(0))
}

async fn output_flood(cx: &Context) -> Checked {
    use futures_util::StreamExt as _;
    use stacyvm_sandbox::ProcessEvent;

    let subject = cx.sandbox().await?;
    let line = b"0123456789abcde\n";
    let script = format!("yes 0123456789abcde | head -c {FLOOD_BYTES}; echo done >&2");
    let mut stream = subject.session.start(shell(&script)).await?;
    let (mut received, mut dropped, mut exit, mut errors) = (0_u64, 0_u64, None, Vec::new());
    while let Some(event) = stream.next().await {
        match event? {
            ProcessEvent::Stdout(bytes) => {
                let at = received + dropped;
                let wrong = bytes.iter().enumerate().find(|(i, byte)| **byte != line[((at + *i as u64) % 16) as usize]);
                if let Some((i, byte)) = wrong {
                    return Err(Failure(format!("byte {} of the output is {byte:#x}", at + i as u64)));
                }
                received += bytes.len() as u64;
            }
            ProcessEvent::Stderr(bytes) => errors.extend_from_slice(&bytes),
            ProcessEvent::Dropped { bytes } => dropped += bytes,
            ProcessEvent::Exited(end) => exit = Some(end),
            ProcessEvent::Started { .. } | ProcessEvent::Keepalive | ProcessEvent::Terminal(_) => {}
        }
    }
    cx.note(format!("{received} bytes arrived, {dropped} were said to be dropped"));
    expect_eq("bytes accounted for", &(received + dropped), &FLOOD_BYTES)?;
    expect_eq("stderr", String::from_utf8_lossy(&errors).as_ref(), "done\n")?;
    expect_eq("exit", &exit, &Some(exited(0)))
}

async fn binary_output(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let all: Vec<u8> = (0..=255).collect();
    let path = format!("{}/bytes", cx.dir());
    subject.put(&path, &all).await?;
    let output = subject.run(argv(["cat", &path])).await?;
    expect_eq("stdout", &output.stdout, &all)
}

async fn background_child(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let marker = "stacyvm-marker-s32";
    // The child holds stdout and would hold the exec for ten minutes.
    let output = subject.shell(&format!("sh -c 'sleep 600; :' {marker} & echo started")).await?;
    expect_eq("stdout", output.text().as_str(), "started\n")?;
    expect_eq("exit", &output.exit, &exited(0))?;
    eventually("exactly the background child still runs", KILL_LIMIT, || async {
        Ok((subject.marked_processes(marker).await? == 1).then_some(()))
    })
    .await
}

async fn other_user(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let request = StartRequest { user: Some(OTHER_UID.to_string()), ..shell("id -u; id -g") };
    let map = subject.shell("cat /proc/self/uid_map").await?.success()?;
    if !has_uid(&map, OTHER_UID) {
        cx.note("this sandbox has no such uid: its runtime has none to give, or pretends to");
        return match subject.run(request.clone()).await.map(|output| output.text()) {
            Ok(text) if text.starts_with(&format!("{OTHER_UID}\n")) => Ok(()),
            _ => expect_error("start", start(&subject, request).await, "InvalidArgument", |error| {
                matches!(error, SessionError::InvalidArgument(_))
            }),
        };
    }
    let text = subject.run(request).await?.success()?;
    ensure!(text.starts_with(&format!("{OTHER_UID}\n")), "the command's user is {text:?}, not {OTHER_UID}");
    Ok(())
}

/// Whether a user namespace with this map (user_namespaces(7)) has the uid.
fn has_uid(map: &str, uid: u64) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if (first..first + count).contains(&uid))
    })
}

async fn unknown_user(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let request = StartRequest { user: Some("no-such-user".to_owned()), ..shell("id") };
    let outcome = start(&subject, request).await;
    // The REST API has one code for both; its message names the user.
    let expected = |error: &SessionError| match error {
        SessionError::UserNotFound(_) => true,
        SessionError::InvalidArgument(message) => message.contains("no-such-user"),
        _ => false,
    };
    expect_error("start", outcome, "UserNotFound", expected)
}

async fn start(subject: &Subject, request: StartRequest) -> Result<(), SessionError> {
    let mut stream = subject.session.start(request).await?;
    super::lifecycle::first(&mut stream).await
}

async fn empty_stdin(cx: &Context) -> Checked {
    let output = cx.sandbox().await?.shell("wc -c; test -t 0 || echo no-terminal").await?;
    let text = output.success()?;
    expect_eq("what the command read", &text.split_whitespace().collect::<Vec<_>>(), &vec!["0", "no-terminal"])
}

async fn console(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    for number in 1..=5 {
        subject.shell(&format!("echo console line {number}")).await?;
    }
    let lines = eventually("the console shows the last line", KILL_LIMIT, || async {
        let lines = subject.session.console(3).await?;
        Ok(lines.last().is_some_and(|line| line.contains("console line 5")).then_some(lines))
    })
    .await?;
    expect_eq("number of lines", &lines.len(), &3)?;
    for (line, number) in lines.iter().zip(3..) {
        ensure!(line.contains(&format!("console line {number}")), "line {number} is {line:?}");
    }
    Ok(())
}

async fn streams_do_not_block(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let mut running = Vec::new();
    for _ in 0..5 {
        let mut reader = subject.open(shell("echo up; sleep 300")).await?;
        reader.until("it is up", |output| output.stdout == b"up\n").await?;
        running.push(reader);
    }
    subject.put("/workspace/beside", b"beside").await?;
    expect_eq("file", &subject.get("/workspace/beside").await?, &b"beside".to_vec())?;
    expect_eq("exec", subject.shell("echo beside").await?.text().as_str(), "beside\n")?;
    cx.target.destroy(&subject.id).await?;
    Ok(())
}

fn exited(code: i32) -> Exit {
    Exit { code: Some(code), signal: None, timed_out: false }
}

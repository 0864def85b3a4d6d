//! Terminals: size, resize, keys.

use std::time::Duration;

use stacyvm_sandbox::{ProcessInput, ProcessSelector, StartRequest, TerminalSize};

use super::check;
use crate::check::{ensure, expect_eq};
use crate::context::shell;
use crate::output::Reader;
use crate::{Check, Checked, Context, Failure, Subject};

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("S50", "a command gets a terminal of the size asked for", [Terminal, Programs], size),
        check!("S51", "a resize reaches the terminal and its command", [Terminal, Programs], resize),
        check!("S52", "Ctrl-C interrupts what runs in the terminal", [Terminal, Programs], interrupt),
        check!("S53", "an interactive shell answers", [Terminal, Programs], interactive),
    ]
}

const SMALL: TerminalSize = TerminalSize { cols: 100, rows: 40 };
const LARGE: TerminalSize = TerminalSize { cols: 132, rows: 50 };

fn in_terminal(script: &str) -> StartRequest {
    StartRequest { terminal: Some(SMALL), ..shell(script) }
}

async fn keys(subject: &Subject, pid: u32, keys: &'static str) -> Checked {
    Ok(subject.session.send_input(&ProcessSelector::Pid(pid), ProcessInput::Terminal(keys.into())).await?)
}

/// Waits until the terminal has shown `text`.
async fn shows(reader: &mut Reader, text: &str) -> Checked {
    reader.until(&format!("it shows {text:?}"), |output| contains(&output.terminal, text)).await
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle.as_bytes())
}

async fn size(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let output = subject.run(in_terminal("test -t 0 && test -t 1 && test -t 2 && echo all three; stty size")).await?;
    // A terminal writes carriage return and newline.
    expect_eq("terminal", &*String::from_utf8_lossy(&output.terminal), "all three\r\n40 100\r\n")?;
    expect_eq("exit", &output.exit.code, &Some(0))
}

async fn resize(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let script = "trap 'echo resized; stty size; exit 0' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut reader = subject.open(in_terminal(script)).await?;
    shows(&mut reader, "ready").await?;
    subject.session.resize(&ProcessSelector::Pid(reader.pid()), LARGE).await?;
    let output = reader.finish().await?;
    let text = String::from_utf8_lossy(&output.terminal);
    ensure!(text.contains("resized\r\n50 132\r\n"), "the terminal shows {text:?}");
    Ok(())
}

async fn interrupt(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let mut reader =
        subject.open(in_terminal("trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done")).await?;
    shows(&mut reader, "ready").await?;
    keys(&subject, reader.pid(), "\u{3}").await?;
    let output = reader.finish().await?;
    ensure!(contains(&output.terminal, "caught"), "the terminal shows {:?}", String::from_utf8_lossy(&output.terminal));
    expect_eq("exit", &output.exit.code, &Some(3))
}

async fn interactive(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let request = StartRequest { argv: vec!["sh".to_owned()], terminal: Some(SMALL), ..StartRequest::default() };
    let mut reader = subject.open(request).await?;
    let pid = reader.pid();
    keys(&subject, pid, "echo $((6 * 7))-answer\n").await?;
    shows(&mut reader, "42-answer").await?;
    keys(&subject, pid, "exit 9\n").await?;
    let output = tokio::time::timeout(Duration::from_secs(20), reader.finish())
        .await
        .map_err(|_| Failure::new("the shell did not end after `exit 9`"))??;
    expect_eq("exit", &output.exit.code, &Some(9))
}

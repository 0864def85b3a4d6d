//! Reaching what listens inside.

use std::time::Duration;

use stacyvm_sandbox::{DialTarget, SessionError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::check;
use crate::check::{ensure, expect_eq, expect_error};
use crate::context::{eventually, shell};
use crate::output::Reader;
use crate::{Check, Checked, Context, Failure, Subject};

const LIMIT: Duration = Duration::from_secs(10);

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("S57", "a port inside can be dialed and answers", [Dial, Programs], dial_port),
        check!("S58", "dialing where nothing listens is a typed error", [Dial], dial_closed),
        check!("S74", "dialing a socket that is not there is a typed error", [Sockets], dial_missing_socket),
        check!("S59", "listening ports are listed, and closed ones no longer", [Ports, Programs], ports),
    ]
}

/// Starts whatever the image has that can answer on a TCP port with one line.
async fn answer_on(subject: &Subject, port: u16, text: &str) -> Result<Reader, Failure> {
    let perl = format!(
        "use IO::Socket::INET; $s=IO::Socket::INET->new(Listen=>5,LocalAddr=>\"127.0.0.1\",LocalPort=>{port},ReuseAddr=>1) or die; \
         while($c=$s->accept){{$l=<$c>; print $c \"{text} $l\"; close $c}}"
    );
    // Two builds of busybox spell "keep listening" differently.
    let script = format!(
        "nc=; for c in 'busybox nc' nc; do $c --help 2>&1 | grep -q -- '-e PROG' && nc=$c && break; done\n\
         if [ -n \"$nc\" ]; then\n\
           keep=-lk; $nc --help 2>&1 | grep -q -- '-ll' && keep=-ll\n\
           printf '#!/bin/sh\\nread l; echo {text} $l\\n' > /tmp/answer-{port}; chmod 755 /tmp/answer-{port}\n\
           echo tool $nc $keep; exec $nc $keep -p {port} -e /tmp/answer-{port}\n\
         elif command -v perl >/dev/null; then echo tool perl; exec perl -e '{perl}'\n\
         else echo no tool; exit 1; fi"
    );
    let mut reader = subject.open(shell(&script)).await?;
    reader.until("it says what listens", |output| output.stdout.ends_with(b"\n")).await?;
    let tool = String::from_utf8_lossy(&reader.seen().stdout).into_owned();
    ensure!(tool.starts_with("tool "), "the image has neither a netcat with -e nor perl: {tool:?}");
    Ok(reader)
}

async fn ask(subject: &Subject, port: u16, question: &str) -> Result<Option<String>, Failure> {
    let mut stream = match subject.session.dial(DialTarget::Port(port)).await {
        Ok(stream) => stream,
        Err(SessionError::PortClosed(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let io = |error: std::io::Error| Failure(format!("talking to the port: {error}"));
    stream.write_all(question.as_bytes()).await.map_err(io)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.map_err(io)?;
    Ok(Some(String::from_utf8_lossy(&answer).into_owned()))
}

async fn dial_port(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let server = answer_on(&subject, 7070, "you said").await?;
    cx.note(String::from_utf8_lossy(&server.seen().stdout).trim().to_owned());
    let answer = eventually("the port answers", LIMIT, || ask(&subject, 7070, "hello\n")).await?;
    expect_eq("answer", answer.as_str(), "you said hello\n")?;
    let again = ask(&subject, 7070, "again\n").await?;
    expect_eq("second connection", &again.as_deref(), &Some("you said again\n"))
}

async fn dial_closed(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let closed = |error: &SessionError| matches!(error, SessionError::PortClosed(_));
    expect_error("port", subject.session.dial(DialTarget::Port(9)).await.map(drop), "PortClosed", closed)
}

async fn dial_missing_socket(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let socket = DialTarget::Unix("/workspace/no-such-socket".to_owned());
    expect_error("socket", subject.session.dial(socket).await.map(drop), "PortClosed or FileNotFound", |error| {
        matches!(error, SessionError::PortClosed(_) | SessionError::FileNotFound(_))
    })
}

async fn ports(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    expect_eq("ports of a new sandbox", &subject.session.ports().await?, &Vec::new())?;
    let server = answer_on(&subject, 7071, "x").await?;
    eventually("7071 is listed", LIMIT, || async { Ok((subject.session.ports().await? == [7071]).then_some(())) })
        .await?;
    let pid = server.pid();
    subject.session.signal(&stacyvm_sandbox::ProcessSelector::Pid(pid), 9).await?;
    eventually("7071 is no longer listed", LIMIT, || async {
        Ok(subject.session.ports().await?.is_empty().then_some(()))
    })
    .await
}

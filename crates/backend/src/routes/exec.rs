//! Commands without input: their whole result, or line by line as it comes.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use stacyvm_api::backend::{Code, ExecRequest, ExecResult, StreamLine};
use stacyvm_sandbox::{
    Exit, ProcessEvent, ProcessSelector, ProcessStream, Session, SessionError, StartRequest, TerminalSize,
};

use crate::error::{Answer, Refusal};
use crate::state::App;
use crate::utf8::Decoder;

/// Output of a command that is answered at once, at most.
const RESULT_BYTES_MAX: usize = 32 << 20;
const SIGKILL: i32 = 9;

pub(super) async fn run(State(app): State<App>, Json(request): Json<ExecRequest>) -> Answer<Response> {
    let session = app.session(&request.sandbox_id).await?;
    let (running, events) = Running::start(session, start_request(&request)?).await?;
    if !request.stream {
        return Ok(Json(gather(running, events).await?).into_response());
    }
    let text = request.encoding.as_deref() != Some("base64");
    let lines = Writer { text, ..Writer::default() };
    let state = (events, lines, Some(running));
    let body = stream::unfold(state, |(mut events, mut lines, mut running)| async move {
        running.as_ref()?;
        let event = events.next().await;
        let written = lines.write(event);
        if lines.ended
            && let Some(running) = running.take()
        {
            running.ended();
        }
        Some((Ok::<_, std::convert::Infallible>(written), (events, lines, running)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(body)).into_response())
}

/// What the protocol's request means. In a shell, arguments are quoted.
pub(super) fn start_request(request: &ExecRequest) -> Answer<StartRequest> {
    if request.command.trim().is_empty() {
        return Err(Refusal::bad_request("a command is required"));
    }
    let argv = match request.mode.as_deref().map(str::trim) {
        None | Some("" | "shell") => {
            let text = request.args.iter().fold(request.command.clone(), |text, argument| {
                text + " '" + &argument.replace('\'', r#"'"'"'"#) + "'"
            });
            vec!["sh".to_owned(), "-c".to_owned(), text]
        }
        Some("argv") => [std::slice::from_ref(&request.command), &request.args].concat(),
        Some(other) => return Err(Refusal::bad_request(format!("mode is shell or argv, not {other}"))),
    };
    Ok(StartRequest {
        argv,
        env: request.env.clone(),
        workdir: request.workdir.clone().filter(|dir| !dir.is_empty()),
        user: request.user.clone(),
        tag: None,
        deadline: request.timeout_ms.map(Duration::from_millis),
        stdin: request.stdin,
        terminal: request.terminal.map(|(cols, rows)| TerminalSize { cols, rows }),
    })
}

/// A command that is killed when whoever asked for it goes away.
pub(super) struct Running {
    session: Arc<dyn Session>,
    pub(super) process: ProcessSelector,
    over: bool,
}

impl Running {
    pub(super) async fn start(session: Arc<dyn Session>, request: StartRequest) -> Answer<(Self, ProcessStream)> {
        let mut events = session.start(request).await?;
        match events.next().await {
            Some(Ok(ProcessEvent::Started { pid })) => {
                Ok((Self { session, process: ProcessSelector::Pid(pid), over: false }, events))
            }
            Some(Err(error)) => Err(error.into()),
            Some(Ok(_)) | None => Err(SessionError::Unavailable(None).into()),
        }
    }

    pub(super) fn ended(mut self) {
        self.over = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.over {
            let (session, process) = (Arc::clone(&self.session), self.process.clone());
            tokio::spawn(async move { session.signal(&process, SIGKILL).await });
        }
    }
}

async fn gather(running: Running, mut events: ProcessStream) -> Answer<ExecResult> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event? {
            ProcessEvent::Stdout(bytes) | ProcessEvent::Terminal(bytes) => stdout.extend_from_slice(&bytes),
            ProcessEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ProcessEvent::Exited(Exit { timed_out: true, .. }) => {
                running.ended();
                return Err(SessionError::DeadlineExceeded.into());
            }
            ProcessEvent::Exited(exit) => {
                running.ended();
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                return Ok(ExecResult { exit_code: exit.shell_code(), stdout: text(stdout), stderr: text(stderr) });
            }
            ProcessEvent::Started { .. } | ProcessEvent::Keepalive => {}
            ProcessEvent::Dropped { .. } => return Err(too_much()),
        }
        if stdout.len() + stderr.len() > RESULT_BYTES_MAX {
            return Err(too_much());
        }
    }
    Err(SessionError::Unavailable(None).into())
}

fn too_much() -> Refusal {
    Refusal::new(429, Code::ResourceLimit, "the command wrote too much for one answer; ask for a stream")
}

/// Events as lines.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) text: bool,
    stdout: Decoder,
    stderr: Decoder,
    pub(super) ended: bool,
}

impl Writer {
    fn write(&mut self, event: Option<Result<ProcessEvent, SessionError>>) -> Bytes {
        let mut written = Vec::new();
        for line in self.lines(event) {
            // Strings and numbers always have a form.
            let _infallible = serde_json::to_writer(&mut written, &line);
            written.push(b'\n');
        }
        if written.is_empty() {
            // Blank lines are skipped, and show that somebody is there.
            written.push(b'\n');
        }
        written.into()
    }

    pub(super) fn lines(&mut self, event: Option<Result<ProcessEvent, SessionError>>) -> Vec<StreamLine> {
        let named = |stream: &str| StreamLine { stream: stream.to_owned(), ..StreamLine::default() };
        let failure = |error: SessionError| Refusal::from(error).line();
        match event {
            Some(Ok(ProcessEvent::Stdout(bytes) | ProcessEvent::Terminal(bytes))) => {
                vec![self.output("stdout", &bytes)]
            }
            Some(Ok(ProcessEvent::Stderr(bytes))) => vec![self.output("stderr", &bytes)],
            Some(Ok(ProcessEvent::Dropped { bytes })) => vec![StreamLine { bytes: Some(bytes), ..named("dropped") }],
            Some(Ok(ProcessEvent::Started { .. } | ProcessEvent::Keepalive)) => Vec::new(),
            Some(Ok(ProcessEvent::Exited(exit))) => {
                self.ended = true;
                let mut lines = Vec::new();
                for (stream, rest) in [("stdout", self.stdout.finish()), ("stderr", self.stderr.finish())] {
                    if !rest.is_empty() {
                        lines.push(StreamLine { data: Some(rest), ..named(stream) });
                    }
                }
                lines.push(StreamLine {
                    exit_code: Some(exit.shell_code()),
                    signal: exit.signal,
                    timed_out: exit.timed_out,
                    ..named("exit")
                });
                lines
            }
            Some(Err(error)) => {
                self.ended = true;
                vec![failure(error)]
            }
            None => {
                self.ended = true;
                vec![failure(SessionError::Unavailable(None))]
            }
        }
    }

    fn output(&mut self, stream: &str, bytes: &[u8]) -> StreamLine {
        let line = StreamLine { stream: stream.to_owned(), ..StreamLine::default() };
        if !self.text {
            return StreamLine { data_base64: Some(STANDARD.encode(bytes)), ..line };
        }
        let decoder = if stream == "stdout" { &mut self.stdout } else { &mut self.stderr };
        StreamLine { data: Some(decoder.push(bytes)), ..line }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_gets_its_arguments_quoted_and_argv_gets_them_as_they_are() {
        let request = |mode: Option<&str>| ExecRequest {
            command: "echo $A".to_owned(),
            args: vec!["it's".to_owned(), "a b".to_owned()],
            mode: mode.map(str::to_owned),
            ..ExecRequest::default()
        };
        let shell = start_request(&request(None)).unwrap().argv;
        assert_eq!(shell, ["sh", "-c", r#"echo $A 'it'"'"'s' 'a b'"#]);
        assert_eq!(start_request(&request(Some("argv"))).unwrap().argv, ["echo $A", "it's", "a b"]);
        assert!(start_request(&request(Some("fish"))).is_err());
        assert!(start_request(&ExecRequest { command: " ".to_owned(), ..request(None) }).is_err());
    }
}

//! Commands without input: one call, whose answer is the output.
//!
//! A backend with [`Feature::Exit`] streams. The published stream does not tell
//! how a command ended, and an exit code that is made up is worse than output
//! that comes late: from other backends the whole result is taken at once.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::Response;
use stacyvm_api::backend::{Code, ExecRequest, ExecResult, Failure, Feature, StreamLine};
use stacyvm_sandbox::{Exit, ProcessStream, SessionError, StartRequest};

use super::error::{About, CallError};
use super::http;
use super::lines::{LINE_BYTES_MAX, Lines};
use super::session::BackendSession;
use crate::process::{Channel, Process};

/// How much later than the deadline a backend may say that it was reached.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

const SIGKILL: i32 = 9;
/// A shell reports a signal's number above this.
const SIGNAL_BASE: i32 = 128;
const SIGNAL_MAX: i32 = 64;
/// More output than any command writes, and far below where offsets overflow.
const DROPPED_BYTES_MAX: u64 = 1 << 48;
const OPERATION: &str = "run the command";

impl BackendSession {
    pub(super) fn exec_request(&self, request: &StartRequest) -> Result<ExecRequest, SessionError> {
        let mut argv = request.argv.iter().cloned();
        let command = argv.next().filter(|program| !program.trim().is_empty());
        let command = command.ok_or_else(|| SessionError::InvalidArgument("a command is required".to_owned()))?;
        if request.user.is_some() && !self.has(Feature::Spec) {
            return Err(SessionError::Unsupported("running a command as another user"));
        }
        let mut env = self.env.clone();
        env.extend(request.env.clone());
        let timeout = request.deadline.filter(|_| self.has(Feature::Exit));
        Ok(ExecRequest {
            sandbox_id: self.backend_id.clone(),
            command,
            args: argv.collect(),
            mode: Some("argv".to_owned()),
            env,
            workdir: request.workdir.clone(),
            timeout_ms: timeout.map(|span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
            user: request.user.clone(),
            encoding: self.has(Feature::Bytes).then(|| "base64".to_owned()),
            ..ExecRequest::default()
        })
    }

    pub(super) async fn exec(&self, request: StartRequest) -> Result<ProcessStream, SessionError> {
        let body = self.exec_request(&request)?;
        if !self.has(Feature::Exit) {
            return Ok(self.exec_whole(&request, &body));
        }
        let call =
            self.http.post(&["exec"], &ExecRequest { stream: true, ..body }).header("accept", "application/x-ndjson");
        let response = self.http.begin(call).await.map_err(|error| start_failure(error, &request))?;
        let process = self.inside.add(&request, None);
        let stream = process.stream(0);
        let session = self.clone();
        tokio::spawn(async move { session.follow(response, &process, patience(request.deadline)).await });
        Ok(stream)
    }

    /// Reads a stream to its end, or to that of the sandbox.
    async fn follow(&self, response: Response, process: &Arc<Process>, limit: Option<Duration>) {
        let read = async {
            let mut lines = Lines::new(http::body(response), LINE_BYTES_MAX);
            while let Some(line) = lines.next::<StreamLine>().await? {
                if self.take(process, line).await? {
                    return Ok(());
                }
            }
            Err(CallError::Broken(None))
        };
        self.settle(process, limit, read).await;
    }

    /// Takes in one line; whether it was the last.
    pub(super) async fn take(&self, process: &Process, line: StreamLine) -> Result<bool, CallError> {
        let channel = match line.stream.as_str() {
            "stdout" => Channel::Stdout,
            "stderr" => Channel::Stderr,
            "exit" => {
                let timed_out = line.timed_out;
                if line.signal.is_some_and(|signal| !(1..=SIGNAL_MAX).contains(&signal)) {
                    return Err(CallError::Garbage("no signal has that number"));
                }
                process.finish(match (line.exit_code, line.signal) {
                    (_, Some(signal)) => Exit { code: None, signal: Some(signal), timed_out },
                    (Some(code), None) => Exit { timed_out, ..exit_of(code) },
                    (None, None) if timed_out => Exit { code: None, signal: Some(SIGKILL), timed_out },
                    (None, None) => return Err(CallError::Garbage("an exit has no code")),
                });
                return Ok(true);
            }
            "error" => return Err(self.told(line)),
            "dropped" => {
                let bytes = line.bytes.unwrap_or(0);
                if bytes > DROPPED_BYTES_MAX {
                    return Err(CallError::Garbage("no command wrote that much"));
                }
                process.skip(bytes);
                return Ok(false);
            }
            // Unknown ones are skipped, as unknown lines are.
            _ => return Ok(false),
        };
        let data = match (line.data_base64, line.data) {
            (Some(text), _) => {
                STANDARD.decode(text).map(Bytes::from).map_err(|_| CallError::Garbage("its base64 is none"))?
            }
            (None, text) => text.unwrap_or_default().into(),
        };
        self.inside.emit(process, channel, data).await;
        Ok(false)
    }

    /// The failure that ends a stream.
    pub(super) fn told(&self, line: StreamLine) -> CallError {
        let message = line.message.unwrap_or_default();
        let failure = Failure { code: line.code.unwrap_or(Code::Unknown), message, hint: None };
        CallError::Refused { status: 500, code: line.code, said: self.http.said(&failure) }
    }

    fn exec_whole(&self, request: &StartRequest, body: &ExecRequest) -> ProcessStream {
        let call = self.http.post(&["exec"], body);
        let process = self.inside.add(request, None);
        let stream = process.stream(0);
        let (session, deadline) = (self.clone(), request.deadline);
        tokio::spawn(async move {
            let run = async {
                let response = session.http.begin_unbounded(call).await?;
                let result: ExecResult = http::whole_json(response).await?;
                session.inside.emit(&process, Channel::Stdout, result.stdout.into()).await;
                session.inside.emit(&process, Channel::Stderr, result.stderr.into()).await;
                process.finish(exit_of(result.exit_code));
                Ok(())
            };
            // The deadline is ours to keep: ending the call tells the backend.
            session.settle(&process, deadline, run).await;
        });
        stream
    }

    /// Sees to it that the command has an end, whatever the backend does.
    pub(super) async fn settle(
        &self,
        process: &Arc<Process>,
        limit: Option<Duration>,
        run: impl Future<Output = Result<(), CallError>>,
    ) {
        let _unsettled = Unsettled(process);
        let late = async {
            match limit {
                Some(span) => tokio::time::sleep(span).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = run => ended,
            // Destroyed here; who reads was told.
            () = process.group.cancelled() => return,
            () = late => {
                process.finish(Exit { code: None, signal: Some(SIGKILL), timed_out: true });
                return;
            }
        };
        match ended {
            Ok(()) => {}
            Err(CallError::Refused { status: 408, .. }) => {
                process.finish(Exit { code: None, signal: Some(SIGKILL), timed_out: true });
            }
            Err(error) => {
                let command = process.argv.first().cloned().unwrap_or_default();
                let error = self.judged(error, About::Command(&command), OPERATION).await;
                process.fail(error);
            }
        }
    }
}

/// Whoever waits for a command hears of its end even when the task that follows
/// it ends by a mistake of ours.
struct Unsettled<'a>(&'a Process);

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        if !self.0.is_over() {
            let cause = "what follows the command ended unexpectedly".into();
            self.0.fail(SessionError::Failed { operation: OPERATION, cause });
        }
    }
}

/// The backend keeps the deadline and says so; this is for one that does not.
pub(super) fn patience(deadline: Option<Duration>) -> Option<Duration> {
    deadline.map(|span| span.saturating_add(DEADLINE_GRACE))
}

pub(super) fn start_failure(error: CallError, request: &StartRequest) -> SessionError {
    let about = match (&error, &request.user, request.argv.first()) {
        (CallError::Refused { code: Some(Code::UserNotFound), .. }, Some(user), _) => About::User(user),
        (_, _, Some(program)) => About::Command(program),
        (_, _, None) => About::Sandbox,
    };
    match error.of_session(about, OPERATION) {
        // There is no file in the call but the working directory.
        SessionError::FileNotFound(_) | SessionError::FileConflict(_) => {
            let workdir = request.workdir.as_deref().unwrap_or("/workspace");
            SessionError::InvalidArgument(format!("the working directory {workdir} does not exist"))
        }
        other => other,
    }
}

/// A signal is told as a shell does.
fn exit_of(code: i32) -> Exit {
    match code.checked_sub(SIGNAL_BASE) {
        Some(signal @ 1..=SIGNAL_MAX) => Exit { code: None, signal: Some(signal), timed_out: false },
        _ => Exit { code: Some(code), signal: None, timed_out: false },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use futures_util::StreamExt as _;

    use super::*;
    use crate::custom::inside::Inside;

    #[tokio::test]
    async fn a_command_ends_when_the_task_that_follows_it_does() {
        let session = BackendSession {
            http: http::Http::new("http://127.0.0.1:1", None, Duration::from_secs(1)).unwrap(),
            backend_id: "box".to_owned(),
            features: Arc::new(BTreeSet::new()),
            env: BTreeMap::new(),
            inside: Arc::new(Inside::default()),
        };
        let process = session.inside.add(&StartRequest::default(), None);
        let events = process.stream(0);
        let run = std::future::poll_fn(|_| -> std::task::Poll<Result<(), CallError>> { panic!("a mistake of ours") });
        let task = tokio::spawn(async move { session.settle(&process, None, run).await });
        task.await.expect_err("it ended by its mistake");
        let last = tokio::time::timeout(Duration::from_mins(1), events.collect::<Vec<_>>()).await.unwrap().pop();
        assert!(matches!(last, Some(Err(SessionError::Failed { .. }))), "{last:?}");
    }
}

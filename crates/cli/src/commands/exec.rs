//! `stacyvm exec`: runs a command in a sandbox as if it ran here.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use serde::Serialize;
use stacyvm_api::{Duration, ErrorCode, ExecRequest, SandboxId};
use stacyvm_client::{ClientError, SandboxClient};
use tokio_util::sync::CancellationToken;

use crate::commands::{Context, exit_status, key_value, stop_when_told};
use crate::failure::{Advice, NotRun};
use crate::output::{Output, json_line};
use crate::terminal::{self, Capture, Drive, Ended, Input, RawMode};

const TERMINAL_TYPE: &str = "TERM";

/// Where it is not known: what most are, or understand.
const USUAL_TERMINAL: &str = "xterm-256color";

/// Run a command in a sandbox
///
/// Input that is piped in reaches the command; its output, errors and exit
/// status come back. Ctrl-C asks it to end, a second one kills it. When the
/// server restarts meanwhile, the command goes on and so does its output.
///
/// Exit status: the command's own; 124 when its deadline passed; 125 when it
/// could not be run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm exec sb-4f9k2m0x7c1v8b3n5q6w -- ls -l /workspace
  stacyvm exec sb-4f9k2m0x7c1v8b3n5q6w --shell -- 'cd /tmp && ls | wc -l'
  echo 'print(6*7)' | stacyvm exec sb-4f9k2m0x7c1v8b3n5q6w -- python3 -
  stacyvm exec sb-4f9k2m0x7c1v8b3n5q6w -t -- top")]
pub(crate) struct ExecArgs {
    /// The sandbox
    id: SandboxId,
    #[command(flatten)]
    command: CommandArgs,
    /// Variable of the command's environment (repeatable)
    #[arg(long, short = 'e', value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// User (name or uid) to run as
    #[arg(long, short = 'u')]
    user: Option<String>,
}

/// A command and how to run it; shared with `run`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Command")]
pub(crate) struct CommandArgs {
    /// Command and arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) words: Vec<String>,
    /// Run the words through `sh -c`, joined by spaces
    #[arg(long)]
    shell: bool,
    /// Directory to run in
    #[arg(long, short = 'w', value_name = "DIR")]
    workdir: Option<String>,
    /// Deadline, such as 30s; everything the command started is killed then
    #[arg(long, value_name = "TIME")]
    timeout: Option<Duration>,
    /// Run on a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Leave standard input alone
    #[arg(long, short = 'n', conflicts_with = "tty")]
    no_stdin: bool,
    #[arg(skip)]
    terminal: Wanted,
}

/// Why a command runs on a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    ByOption,
    /// It is what the subcommand is for.
    ByCommand,
}

pub(crate) async fn run(context: &Context, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let ExecArgs { id, command, env, user } = args;
    if command.words.is_empty() {
        return Err(Advice::usage(
            "there is no command to run",
            format!("write it behind --: `stacyvm exec {id} -- ls -l`; or open a shell: `stacyvm shell {id}`"),
        )
        .into());
    }
    let sandbox = context.client()?.sandbox(id);
    let env = (!env.is_empty()).then(|| env.into_iter().collect());
    let request = ExecRequest { env, user, ..command.request() };
    execute(&sandbox, request, &command, context.output, &stop_when_told()).await
}

impl CommandArgs {
    /// These words on the terminal this program runs in.
    pub(crate) fn on_terminal(words: Vec<String>, workdir: Option<String>) -> Self {
        let terminal = Wanted::ByCommand;
        Self { words, shell: false, workdir, timeout: None, tty: true, no_stdin: false, terminal }
    }

    /// The words as they are, or as one text for the shell.
    pub(crate) fn request(&self) -> ExecRequest {
        let base = ExecRequest { workdir: self.workdir.clone(), timeout: self.timeout, ..ExecRequest::default() };
        if self.shell {
            return ExecRequest { command: self.words.join(" "), mode: Some("shell".to_owned()), ..base };
        }
        argv(&self.words, base)
    }

    fn input(&self) -> Input {
        let piped = !std::io::stdin().is_terminal();
        if !self.no_stdin && (piped || self.tty) { Input::Forward } else { Input::Closed }
    }
}

/// A request for a program and its arguments, without a shell.
pub(crate) fn argv(words: &[String], base: ExecRequest) -> ExecRequest {
    let (command, args) =
        words.split_first().map_or((String::new(), Vec::new()), |(command, args)| (command.clone(), args.to_vec()));
    ExecRequest { command, args: Some(args), mode: Some("argv".to_owned()), ..base }
}

/// Programs on a terminal need to know its kind: that of the one this program
/// is on, unless the command is told another.
fn with_terminal_type(request: ExecRequest) -> ExecRequest {
    let here = std::env::var(TERMINAL_TYPE).ok().filter(|kind| !kind.is_empty());
    let mut env = request.env.unwrap_or_default();
    env.entry(TERMINAL_TYPE.to_owned()).or_insert_with(|| here.unwrap_or_else(|| USUAL_TERMINAL.to_owned()));
    ExecRequest { env: Some(env), ..request }
}

/// Runs the command and prints what comes of it.
pub(crate) async fn execute(
    sandbox: &SandboxClient,
    request: ExecRequest,
    command: &CommandArgs,
    output: Output,
    stop: &CancellationToken,
) -> anyhow::Result<ExitCode> {
    if command.tty && !std::io::stdin().is_terminal() {
        let hint = match command.terminal {
            Wanted::ByOption => "leave out --tty".to_owned(),
            Wanted::ByCommand => format!("run a command without one: stacyvm exec {} -- COMMAND", sandbox.id()),
        };
        return Err(Advice::new("standard input is not a terminal", hint).into());
    }
    let request = if command.tty { with_terminal_type(request) } else { request };
    let raw = if command.tty { Some(RawMode::enter()?) } else { None };
    // Another user is the other thing that a runtime may not have.
    let as_user = request.user.is_some();
    let how = Drive {
        request,
        input: command.input(),
        capture: if output.is_json() { Capture::Collect } else { Capture::Print },
        terminal: command.tty.then(terminal::size),
        output,
    };
    let ended = terminal::drive(sandbox, how, stop).await;
    drop(raw);
    let ended = ended.map_err(|error| no_terminal(error, command.tty && !as_user)).context(NotRun)?;
    if output.is_json() {
        json_line(&Report::new(sandbox.id(), &ended))?;
    } else if let Some(code) = ended.exit.error {
        output.note(&format!("error: the command was ended: {}", reason(code)));
    }
    Ok(status_of(&ended))
}

/// Says it plainly where the terminal is what the runtime does not have.
fn no_terminal(error: anyhow::Error, wanted: bool) -> anyhow::Error {
    let code = error.downcast_ref::<ClientError>().and_then(ClientError::code);
    if !wanted || code != Some(ErrorCode::Unsupported) {
        return error;
    }
    Advice::new("this runtime has no terminals", "run a command without one: `stacyvm exec ID -- COMMAND`").into()
}

/// The program's exit status for a finished command.
fn status_of(ended: &Ended) -> ExitCode {
    match ended.exit.error {
        Some(ErrorCode::Timeout) => ExitCode::from(124),
        _ => exit_status(ended.exit.code),
    }
}

fn reason(code: ErrorCode) -> String {
    match code {
        ErrorCode::Timeout => "its deadline passed".to_owned(),
        ErrorCode::SandboxOom => "the sandbox used up its memory (SANDBOX_OOM)".to_owned(),
        ErrorCode::SandboxDiskFull => "the sandbox's disk is full (SANDBOX_DISK_FULL)".to_owned(),
        ErrorCode::SandboxPidsExhausted => "the sandbox used up its process limit (SANDBOX_PIDS_EXHAUSTED)".to_owned(),
        other => other.to_string(),
    }
}

/// A finished command, for `--json`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    sandbox_id: &'a SandboxId,
    exit_code: i32,
    stdout: String,
    stderr: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration: Option<Duration>,
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorCode>,
    /// `stdout_b64` and `stderr_b64`, for output that is not text.
    #[serde(flatten)]
    exact: BTreeMap<&'static str, String>,
}

impl<'a> Report<'a> {
    fn new(sandbox_id: &'a SandboxId, ended: &Ended) -> Self {
        let mut exact = BTreeMap::new();
        for (name, bytes) in [("stdout_b64", &ended.stdout), ("stderr_b64", &ended.stderr)] {
            if std::str::from_utf8(bytes).is_err() {
                exact.insert(name, BASE64.encode(bytes));
            }
        }
        Self {
            sandbox_id,
            exit_code: ended.exit.code,
            stdout: String::from_utf8_lossy(&ended.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&ended.stderr).into_owned(),
            duration: ended.exit.duration,
            truncated: ended.truncated,
            error: ended.exit.error,
            exact,
        }
    }
}

#[cfg(test)]
mod tests {
    use stacyvm_client::Exit;

    use super::*;

    fn ended(stdout: &[u8], code: i32, error: Option<ErrorCode>) -> Ended {
        let exit = Exit { code, duration: None, error };
        Ended { exit, stdout: stdout.to_vec(), stderr: Vec::new(), truncated: false }
    }

    #[test]
    fn output_that_is_not_text_is_reported_exactly() {
        let id: SandboxId = "sb-1".parse().unwrap();
        let json = |stdout: &[u8]| serde_json::to_value(Report::new(&id, &ended(stdout, 3, None))).unwrap();
        assert_eq!(json(b"hi\n")["stdout"], "hi\n");
        assert_eq!(json(b"hi\n").get("stdout_b64"), None);
        assert_eq!(json(b"\xff\0")["stdout_b64"], "/wA=");
    }

    #[test]
    fn the_status_is_the_commands_or_says_why() {
        let status = |code, error| format!("{:?}", status_of(&ended(b"", code, error)));
        let expect = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(status(7, None), expect(7));
        assert_eq!(status(137, Some(ErrorCode::SandboxOom)), expect(137));
        assert_eq!(status(137, Some(ErrorCode::Timeout)), expect(124));
        assert_eq!(status(-1, None), expect(255));
    }
}

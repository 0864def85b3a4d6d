//! `stacyvm run`: one command in a sandbox of its own, which is gone afterwards.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use stacyvm_api::{CreateRequest, ExecRequest, Sandbox};
use stacyvm_client::{Client, Destroyed, SandboxClient};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::commands::create::SandboxArgs;
use crate::commands::exec::{CommandArgs, execute};
use crate::commands::kill::not_yet_destroyed;
use crate::commands::{Context, shell, stop_when_told};
use crate::failure::NotRun;
use crate::output::Output;

/// Longest wait for the sandbox to be gone at the end.
const DESTROY_LIMIT: Duration = Duration::from_secs(30);

/// Run one command in a new sandbox and destroy it
///
/// Makes a sandbox, runs the command with its output here, and destroys the
/// sandbox, also after Ctrl-C. Without a command it opens a shell.
///
/// Exit status: the command's own; 124 when its deadline passed; 125 when it
/// could not be run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm run --image host -- python3 -c 'print(6*7)'
  stacyvm run --image alpine -- sh -c 'apk --version'
  stacyvm run --image host --memory 256 --network none --shell -- 'df -h /workspace; id'
  cat data.csv | stacyvm run --image host -- python3 -c 'import sys; print(len(sys.stdin.readlines()))'
  stacyvm run --image host")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Template to make the sandbox from; options given here win
    #[arg(long)]
    template: Option<String>,
    /// Keep the sandbox, and print its id
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    command: CommandArgs,
}

pub(crate) async fn run(context: &Context, args: RunArgs) -> anyhow::Result<ExitCode> {
    let client = context.client()?;
    let stop = stop_when_told();
    let request = args.sandbox.request(args.template.as_deref());
    let record = create(&client, &request, &stop).await.context(NotRun)?;
    let sandbox = client.sandbox(record.id.clone());
    let result = in_sandbox(&sandbox, args.command, context.output, &stop).await;
    if args.keep {
        context.output.note(&format!("kept {}; destroy it with: stacyvm kill {}", record.id, record.id));
        return result;
    }
    let destroyed = destroy(&sandbox).await;
    // What the command did counts more than what became of its sandbox.
    let code = result?;
    destroyed?;
    Ok(code)
}

/// Waits for the sandbox. When the wait is given up, the server frees what it
/// has made so far: that is what closing the connection tells it.
async fn create(client: &Client, request: &CreateRequest, stop: &CancellationToken) -> anyhow::Result<Sandbox> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for signals")?;
    tokio::select! {
        created = client.create(request) => Ok(created?),
        _ = interrupt.recv() => anyhow::bail!("interrupted before the sandbox was ready"),
        () = stop.cancelled() => anyhow::bail!("stopped before the sandbox was ready"),
    }
}

async fn in_sandbox(
    sandbox: &SandboxClient,
    mut command: CommandArgs,
    output: Output,
    stop: &CancellationToken,
) -> anyhow::Result<ExitCode> {
    let request: ExecRequest = if command.words.is_empty() {
        command.tty = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        shell::request(&command.request())
    } else {
        command.request()
    };
    execute(sandbox, request, &command, output, stop).await
}

async fn destroy(sandbox: &SandboxClient) -> anyhow::Result<()> {
    let failed = || format!("the sandbox {} may still be there; destroy it with `stacyvm kill`", sandbox.id());
    match tokio::time::timeout(DESTROY_LIMIT, sandbox.destroy()).await.with_context(failed)?.with_context(failed)? {
        Destroyed::Done => Ok(()),
        Destroyed::Retrying => Err(not_yet_destroyed(sandbox.id())),
    }
}

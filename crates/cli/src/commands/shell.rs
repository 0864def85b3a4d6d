//! `stacyvm shell`: an interactive shell in a sandbox.

use std::process::ExitCode;

use clap::Args;
use stacyvm_api::{ExecRequest, SandboxId};

use crate::commands::exec::{CommandArgs, execute};
use crate::commands::{Context, key_value, stop_when_told};
use crate::failure::Advice;

/// The best shell there is: bash where the image has it, else sh.
const SHELL: &str = "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi";

/// Open a shell in a sandbox
///
/// The terminal's size, keys and signals go through. End it with `exit` or
/// Ctrl-D; the sandbox stays.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm shell sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm shell sb-4f9k2m0x7c1v8b3n5q6w --user root -w /
  stacyvm shell sb-4f9k2m0x7c1v8b3n5q6w -- python3")]
pub(crate) struct ShellArgs {
    /// The sandbox
    id: SandboxId,
    /// Variable of the shell's environment (repeatable)
    #[arg(long, short = 'e', value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// User (name or uid) to run as
    #[arg(long, short = 'u')]
    user: Option<String>,
    /// Directory to begin in
    #[arg(long, short = 'w', value_name = "DIR")]
    workdir: Option<String>,
    /// Program to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    words: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: ShellArgs) -> anyhow::Result<ExitCode> {
    let ShellArgs { id, env, user, workdir, words } = args;
    if context.output.is_json() {
        return Err(Advice::new("a shell has no JSON form", "use `stacyvm exec --json`").into());
    }
    let sandbox = context.client()?.sandbox(id);
    let command = CommandArgs::on_terminal(words, workdir);
    let env = (!env.is_empty()).then(|| env.into_iter().collect());
    let base = ExecRequest { env, user, ..command.request() };
    let request = if command.words.is_empty() { self::request(&base) } else { base };
    execute(&sandbox, request, &command, context.output, &stop_when_told()).await
}

/// The request turned into one for a shell.
pub(crate) fn request(base: &ExecRequest) -> ExecRequest {
    ExecRequest { command: SHELL.to_owned(), args: None, mode: Some("shell".to_owned()), ..base.clone() }
}

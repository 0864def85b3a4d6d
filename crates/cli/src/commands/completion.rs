//! `stacyvm completion`: a script that completes this command line in a shell.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::commands::Cli;
use crate::output::print;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm completion bash > /etc/bash_completion.d/stacyvm
  stacyvm completion zsh > ~/.zfunc/_stacyvm
  stacyvm completion fish > ~/.config/fish/completions/stacyvm.fish")]
pub(crate) struct CompletionArgs {
    shell: Shell,
}

pub(crate) fn run(args: &CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "stacyvm", &mut script);
    print(&String::from_utf8(script)?)
}

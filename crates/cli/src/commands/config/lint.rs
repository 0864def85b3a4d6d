//! `stacyvm config lint`: whether a configuration is wise.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::check::Strictness;
use crate::commands::Context;
use crate::config::{self, Environment};

/// Judge the configuration: keys, exposure, limits, isolation
///
/// Every finding names the key, its line and what to do. With --production,
/// what is a risk to others is a failure.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm config lint
  stacyvm config lint --production --file /etc/stacyvm/stacyvm.yaml
  stacyvm config lint --json | jq '.checks[] | select(.status != \"PASS\")'")]
pub(super) struct LintArgs {
    /// Configuration file, instead of the usual places
    #[arg(long, visible_alias = "config", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Judge for a server that other people depend on
    #[arg(long)]
    production: bool,
}

pub(super) fn run(context: &Context, args: &LintArgs) -> anyhow::Result<ExitCode> {
    let loaded = config::examine(args.file.as_deref(), &Environment::of_this_process(), &[]);
    let checks = config::lint(&loaded, Strictness::new(args.production));
    checks.show(context.output)?;
    Ok(checks.exit_code())
}

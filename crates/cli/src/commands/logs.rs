//! `stacyvm logs`: the last lines a sandbox's commands wrote.

use clap::Args;
use stacyvm_api::SandboxId;

use crate::commands::Context;
use crate::output::lines;

/// Show the last lines that a sandbox's commands wrote
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm logs sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm logs -n 20 sb-4f9k2m0x7c1v8b3n5q6w")]
pub(crate) struct LogsArgs {
    /// The sandbox
    id: SandboxId,
    /// Lines at most: 1 to 10000
    #[arg(long, short = 'n', default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    lines: u32,
}

pub(crate) async fn run(context: &Context, args: LogsArgs) -> anyhow::Result<()> {
    let logged = context.client()?.sandbox(args.id).logs(args.lines).await?;
    context.output.show(&logged, |logged| lines(logged))
}

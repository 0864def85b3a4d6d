//! `stacyvm extend`: gives a sandbox more time.

use clap::Args;
use stacyvm_api::{Duration, SandboxId};

use crate::commands::Context;
use crate::output;

/// Let a sandbox live for a time from now
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm extend sb-4f9k2m0x7c1v8b3n5q6w 2h
  stacyvm extend sb-4f9k2m0x7c1v8b3n5q6w 90m")]
pub(crate) struct ExtendArgs {
    /// The sandbox
    id: SandboxId,
    /// Time from now, such as 30m or 2h
    ttl: Duration,
}

pub(crate) async fn run(context: &Context, args: ExtendArgs) -> anyhow::Result<()> {
    let sandbox = context.client()?.sandbox(args.id).extend(args.ttl).await?;
    context.output.show(&sandbox, |sandbox| {
        format!("{} expires {} ({})\n", sandbox.id, output::relative(sandbox.expires_at), sandbox.expires_at)
    })
}

//! `stacyvm spawn`: makes a sandbox and leaves it running.

use std::time::Instant;

use clap::Args;

use crate::commands::Context;
use crate::commands::create::SandboxArgs;
use crate::output::{self, Tone, print};

/// Create a sandbox
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm spawn --image host
  stacyvm spawn --image python:3.12 --memory 2048 --vcpus 2 --ttl 2h
  id=$(stacyvm spawn --quiet --image host)
  stacyvm spawn --template data-science --metadata job=42")]
pub(crate) struct SpawnArgs {
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Template to make the sandbox from; options given here win
    #[arg(long)]
    template: Option<String>,
    /// Print the id alone
    #[arg(long, short = 'q')]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: SpawnArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    let started = Instant::now();
    let sandbox = client.create(&args.sandbox.request(args.template.as_deref())).await?;
    let took = started.elapsed();
    if args.quiet {
        return print(&format!("{}\n", sandbox.id));
    }
    context.output.show(&sandbox, |sandbox| {
        let id = context.output.paint(Tone::Strong, sandbox.id.as_str());
        let (image, provider) = (&sandbox.image, &sandbox.provider);
        let expires = output::relative(sandbox.expires_at);
        let took = output::took(took);
        format!("{id}  {image} on {provider}, ready in {took}, expires {expires}\n")
    })
}

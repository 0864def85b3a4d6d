//! `stacyvm spawn`: makes a sandbox and leaves it running.

use std::time::{Duration, Instant};

use clap::Args;
use stacyvm_api::Sandbox;

use crate::commands::Context;
use crate::commands::create::SandboxArgs;
use crate::output::{self, Output, json_line, print};

/// Create a sandbox
///
/// Prints its id on standard output, and what there is to know about it on
/// standard error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm spawn --image host
  stacyvm spawn --image python:3.12 --memory 2048 --vcpus 2 --ttl 2h
  id=$(stacyvm spawn --image host)
  stacyvm spawn --template data-science --metadata job=42")]
pub(crate) struct SpawnArgs {
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Template to make the sandbox from; options given here win
    #[arg(long)]
    template: Option<String>,
    /// Say nothing beside the id
    #[arg(long, short = 'q')]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: SpawnArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    let started = Instant::now();
    let sandbox = client.create(&args.sandbox.request(args.template.as_deref())).await?;
    let took = started.elapsed();
    let told = if args.quiet { Told::IdAlone } else { Told::All(took) };
    show(context.output, &sandbox, told)
}

/// What is said of a new sandbox.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Told {
    IdAlone,
    /// And how long it took.
    All(Duration),
}

/// The id is the result; a script takes it as it is.
pub(crate) fn show(output: Output, sandbox: &Sandbox, told: Told) -> anyhow::Result<()> {
    if output.is_json() {
        return json_line(sandbox);
    }
    print(&format!("{}\n", sandbox.id))?;
    if let Told::All(took) = told {
        let (image, provider, expires) = (&sandbox.image, &sandbox.provider, output::relative(sandbox.expires_at));
        output.note(&format!("{image} on {provider}, ready in {}, expires {expires}", output::took(took)));
    }
    Ok(())
}

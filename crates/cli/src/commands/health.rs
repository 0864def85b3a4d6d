//! `stacyvm health`: whether the server can make sandboxes.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::Args;
use stacyvm_api::Readiness;

use crate::commands::Context;
use crate::output::{Output, Tone};

/// Show whether the server is ready to make sandboxes
///
/// Exit status: 0 when it is ready, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm health
  until stacyvm health >/dev/null 2>&1; do sleep 0.2; done")]
pub(crate) struct HealthArgs {}

pub(crate) async fn run(context: &Context, HealthArgs {}: &HealthArgs) -> anyhow::Result<ExitCode> {
    let readiness = context.client()?.ready().await?;
    let ready = readiness.status == "ready";
    context.output.show(&readiness, |readiness| page(context.output, readiness, ready))?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn page(output: Output, readiness: &Readiness, ready: bool) -> String {
    let tone = if ready { Tone::Good } else { Tone::Bad };
    let status = output.paint(tone, &readiness.status.replace('_', " "));
    let mut page = format!("{status}, version {}, up {}\n", readiness.version, readiness.uptime);
    let _ = writeln!(page, "store: {}", readiness.store);
    for provider in &readiness.providers {
        let (tone, word) = if provider.healthy { (Tone::Good, "healthy") } else { (Tone::Bad, "unhealthy") };
        let default = if provider.default { " (default)" } else { "" };
        let why = provider.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        let _ = writeln!(page, "provider {}{default}: {}{why}", provider.name, output.paint(tone, word));
    }
    page
}

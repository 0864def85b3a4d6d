//! `stacyvm list`: sandboxes as a table.

use clap::Args;
use stacyvm_api::{ListQuery, Sandbox, SandboxState};

use crate::commands::Context;
use crate::output::{self, Output, lines, print};

/// List sandboxes, newest first
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm list
  stacyvm list --state running --metadata job=42
  stacyvm list --quiet | xargs stacyvm kill
  stacyvm list --json | jq -r '.[].id'")]
pub(crate) struct ListArgs {
    /// Only those in this state, such as running or error
    #[arg(long, value_parser = state)]
    state: Option<SandboxState>,
    /// Only those of this provider
    #[arg(long)]
    provider: Option<String>,
    /// Only those of this owner
    #[arg(long)]
    owner: Option<String>,
    /// Only those with this note
    #[arg(long, value_name = "KEY=VALUE")]
    metadata: Option<String>,
    /// Print ids alone
    #[arg(long, short = 'q')]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: ListArgs) -> anyhow::Result<()> {
    let query = ListQuery {
        state: args.state,
        provider: args.provider,
        owner_id: args.owner,
        metadata: args.metadata,
        ..ListQuery::default()
    };
    let sandboxes = context.client()?.list_all(&query).await?;
    if args.quiet {
        return print(&lines(sandboxes.iter().map(|sandbox| &sandbox.id)));
    }
    context.output.show(&sandboxes, |sandboxes| table(context.output, sandboxes))
}

fn table(output: Output, sandboxes: &[Sandbox]) -> String {
    if sandboxes.is_empty() {
        return "no sandboxes\n".to_owned();
    }
    let rows = sandboxes.iter().map(|sandbox| {
        vec![
            sandbox.id.to_string(),
            output.state(sandbox.state),
            sandbox.image.clone(),
            sandbox.provider.clone(),
            sandbox.owner_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            output::relative(sandbox.created_at),
            output::relative(sandbox.expires_at),
        ]
    });
    output.table(&["ID", "STATE", "IMAGE", "PROVIDER", "OWNER", "CREATED", "EXPIRES"], rows.collect())
}

/// The state of this name.
fn state(text: &str) -> Result<SandboxState, String> {
    serde_json::from_value(serde_json::Value::String(text.to_lowercase()))
        .map_err(|_| "use creating, running, paused, unhealthy, destroying, destroyed or error".to_owned())
}

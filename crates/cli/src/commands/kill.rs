//! `stacyvm kill`: ends sandboxes and frees what they used.

use clap::{ArgGroup, Args};
use futures_util::StreamExt as _;
use futures_util::stream;
use serde_json::json;
use stacyvm_api::{ListQuery, SandboxId};
use stacyvm_client::{Client, ClientError};

use crate::commands::Context;
use crate::output::{json_line, lines, print};

/// Sandboxes destroyed at once.
const AT_ONCE: usize = 16;

/// Destroy sandboxes
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true))]
#[command(after_help = "Examples:
  stacyvm kill sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm kill --all
  stacyvm kill --expired
  stacyvm list -q --metadata job=42 | xargs stacyvm kill")]
pub(crate) struct KillArgs {
    /// Sandboxes to destroy
    #[arg(group = "which")]
    ids: Vec<SandboxId>,
    /// Destroy every sandbox
    #[arg(long, group = "which")]
    all: bool,
    /// Destroy those whose time is up
    #[arg(long, group = "which")]
    expired: bool,
}

pub(crate) async fn run(context: &Context, args: KillArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    if args.expired {
        let pruned = client.prune().await?;
        return context.output.show(&json!({ "pruned": pruned }), |_| format!("destroyed {pruned}\n"));
    }
    let ids = if args.all {
        client.list_all(&ListQuery::default()).await?.into_iter().map(|sandbox| sandbox.id).collect()
    } else {
        args.ids
    };
    let results = destroy(&client, ids).await;
    let mut destroyed = Vec::new();
    let mut failure = None;
    for (id, result) in results {
        match result {
            Ok(()) => destroyed.push(id),
            Err(error) => {
                context.output.note(&format!("error: {id}: {error}"));
                failure = Some(error);
            }
        }
    }
    if context.output.is_json() {
        json_line(&json!({ "destroyed": destroyed }))?;
    } else {
        print(&lines(&destroyed))?;
    }
    failure.map_or(Ok(()), |error| Err(anyhow::Error::from(error).context("not every sandbox was destroyed")))
}

async fn destroy(client: &Client, ids: Vec<SandboxId>) -> Vec<(SandboxId, Result<(), ClientError>)> {
    let one = |id: SandboxId| async move { (id.clone(), client.sandbox(id).destroy().await) };
    stream::iter(ids.into_iter().map(one)).buffered(AT_ONCE).collect().await
}

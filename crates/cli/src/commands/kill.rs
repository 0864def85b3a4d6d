//! `stacyvm kill`: ends sandboxes and frees what they used.

use clap::Args;
use futures_util::StreamExt as _;
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use stacyvm_api::{ErrorCode, ListQuery, SandboxId};
use stacyvm_client::{Client, ClientError, Destroyed};

use crate::commands::Context;
use crate::failure::{self, Advice};
use crate::output::{json_line, lines, print};

/// What is said of a sandbox that its runtime did not end.
const NOT_YET: &str = "still there, in the state destroying: its runtime did not end it";

/// Sandboxes destroyed at once.
const AT_ONCE: usize = 16;

/// Destroy sandboxes
///
/// Prints the ids of those that are gone. One that does not exist is an error,
/// unless --ignore-missing is given; the others are destroyed all the same.
/// Naming none destroys none and succeeds, so that it can end a pipe.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm kill sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm kill --all
  stacyvm kill --expired
  stacyvm list -q --metadata job=42 | xargs stacyvm kill --ignore-missing")]
pub(crate) struct KillArgs {
    /// Sandboxes to destroy
    #[arg(conflicts_with_all = ["all", "expired"])]
    ids: Vec<SandboxId>,
    /// Destroy every sandbox
    #[arg(long, conflicts_with = "expired")]
    all: bool,
    /// Destroy those whose time is up
    #[arg(long)]
    expired: bool,
    /// Succeed also for those that do not exist
    #[arg(long)]
    ignore_missing: bool,
}

/// What to do about a sandbox that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Fails,
    IsFine,
}

/// One that is still there, or never was, for `--json`.
#[derive(Debug, Serialize)]
struct Failed {
    id: SandboxId,
    code: String,
    message: String,
}

pub(crate) async fn run(context: &Context, args: KillArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    if args.expired {
        let pruned = client.prune().await?;
        return context.output.show(&json!({ "pruned": pruned }), |_| format!("destroyed {pruned}\n"));
    }
    let (ids, missing) = if args.all {
        // One that ends meanwhile is what was asked for.
        let all = client.list_all(&ListQuery::default()).await?;
        (all.into_iter().map(|sandbox| sandbox.id).collect(), Missing::IsFine)
    } else {
        (args.ids, if args.ignore_missing { Missing::IsFine } else { Missing::Fails })
    };
    if ids.is_empty() {
        context.output.note(if args.all {
            "there are no sandboxes"
        } else {
            "no sandbox was named: nothing to destroy"
        });
    }
    let (mut destroyed, mut failed, mut last) = (Vec::new(), Vec::new(), None);
    for (id, result) in destroy(&client, ids, missing).await {
        let (code, message, error) = match result {
            Ok(Destroyed::Done) => {
                destroyed.push(id);
                continue;
            }
            Ok(Destroyed::Retrying) => (ErrorCode::Unavailable.to_string(), NOT_YET.to_owned(), not_yet_destroyed(&id)),
            Err(error) => (failure::client_code(&error).to_owned(), told(&error), explained(error, &id)),
        };
        failed.push(Failed { id, code, message });
        last = Some(error);
    }
    if context.output.is_json() {
        json_line(&json!({ "destroyed": destroyed, "failed": failed }))?;
    } else {
        print(&lines(&destroyed))?;
    }
    let Some(error) = last else { return Ok(()) };
    // One failure is the whole story; of several the list comes first.
    if failed.len() == 1 && destroyed.is_empty() {
        return Err(error);
    }
    for Failed { id, message, .. } in &failed {
        context.output.note(&format!("error: {id}: {message}"));
    }
    Err(error.context("not every sandbox was destroyed"))
}

async fn destroy(
    client: &Client,
    ids: Vec<SandboxId>,
    missing: Missing,
) -> Vec<(SandboxId, Result<Destroyed, ClientError>)> {
    let one = |id: SandboxId| async move { (id.clone(), destroy_one(client, id, missing).await) };
    stream::iter(ids.into_iter().map(one)).buffered(AT_ONCE).collect().await
}

/// To the API, destroying what is not there is a success: it is asked first.
async fn destroy_one(client: &Client, id: SandboxId, missing: Missing) -> Result<Destroyed, ClientError> {
    let sandbox = client.sandbox(id);
    if missing == Missing::Fails {
        sandbox.get().await?;
    }
    sandbox.destroy().await
}

fn is_missing(error: &ClientError) -> bool {
    error.code() == Some(ErrorCode::NotFound)
}

fn told(error: &ClientError) -> String {
    if is_missing(error) { "no such sandbox".to_owned() } else { error.to_string() }
}

/// The server took the order and cannot carry it out for now.
pub(crate) fn not_yet_destroyed(id: &SandboxId) -> anyhow::Error {
    let hint = "the server goes on trying, and `stacyvm providers` says what its runtime lacks";
    Advice::new(format!("the sandbox {id} is {NOT_YET}"), hint).of(ErrorCode::Unavailable).into()
}

fn explained(error: ClientError, id: &SandboxId) -> anyhow::Error {
    if !is_missing(&error) {
        return error.into();
    }
    let hint = "`stacyvm list` shows those there are; with --ignore-missing this is no error";
    Advice::new(format!("no such sandbox: {id}"), hint).of(ErrorCode::NotFound).into()
}

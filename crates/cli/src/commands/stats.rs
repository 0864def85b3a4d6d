//! `stacyvm stats`: what sandboxes use right now.

use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;
use serde_json::json;
use stacyvm_api::{ErrorCode, ListQuery, SandboxId, SandboxState, SandboxStats};
use stacyvm_client::{Client, ClientError};

use crate::commands::Context;
use crate::failure;
use crate::output::{Output, bytes, print};

/// Sandboxes asked at once.
const AT_ONCE: usize = 16;

/// Pause between two readings of `--watch`.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// Show what sandboxes use of processor, memory, processes and disk
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm stats
  stacyvm stats sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm stats --watch")]
pub(crate) struct StatsArgs {
    /// Sandboxes to show; all running ones without any, and those that fail are named
    ids: Vec<SandboxId>,
    /// Show them again every second, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Serialize)]
struct Reading {
    id: SandboxId,
    #[serde(flatten)]
    stats: SandboxStats,
}

/// Sandboxes that were asked for what they use, and what came of it.
struct Answers {
    readings: Vec<Reading>,
    failed: Vec<(SandboxId, ClientError)>,
}

pub(crate) async fn run(context: &Context, args: StatsArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    loop {
        let Answers { readings, failed } = read(&client, &args.ids).await?;
        if args.watch && !context.output.is_json() {
            // Home and clear: the table stays where it is.
            print("\x1b[H\x1b[2J")?;
        }
        if !readings.is_empty() || failed.is_empty() {
            context.output.show(&readings, |readings| table(context.output, readings))?;
        }
        for (id, error) in &failed {
            skipped(context.output, id, error);
        }
        if !args.watch {
            let last = failed.into_iter().next_back().filter(|_| readings.is_empty());
            return last
                .map_or(Ok(()), |(_, error)| Err(anyhow::Error::from(error).context("no sandbox says what it uses")));
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

/// Who names sandboxes wants all of them; of all there are, one that does not
/// answer hides no other.
async fn read(client: &Client, ids: &[SandboxId]) -> anyhow::Result<Answers> {
    let one = |id: SandboxId| async move {
        match client.sandbox(id.clone()).stats().await {
            Ok(stats) => Ok(Reading { id, stats }),
            Err(error) => Err((id, error)),
        }
    };
    if !ids.is_empty() {
        let readings = stream::iter(ids.to_vec()).map(one).buffered(AT_ONCE).map_err(|(_, error)| error);
        return Ok(Answers { readings: readings.try_collect().await?, failed: Vec::new() });
    }
    let query = ListQuery { state: Some(SandboxState::Running), ..ListQuery::default() };
    let running = client.list_all(&query).await?.into_iter().map(|sandbox| sandbox.id);
    let all: Vec<_> = stream::iter(running.map(one)).buffered(AT_ONCE).collect().await;
    let mut answers = Answers { readings: Vec::new(), failed: Vec::new() };
    for answer in all {
        match answer {
            Ok(reading) => answers.readings.push(reading),
            // It ended since the listing, and has nothing to show.
            Err((_, error)) if error.code() == Some(ErrorCode::NotFound) => {}
            Err(failed) => answers.failed.push(failed),
        }
    }
    Ok(answers)
}

/// On standard error, to people and to programs.
fn skipped(output: Output, id: &SandboxId, error: &ClientError) {
    let text = if output.is_json() {
        let code = failure::client_code(error);
        json!({ "skipped": { "id": id, "code": code, "message": error.to_string() } }).to_string()
    } else {
        format!("skipped {id}: {error}")
    };
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn table(output: Output, readings: &[Reading]) -> String {
    if readings.is_empty() {
        return "no running sandboxes\n".to_owned();
    }
    let rows = readings.iter().map(|Reading { id, stats }| {
        vec![
            id.to_string(),
            stats.cpu_pct.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1}%")),
            of(stats.mem_bytes, stats.mem_limit_bytes, bytes),
            of(stats.pids, stats.pids_limit, |count| count.to_string()),
            of(stats.disk_bytes, stats.disk_limit_bytes, bytes),
        ]
    });
    output.table(&["ID", "CPU", "MEMORY", "PROCESSES", "DISK"], rows.collect())
}

/// `5 MiB / 1.0 GiB`; without a limit, the use alone.
fn of(used: Option<u64>, limit: Option<u64>, form: impl Fn(u64) -> String) -> String {
    match (used, limit.filter(|limit| *limit > 0)) {
        (None, _) => "-".to_owned(),
        (Some(used), None) => form(used),
        (Some(used), Some(limit)) => format!("{} / {}", form(used), form(limit)),
    }
}

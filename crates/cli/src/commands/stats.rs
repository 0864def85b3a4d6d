//! `stacyvm stats`: what sandboxes use right now.

use std::time::Duration;

use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;
use stacyvm_api::{ListQuery, SandboxId, SandboxState, SandboxStats};
use stacyvm_client::Client;

use crate::commands::Context;
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
    /// Sandboxes to show; all running ones without any
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

pub(crate) async fn run(context: &Context, args: StatsArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    loop {
        let readings = read(&client, &args.ids).await?;
        if args.watch && !context.output.is_json() {
            // Home and clear: the table stays where it is.
            print("\x1b[H\x1b[2J")?;
        }
        context.output.show(&readings, |readings| table(context.output, readings))?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

async fn read(client: &Client, ids: &[SandboxId]) -> anyhow::Result<Vec<Reading>> {
    let one = |id: SandboxId| async move {
        let stats = client.sandbox(id.clone()).stats().await?;
        Ok(Reading { id, stats })
    };
    if !ids.is_empty() {
        return stream::iter(ids.to_vec()).map(one).buffered(AT_ONCE).try_collect().await;
    }
    let query = ListQuery { state: Some(SandboxState::Running), ..ListQuery::default() };
    let running = client.list_all(&query).await?.into_iter().map(|sandbox| sandbox.id);
    let readings = stream::iter(running.map(one)).buffered(AT_ONCE);
    // One that ended since the listing has nothing to show.
    Ok(readings.filter_map(|reading: anyhow::Result<_>| std::future::ready(reading.ok())).collect().await)
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

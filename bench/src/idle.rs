//! What sandboxes cost that do nothing, and what is left when they are gone.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use stacyvm_conformance::{Census, CensusScope, census_processes};
use tokio::time::{Instant, sleep};

use crate::server::{ServeOptions, Server, Setup};

/// Creates at the same time while filling the machine.
const CONCURRENCY: usize = 16;
/// Freeing may go on for a moment after the last answer.
const SETTLE_LIMIT: Duration = Duration::from_mins(1);
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Looks without a change that count as rest.
const STEADY_LOOKS: usize = 10;

pub(crate) struct Idle {
    pub(crate) count: usize,
    pub(crate) created_in: Duration,
    /// Proportional memory of all processes of all sandboxes, divided.
    pub(crate) proportional_kib_each: f64,
    /// Fall of the machine's available memory, divided: kernel memory included.
    pub(crate) available_kib_each: f64,
    pub(crate) server_kib: u64,
    pub(crate) destroyed_in: Duration,
    pub(crate) before: Census,
    pub(crate) after: Census,
}

pub(crate) async fn measure(setup: &Setup, count: usize) -> anyhow::Result<Idle> {
    let server = Server::start(setup, "idle", ServeOptions::default()).await?;
    let scope = server.scope();
    // What is made once, with the first sandbox, is not what each one costs.
    let id = server.create().await?;
    server.exec_true(&id).await?;
    server.destroy(&id).await?;
    let before = settled(&scope, None).await?;
    let baseline = census_processes(&scope)?;
    let available = available_kib()?;
    let start = Instant::now();
    let server_ref = &server;
    let ids: Vec<_> = stream::iter(0..count)
        .map(|_| async move { server_ref.create().await })
        .buffer_unordered(CONCURRENCY)
        .try_collect()
        .await?;
    let created_in = start.elapsed();
    let mut proportional_kib = 0;
    for pid in census_processes(&scope)?.difference(&baseline) {
        proportional_kib += proportional_kib_of(*pid).unwrap_or(0);
    }
    let fallen_kib = available.saturating_sub(available_kib()?);
    let server_kib = resident_kib(server.pid())?;
    let start = Instant::now();
    stream::iter(ids)
        .map(|id| async move { server_ref.destroy(&id).await })
        .buffer_unordered(CONCURRENCY)
        .try_collect::<()>()
        .await?;
    let destroyed_in = start.elapsed();
    let after = settled(&scope, Some(&before)).await?;
    server.stop().await?;
    Ok(Idle {
        count,
        created_in,
        proportional_kib_each: proportional_kib as f64 / count as f64,
        available_kib_each: fallen_kib as f64 / count as f64,
        server_kib,
        destroyed_in,
        before,
        after,
    })
}

/// The census once it equals `expected`, or has stopped changing.
async fn settled(scope: &CensusScope, expected: Option<&Census>) -> anyhow::Result<Census> {
    let end = Instant::now() + SETTLE_LIMIT;
    let mut last = Census::take(scope)?;
    let mut same = 0;
    while Instant::now() < end {
        sleep(POLL_INTERVAL).await;
        let now = Census::take(scope)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        if expected.map_or(same >= STEADY_LOOKS, |expected| last == *expected) {
            break;
        }
    }
    Ok(last)
}

/// Resident memory of a process.
pub(crate) fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    kib_of(&format!("/proc/{pid}/status"), "VmRSS:")
}

fn proportional_kib_of(pid: u32) -> anyhow::Result<u64> {
    kib_of(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

fn available_kib() -> anyhow::Result<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

fn kib_of(path: &str, key: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("{path} has no {key}"))
}

//! `/metrics` and `/init`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use serde::{Deserialize, Serialize};

use super::upload::Upload;
use super::{empty, json};
use crate::files::blocking;
use crate::serve::Body;
use crate::{Failure, Sandbox};

/// The body of an `/init`.
const MAX_INIT_BYTES: usize = 1 << 20;

/// Between the two looks at the processor's counters.
const CPU_WINDOW: std::time::Duration = std::time::Duration::from_millis(100);

/// As envd's clients read it. Bytes, and a percentage of all processors.
#[derive(Serialize)]
struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

/// What a controller may set after the start. Other fields are not ours.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Init {
    env_vars: BTreeMap<String, String>,
    access_token: Option<String>,
    default_user: Option<String>,
    default_workdir: Option<String>,
}

pub(crate) async fn metrics() -> Result<Response<Body>, Failure> {
    let before = blocking(|| Ok(cpu_times())).await?;
    tokio::time::sleep(CPU_WINDOW).await;
    let metrics = blocking(move || Ok(read_metrics(before))).await?;
    Ok(json(&metrics))
}

pub(crate) async fn init(sandbox: &Arc<Sandbox>, request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let body = Limited::new(request.into_body(), MAX_INIT_BYTES).collect().await;
    let body = body.map_err(|error| Failure::InvalidArgument(format!("the settings cannot be read: {error}")))?;
    let bytes = body.to_bytes();
    let init = if bytes.is_empty() { Ok(Init::default()) } else { serde_json::from_slice(&bytes) };
    let init: Init =
        init.map_err(|error| Failure::InvalidArgument(format!("the settings are not understood: {error}")))?;
    if let Some(user) = &init.default_user {
        sandbox.identity(Some(user))?;
    }
    sandbox.configure(init.env_vars, init.default_user, init.default_workdir);
    if let Some(token) = init.access_token.filter(|token| !token.is_empty()) {
        sandbox.set_token(token);
    }
    Ok(empty(StatusCode::NO_CONTENT))
}

fn read_metrics((busy_before, all_before): (u64, u64)) -> Metrics {
    let (busy, all) = cpu_times();
    let elapsed = all.saturating_sub(all_before);
    let used = if elapsed == 0 { 0.0 } else { busy.saturating_sub(busy_before) as f64 / elapsed as f64 * 100.0 };
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let disk = rustix::fs::statvfs("/").ok();
    let disk_bytes = |blocks: u64| disk.as_ref().map_or(0, |disk| blocks.saturating_mul(disk.f_frsize));
    let mem_total = meminfo(&memory, "MemTotal:");
    Metrics {
        ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        cpu_count: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        cpu_used_pct: (used * 100.0).round() / 100.0,
        mem_total,
        mem_used: mem_total.saturating_sub(meminfo(&memory, "MemAvailable:")),
        mem_cache: meminfo(&memory, "Cached:"),
        disk_used: disk_bytes(disk.as_ref().map_or(0, |disk| disk.f_blocks.saturating_sub(disk.f_bfree))),
        disk_total: disk_bytes(disk.as_ref().map_or(0, |disk| disk.f_blocks)),
    }
}

/// Ticks at work and in all, over all processors (`proc_stat(5)`).
fn cpu_times() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .filter_map(|t| t.parse().ok())
        .collect();
    let all: u64 = fields.iter().take(8).sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    (all.saturating_sub(idle), all)
}

fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        assert_eq!(meminfo("MemTotal:  16 kB\nMemFree: 4 kB\n", "MemFree:"), 4096);
        assert_eq!(meminfo("", "MemFree:"), 0);
        let metrics = read_metrics((0, 0));
        assert!(metrics.mem_total > 0 && metrics.disk_total > 0 && metrics.cpu_count > 0);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
    }
}

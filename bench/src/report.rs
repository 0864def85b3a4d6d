//! What was measured, as lines and as JSON.

use std::fs;

use serde::Serialize;
use serde_json::{Value, json};
use stacyvm_conformance::Census;

use crate::baseline::Baseline;
use crate::burst::{BURST, Burst};
use crate::docker::Docker;
use crate::idle::Idle;
use crate::latency::Latency;
use crate::preview::Preview;
use crate::proot::Proot;
use crate::server::Setup;
use crate::statistics::Spread;
use crate::transfer::Transfer;

/// The numbers that this project promises, printed beside what was measured.
pub(crate) mod promised {
    pub(super) const CREATE: &str = "p50 <= 8 ms, p99 <= 40 ms";
    pub(super) const EXEC: &str = "p50 <= 2 ms";
    pub(super) const DESTROY: &str = "p50 <= 8 ms";
    pub(super) const FROM_POOL: &str = "p99 <= 400 ms";
    pub(super) const FROM_NOTHING: &str = "p99 <= 1500 ms";
    /// Of what the daemon takes for the same by itself.
    pub(super) const ON_DOCKER_CREATE: f64 = 1.15;
    pub(super) const ON_DOCKER_EXEC: f64 = 0.1;
    /// Of what PRoot takes by itself.
    pub(super) const ON_PROOT_EXEC: f64 = 1.5;
    /// How many times slower another runtime is.
    pub(crate) const THAN_CRUN: f64 = 1.3;
    pub(crate) const THAN_RUNC: f64 = 4.0;
    pub(crate) const THAN_DOCKER: f64 = 15.0;
}

/// Printed as it grows; serialised as a whole.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    host: Value,
    results: Vec<Value>,
}

impl Report {
    pub(crate) fn new(setup: &Setup) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
        let memory = read("/proc/meminfo");
        let memory = memory.lines().next().unwrap_or_default().trim_start_matches("MemTotal:").trim();
        let host = json!({
            "kernel": read("/proc/sys/kernel/osrelease").trim(),
            "cpu": cpu.unwrap_or("unknown"),
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "memory": memory,
            "load": read("/proc/loadavg").split_whitespace().next().unwrap_or_default(),
            "program": setup.program.display().to_string(),
        });
        Self { host, results: Vec::new() }
    }

    pub(crate) fn heading(&self) -> String {
        let host = |key: &str| self.host[key].to_string().trim_matches('"').to_owned();
        format!(
            "StacyVM benchmarks\n  {} x {}, {}, Linux {}\n  load before: {} (other work on this machine shows in every number)\n\n",
            host("cpus"),
            host("cpu"),
            host("memory"),
            host("kernel"),
            host("load"),
        )
    }

    pub(crate) fn latency(&mut self, measured: Latency) {
        let Latency { create_and_exec, create, exec, destroy, others } = measured;
        println!("One at a time (REST API; image cached; default network)");
        println!("{:<38} {:>5} {:>8} {:>8} {:>8} {:>8}   promised", "", "n", "min", "p50", "p95", "p99");
        self.spread("create -> result of `true`", create_and_exec, promised::CREATE);
        self.spread("  of this, create", create, "");
        self.spread("exec /bin/true in a live sandbox", exec, promised::EXEC);
        self.spread("destroy", destroy, promised::DESTROY);
        for Baseline { name, promised, outcome } in others {
            match outcome {
                Ok(spread) => {
                    let ratio = spread.p50_ms / create_and_exec.p50_ms;
                    let promise = promised.map_or_else(String::new, |times| format!("; promised {times}"));
                    self.spread(&name, spread, &format!("we are {ratio:.2} times faster{promise}"));
                    self.results
                        .push(json!({ "name": format!("{name} / create"), "ratio_p50": ratio, "promised": promised }));
                }
                Err(reason) => {
                    println!("{name:<38} not available: {reason}");
                    self.results.push(json!({ "name": name, "not_available": reason }));
                }
            }
        }
        println!();
    }

    pub(crate) fn burst(&mut self, burst: &Burst) {
        println!("{BURST} asked for at once, each until its first result");
        self.spread("namespaces ready for all", burst.from_pool, promised::FROM_POOL);
        self.spread("no namespaces ready", burst.from_nothing, promised::FROM_NOTHING);
        println!();
    }

    pub(crate) fn idle(&mut self, idle: &Idle) {
        let mib = |kib: f64| kib / 1024.0;
        println!("{} idle sandboxes (promised: 1000, <= 1 MB each, server < 150 MB)", idle.count);
        println!("  created in                 {:>8.2} s", idle.created_in.as_secs_f64());
        println!("  proportional memory each   {:>8.2} MiB", mib(idle.proportional_kib_each));
        println!("  available memory used each {:>8.2} MiB", mib(idle.available_kib_each));
        println!("  server, resident           {:>8.1} MiB", mib(idle.server_kib as f64));
        println!("  destroyed in               {:>8.2} s", idle.destroyed_in.as_secs_f64());
        println!("  left behind                {}", difference(&idle.before, &idle.after));
        println!();
        self.results.push(json!({
            "name": "idle", "count": idle.count, "created_in_s": idle.created_in.as_secs_f64(),
            "proportional_kib_each": idle.proportional_kib_each, "available_kib_each": idle.available_kib_each,
            "server_kib": idle.server_kib, "destroyed_in_s": idle.destroyed_in.as_secs_f64(),
            "left_behind": difference(&idle.before, &idle.after),
        }));
    }

    pub(crate) fn transfer(&mut self, transfer: &Transfer) {
        let megabytes = transfer.bytes as f64 / 1e6;
        println!("A file of {megabytes:.0} MB through the API, in MB/s");
        println!("{:<36} {:>8} {:>8}", "", "up", "down");
        for (name, rates, promised) in [
            ("sandbox whose memory holds it", transfer.cached, "   promised >= 350, >= 500"),
            ("sandbox of 512 MiB", transfer.small, ""),
            ("the disk by itself: write, read", transfer.disk, ""),
        ] {
            let [up, down] = [rates.up, rates.down].map(|span| megabytes / span.as_secs_f64());
            println!("{name:<36} {up:>8.0} {down:>8.0}{promised}");
            self.results
                .push(json!({ "name": format!("transfer, {name}"), "bytes": transfer.bytes, "up": up, "down": down }));
        }
        let (before, peak) = (transfer.server_before_kib / 1024, transfer.server_peak_kib / 1024);
        println!("server memory {before} MiB before, {peak} MiB at most");
        println!();
        self.results.push(json!({
            "name": "transfer, memory of the server", "before_kib": transfer.server_before_kib,
            "peak_kib": transfer.server_peak_kib,
        }));
    }

    pub(crate) fn preview(&mut self, measured: &Preview) {
        println!("A server inside a sandbox without a network, through its preview");
        println!("{:<26} {:>10} {:>10} {:>7}   promised", "", "direct", "preview", "ratio");
        let Preview { direct, preview } = measured;
        for (name, direct, preview, promised) in [
            ("down, MB/s", direct.down, preview.down, ">= 400, >= 25 %"),
            ("up, MB/s", direct.up, preview.up, ">= 400, >= 25 %"),
            ("keep-alive requests/s", direct.requests, preview.requests, ">= 5000"),
        ] {
            let percent = preview / direct * 100.0;
            println!("{name:<26} {direct:>10.0} {preview:>10.0} {percent:>5.0} %   {promised}");
            self.results.push(json!({
                "name": format!("preview {name}"), "direct": direct, "preview": preview, "promised": promised,
            }));
        }
        println!();
    }

    pub(crate) fn docker(&mut self, measured: Result<Docker, String>) {
        println!("On a docker daemon (runc), beside the same daemon by itself");
        let Some(measured) = self.available("docker", measured) else { return };
        let Docker { create, bare, exec, client_exec } = measured;
        self.spread("bare Engine create + start", bare, "");
        self.ratio("create on docker", create, bare, promised::ON_DOCKER_CREATE);
        self.spread("docker exec", client_exec, "");
        self.ratio("exec on docker", exec, client_exec, promised::ON_DOCKER_EXEC);
        println!();
    }

    pub(crate) fn proot(&mut self, measured: Result<Proot, String>) {
        println!("Under PRoot, beside PRoot by itself");
        let Some(measured) = self.available("proot", measured) else { return };
        let Proot { create, exec, bare } = measured;
        self.spread("create under PRoot (copies its root)", create, "");
        self.spread("proot /bin/true", bare, "");
        self.ratio("exec under PRoot", exec, bare, promised::ON_PROOT_EXEC);
        println!();
    }

    /// What could be measured, below its table's head; or says why not.
    fn available<T>(&mut self, part: &str, measured: Result<T, String>) -> Option<T> {
        match measured {
            Ok(measured) => {
                println!("{:<38} {:>5} {:>8} {:>8} {:>8} {:>8}   promised", "", "n", "min", "p50", "p95", "p99");
                Some(measured)
            }
            Err(reason) => {
                println!("  not available: {reason}\n");
                self.results.push(json!({ "name": part, "not_available": reason }));
                None
            }
        }
    }

    fn ratio(&mut self, name: &str, ours: Spread, theirs: Spread, promised: f64) {
        let ratio = ours.p50_ms / theirs.p50_ms;
        self.spread(name, ours, &format!("{ratio:.2} of that; promised <= {promised}"));
        self.results.push(json!({ "name": format!("{name} / bare"), "ratio_p50": ratio, "promised": promised }));
    }

    fn spread(&mut self, name: &str, spread: Spread, note: &str) {
        println!(
            "{name:<38} {:>5} {:>8.2} {:>8.2} {:>8.2} {:>8.2}   {note}",
            spread.count, spread.min_ms, spread.p50_ms, spread.p95_ms, spread.p99_ms
        );
        self.results.push(json!({ "name": name.trim(), "spread": spread, "note": note }));
    }
}

fn difference(before: &Census, after: &Census) -> String {
    let changes = before.changes_to(after);
    if changes.is_empty() { "nothing".to_owned() } else { changes.join(", ") }
}

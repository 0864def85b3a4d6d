//! Readings of the host and of this process, from `/proc`.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use stacyvm_api::HostStats as Reading;

/// Readings closer together than this share one result: rates over a shorter
/// time say nothing.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps the counters of the reading before, because rates need two.
#[derive(Debug, Default)]
pub(crate) struct HostStats {
    last: Mutex<Option<Last>>,
}

#[derive(Debug, Clone, Copy)]
struct Last {
    at: Instant,
    counters: Counters,
    reading: Reading,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counters {
    cpu_busy: u64,
    cpu_total: u64,
    received_bytes: u64,
    sent_bytes: u64,
}

/// This process's own resources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ProcessStats {
    pub(crate) resident_bytes: u64,
    pub(crate) virtual_bytes: u64,
    pub(crate) data_bytes: u64,
    pub(crate) threads: u64,
}

impl HostStats {
    /// The first reading has no rates.
    pub(crate) fn read(&self) -> Reading {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.filter(|last| last.at.elapsed() < MIN_INTERVAL) {
            return last.reading;
        }
        let at = Instant::now();
        let counters = counters();
        let mut reading = Reading { mem_pct: memory_pct(), disk_pct: disk_pct(), load1: load1(), ..Reading::default() };
        if let Some(before) = *last {
            let seconds = at.duration_since(before.at).as_secs_f64();
            let grown = |now: u64, then: u64| now.saturating_sub(then) as f64;
            reading.cpu_pct = pct(
                grown(counters.cpu_busy, before.counters.cpu_busy),
                grown(counters.cpu_total, before.counters.cpu_total),
            );
            reading.net_rx_bps = grown(counters.received_bytes, before.counters.received_bytes) / seconds;
            reading.net_tx_bps = grown(counters.sent_bytes, before.counters.sent_bytes) / seconds;
        }
        *last = Some(Last { at, counters, reading });
        reading
    }
}

impl ProcessStats {
    /// Zeroes where there is no `/proc`.
    pub(crate) fn read() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kib = |name: &str| field(&status, name).unwrap_or(0) * 1024;
        Self {
            resident_bytes: kib("VmRSS:"),
            virtual_bytes: kib("VmSize:"),
            data_bytes: kib("VmData:"),
            threads: field(&status, "Threads:").unwrap_or(0),
        }
    }
}

fn counters() -> Counters {
    let (cpu_busy, cpu_total) = fs::read_to_string("/proc/stat").ok().and_then(|text| cpu(&text)).unwrap_or_default();
    let (received_bytes, sent_bytes) = network(&fs::read_to_string("/proc/net/dev").unwrap_or_default());
    Counters { cpu_busy, cpu_total, received_bytes, sent_bytes }
}

/// Busy and total ticks of all processors; idle and iowait are the fourth and
/// fifth numbers (proc_stat(5)).
fn cpu(stat: &str) -> Option<(u64, u64)> {
    let numbers: Vec<u64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|number| number.parse().ok()).collect();
    // Guest time, beyond the eighth number, is counted in user time already.
    let total: u64 = numbers.iter().take(8).sum();
    let idle = numbers.get(3)? + numbers.get(4).copied().unwrap_or(0);
    Some((total.saturating_sub(idle), total))
}

/// Bytes in and out of all interfaces but loopback.
fn network(dev: &str) -> (u64, u64) {
    let mut sum = (0, 0);
    for (name, counters) in dev.lines().filter_map(|line| line.split_once(':')) {
        let numbers: Vec<u64> = counters.split_whitespace().map_while(|number| number.parse().ok()).collect();
        if let (false, Some(received), Some(sent)) = (name.trim() == "lo", numbers.first(), numbers.get(8)) {
            sum.0 += received;
            sum.1 += sent;
        }
    }
    sum
}

fn memory_pct() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = field(&text, "MemTotal:").unwrap_or(0);
    let available = field(&text, "MemAvailable:").unwrap_or(total);
    pct(total.saturating_sub(available) as f64, total as f64)
}

fn disk_pct() -> f64 {
    let Ok(root) = rustix::fs::statvfs("/") else { return 0.0 };
    let used = root.f_blocks.saturating_sub(root.f_bfree);
    pct(used as f64, (used + root.f_bavail) as f64)
}

fn load1() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

/// The number after `name` in a text of `Name:   123 kB` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

fn pct(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole * 1000.0).round() / 10.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_the_kernels_text() {
        assert_eq!(cpu("cpu  10 0 5 80 5 0 0 0 3 0\ncpu0 1 2 3 4\n"), Some((15, 100)));
        assert_eq!(cpu("garbage"), None);
        let dev = "Inter-|   Receive\n face |bytes\n    lo: 9 0 0 0 0 0 0 0 9 0\n  eth0: 100 1 0 0 0 0 0 0 50 1\n";
        assert_eq!(network(dev), (100, 50));
        assert_eq!(field("VmSize:\t 12 kB\nVmRSS:\t  34 kB\n", "VmRSS:"), Some(34));
    }

    #[test]
    fn this_host_can_be_read() {
        let stats = HostStats::default();
        let first = stats.read();
        assert!(first.mem_pct > 0.0 && first.mem_pct <= 100.0, "{first:?}");
        assert_eq!(stats.read(), first, "a second reading at once is the same");
        assert!(ProcessStats::read().resident_bytes > 0);
    }
}

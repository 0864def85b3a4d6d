//! What starting a sandbox takes, and what an idle one costs the host, held
//! against the operator's limits.

use std::time::{Duration, Instant};

use stacyvm_client::{Client, SandboxClient};

use super::{Making, Seen, Trouble, daemon, make, output};
use crate::host::{Daemon, memory_kib, speaking_of};
use crate::run::Run;
use crate::server::Subject;
use crate::{CertifyOptions, Measured};

/// Sandboxes whose memory the mean is of.
const MEMORY_SAMPLES: usize = 3;

pub(crate) async fn look(run: &mut Run<'_>, subject: &mut Subject) {
    let ids = ["M1", "KT-R3"];
    let Some(id) = ids.into_iter().find(|id| run.has(id)) else { return };
    let (client, options) = (subject.client(), run.options);
    let (mark, image) = (run.mark.clone(), run.options.image.clone());
    let making = Making::of(run.target, &image, &mark);
    let is_here = subject.own().is_some() || run.target.has_daemon();
    let daemon = daemon(run);
    let mut measured = None;
    let work = async {
        let times = starts(&client, making, options.samples).await?;
        let memory_overhead_kib = if is_here { memory(&client, making, daemon.as_ref()).await? } else { None };
        let found = Measured {
            samples: options.samples,
            spawn_p50_ms: percentile(&times, 50),
            spawn_p95_ms: percentile(&times, 95),
            memory_overhead_kib,
        };
        let seen = judge(&found, options);
        measured = Some(found);
        Ok(seen)
    };
    run.look(id, work).await;
    run.measured = measured;
}

async fn starts(client: &Client, making: Making<'_>, samples: u32) -> Result<Vec<u64>, Trouble> {
    let mut times = Vec::new();
    for _ in 0..samples.max(1) {
        let started = Instant::now();
        let sandbox = make(client, making).await?;
        // It counts as started when it does something.
        output(&sandbox, "true").await?;
        times.push(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
        sandbox.destroy().await?;
    }
    times.sort_unstable();
    Ok(times)
}

/// Of sorted times, the one that this share of them does not exceed.
fn percentile(sorted: &[u64], share: usize) -> u64 {
    let place = (sorted.len() * share).div_ceil(100).max(1) - 1;
    sorted.get(place).copied().unwrap_or(0)
}

/// Host memory of one idle sandbox, the mean of a few that run together.
async fn memory(client: &Client, making: Making<'_>, daemon: Option<&Daemon>) -> Result<Option<u64>, Trouble> {
    let mut sandboxes = Vec::new();
    for _ in 0..MEMORY_SAMPLES {
        sandboxes.push(make(client, making).await?);
    }
    let mut total = Some(0);
    for sandbox in &sandboxes {
        let one = memory_of(sandbox, daemon).await?;
        total = total.zip(one).map(|(sum, one)| sum + one);
    }
    for sandbox in &sandboxes {
        sandbox.destroy().await?;
    }
    Ok(total.map(|sum| sum / MEMORY_SAMPLES as u64))
}

async fn memory_of(sandbox: &SandboxClient, daemon: Option<&Daemon>) -> Result<Option<u64>, Trouble> {
    // In the control groups of ours, or on the command line of what a daemon started.
    let mut marks = vec![format!("/{}", sandbox.id())];
    if let Some(daemon) = daemon {
        marks.extend(daemon.containers_of(sandbox.id().as_str()).await?.into_iter().map(|container| container.id));
    }
    let found: Vec<u64> = speaking_of(&marks).into_iter().filter_map(memory_kib).collect();
    Ok((!found.is_empty()).then(|| found.iter().sum()))
}

fn judge(found: &Measured, options: &CertifyOptions) -> Seen {
    let memory = found.memory_overhead_kib.map(|kib| format!("{:.1} MiB", kib as f64 / 1024.0));
    let message = format!(
        "{} starts: p50 {} ms, p95 {} ms; an idle sandbox takes {} of the host",
        found.samples,
        found.spawn_p50_ms,
        found.spawn_p95_ms,
        memory.as_deref().unwrap_or("an unknown part")
    );
    let mut broken = Vec::new();
    let mut unlimited = Vec::new();
    match options.slo_spawn_p95 {
        Some(limit) if Duration::from_millis(found.spawn_p95_ms) > limit => {
            broken.push(format!("p95 is above {limit:?}"));
        }
        Some(_) => {}
        None => unlimited.push("--slo-spawn-p95"),
    }
    match (options.slo_memory_overhead_mib, found.memory_overhead_kib) {
        (Some(limit), Some(kib)) if kib > limit << 10 => broken.push(format!("memory is above {limit} MiB")),
        (Some(_), None) => broken.push("memory could not be read, and a limit was given".to_owned()),
        (Some(_), Some(_)) => {}
        (None, _) => unlimited.push("--slo-mem-overhead"),
    }
    if !broken.is_empty() {
        let fix = "see what else runs on this host, or give it more; raise the limit only if users accept it";
        return Seen::fail(format!("{message}: {}", broken.join(", ")), fix);
    }
    if unlimited.is_empty() {
        return Seen::pass(message);
    }
    Seen::warn(format!("{message}; held against no limit"), format!("give {}", unlimited.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let times: Vec<u64> = (1..=20).collect();
        assert_eq!((percentile(&times, 50), percentile(&times, 95), percentile(&times, 100)), (10, 19, 20));
        assert_eq!((percentile(&[7], 50), percentile(&[7], 95), percentile(&[], 95)), (7, 7, 0));
    }

    #[test]
    fn limits_of_the_operator_decide() {
        let found = |memory| Measured { samples: 20, spawn_p50_ms: 10, spawn_p95_ms: 90, memory_overhead_kib: memory };
        let status = |memory, time_ms: Option<u64>, limit| {
            let options = CertifyOptions {
                slo_spawn_p95: time_ms.map(Duration::from_millis),
                slo_memory_overhead_mib: limit,
                ..crate::options::tests::options()
            };
            judge(&found(memory), &options).status
        };
        assert_eq!(status(Some(2048), Some(100), Some(2)), Status::Pass);
        assert_eq!(status(Some(2048), Some(80), Some(2)), Status::Fail);
        assert_eq!(status(Some(2049), Some(100), Some(2)), Status::Fail);
        assert_eq!(status(None, Some(100), Some(2)), Status::Fail, "a limit that was not held against anything");
        assert_eq!(status(Some(2048), None, None), Status::Warn);
    }
}

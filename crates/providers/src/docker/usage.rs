//! What a container uses, in one reading.

use bollard::models::{ContainerMemoryStats, ContainerStatsResponse};
use bollard::query_parameters::StatsOptionsBuilder;
use futures_util::StreamExt as _;
use stacyvm_sandbox::ResourceUsage;

use super::daemon::Daemon;
use super::error::DockerError;

/// Pages of files that the kernel gives back when they are wanted, by their
/// names in control groups v1 and v2.
const INACTIVE_FILE: [&str; 2] = ["total_inactive_file", "inactive_file"];

/// One sample: the daemon would otherwise wait a second for a second one.
pub(super) async fn read(daemon: &Daemon, container: &str) -> Result<ResourceUsage, DockerError> {
    const OPERATION: &str = "read the container's usage";
    let options = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
    let mut readings = Box::pin(daemon.client.stats(container, Some(options)));
    match readings.next().await {
        Some(reading) => reading.map(usage).map_err(DockerError::api(OPERATION)),
        None => Err(DockerError::system(OPERATION)(std::io::ErrorKind::UnexpectedEof.into())),
    }
}

fn usage(reading: ContainerStatsResponse) -> ResourceUsage {
    let memory = reading.memory_stats.unwrap_or_default();
    let pids = reading.pids_stats.unwrap_or_default();
    let cpu = reading.cpu_stats.and_then(|cpu| cpu.cpu_usage).unwrap_or_default();
    ResourceUsage {
        cpu_usec: cpu.total_usage.unwrap_or(0) / 1000,
        memory_bytes: used(&memory),
        memory_limit_bytes: memory.limit.unwrap_or(0),
        pids: pids.current.unwrap_or(0),
        pids_limit: pids.limit.unwrap_or(0),
        ..ResourceUsage::default()
    }
}

fn used(memory: &ContainerMemoryStats) -> u64 {
    let stats = memory.stats.as_ref();
    let inactive = INACTIVE_FILE.into_iter().find_map(|name| stats?.get(name).copied()).unwrap_or(0);
    let all = memory.usage.unwrap_or(0);
    // As the docker client does: what makes no sense is not taken off.
    if inactive < all { all - inactive } else { all }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn memory_is_counted_without_what_can_be_given_back() {
        let memory = |name: &str, inactive| ContainerMemoryStats {
            usage: Some(100),
            stats: Some(HashMap::from([(name.to_owned(), inactive)])),
            ..ContainerMemoryStats::default()
        };
        assert_eq!(used(&memory("total_inactive_file", 30)), 70);
        assert_eq!(used(&memory("inactive_file", 40)), 60);
        assert_eq!(used(&memory("inactive_file", 400)), 100);
        assert_eq!(used(&memory("file", 10)), 100);
    }
}

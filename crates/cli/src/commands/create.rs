//! The options that describe a new sandbox, shared by `run`, `spawn` and
//! `template save`.

use clap::Args;
use stacyvm_api::{CreateRequest, Disk, Duration, NetworkMode, NetworkRequest};
use stacyvm_engine::{MEMORY_RANGE_MIB, PIDS_RANGE, VCPUS_RANGE};

use crate::commands::{given, key_value};

/// Stands in for `--owner`.
const OWNER_VARIABLE: &str = "STACYVM_OWNER";

#[derive(Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct SandboxArgs {
    /// Image, such as `python:3.12` or `host` (this host's own /usr, read-only)
    #[arg(long, short = 'i')]
    pub(crate) image: Option<String>,
    /// Runtime to use instead of the server's default
    #[arg(long)]
    pub(crate) provider: Option<String>,
    /// How long the sandbox may live, such as 30m or 2h
    #[arg(long, value_name = "TIME")]
    pub(crate) ttl: Option<Duration>,
    /// Memory limit: 16 MiB at least
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(MEMORY_RANGE_MIB))]
    pub(crate) memory: Option<u64>,
    /// Processors at most, such as 2 or 0.5: 0.01 at least
    #[arg(long, value_name = "COUNT", value_parser = processors)]
    pub(crate) vcpus: Option<f64>,
    /// Size of the writable disk: 1 MiB at least
    #[arg(long = "disk", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) disk_mib: Option<u64>,
    /// Keep the writable disk in memory, within the memory limit
    #[arg(long)]
    pub(crate) disk_in_memory: bool,
    /// Processes and threads at most: 16 to 4194304
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(PIDS_RANGE))]
    pub(crate) pids_limit: Option<u64>,
    /// What it may reach: `none`, `bridge`, or a network of the runtime
    #[arg(long, value_name = "MODE")]
    pub(crate) network: Option<String>,
    /// Address or range to allow although it is denied by default (repeatable)
    #[arg(long, value_name = "CIDR")]
    pub(crate) allow: Vec<String>,
    /// Environment of every command in the sandbox (repeatable)
    #[arg(long, short = 'e', value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) env: Vec<(String, String)>,
    /// User (name or uid) commands run as
    #[arg(long, short = 'u')]
    pub(crate) user: Option<String>,
    /// Note kept with the sandbox (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Whom the sandbox is accounted to [env: STACYVM_OWNER]
    #[arg(long)]
    pub(crate) owner: Option<String>,
    /// Make it although some limits asked for cannot be enforced
    #[arg(long)]
    pub(crate) allow_unenforced: bool,
}

impl SandboxArgs {
    pub(crate) fn request(&self, template: Option<&str>) -> CreateRequest {
        CreateRequest {
            image: self.image.clone(),
            provider: self.provider.clone(),
            template: template.map(str::to_owned),
            memory_mb: self.memory,
            vcpus: self.vcpus,
            disk_size_mb: self.disk_mib,
            disk: self.disk_in_memory.then_some(Disk::Memory),
            pids_limit: self.pids_limit,
            ttl: self.ttl,
            owner_id: given(self.owner.clone(), OWNER_VARIABLE),
            metadata: (!self.metadata.is_empty()).then(|| self.metadata.iter().cloned().collect()),
            env: (!self.env.is_empty()).then(|| self.env.iter().cloned().collect()),
            user: self.user.clone(),
            network: self.network_request(),
            network_mode: None,
            allow_unenforced: self.allow_unenforced.then_some(true),
        }
    }

    pub(crate) fn network_request(&self) -> Option<NetworkRequest> {
        if self.network.is_none() && self.allow.is_empty() {
            return None;
        }
        let mode = self.network.as_deref().map_or(NetworkMode::Bridge, NetworkMode::parse);
        Some(NetworkRequest { mode, allow: self.allow.clone() })
    }
}

/// A number of processors, whole or not.
fn processors(text: &str) -> Result<f64, String> {
    let count: f64 = text.parse().map_err(|_| "write a number such as 2 or 0.5".to_owned())?;
    let min = VCPUS_RANGE.start();
    if count.is_finite() && count >= *min { Ok(count) } else { Err(format!("it must be {min} or more")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_a_number_that_can_be_shared_out() {
        assert_eq!((processors("2"), processors("0.5"), processors("0.01")), (Ok(2.0), Ok(0.5), Ok(0.01)));
        for text in ["0", "-1", "0.001", "inf", "NaN", "two", ""] {
            assert!(processors(text).is_err(), "{text}");
        }
    }
}

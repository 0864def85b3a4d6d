//! The server about itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Duration, ProviderHealth};

/// `GET /health` (`ok`) and `GET /live` (`alive`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub status: String,
    pub version: String,
    pub uptime: Duration,
}

/// `GET /ready`. Ready means that the store answers and that the default
/// provider is healthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Readiness {
    pub status: String,
    pub version: String,
    pub uptime: Duration,
    pub store: String,
    pub providers: Vec<ProviderHealth>,
    pub ready_providers: u64,
    pub total_providers: u64,
}

/// `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    pub version: String,
    pub commit: String,
    pub os: String,
    pub arch: String,
    pub envd_version: String,
}

/// `GET /pool/status` while pool mode does not exist: `{"enabled":false}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    pub enabled: bool,
}

/// `GET /system/stats`: the host. Rates are per second since the last reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostStats {
    pub cpu_pct: f64,
    pub mem_pct: f64,
    /// Of the root file system.
    pub disk_pct: f64,
    pub net_rx_bps: f64,
    pub net_tx_bps: f64,
    pub load1: f64,
}

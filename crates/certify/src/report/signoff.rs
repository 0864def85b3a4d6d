//! The fifteen fields that an operator signs, twelve of them filled in.

use serde::{Deserialize, Serialize};

/// In the order of the published template.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signoff {
    pub runtime: String,
    pub host_os_kernel: String,
    pub stacyvm_version: String,
    pub config_file: String,
    pub provider_health_endpoint: String,
    pub smoke_script_result: String,
    pub lifecycle_conformance: String,
    pub exec_conformance: String,
    pub file_conformance: String,
    pub streaming_conformance: String,
    pub live_preview: String,
    pub restart_reconciliation: String,
    /// By hand, as are the next two.
    pub known_host_caveats: String,
    pub owner_signoff: String,
    pub date: String,
}

/// Labels of the fields that are filled in by hand.
pub(super) const BY_HAND: [&str; 3] = ["Known host caveats", "Owner/signoff", "Date"];

impl Signoff {
    /// Labels and values.
    pub fn fields(&self) -> [(&'static str, &str); 15] {
        [
            ("Runtime", &self.runtime),
            ("Host OS/kernel", &self.host_os_kernel),
            ("StacyVM version", &self.stacyvm_version),
            ("Config file", &self.config_file),
            ("Provider health endpoint", &self.provider_health_endpoint),
            ("Smoke script result", &self.smoke_script_result),
            ("Lifecycle conformance", &self.lifecycle_conformance),
            ("Exec conformance", &self.exec_conformance),
            ("File conformance", &self.file_conformance),
            ("Streaming conformance", &self.streaming_conformance),
            ("Live preview", &self.live_preview),
            ("Restart reconciliation", &self.restart_reconciliation),
            (BY_HAND[0], &self.known_host_caveats),
            (BY_HAND[1], &self.owner_signoff),
            (BY_HAND[2], &self.date),
        ]
    }
}

//! What a run found.

use serde::{Deserialize, Serialize};
use stacyvm_api::Timestamp;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    Pass,
    Fail,
    Skip,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
            Self::Skip => "SKIP",
        }
    }
}

/// One check's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    pub id: String,
    pub title: String,
    pub status: Status,
    /// Why it failed or was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub duration_ms: u64,
    /// What was seen, for whoever reads the report later.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What was tested: `provider oci`, `server http://127.0.0.1:7423`.
    pub target: String,
    pub image: String,
    pub version: String,
    pub started_at: Timestamp,
    pub duration_ms: u64,
    pub summary: Summary,
    /// Sandboxes that still existed after their checks had destroyed them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_behind: Vec<String>,
    pub checks: Vec<CheckReport>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
}

impl Summary {
    pub(crate) fn of(checks: &[CheckReport]) -> Self {
        let count = |status| checks.iter().filter(|check| check.status == status).count();
        Self { passed: count(Status::Pass), failed: count(Status::Fail), skipped: count(Status::Skip) }
    }
}

impl Report {
    /// Nothing failed, nothing was left behind, and something passed.
    pub fn is_success(&self) -> bool {
        self.summary.failed == 0 && self.summary.passed > 0 && self.left_behind.is_empty()
    }

    pub fn failed_ids(&self) -> Vec<&str> {
        self.ids_with(Status::Fail)
    }

    pub fn skipped_ids(&self) -> Vec<&str> {
        self.ids_with(Status::Skip)
    }

    fn ids_with(&self, status: Status) -> Vec<&str> {
        self.checks.iter().filter(|check| check.status == status).map(|check| check.id.as_str()).collect()
    }
}

//! What a certification found.

mod render;
mod seal;
mod signoff;

use serde::{Deserialize, Serialize};
use stacyvm_api::Timestamp;

pub use render::Format;
pub use seal::{VerifyError, verify, verify_attachments};
pub use signoff::Signoff;

pub(crate) use seal::sha256;

/// How a row came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    Pass,
    /// It works, and something is worth knowing.
    Warn,
    /// Nobody could look. Counts as a failure: what was not seen is not certified.
    Unavailable,
    Fail,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Unavailable => "UNAVAILABLE",
            Self::Fail => "FAIL",
        }
    }
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub status: Status,
    /// The row's id.
    pub name: String,
    pub title: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// What was seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
    pub duration_ms: u64,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    pub hostname: String,
    /// As `uname -srm` says.
    pub os: String,
    pub distribution: String,
    pub processors: usize,
    pub memory_mb: u64,
    /// `none`, or what the machine itself runs on.
    pub virtualization: String,
    pub cgroup: String,
}

/// A file beside the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub name: String,
    pub sha256: String,
}

/// What starting sandboxes cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    pub samples: u32,
    pub spawn_p50_ms: u64,
    pub spawn_p95_ms: u64,
    /// Of the host's memory, for an idle sandbox, where it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_overhead_kib: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub passed: usize,
    pub warned: usize,
    pub unavailable: usize,
    pub failed: usize,
}

/// The whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub generated_at: Timestamp,
    pub runtime: String,
    pub host: HostFacts,
    pub stacyvm_version: String,
    pub stacyvm_commit: String,
    /// The server that was asked; a local address where it was started for this.
    pub stacyvm_url: String,
    pub config_file: String,
    pub image: String,
    /// PASS or FAIL.
    pub status: Status,
    pub summary: Summary,
    pub checks: Vec<Outcome>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caveats: Vec<String>,
    pub signoff: Signoff,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<Attachment>,
    /// Over everything else, without what is filled in by hand.
    pub report_hash: String,
}

impl Report {
    /// Everything was looked at, and nothing failed.
    pub fn is_success(&self) -> bool {
        self.status == Status::Pass
    }

    pub(crate) fn overall(checks: &[Outcome]) -> (Status, Summary) {
        let count = |status| checks.iter().filter(|check| check.status == status).count();
        let summary = Summary {
            passed: count(Status::Pass),
            warned: count(Status::Warn),
            unavailable: count(Status::Unavailable),
            failed: count(Status::Fail),
        };
        let passes = summary.failed == 0 && summary.unavailable == 0 && summary.passed > 0;
        (if passes { Status::Pass } else { Status::Fail }, summary)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn outcome(name: &str, status: Status) -> Outcome {
        Outcome {
            status,
            name: name.to_owned(),
            title: "a | row".to_owned(),
            message: "it is | so\nand on".to_owned(),
            fix: (status != Status::Pass).then(|| "do `this`".to_owned()),
            evidence: vec!["seen <b>".to_owned()],
            duration_ms: 7,
        }
    }

    pub(crate) fn report(statuses: &[Status]) -> Report {
        let checks: Vec<Outcome> =
            statuses.iter().enumerate().map(|(index, status)| outcome(&format!("B{index}"), *status)).collect();
        let (status, summary) = Report::overall(&checks);
        Report {
            generated_at: Timestamp::from_unix_ms(1_700_000_000_000),
            runtime: "oci".to_owned(),
            host: HostFacts { hostname: "vm1".to_owned(), os: "Linux 6.1 x86_64".to_owned(), ..HostFacts::default() },
            stacyvm_version: "0.0.0".to_owned(),
            stacyvm_commit: "abc".to_owned(),
            stacyvm_url: "http://127.0.0.1:1".to_owned(),
            config_file: "none".to_owned(),
            image: "alpine:latest".to_owned(),
            status,
            summary,
            checks,
            measured: None,
            caveats: vec!["shared kernel".to_owned()],
            signoff: Signoff { runtime: "oci".to_owned(), ..Signoff::default() },
            attachments: Vec::new(),
            report_hash: String::new(),
        }
    }

    #[test]
    fn what_was_not_seen_is_no_pass() {
        for (statuses, expected) in [
            (&[Status::Pass][..], Status::Pass),
            (&[Status::Pass, Status::Warn], Status::Pass),
            (&[Status::Pass, Status::Unavailable], Status::Fail),
            (&[Status::Pass, Status::Fail], Status::Fail),
            (&[Status::Warn], Status::Fail),
            (&[], Status::Fail),
        ] {
            assert_eq!(report(statuses).status, expected, "{statuses:?}");
        }
    }
}

//! What an operator's command looked at, what it found, and what to do.
//!
//! ```text
//! [FAIL] auth.api_key: anybody who reaches the server may run code (stacyvm.yaml:4)
//!     fix: openssl rand -hex 32 > api.key, and name the file in auth.api_key_file
//! ```

use std::fmt::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;
use stacyvm_api::{Finding, FindingLevel};

use crate::output::{Output, Tone};

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Status {
    /// Not looked at, because it is about something that is honestly not there.
    Skip,
    Pass,
    Warn,
    Fail,
}

/// For what purpose something is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// Somebody's own machine.
    Development,
    /// Other people depend on it: what is a risk there is a failure.
    Production,
}

impl Strictness {
    pub(crate) fn new(production: bool) -> Self {
        if production { Self::Production } else { Self::Development }
    }

    /// What a risk counts as.
    pub(crate) fn risk(self) -> Status {
        match self {
            Self::Development => Status::Warn,
            Self::Production => Status::Fail,
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    pub(crate) status: Status,
    /// Stable, such as `auth.api_key`; of settings it is the key.
    pub(crate) name: String,
    pub(crate) message: String,
    /// Where it was written: `stacyvm.yaml:12`, a variable, an option.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<String>,
}

impl Check {
    pub(crate) fn pass(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: Status::Pass, name: name.into(), message: message.into(), place: None, fix: None }
    }

    pub(crate) fn skip(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self { status: Status::Skip, ..Self::pass(name, why) }
    }

    /// Not as it should be, and what to do.
    pub(crate) fn new(
        status: Status,
        name: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { status, name: name.into(), message: message.into(), place: None, fix: Some(fix.into()) }
    }

    pub(crate) fn warn(name: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Status::Warn, name, message, fix)
    }

    pub(crate) fn fail(name: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Status::Fail, name, message, fix)
    }

    pub(crate) fn at(mut self, place: impl Into<String>) -> Self {
        self.place = Some(place.into());
        self
    }

    /// As it is printed, with its fix on a line of its own.
    pub(crate) fn text(&self, output: Output) -> String {
        let (tone, word) = match self.status {
            Status::Skip => (Tone::Faint, "SKIP"),
            Status::Pass => (Tone::Good, "PASS"),
            Status::Warn => (Tone::Warning, "WARN"),
            Status::Fail => (Tone::Bad, "FAIL"),
        };
        let place = self.place.as_ref().map(|place| format!(" ({place})")).unwrap_or_default();
        let mut text = format!("[{}] {}: {}{place}\n", output.paint(tone, word), self.name, self.message);
        if let Some(fix) = &self.fix {
            let _ = writeln!(text, "    fix: {fix}");
        }
        text
    }
}

impl From<Finding> for Check {
    fn from(finding: Finding) -> Self {
        let status = match finding.level {
            FindingLevel::Ok => Status::Pass,
            FindingLevel::Warning => Status::Warn,
            FindingLevel::Failure => Status::Fail,
        };
        Self { status, name: finding.name, message: finding.message, place: None, fix: finding.fix }
    }
}

/// All that was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Checks(pub(crate) Vec<Check>);

impl Checks {
    pub(crate) fn push(&mut self, check: Check) {
        self.0.push(check);
    }

    pub(crate) fn extend(&mut self, others: impl IntoIterator<Item = Check>) {
        self.0.extend(others);
    }

    /// The worst of all.
    pub(crate) fn status(&self) -> Status {
        self.0.iter().map(|check| check.status).max().unwrap_or(Status::Pass)
    }

    pub(crate) fn count(&self, status: Status) -> usize {
        self.0.iter().filter(|check| check.status == status).count()
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        if self.status() == Status::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    /// Findings for people, or as JSON with the worst of them as `status`.
    pub(crate) fn show(&self, output: Output) -> anyhow::Result<()> {
        let page = json!({ "status": self.status(), "checks": self });
        output.show(&page, |_| self.text(output))
    }

    /// Every check, and a last line that counts them.
    pub(crate) fn text(&self, output: Output) -> String {
        let mut text: String = self.0.iter().map(|check| check.text(output)).collect();
        let _ = writeln!(text, "\n{}", self.summary());
        text
    }

    /// What is not as it should be, the worst first.
    pub(crate) fn troubles(&self) -> impl Iterator<Item = &Check> {
        let of = |status: Status| self.0.iter().filter(move |check| check.status == status);
        of(Status::Fail).chain(of(Status::Warn))
    }

    pub(crate) fn summary(&self) -> String {
        let [passed, warned, failed] = [Status::Pass, Status::Warn, Status::Fail].map(|status| self.count(status));
        format!("{passed} passed, {warned} warned, {failed} failed")
    }
}

impl FromIterator<Check> for Checks {
    fn from_iter<I: IntoIterator<Item = Check>>(checks: I) -> Self {
        Self(checks.into_iter().collect())
    }
}

impl IntoIterator for Checks {
    type Item = Check;
    type IntoIter = std::vec::IntoIter<Check>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Form;

    #[test]
    fn a_finding_says_where_and_what_to_do() {
        let check = Check::fail("server.port", "is taken", "pass --port").at("stacyvm.yaml:3");
        let text = check.text(Output::new(Form::Human));
        assert_eq!(text, "[FAIL] server.port: is taken (stacyvm.yaml:3)\n    fix: pass --port\n");
        assert_eq!(Check::pass("a", "is well").text(Output::new(Form::Human)), "[PASS] a: is well\n");
    }

    #[test]
    fn the_worst_finding_decides() {
        let mut checks = Checks::default();
        assert_eq!(checks.status(), Status::Pass);
        checks.push(Check::pass("a", "well"));
        checks.push(Check::warn("b", "hm", "look"));
        assert_eq!(checks.status(), Status::Warn);
        checks.push(Check::fail("c", "no", "do"));
        assert_eq!(checks.status(), Status::Fail);
        assert!(checks.text(Output::new(Form::Human)).ends_with("\n1 passed, 1 warned, 1 failed\n"));
        let json = serde_json::to_value(&checks).unwrap();
        assert_eq!(json[2], serde_json::json!({"status": "FAIL", "name": "c", "message": "no", "fix": "do"}));
    }
}

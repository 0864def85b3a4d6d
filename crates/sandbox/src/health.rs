//! A provider's health, finding by finding.

use stacyvm_api::{Finding, FindingLevel};

/// What a provider found on its host. Healthy means that no finding is a
/// failure, so that "why not" always has an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthReport {
    pub findings: Vec<Finding>,
}

impl HealthReport {
    pub fn is_healthy(&self) -> bool {
        self.findings.iter().all(|finding| finding.level != FindingLevel::Failure)
    }

    /// The first failure, in one sentence with its fix.
    pub fn reason(&self) -> Option<String> {
        let failure = self.findings.iter().find(|finding| finding.level == FindingLevel::Failure)?;
        Some(match &failure.fix {
            Some(fix) => format!("{}: {} ({fix})", failure.name, failure.message),
            None => format!("{}: {}", failure.name, failure.message),
        })
    }

    pub fn ok(&mut self, name: &str, message: impl Into<String>) {
        self.push(name, FindingLevel::Ok, message, None);
    }

    pub fn warn(&mut self, name: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.push(name, FindingLevel::Warning, message, Some(fix.into()));
    }

    pub fn fail(&mut self, name: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.push(name, FindingLevel::Failure, message, Some(fix.into()));
    }

    fn push(&mut self, name: &str, level: FindingLevel, message: impl Into<String>, fix: Option<String>) {
        self.findings.push(Finding { name: name.to_owned(), level, message: message.into(), fix });
    }
}

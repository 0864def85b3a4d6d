//! Judges a configuration: is it safe, is it bounded, will it hold?
//!
//! A rule looks at [`Settings`] only, never at the host; that is the doctor's.
//! Each says which key it is about, so that the message can name its line. A
//! rule about a setting that this version does not have yet says so and never
//! passes.

mod auth;
mod exposure;
mod limits;
mod runtimes;
mod site;

use crate::check::{Check, Checks, Strictness};
use crate::config::load::Loaded;
use crate::config::problem::{ConfigError, Problem};
use crate::config::settings::{Settings, Source};

/// Everything there is to say about a configuration that was read, or about
/// why it cannot be.
pub(crate) fn lint(loaded: &Result<Loaded, ConfigError>, strictness: Strictness) -> Checks {
    match loaded {
        Ok(loaded) => {
            let mut linter = Linter::new(&loaded.settings, &loaded.faults, strictness);
            if loaded.faults.is_empty() {
                linter.checks.push(Check::pass("config", source_of(loaded)));
            }
            linter.checks.extend(loaded.faults.iter().map(failure));
            linter.checks.extend(loaded.warnings.iter().map(warning));
            linter.all();
            linter.checks
        }
        Err(error) => failures(error),
    }
}

/// Why a configuration cannot be used: one failure for each problem.
pub(crate) fn failures(error: &ConfigError) -> Checks {
    let checks = match error {
        ConfigError::Read { source, .. } => {
            vec![Check::fail("config", format!("{error}: {source}"), "name a readable file with --config")]
        }
        ConfigError::Invalid(problems) => problems.iter().map(failure).collect(),
    };
    Checks(checks)
}

fn failure(problem: &Problem) -> Check {
    const READ_MORE: &str = "correct it; `stacyvm config schema` and docs/configuration.md list every key";
    let fix = problem.hint.clone().unwrap_or_else(|| READ_MORE.to_owned());
    Check::fail("config", problem.message.clone(), fix).at(problem.place.clone())
}

fn source_of(loaded: &Loaded) -> String {
    match &loaded.file {
        Some(file) => format!("{} can be read", file.display()),
        None => "there is no file: defaults and variables hold".to_owned(),
    }
}

fn warning(problem: &Problem) -> Check {
    let fix = problem.hint.clone().unwrap_or_else(|| "take it out".to_owned());
    Check::warn("config", problem.message.clone(), fix).at(problem.place.clone())
}

/// Rules and what they have found so far.
pub(super) struct Linter<'a> {
    settings: &'a Settings,
    faults: &'a [Problem],
    strictness: Strictness,
    checks: Checks,
}

impl<'a> Linter<'a> {
    fn new(settings: &'a Settings, faults: &'a [Problem], strictness: Strictness) -> Self {
        Self { settings, faults, strictness, checks: Checks::default() }
    }

    fn all(&mut self) {
        self.auth();
        self.oidc();
        self.exposure();
        self.rate_limit();
        self.storage();
        self.limits();
        self.logging();
        self.runtimes();
    }

    /// Nothing is to be said of the key, unless it is wrong in another way.
    fn pass(&mut self, key: &str, message: impl Into<String>) {
        if !self.is_faulty(key) {
            self.add(key, Check::pass(key, message));
        }
    }

    fn is_faulty(&self, key: &str) -> bool {
        self.faults.iter().any(|fault| fault.place == key)
    }

    /// Fine on one's own machine, a failure in production.
    fn risk(&mut self, key: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(key, Check::new(self.strictness.risk(), key, message, fix));
    }

    fn warn(&mut self, key: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(key, Check::warn(key, message, fix));
    }

    fn fail(&mut self, key: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(key, Check::fail(key, message, fix));
    }

    /// A risk if `bad`, else a pass.
    fn risk_if(&mut self, bad: bool, key: &str, well: &str, message: &str, fix: &str) {
        if bad { self.risk(key, message, fix) } else { self.pass(key, well) }
    }

    /// This version does not have what the rule is about.
    fn absent(&mut self, key: &str, feature: &str, instead: &str) {
        self.warn(key, format!("this version has no {feature}"), instead);
    }

    /// A finding of a name that is no key, at the place of one.
    fn add(&mut self, key: &str, check: Check) {
        let place = match self.settings.get(key).map(|value| &value.source) {
            Some(Source::Default) | None => None,
            Some(source) => Some(source.to_string()),
        };
        self.checks.push(match place {
            Some(place) => check.at(place),
            None => check,
        });
    }

    /// [`Self::risk`] under another name than the key's.
    fn named(&self, name: &str, message: impl Into<String>, fix: impl Into<String>) -> Check {
        Check::new(self.strictness.risk(), name, message, fix)
    }
}

#[cfg(test)]
mod tests;

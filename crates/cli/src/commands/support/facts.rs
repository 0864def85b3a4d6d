//! What may stand in a bundle: numbers, switches, times, and words out of our
//! own program. There is no field for text that somebody else wrote, so that
//! none can get in.

use serde::Serialize;
use stacyvm_api::{Duration, FindingLevel, Readiness, SandboxState, Timestamp};
use stacyvm_engine::{MigrationState, StoreMigration, StoreStatistics};

use crate::check::{Checks, Status};
use crate::commands::serve::KNOWN_PROVIDERS;
use crate::config::{ConfigError, Content, Setting as _, Shape, Source, Value, shape_of};

/// A setting: whether it is set and where, and its value where that cannot be
/// a secret.
#[derive(Debug, Serialize)]
pub(super) struct SettingFact {
    key: &'static str,
    /// `default`, `file`, `environment`, `option` or `key_file`.
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    is_set: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Fact>,
    /// Entries of a list or section.
    #[serde(skip_serializing_if = "Option::is_none")]
    entries: Option<usize>,
}

/// A value that is no text.
#[derive(Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Fact {
    Switch(bool),
    Number(u64),
    Fraction(f64),
    Duration(Duration),
    /// One of the words that this program knows.
    Word(&'static str),
}

/// A check without its message, which may quote what somebody wrote.
#[derive(Debug, Serialize)]
pub(super) struct CheckFact {
    name: String,
    status: Status,
}

/// Where the configuration is wrong; not what stands there.
#[derive(Debug, Serialize)]
pub(super) struct ProblemFact {
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
}

#[derive(Debug, Serialize)]
pub(super) struct StoreFact {
    size_bytes: u64,
    free_bytes: u64,
    is_whole: bool,
    migrations: Vec<(i64, MigrationState)>,
    /// Of our own tables.
    rows: Vec<(String, u64)>,
    sandboxes: Vec<(SandboxState, u64)>,
}

/// A running server's health.
#[derive(Debug, Serialize)]
pub(super) struct ServerFact {
    is_ready: bool,
    is_store_ok: bool,
    is_same_version: bool,
    uptime: Duration,
    providers: Vec<ProviderFact>,
}

#[derive(Debug, Serialize)]
struct ProviderFact {
    /// One of this program's, or `other`.
    name: &'static str,
    is_healthy: bool,
    is_default: bool,
    latency_ms: u64,
    warnings: usize,
    failures: usize,
}

impl SettingFact {
    pub(super) fn new(value: &Value) -> Self {
        let (source, line) = match value.source {
            Source::Default => ("default", None),
            Source::File { line, .. } => ("file", Some(line)),
            Source::Environment(_) => ("environment", None),
            Source::Option(_) => ("option", None),
            Source::KeyFile(_) => ("key_file", None),
        };
        let (known, entries) = match &value.content {
            Content::Text(text) => (fact(value.key, text), None),
            Content::List(items) => (None, Some(items.len())),
            Content::Map(entries) => (None, Some(entries.len())),
            Content::Secret(_) => (None, None),
        };
        Self { key: value.key, source, line, is_set: !value.content.is_empty(), value: known, entries }
    }
}

/// The value as its type reads it. Text has none: it may be anything.
fn fact(key: &str, text: &str) -> Option<Fact> {
    match shape_of(key)? {
        Shape::Switch => bool::parse(text).ok().map(Fact::Switch),
        Shape::Number => u64::parse(text).ok().map(Fact::Number),
        Shape::Fraction => f64::parse(text).ok().map(Fact::Fraction),
        Shape::Duration => Duration::parse(text).ok().map(Fact::Duration),
        Shape::Choice(words) => words.iter().find(|word| **word == text).map(|word| Fact::Word(word)),
        Shape::Text if key == "providers.default" => {
            let known = KNOWN_PROVIDERS.into_iter().chain(["auto"]).find(|name| *name == text);
            Some(Fact::Word(known.unwrap_or("other")))
        }
        Shape::Text | Shape::Secret | Shape::Secrets | Shape::List | Shape::Map => None,
    }
}

pub(super) fn checks(checks: Checks) -> Vec<CheckFact> {
    checks.into_iter().map(|check| CheckFact { name: check.name, status: check.status }).collect()
}

/// One entry for each problem.
pub(super) fn problems(error: &ConfigError) -> Vec<ProblemFact> {
    match error {
        ConfigError::Read { .. } => vec![ProblemFact { line: None }],
        ConfigError::Invalid(problems) => problems
            .iter()
            .map(|problem| {
                let line = problem.place.rsplit_once(':').and_then(|(_, line)| line.parse().ok());
                ProblemFact { line }
            })
            .collect(),
    }
}

impl StoreFact {
    pub(super) fn new(statistics: StoreStatistics, migrations: &[StoreMigration], is_whole: bool) -> Self {
        let StoreStatistics { size_bytes, free_bytes, rows, sandboxes } = statistics;
        let migrations = migrations.iter().map(|migration| (migration.version, migration.state)).collect();
        Self { size_bytes, free_bytes, is_whole, migrations, rows, sandboxes }
    }
}

impl ServerFact {
    pub(super) fn new(readiness: &Readiness) -> Self {
        let provider = |health: &stacyvm_api::ProviderHealth| {
            let count = |level| health.findings.iter().filter(|finding| finding.level == level).count();
            ProviderFact {
                name: KNOWN_PROVIDERS.into_iter().find(|name| *name == health.name).unwrap_or("other"),
                is_healthy: health.healthy,
                is_default: health.default,
                latency_ms: health.latency_ms,
                warnings: count(FindingLevel::Warning),
                failures: count(FindingLevel::Failure),
            }
        };
        Self {
            is_ready: readiness.status == "ready",
            is_store_ok: readiness.store == "ok",
            is_same_version: readiness.version == env!("CARGO_PKG_VERSION"),
            uptime: readiness.uptime,
            providers: readiness.providers.iter().map(provider).collect(),
        }
    }
}

/// What could not be gathered, by one of our own words.
#[derive(Debug, Serialize)]
pub(super) struct Missing {
    pub(super) what: &'static str,
    pub(super) why: &'static str,
}

/// The program and the machine.
#[derive(Debug, Serialize)]
pub(super) struct HostFact {
    pub(super) os: &'static str,
    pub(super) arch: &'static str,
    /// Numbers of the kernel's release, such as `[6, 1, 0]`.
    kernel: Vec<u64>,
    processors: usize,
    memory_mb: u64,
    swap_mb: u64,
    is_root: bool,
    is_cgroup_v2: bool,
}

impl HostFact {
    pub(super) fn of_this() -> Self {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        let information = rustix::system::sysinfo();
        let mebibytes = |count: u64| count.saturating_mul(u64::from(information.mem_unit)) >> 20;
        Self {
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            kernel: release.split(['.', '-']).map_while(|part| part.parse().ok()).collect(),
            processors: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mb: mebibytes(information.totalram as u64),
            swap_mb: mebibytes(information.totalswap as u64),
            is_root: rustix::process::geteuid().is_root(),
            is_cgroup_v2: std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        }
    }
}

/// When and by what a bundle was made.
#[derive(Debug, Serialize)]
pub(super) struct Origin {
    pub(super) generated_at: Timestamp,
    pub(super) version: &'static str,
    pub(super) commit: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json_schema;

    #[test]
    fn text_has_no_value_and_words_are_our_own() {
        assert_eq!(fact("server.host", "hunter2"), None);
        assert_eq!(fact("auth.api_key", "hunter2"), None);
        assert_eq!(fact("providers.default", "hunter2"), Some(Fact::Word("other")));
        assert_eq!(fact("defaults.spawn_overflow", "queue"), Some(Fact::Word("queue")));
        assert_eq!(fact("defaults.spawn_overflow", "hunter2"), None);
        assert_eq!(fact("server.port", "7423"), Some(Fact::Number(7423)));
        assert_eq!(fact("server.port", "hunter2"), None);
        assert_eq!(fact("defaults.ttl", "1h"), Some(Fact::Duration(Duration::from_secs(3600))));
    }

    #[test]
    fn no_key_of_the_schema_shows_arbitrary_text() {
        fn keys(prefix: &str, schema: &serde_json::Value, found: &mut Vec<String>) {
            for (name, below) in schema["properties"].as_object().into_iter().flatten() {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                keys(&key, below, found);
                found.push(key);
            }
        }
        let mut found = Vec::new();
        keys("", &json_schema(), &mut found);
        assert!(found.len() > 100, "{found:?}");
        for key in found {
            let shown = serde_json::to_string(&fact(&key, "hunter2")).unwrap();
            assert!(!shown.contains("hunter2"), "{key}: {shown}");
        }
    }
}

//! `stacyvm doctor`: what this host can run, and why not more.
//!
//! It only looks: no directory is made, no server started, nothing switched on.
//! Needs no server; where one runs it is asked whether it is ready.

mod host;
mod install;
mod runtimes;
mod server;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use stacyvm_engine::StoreFile;

use crate::check::{Check, Checks, Status, Strictness};
use crate::commands::Context;
use crate::commands::serve::{KNOWN_PROVIDERS, database, enabled_providers};
use crate::commands::settings::PlaceArgs;
use crate::config::{self, Config, ConfigError, Environment, Loaded};
use crate::output::{Output, Tone, bytes};
use host::Host;
use runtimes::{Found, Isolation, RUNTIMES, Server, Standing, Wishes};

/// Of the rules of `config lint`, those that keep a server from starting or let
/// anybody in (control-plane 3.4).
const LINT_SHOWN: [&str; 5] =
    ["auth.api_key", "auth.admin_api_key", "auth.admin_fallback_enabled", "database.driver", "providers.default"];

/// Show what this host can run, what is missing, and how to get it
///
/// Looks at the configuration, the data directory, the port and every runtime,
/// strongest isolation first. Changes nothing and needs no server. What is wrong
/// comes first; what is fine, and what runtimes lack that nobody uses here, is
/// shown with --verbose and in JSON. With --production, what is a risk to others
/// is a failure.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm doctor
  stacyvm doctor --verbose
  stacyvm doctor --production --config /etc/stacyvm/stacyvm.yaml
  stacyvm doctor --json | jq '.runtimes[] | select(.usable) | .name'")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Judge for a server that other people depend on
    #[arg(long)]
    production: bool,
    /// Show every check, and every runtime
    #[arg(long, short = 'v')]
    verbose: bool,
}

/// All that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Diagnosis {
    pub(crate) status: Status,
    pub(crate) checks: Checks,
    /// Those that are not about runtimes nobody uses here.
    #[serde(skip)]
    concerns: Checks,
    runtimes: Vec<Found>,
    /// The strongest isolation that works here.
    pub(crate) suggestion: Option<Suggestion>,
}

/// Settings for the best runtime of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Suggestion {
    pub(crate) runtime: &'static str,
    pub(crate) isolation: String,
    pub(crate) settings: Vec<(&'static str, &'static str)>,
}

pub(crate) async fn run(context: &Context, args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let environment = Environment::of_this_process();
    let loaded = args.place.examine(&environment);
    let strictness = Strictness::new(args.production);
    let diagnosis = diagnose(context, &loaded, &environment, strictness).await?;
    context.output.show(&diagnosis, |diagnosis| {
        if args.verbose { diagnosis.full_page(context.output) } else { diagnosis.page(context.output) }
    })?;
    Ok(diagnosis.checks.exit_code())
}

/// Looks at everything.
pub(crate) async fn diagnose(
    context: &Context,
    loaded: &Result<Loaded, ConfigError>,
    environment: &Environment,
    strictness: Strictness,
) -> anyhow::Result<Diagnosis> {
    let host = Host::this(environment.get("PATH"), environment.get("DOCKER_HOST"));
    let mut checks = Checks::default();
    checks.push(machine());
    let mut data_dir = None;
    match loaded {
        Err(_) => checks.extend(config::lint(loaded, strictness)),
        Ok(found) => {
            let shown = |check: &Check| check.name == "config" || LINT_SHOWN.contains(&check.name.as_str());
            checks.extend(config::lint(loaded, strictness).into_iter().filter(shown));
            let dir = PlaceArgs::data_dir(found, environment)?;
            checks.extend(server::check(&found.config, &dir, environment, strictness));
            checks.extend(server::port(context, &found.config, &dir).await?);
            data_dir = Some(dir);
        }
    }
    let runtimes = look_at_runtimes(&host, loaded.as_ref().ok(), data_dir.as_deref(), environment).await;
    // On a machine of one's own, where only it can call, keys are no concern.
    let is_advice = |check: &Check| {
        strictness == Strictness::Development && check.status == Status::Warn && check.name.starts_with("auth.")
    };
    let mut concerns: Checks = checks.0.iter().filter(|check| !is_advice(check)).cloned().collect();
    for runtime in &runtimes {
        checks.extend(runtime.checks.iter().cloned());
        if runtime.enabled && runtime.in_this_version {
            concerns.extend(runtime.checks.iter().cloned());
        }
    }
    let suggestion = suggest(&runtimes);
    if suggestion.is_none() {
        let fix = "follow the fixes of one runtime (stacyvm doctor --verbose); oci needs the least";
        let none = Check::fail("runtimes", "no runtime of this version can be used here", fix);
        checks.push(none.clone());
        concerns.push(none);
    }
    Ok(Diagnosis { status: checks.status(), checks, concerns, runtimes, suggestion })
}

/// What one runtime needs of this host, judged as if a server was to use it,
/// whether or not this version can.
pub(crate) async fn runtime_checks(
    name: &str,
    loaded: &Result<Loaded, ConfigError>,
    environment: &Environment,
) -> Vec<Check> {
    let Some(runtime) = RUNTIMES.iter().find(|runtime| runtime.name == name) else { return Vec::new() };
    let host = Host::this(environment.get("PATH"), environment.get("DOCKER_HOST"));
    let loaded = loaded.as_ref().ok();
    let dir = loaded.and_then(|loaded| PlaceArgs::data_dir(loaded, environment).ok());
    let wishes = wishes(loaded, dir.as_deref(), environment).await;
    let daemon = runtimes::ask_daemon(&host, &wishes).await;
    runtime.look(&host, &wishes, &daemon, Standing { in_this_version: true, enabled: true }).await.checks
}

/// What is known of the server that would use the runtimes.
async fn wishes<'a>(
    loaded: Option<&'a Loaded>,
    data_dir: Option<&'a Path>,
    environment: &'a Environment,
) -> Wishes<'a> {
    let Some((loaded, data_dir)) = loaded.zip(data_dir) else {
        return Wishes { settings: loaded.map(|loaded| &loaded.settings), server: None };
    };
    let config = &loaded.config;
    let demands_key = demands_key(config, data_dir).await;
    Wishes { settings: Some(&loaded.settings), server: Some(Server { config, environment, data_dir, demands_key }) }
}

/// Whether a server would ask callers for a key. A store that cannot be read
/// has none that count.
async fn demands_key(config: &Config, data_dir: &Path) -> bool {
    let auth = &config.auth;
    if let Some(enabled) = auth.enabled {
        return enabled;
    }
    if auth.api_key.is_some() || auth.admin_api_key.is_some() {
        return true;
    }
    let file = database(config, data_dir);
    file.is_file() && StoreFile::new(file).keys().await.is_ok_and(|keys| keys.ever_made)
}

async fn look_at_runtimes(
    host: &Host,
    loaded: Option<&Loaded>,
    data_dir: Option<&Path>,
    environment: &Environment,
) -> Vec<Found> {
    let wishes = wishes(loaded, data_dir, environment).await;
    let enabled = loaded.map(|loaded| enabled_providers(&loaded.config)).unwrap_or_default();
    let daemon = runtimes::ask_daemon(host, &wishes).await;
    let mut found = Vec::with_capacity(RUNTIMES.len());
    for runtime in &RUNTIMES {
        let standing = Standing {
            in_this_version: KNOWN_PROVIDERS.contains(&runtime.provider),
            enabled: enabled.contains(&runtime.provider) && runtime.is_chosen(&wishes),
        };
        found.push(runtime.look(host, &wishes, &daemon, standing).await);
    }
    found
}

/// The strongest isolation that works; a fake is no suggestion.
fn suggest(found: &[Found]) -> Option<Suggestion> {
    let best = found.iter().find(|runtime| runtime.usable && runtime.isolation != Isolation::Imitation)?;
    let row = RUNTIMES.iter().find(|row| row.name == best.name)?;
    Some(Suggestion { runtime: best.name, isolation: best.isolation.to_string(), settings: row.settings.to_vec() })
}

/// What kind of machine this is; never a reason to stop.
fn machine() -> Check {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux").trim_matches('"');
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kibibytes = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let memory = kibibytes.map(|kibibytes| format!(", {} of memory", bytes(kibibytes << 10))).unwrap_or_default();
    let arch = std::env::consts::ARCH;
    Check::pass("host", format!("{name}, Linux {kernel}, {arch}, {processors} processors{memory}"))
}

impl Diagnosis {
    /// What somebody has to do, and what can be had.
    fn page(&self, output: Output) -> String {
        let troubles: Vec<&Check> = self.concerns.troubles().collect();
        let mut page: String = troubles.iter().map(|check| check.text(output)).collect();
        if troubles.is_empty() {
            page.push_str("Nothing is wrong with this host and its configuration.\n");
        }
        self.offer(output, |runtime| runtime.in_this_version, &mut page);
        let _ = writeln!(page, "\n{}; --verbose shows every check", self.concerns.summary());
        page
    }

    /// Everything that was looked at.
    fn full_page(&self, output: Output) -> String {
        let mut page = self.checks.text(output);
        self.offer(output, |_| true, &mut page);
        page
    }

    /// The runtimes there are, and the best of them.
    fn offer(&self, output: Output, shown: impl Fn(&Found) -> bool, page: &mut String) {
        page.push_str("\nRuntimes, strongest isolation first:\n\n");
        let rows = self.runtimes.iter().filter(|runtime| shown(runtime)).map(|runtime| {
            let (tone, word) = if runtime.usable { (Tone::Good, "yes") } else { (Tone::Faint, "no") };
            let why = match (&runtime.missing, runtime.enabled) {
                (Some(why), _) => why.clone(),
                (None, true) => "enabled".to_owned(),
                (None, false) => "not enabled".to_owned(),
            };
            vec![runtime.name.to_owned(), runtime.isolation.to_string(), output.paint(tone, word), why]
        });
        page.push_str(&output.table(&["RUNTIME", "ISOLATION", "USABLE", "WHY"], rows.collect()));
        match &self.suggestion {
            Some(suggestion) => page.push_str(&suggestion.page()),
            None => page.push_str("\nNothing to suggest: no runtime of this version can be used here.\n"),
        }
    }
}

impl Suggestion {
    fn page(&self) -> String {
        let mut page =
            format!("\nBest for this host: {} ({}). `stacyvm init` writes:\n\n", self.runtime, self.isolation);
        page.push_str(&yaml(&self.settings));
        page
    }
}

/// Dotted keys as sections. Keys of one section follow each other.
pub(crate) fn yaml(settings: &[(&str, &str)]) -> String {
    let mut page = String::new();
    let mut open: Vec<&str> = Vec::new();
    for (key, value) in settings {
        let mut sections: Vec<&str> = key.split('.').collect();
        let name = sections.pop().unwrap_or_default();
        let common = open.iter().zip(&sections).take_while(|(one, other)| one == other).count();
        for (depth, section) in sections.iter().enumerate().skip(common) {
            let _ = writeln!(page, "{:width$}{section}:", "", width = depth * 2);
        }
        let _ = writeln!(page, "{:width$}{name}: {value}", "", width = sections.len() * 2);
        open = sections;
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_keys_become_sections() {
        let settings = [("providers.default", "docker"), ("providers.docker.runtime", "runsc"), ("top", "1")];
        assert_eq!(yaml(&settings), "providers:\n  default: docker\n  docker:\n    runtime: runsc\ntop: 1\n");
    }

    #[test]
    fn the_fake_is_never_suggested() {
        let found = |name: &'static str, isolation, usable| Found {
            name,
            provider: name,
            isolation,
            in_this_version: true,
            enabled: false,
            usable,
            missing: None,
            checks: Vec::new(),
        };
        let mock = found("mock", Isolation::Imitation, true);
        assert_eq!(suggest(std::slice::from_ref(&mock)), None);
        let oci = found("oci", Isolation::Container, true);
        let broken = found("firecracker", Isolation::VirtualMachine, false);
        assert_eq!(suggest(&[broken, oci, mock]).unwrap().runtime, "oci");
    }
}

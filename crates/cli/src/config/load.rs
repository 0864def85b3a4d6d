//! Finding, reading and checking a configuration.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::config::acme;
use crate::config::check::check;
use crate::config::problem::{ConfigError, Problem};
use crate::config::reserved::{Absence, RESERVED, Reserved};
use crate::config::schema::{Config, Entry, entries, find};
use crate::config::setting::{Raw, Secret, Setting, Shape};
use crate::config::settings::{Settings, Source};
use crate::config::small_file::{MAX_KEY_FILE_BYTES, read_small_file};
use crate::config::source::{Keys, MAX_FILE_BYTES, Placed, parse_file};

const ENV_PREFIX: &str = "STACYVM_";

/// Variables of our name that are not settings: what the client reads, what
/// picks the file, and what builds and tests use.
const OTHER_VARIABLES: [&str; 11] = [
    "STACYVM_AGENT_BINARY",
    "STACYVM_API_KEY",
    "STACYVM_BACKEND_KEY",
    "STACYVM_CONFIG",
    "STACYVM_FIRECRACKER_KERNEL",
    "STACYVM_OWNER",
    "STACYVM_PROOT_ROOTFS",
    "STACYVM_PROOT_WORKSPACE_BASE",
    "STACYVM_SMOKE_TIMEOUT",
    "STACYVM_SMOKE_URL",
    "STACYVM_URL",
];

/// Names below this likeness are not worth a suggestion.
const LIKENESS: f64 = 0.6;

/// What a program is started with, apart from its arguments.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) home: Option<PathBuf>,
    pub(crate) current_dir: PathBuf,
}

impl Environment {
    pub(crate) fn of_this_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
        Self { variables, home, current_dir: std::env::current_dir().unwrap_or_default() }
    }

    /// A variable that is set to something.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// A configuration and where it came from.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) config: Config,
    /// The same, value by value, with their places.
    pub(crate) settings: Settings,
    /// What is written and has no effect in this version, with its places.
    pub(crate) unused: Settings,
    pub(crate) file: Option<PathBuf>,
    /// What is not wrong but probably not meant.
    pub(crate) warnings: Vec<Problem>,
    /// What no server starts with, although all of it could be read. Whoever
    /// acts on a configuration gets none of them ([`load`]).
    pub(crate) faults: Vec<Problem>,
}

/// A setting given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) key: &'static str,
    /// The option it was given with, such as `--port`.
    pub(crate) option: &'static str,
    pub(crate) text: String,
}

/// Reads the file that `explicit`, `STACYVM_CONFIG` or the usual places name,
/// lays the environment over it and checks the whole.
pub(crate) fn load(explicit: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
    load_with(explicit, environment, &[])
}

/// [`load`], with what was given on the command line over all of it.
pub(crate) fn load_with(
    explicit: Option<&Path>,
    environment: &Environment,
    given: &[Given],
) -> Result<Loaded, ConfigError> {
    let loaded = examine(explicit, environment, given)?;
    if loaded.faults.is_empty() { Ok(loaded) } else { Err(ConfigError::Invalid(loaded.faults)) }
}

/// [`load_with`] for those who judge a configuration: one that could be read,
/// with what is wrong with it.
pub(crate) fn examine(
    explicit: Option<&Path>,
    environment: &Environment,
    given: &[Given],
) -> Result<Loaded, ConfigError> {
    let mut problems = Vec::new();
    let file = find_file(explicit, environment);
    let settings = match &file {
        Some(path) => {
            let text = read_file(path)?;
            parse_file(&shown(path, environment), &text, &Schema, &mut problems)
        }
        None => BTreeMap::new(),
    };
    let mut reader = Reader { file: settings, environment, given, problems };
    let mut config = Config::read(&mut reader);
    let mut settings = reader.settings();
    let unused = reader.unused();
    let mut warnings = reader.reserved();
    warnings.extend(unknown_variables(environment));
    let Reader { mut problems, .. } = reader;
    let mut faults = Vec::new();
    resolve_key_files(&mut config, &mut settings, &mut faults);
    check(&config, &mut faults);
    acme::check(&config, environment, &mut faults);
    if !problems.is_empty() {
        problems.append(&mut faults);
        return Err(ConfigError::Invalid(problems));
    }
    Ok(Loaded { config, settings, unused, file, warnings, faults })
}

/// Hands out settings one by one and keeps what is wrong with them.
pub(crate) struct Reader<'a> {
    file: BTreeMap<String, Placed>,
    environment: &'a Environment,
    given: &'a [Given],
    problems: Vec<Problem>,
}

impl Reader<'_> {
    /// The setting's value: from the command line, the environment, the file,
    /// or its default.
    pub(crate) fn read<T: Setting>(&mut self, entry: &Entry) -> T {
        // An option hides what is below it, but not that it is wrong.
        let given = self.given(entry);
        let below = self.written_below(entry);
        let mut value = None;
        for placed in [below, given].into_iter().flatten() {
            match T::from_raw(&placed.raw) {
                Ok(read) => value = Some(read),
                Err(why) => {
                    self.problems.push(Problem::new(placed.source.to_string(), format!("`{}` {why}", entry.key)));
                }
            }
        }
        if let Some(value) = value {
            return value;
        }
        T::parse(entry.default).unwrap_or_else(|why| unreachable!("the default of {}: {why}", entry.key))
    }

    fn written(&self, entry: &Entry) -> Option<Placed> {
        self.given(entry).or_else(|| self.written_below(entry))
    }

    fn given(&self, entry: &Entry) -> Option<Placed> {
        let given = self.given.iter().find(|given| given.key == entry.key)?;
        Some(Placed { source: Source::Option(given.option), raw: scalar(&given.text) })
    }

    /// In the environment, or in the file.
    fn written_below(&self, entry: &Entry) -> Option<Placed> {
        let name = entry.env_name();
        if let Some(text) = self.environment.get(&name) {
            return Some(Placed { raw: scalar(text), source: Source::Environment(name) });
        }
        self.file.get(entry.key).cloned()
    }

    /// Every setting with its place.
    fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        for entry in entries() {
            let written = self.written(entry);
            settings.push(entry, written.as_ref().map(|placed| (placed.source.clone(), &placed.raw)));
        }
        settings
    }

    /// Keys without an effect that are written all the same.
    fn unused(&self) -> Settings {
        let mut settings = Settings::default();
        for Reserved { entry, .. } in RESERVED {
            if let Some(placed) = self.written(entry) {
                settings.push(entry, Some((placed.source.clone(), &placed.raw)));
            }
        }
        settings
    }

    /// Warnings about keys without an effect; those that matter are problems.
    fn reserved(&mut self) -> Vec<Problem> {
        let mut warnings = Vec::new();
        for Reserved { entry, absence } in RESERVED {
            let Some(placed) = self.written(entry) else { continue };
            if is_default(entry, &placed.raw) {
                continue;
            }
            let message = format!("`{}` has no effect: this version does not have what it sets", entry.key);
            match absence {
                Absence::Harmless => warnings.push(Problem::new(placed.source.to_string(), message)),
                Absence::Refused => self.problems.push(
                    Problem::new(placed.source.to_string(), message)
                        .hint("take it out if the server may run without that protection"),
                ),
            }
        }
        warnings
    }
}

fn scalar(text: &str) -> Raw {
    Raw::Scalar { text: text.to_owned(), quoted: false }
}

fn is_default(entry: &Entry, raw: &Raw) -> bool {
    match raw {
        Raw::Scalar { text, .. } => text.trim() == entry.default || (entry.shape == Shape::Switch && text == "0"),
        Raw::List(items) => items.join(",") == entry.default,
        Raw::Map(map) => map.is_empty(),
    }
}

struct Schema;

impl Keys for Schema {
    fn is_setting(&self, key: &str) -> bool {
        find(key).is_some()
    }

    fn is_section(&self, key: &str) -> bool {
        all_keys().any(|known| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
    }

    fn nearest(&self, key: &str) -> Option<&'static str> {
        nearest_key(key)
    }
}

fn all_keys() -> impl Iterator<Item = &'static str> {
    entries().map(|entry| entry.key).chain(RESERVED.iter().map(|reserved| reserved.entry.key))
}

/// The setting or section most like `key`. The same last word in another
/// section is as likely a mistake as a slip of the fingers.
fn nearest_key(key: &str) -> Option<&'static str> {
    let last = key.rsplit('.').next().unwrap_or(key);
    let likeness = |known: &'static str| {
        let whole = strsim::normalized_damerau_levenshtein(key, known);
        let known_last = known.rsplit('.').next().unwrap_or(known);
        let moved = 0.9 * strsim::normalized_damerau_levenshtein(last, known_last);
        whole.max(moved)
    };
    let sections = all_keys().flat_map(|known| known.match_indices('.').map(move |(at, _)| &known[..at]));
    let depth = key.matches('.').count();
    let mut best: Option<(f64, &'static str)> = None;
    for known in all_keys().chain(sections.filter(|section| section.matches('.').count() == depth)) {
        let score = likeness(known);
        if score >= LIKENESS && best.is_none_or(|(highest, _)| score > highest) {
            best = Some((score, known));
        }
    }
    best.map(|(_, known)| known)
}

fn find_file(explicit: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    if let Some(path) = explicit {
        return Some(path.to_owned());
    }
    if let Some(path) = environment.get("STACYVM_CONFIG") {
        return Some(PathBuf::from(path));
    }
    let here = environment.current_dir.join("stacyvm.yaml");
    let home = environment.home.as_ref().map(|home| home.join(".stacyvm/config.yaml"));
    [Some(here), home].into_iter().flatten().find(|path| path.exists())
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    read_small_file(path, MAX_FILE_BYTES).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn shown(path: &Path, environment: &Environment) -> String {
    // Below `/` the rest would look like a path from elsewhere.
    let here = Some(&environment.current_dir).filter(|here| here.parent().is_some());
    here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).display().to_string()
}

fn unknown_variables(environment: &Environment) -> Vec<Problem> {
    let known: Vec<String> = all_keys().filter_map(find).map(Entry::env_name).collect();
    let mut warnings = Vec::new();
    for name in environment.variables.keys().filter(|name| name.starts_with(ENV_PREFIX)) {
        if known.contains(name) || OTHER_VARIABLES.contains(&name.as_str()) {
            continue;
        }
        let nearest = known
            .iter()
            .map(|known| (strsim::normalized_damerau_levenshtein(name, known), known))
            .filter(|(score, _)| *score >= 0.8)
            .max_by(|left, right| left.0.total_cmp(&right.0));
        let mut message = "this variable is no setting of stacyvm".to_owned();
        if let Some((_, nearest)) = nearest {
            let _ = write!(message, "; did you mean {nearest}?");
        }
        warnings.push(Problem::new(name.clone(), message));
    }
    warnings
}

/// Keys may be kept in files of their own, as secret stores hand them out.
fn resolve_key_files(config: &mut Config, settings: &mut Settings, problems: &mut Vec<Problem>) {
    let (auth, custom, acme) = (&mut config.auth, &mut config.custom, &mut config.acme);
    for (key, inline, file) in [
        ("providers.custom.api_key", &mut custom.api_key, &custom.api_key_file),
        ("server.acme.eab_hmac_key", &mut acme.eab_hmac_key, &acme.eab_hmac_key_file),
        ("auth.api_key", &mut auth.api_key, &auth.api_key_file),
        ("auth.admin_api_key", &mut auth.admin_api_key, &auth.admin_api_key_file),
    ] {
        let Some(path) = file else { continue };
        if inline.is_some() {
            problems.push(Problem::new(key, format!("both `{key}` and `{key}_file` are set; keep one")));
            continue;
        }
        match read_small_file(path, MAX_KEY_FILE_BYTES) {
            Ok(text) if text.trim().is_empty() => {
                problems.push(Problem::new(format!("{key}_file"), format!("{} is empty", path.display())));
            }
            Ok(text) => {
                let secret = Secret::new(text.trim());
                settings.set_from_key_file(key, path, &secret);
                *inline = Some(secret);
            }
            Err(error) => {
                problems.push(Problem::new(format!("{key}_file"), format!("cannot read {}: {error}", path.display())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Environment { variables, home: None, current_dir: PathBuf::from("/nowhere") }
    }

    #[test]
    fn a_file_is_shown_as_it_is_reached_from_here() {
        let shown_from =
            |here: &str| shown(Path::new("/etc/s.yaml"), &Environment { current_dir: here.into(), ..environment(&[]) });
        assert_eq!(["/", "/etc", "/home"].map(shown_from), ["/etc/s.yaml", "s.yaml", "/etc/s.yaml"]);
    }

    fn load_text(text: &str, variables: &[(&str, &str)]) -> Result<Loaded, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stacyvm.yaml");
        std::fs::write(&path, text).unwrap();
        let environment = Environment { current_dir: dir.path().to_owned(), ..environment(variables) };
        load(None, &environment).map_err(|error| error.to_string())
    }

    fn check_error(text: &str, expect: &str) {
        assert_eq!(load_text(text, &[]).unwrap_err(), expect);
    }

    #[test]
    fn without_anything_the_defaults_hold() {
        let loaded = load(None, &environment(&[])).unwrap();
        assert_eq!(loaded.file, None);
        assert!(loaded.warnings.is_empty());
        let config = loaded.config;
        assert_eq!((config.server.host.as_str(), config.server.port), ("127.0.0.1", 7423));
        assert_eq!(config.defaults.max_ttl.to_string(), "24h0m0s");
        assert_eq!(config.providers.default, "auto");
        assert!(config.auth.api_key.is_none() && config.auth.admin_fallback_enabled);
    }

    #[test]
    fn every_default_can_be_read() {
        // `read` panics for a default that its own type refuses.
        let environment = environment(&[]);
        let mut reader = Reader { file: BTreeMap::new(), environment: &environment, given: &[], problems: Vec::new() };
        Config::read(&mut reader);
        assert_eq!(reader.problems, []);
    }

    #[test]
    fn the_environment_wins_over_the_file_unless_it_is_empty() {
        let text = "server:\n  port: 1\n  host: 127.0.0.2\n  allowed_hosts: [a, b]\n";
        let variables =
            [("STACYVM_SERVER_PORT", "2"), ("STACYVM_SERVER_HOST", ""), ("STACYVM_SERVER_ALLOWED_HOSTS", "c, d")];
        let server = load_text(text, &variables).unwrap().config.server;
        assert_eq!((server.port, server.host.as_str()), (2, "127.0.0.2"));
        assert_eq!(server.allowed_hosts, ["c", "d"]);
    }

    #[test]
    fn every_value_has_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key) = (dir.path().join("stacyvm.yaml"), dir.path().join("key"));
        std::fs::write(&key, "k\n").unwrap();
        std::fs::write(&file, format!("server:\n  port: 1\n  host: x\nauth:\n  api_key_file: {}\n", key.display()))
            .unwrap();
        let environment = Environment {
            current_dir: dir.path().to_owned(),
            ..environment(&[("STACYVM_SERVER_PORT", "2"), ("STACYVM_LOGGING_LEVEL", "debug")])
        };
        let given = [Given { key: "server.port", option: "--port", text: "3".to_owned() }];
        let loaded = load_with(None, &environment, &given).unwrap();
        assert_eq!(loaded.config.server.port, 3);
        let place = |key: &str| loaded.settings.get(key).unwrap().source.to_string();
        assert_eq!(place("server.port"), "--port");
        assert_eq!(place("server.host"), "stacyvm.yaml:3");
        assert_eq!(place("logging.level"), "STACYVM_LOGGING_LEVEL");
        assert_eq!(place("defaults.ttl"), "default");
        assert_eq!(place("auth.api_key"), key.display().to_string());
        let bad = [Given { key: "server.port", option: "--port", text: "x".to_owned() }];
        let error = load_with(None, &environment, &bad).unwrap_err().to_string();
        assert_eq!(error, "--port: `server.port` must be a whole number, not `x`");
        let environment =
            Environment { current_dir: dir.path().to_owned(), ..self::environment(&[("STACYVM_SERVER_PORT", "http")]) };
        let error = load_with(None, &environment, &given).unwrap_err().to_string();
        assert_eq!(error, "STACYVM_SERVER_PORT: `server.port` must be a whole number, not `http`");
    }

    #[test]
    fn unknown_keys_name_the_nearest_and_their_line() {
        check_error("server:\n  prot: 1\n", "stacyvm.yaml:2: unknown key `server.prot` (did you mean `server.port`?)");
        check_error("# x\nsevrer:\n  port: 1\n", "stacyvm.yaml:2: unknown key `sevrer` (did you mean `server`?)");
        check_error("server:\n  ttl: 1h\n", "stacyvm.yaml:2: unknown key `server.ttl` (did you mean `defaults.ttl`?)");
        check_error("xyzzy: 1\n", "stacyvm.yaml:1: unknown key `xyzzy`");
    }

    #[test]
    fn wrong_types_name_key_and_line() {
        check_error(
            "server:\n  host: localhost\n  port: http\n",
            "stacyvm.yaml:3: `server.port` must be a whole number, not `http`",
        );
        check_error(
            "defaults:\n  ttl: 30\n",
            "stacyvm.yaml:2: `defaults.ttl` must be a duration such as 30s or 1h30m: `30` has no unit; write for example 30s",
        );
        check_error("server: 7423\n", "stacyvm.yaml:1: `server` must be a section of keys and values");
        check_error("server:\n  port: [1]\n", "stacyvm.yaml:2: `server.port` must be a whole number, not a list");
        check_error("server:\n  port: {a: 1}\n", "stacyvm.yaml:2: `server.port` must be a whole number, not a section");
        check_error(
            "defaults:\n  spawn_overflow: drop\n",
            "stacyvm.yaml:2: `defaults.spawn_overflow` must be one of reject, queue, not `drop`",
        );
        let error = load_text("", &[("STACYVM_SERVER_PORT", "x")]).unwrap_err();
        assert_eq!(error, "STACYVM_SERVER_PORT: `server.port` must be a whole number, not `x`");
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let error = load_text("servr: 1\ndefaults:\n  vcpus: -1\n  ttl: x\n", &[]).unwrap_err();
        assert_eq!(error.lines().count(), 3, "{error}");
    }

    #[test]
    fn text_that_is_not_yaml_names_the_line() {
        let error = load_text("server:\n  host: [a\n", &[]).unwrap_err();
        assert!(error.starts_with("stacyvm.yaml:") && error.contains("not YAML"), "{error}");
        let error = load_text("a: 1\na: 2\n", &[]).unwrap_err();
        assert!(error.starts_with("stacyvm.yaml:2: not YAML"), "{error}");
        let error = load_text("server: {port: 1}\n---\nserver: {port: 2}\n", &[]).unwrap_err();
        assert!(error.contains("more than one YAML document"), "{error}");
    }

    #[test]
    fn empty_values_and_empty_files_leave_the_defaults() {
        assert_eq!(load_text("server:\n  port:\n  host: ~\nauth:\n", &[]).unwrap().config.server.port, 7423);
        assert_eq!(load_text("", &[]).unwrap().config.server.port, 7423);
        assert_eq!(load_text("# only a comment\n", &[]).unwrap().config.server.port, 7423);
    }

    #[test]
    fn keys_of_absent_features_warn_and_protections_refuse() {
        let text =
            "providers:\n  firecracker:\n    enabled: true\n    kernel_path: /k\n  proot:\n    max_sandboxes: 10\n";
        let warnings = load_text(text, &[]).unwrap().warnings;
        let places: Vec<_> = warnings.iter().map(|warning| warning.place.as_str()).collect();
        assert_eq!(places, ["stacyvm.yaml:3", "stacyvm.yaml:4"], "the default of proot is no warning");
        let error = load_text("auth:\n  oidc_enabled: true\n", &[]).unwrap_err();
        assert!(error.starts_with("stacyvm.yaml:2: `auth.oidc_enabled` has no effect"), "{error}");
    }

    #[test]
    fn published_rate_limits_are_read() {
        let text = "rate_limit: {enabled: true, requests_per_minute: 10, burst: 0, key_by: \"\", bucket_ttl: 5m}\n";
        let limit = load_text(text, &[]).unwrap().config.rate_limit;
        assert_eq!((limit.enabled, limit.requests_per_minute, limit.burst, limit.key_by), (true, 10, 0, None));
        check_error(
            "rate_limit:\n  key_by: user\n",
            "stacyvm.yaml:2: `rate_limit.key_by` must be one of owner, api_key, ip, not `user`",
        );
    }

    #[test]
    fn variables_that_are_no_settings_are_pointed_out() {
        let variables = [("STACYVM_SERVER_PROT", "1"), ("STACYVM_API_KEY", "k"), ("OTHER", "x")];
        let warnings = load(None, &environment(&variables)).unwrap().warnings;
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].message.contains("did you mean STACYVM_SERVER_PORT?"), "{warnings:?}");
    }

    #[test]
    fn a_key_comes_from_one_place_and_never_shows() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "from-file\n").unwrap();
        let text = format!("auth:\n  api_key_file: {}\n", file.display());
        let loaded = load_text(&text, &[]).unwrap();
        assert_eq!(loaded.config.auth.api_key.as_ref().unwrap().expose(), "from-file");
        assert!(!format!("{loaded:?}").contains("from-file"));
        let error = load_text(&text, &[("STACYVM_AUTH_API_KEY", "other-key")]).unwrap_err();
        assert!(error.contains("keep one") && !error.contains("other-key"), "{error}");
        std::fs::write(&file, "\n").unwrap();
        assert!(load_text(&text, &[]).unwrap_err().contains("is empty"));
    }

    #[test]
    fn a_key_file_without_an_end_is_refused() {
        for text in [
            "auth: {api_key_file: /dev/zero}",
            "auth: {admin_api_key_file: /dev/zero}",
            "providers: {custom: {api_key_file: /dev/zero}}",
        ] {
            let error = load_text(text, &[]).unwrap_err();
            assert!(error.contains("cannot read /dev/zero: it is no regular file"), "{text}: {error}");
        }
    }

    #[test]
    fn switching_authentication_against_the_keys_is_refused() {
        assert!(load_text("auth:\n  enabled: true\n", &[]).is_ok(), "keys may be stored");
        assert!(load_text("auth:\n  enabled: false\n  api_key: k\n", &[]).unwrap_err().contains("a key is set"));
        assert!(load_text("auth:\n  enabled: true\n  api_key: k\n", &[]).is_ok());
    }

    #[test]
    fn previews_of_one_site_with_the_api_are_refused() {
        let error = load_text("server: {preview_domain: p.example.com, allowed_hosts: [api.example.com]}\n", &[]);
        assert!(error.unwrap_err().contains("one site (example.com) with `api.example.com`"));
        let other = "server: {preview_domain: example-preview.com, allowed_hosts: [api.example.com]}\n";
        assert!(load_text(other, &[]).is_ok());
        for (server, expected) in [
            ("preview_domain: 10.0.0.1", "server.preview_domain: `10.0.0.1` is not a domain"),
            ("preview_domain: co.uk", "server.preview_domain: names below `co.uk` are those of strangers"),
            ("preview_domain: 'http://a'", "server.preview_domain: `http://a` is not a domain"),
            ("preview_url: 'https://other.example'", "server.preview_url: `https://other.example` is not an address"),
            ("preview_domain: '', preview_url: 'https://a.example'", "server.preview_url: `https://a.example` says"),
            ("port: 8000, preview_port: 8000", "server.preview_port: 8000 is server.port too"),
        ] {
            let error = load_text(&format!("server: {{{server}}}\n"), &[]).unwrap_err();
            assert!(error.starts_with(expected), "{server}: {error}");
        }
        for well in ["preview_domain: '', preview_port: 8000", "port: 0, preview_port: 0"] {
            assert!(load_text(&format!("server: {{{well}}}\n"), &[]).is_ok(), "{well}");
        }
        assert!(load_text("server: {tls_cert_file: a.pem}\n", &[]).unwrap_err().contains("go together"));
    }

    #[test]
    fn the_hosts_network_needs_a_key() {
        let text = "providers: {docker: {enabled: true, network_mode: host}}\n";
        assert!(load_text(text, &[]).unwrap_err().contains("share this machine's network"));
        assert!(load_text(text, &[("STACYVM_AUTH_API_KEY", "key")]).is_ok());
        assert!(load_text(text, &[("STACYVM_AUTH_ENABLED", "true")]).is_ok(), "keys may be stored");
        let default = [("STACYVM_PROVIDERS_DEFAULT", "docker")];
        assert!(load_text("providers: {docker: {network_mode: host}}\n", &default).is_err());
        assert!(load_text("providers: {docker: {network_mode: host}}\n", &[]).is_ok(), "it is not in use");
        assert!(load_text("providers: {docker: {tmpfs: {cache: size=1m}}}\n", &[]).unwrap_err().contains("`cache`"));
    }

    #[test]
    fn contradicting_limits_are_refused() {
        assert!(load_text("defaults: {ttl: 2h, max_ttl: 1h}\n", &[]).unwrap_err().contains("max_ttl"));
        assert!(load_text("defaults: {ttl: 2h, max_ttl: 0s}\n", &[]).is_ok());
        assert!(load_text("defaults: {memory_mb: 0}\n", &[]).is_err());
        assert!(load_text("providers: {reconcile_interval: 0s}\n", &[]).unwrap_err().contains("shorter than 1s"));
    }

    #[test]
    fn the_file_is_the_first_of_the_places() {
        let dir = tempfile::tempdir().unwrap();
        let (home, here) = (dir.path().join("home"), dir.path().join("here"));
        std::fs::create_dir_all(home.join(".stacyvm")).unwrap();
        std::fs::create_dir_all(&here).unwrap();
        std::fs::write(home.join(".stacyvm/config.yaml"), "server: {port: 1}").unwrap();
        let mut environment = Environment { home: Some(home), current_dir: here.clone(), ..environment(&[]) };
        let port = |environment: &Environment, explicit: Option<&Path>| {
            load(explicit, environment).map(|it| it.config.server.port)
        };
        assert_eq!(port(&environment, None).unwrap(), 1);
        std::fs::write(here.join("stacyvm.yaml"), "server: {port: 2}").unwrap();
        assert_eq!(port(&environment, None).unwrap(), 2);
        let named = dir.path().join("named.yaml");
        std::fs::write(&named, "server: {port: 3}").unwrap();
        environment.variables.insert("STACYVM_CONFIG".to_owned(), named.display().to_string());
        assert_eq!(port(&environment, None).unwrap(), 3);
        assert_eq!(port(&environment, Some(&here.join("stacyvm.yaml"))).unwrap(), 2);
        let error = port(&environment, Some(Path::new("/does/not/exist"))).unwrap_err();
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
    }
}

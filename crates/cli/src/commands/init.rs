//! `stacyvm init`: a first configuration, made for this host.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::check::Strictness;
use crate::commands::Context;
use crate::commands::doctor::{self, Suggestion};
use crate::commands::settings::PlaceArgs;
use crate::config::{Environment, meaning_of};
use crate::data_dir;
use crate::output::print;
use crate::private_file::{Existing, PrivateFile};

/// Where a server started here finds it.
const DEFAULT_OUTPUT: &str = "stacyvm.yaml";

/// Left to the host itself.
const RESERVED_MEMORY_MB: u64 = 1024;

const DEFAULT_MEMORY_MB: u64 = 1024;

/// Longest line of a comment.
const WIDTH: usize = 100;

/// Write a commented configuration for what this host has
///
/// Looks at the host as `stacyvm doctor` does and chooses the strongest
/// isolation and limits that fit. The file passes `stacyvm config lint`. With
/// --production it passes `stacyvm config lint --production`: callers need keys,
/// which are made with `stacyvm key create`, and are limited.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm init
  stacyvm init --production --output /etc/stacyvm/stacyvm.yaml
  stacyvm init --output - | less")]
pub(crate) struct InitArgs {
    /// File to write; `-` is standard output
    #[arg(long, short = 'o', value_name = "PATH", default_value = DEFAULT_OUTPUT)]
    output: PathBuf,
    /// Replace the file where it exists
    #[arg(long)]
    force: bool,
    /// Write it for a server that other people depend on
    #[arg(long)]
    production: bool,
}

/// What the limits are measured by.
#[derive(Debug, Clone, Copy)]
struct Size {
    memory_mb: u64,
    processors: u64,
}

pub(crate) async fn run(context: &Context, args: &InitArgs) -> anyhow::Result<()> {
    let to_stdout = args.output.as_os_str() == "-";
    let file = if to_stdout { None } else { Some(PrivateFile::begin(&args.output, Existing::new(args.force))?) };
    let environment = Environment::of_this_process();
    // What an older file says has no part in a new one.
    let fresh = Environment { current_dir: PathBuf::new(), home: None, ..environment.clone() };
    let loaded = PlaceArgs::default().load(&fresh);
    let strictness = Strictness::new(args.production);
    let diagnosis = doctor::diagnose(context, &loaded, &environment, strictness).await?;
    let text = document(diagnosis.suggestion.as_ref(), this_host(), strictness);
    let Some(mut file) = file else { return print(&text) };
    file.write(text.as_bytes())?;
    let path = file.finish()?;
    let runtime = diagnosis.suggestion.map(|suggestion| suggestion.runtime);
    context.output.show(&json!({ "path": path, "runtime": runtime }), |_| {
        let path = path.display();
        let serve = format!("stacyvm serve --config {path}");
        let next = match strictness {
            Strictness::Development => format!("stacyvm config lint --file {path} && {serve}"),
            // Without a first key such a server does not start.
            Strictness::Production => {
                let dir = shown_data_dir(&environment);
                let key = "stacyvm key create admin --scope read --scope api --scope admin";
                format!("{key} --data-dir {dir} --config {path} && {serve}")
            }
        };
        format!("wrote {path}\nnext: {next}\n")
    })
}

/// Where a server with the new file keeps its data.
fn shown_data_dir(environment: &Environment) -> String {
    let chosen = environment.get("STACYVM_DATA_DIR").map(PathBuf::from);
    let dir = data_dir::resolve(chosen.as_deref(), environment.home.as_deref());
    dir.map_or_else(|_| "DIR".to_owned(), |dir| dir.display().to_string())
}

fn this_host() -> Size {
    let information = rustix::system::sysinfo();
    let bytes = (information.totalram as u64).saturating_mul(u64::from(information.mem_unit));
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Size { memory_mb: bytes >> 20, processors: processors as u64 }
}

/// The file's text.
fn document(suggestion: Option<&Suggestion>, size: Size, strictness: Strictness) -> String {
    let mut page = Page::default();
    page.comment(&format!(
        "StacyVM's configuration, written by `stacyvm init` of version {} for a host with {} MiB of memory and {} \
         processors. Everything here may be left out. `stacyvm config show` prints every setting, `stacyvm config lint` \
         judges them.",
        env!("CARGO_PKG_VERSION"),
        size.memory_mb,
        size.processors
    ));
    page.runtime(suggestion);
    page.server();
    match strictness {
        Strictness::Development => page.keys(),
        Strictness::Production => page.required_keys(),
    }
    page.limits(size);
    page.rest(strictness);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
    section: &'static str,
}

impl Page {
    fn comment(&mut self, text: &str) {
        self.wrapped("# ", text);
    }

    fn wrapped(&mut self, prefix: &str, text: &str) {
        let mut line = prefix.trim_end().to_owned();
        for word in text.split_whitespace() {
            if line.chars().count() + 1 + word.chars().count() > WIDTH {
                let _ = writeln!(self.text, "{line}");
                prefix.trim_end().clone_into(&mut line);
            }
            let _ = write!(line, " {word}");
        }
        let _ = writeln!(self.text, "{line}");
    }

    /// A setting of a section, below what it means.
    fn set(&mut self, section: &'static str, name: &str, value: &str) {
        self.entry(section, name, &format!("{name}: {value}"));
    }

    /// A setting that is not made yet: somebody has to decide.
    fn offer(&mut self, section: &'static str, name: &str, value: &str) {
        self.entry(section, name, &format!("# {name}: {value}"));
    }

    fn entry(&mut self, section: &'static str, name: &str, line: &str) {
        self.open(section);
        self.wrapped("  # ", &meaning_of(&format!("{section}.{name}")));
        let _ = writeln!(self.text, "  {line}");
    }

    fn open(&mut self, section: &'static str) {
        if self.section != section {
            let _ = write!(self.text, "\n{section}:\n");
            self.section = section;
        }
    }

    fn runtime(&mut self, suggestion: Option<&Suggestion>) {
        if let Some(suggestion) = suggestion {
            self.text.push('\n');
            let why = format!("{} is the strongest that works here: {}.", suggestion.runtime, suggestion.isolation);
            self.comment(&why);
            self.text.push_str(&doctor::yaml(&suggestion.settings));
        } else {
            self.text.push('\n');
            self.comment("Nothing works here yet: see `stacyvm doctor`.");
            self.text.push_str("providers:\n  default: auto\n");
        }
    }

    fn server(&mut self) {
        self.set("server", "host", "127.0.0.1");
        self.set("server", "port", "7423");
        self.offer("server", "allowed_hosts", "[vm.example.com]");
        self.offer("server", "preview_domain", "vm-previews.example");
    }

    fn keys(&mut self) {
        self.text.push('\n');
        self.comment(
            "Keys. Needed as soon as others can reach the server: `openssl rand -hex 32 > api.key && chmod 600 api.key`, \
             another for the admin, and take the marks of comment away.",
        );
        self.text.push_str("auth:\n");
        self.section = "auth";
        self.offer("auth", "api_key_file", "/etc/stacyvm/api.key");
        self.offer("auth", "admin_api_key_file", "/etc/stacyvm/admin.key");
        self.set("auth", "admin_fallback_enabled", "false");
    }

    fn required_keys(&mut self) {
        self.text.push('\n');
        self.comment(
            "Keys. Nobody calls without one; the first is made while the server is stopped: `stacyvm key create admin \
             --scope read --scope api --scope admin --data-dir DIR`.",
        );
        self.text.push_str("auth:\n");
        self.section = "auth";
        self.set("auth", "enabled", "true");
        self.set("auth", "admin_fallback_enabled", "false");
        self.set("auth", "failures_per_minute", "60");
        self.set("auth", "admin_audit_retention", "2160h");
        self.set("rate_limit", "enabled", "true");
        self.set("rate_limit", "requests_per_minute", "600");
    }

    fn limits(&mut self, size: Size) {
        let for_sandboxes = size.memory_mb.saturating_sub(RESERVED_MEMORY_MB);
        let memory = DEFAULT_MEMORY_MB.min((for_sandboxes / 2).max(128));
        let count = (for_sandboxes / memory).max(1);
        self.set("defaults", "image", "alpine:latest");
        self.set("defaults", "memory_mb", &memory.to_string());
        self.set("defaults", "vcpus", "1");
        self.set("defaults", "ttl", "30m");
        self.set("defaults", "max_ttl", "24h");
        self.set("defaults", "max_exec_timeout", "10m");
        self.set("defaults", "max_sandboxes", &count.to_string());
        self.set("defaults", "max_sandboxes_per_owner", &count.div_ceil(2).to_string());
        self.set("defaults", "max_memory_mb", &for_sandboxes.max(memory).to_string());
        self.set("defaults", "max_vcpus", &size.processors.to_string());
        self.set("defaults", "max_disk_size_mb", "10240");
    }

    fn rest(&mut self, strictness: Strictness) {
        self.set("logging", "level", "info");
        let format = match strictness {
            Strictness::Development => "auto",
            Strictness::Production => "json",
        };
        self.set("logging", "format", format);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::check::{Checks, Status};
    use crate::config::{lint, load};

    const SMALL: Size = Size { memory_mb: 512, processors: 1 };
    const LARGE: Size = Size { memory_mb: 262_144, processors: 64 };

    fn oci() -> Suggestion {
        let settings = vec![("providers.default", "oci")];
        Suggestion { runtime: "oci", isolation: "container".to_owned(), settings }
    }

    fn judge(text: &str) -> Checks {
        judge_for(text, Strictness::Development)
    }

    fn judge_for(text: &str, strictness: Strictness) -> Checks {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stacyvm.yaml");
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        lint(&load(Some(&file), &Environment::default()), strictness)
    }

    #[test]
    fn what_is_written_passes_on_every_host() {
        for size in [SMALL, LARGE] {
            for suggestion in [Some(oci()), None] {
                let text = document(suggestion.as_ref(), size, Strictness::Development);
                let checks = judge(&text);
                assert!(checks.count(Status::Fail) == 0, "{checks:#?}\n{text}");
                let strict = document(suggestion.as_ref(), size, Strictness::Production);
                let checks = judge_for(&strict, Strictness::Production);
                assert!(checks.count(Status::Fail) == 0, "{checks:#?}\n{strict}");
                let text = text + &strict;
                assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
            }
        }
    }

    #[test]
    fn what_is_only_offered_can_be_taken() {
        let text = document(Some(&oci()), LARGE, Strictness::Development);
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, "0123456789abcdef0123456789abcdef").unwrap();
        let taken: Vec<String> = text
            .lines()
            .map(|line| match line.strip_prefix("  # ") {
                Some(rest) if rest.split_once(": ").is_some_and(|(name, _)| !name.contains(' ')) => format!("  {rest}"),
                _ => line.to_owned(),
            })
            .collect();
        let taken = taken.join("\n").replace("/etc/stacyvm/api.key", &key.display().to_string());
        let taken = taken.replace("/etc/stacyvm/admin.key", &key.display().to_string());
        let checks = judge(&taken);
        assert_eq!(checks.count(Status::Fail), 0, "{checks:#?}\n{taken}");
        assert!(
            checks.0.iter().any(|check| check.name == "auth.enabled" && check.status == Status::Pass),
            "{checks:#?}"
        );
    }

    #[test]
    fn limits_fit_the_host() {
        let document = |size| document(None, size, Strictness::Development);
        assert!(document(SMALL).contains("  max_sandboxes: 1\n"), "{}", document(SMALL));
        assert!(document(LARGE).contains("  max_sandboxes: 255\n"));
        assert!(document(LARGE).contains("  max_vcpus: 64\n"));
    }
}

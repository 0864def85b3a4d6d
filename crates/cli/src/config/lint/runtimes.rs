//! What makes the sandboxes, and how well it keeps them in.

use std::path::Path;

use super::Linter;
use crate::check::Check;
use crate::commands::KNOWN_PROVIDERS;

/// Directories of the host whose content is nobody else's business.
const PRIVATE: [&str; 8] = ["/etc", "/root", "/home", "/var", "/run", "/proc", "/sys", "/dev"];

/// Names of checks, settings that must not be empty, and what they could be.
const DOCKER_NEEDS: [(&str, &str, &str); 6] = [
    ("docker.runtime", "providers.docker.runtime", "runc"),
    ("docker.network_mode", "providers.docker.network_mode", "bridge"),
    ("docker.user", "providers.docker.user", "1000:1000"),
    ("docker.memory", "providers.docker.memory", "512m"),
    ("docker.cpus", "providers.docker.cpus", "1"),
    ("docker.pids_limit", "providers.docker.pids_limit", "256"),
];

impl Linter<'_> {
    pub(super) fn runtimes(&mut self) {
        self.mock();
        self.default_provider();
        self.host_include();
        self.registries();
        self.docker();
    }

    fn mock(&mut self) {
        if self.settings.parsed("providers.mock.enabled") == Some(true) {
            self.risk(
                "providers.mock.enabled",
                "the fake imitates commands and isolates nothing",
                "set providers.mock.enabled to false",
            );
        }
    }

    fn default_provider(&mut self) {
        const KEY: &str = "providers.default";
        match self.settings.text(KEY) {
            "mock" => self.risk(KEY, "is a fake that runs nothing", "set providers.default to auto"),
            "auto" => self.pass(KEY, "is chosen by what the host has"),
            name if KNOWN_PROVIDERS.contains(&name) => {
                let name = name.to_owned();
                self.pass(KEY, format!("is {name}"));
            }
            name => {
                let message = format!("this version has no provider {name}: the server will not start");
                self.fail(KEY, message, format!("set it to auto, {}", KNOWN_PROVIDERS.join(" or ")));
            }
        }
    }

    fn host_include(&mut self) {
        const KEY: &str = "providers.oci.host_include";
        let shown = self.settings.list(KEY);
        let private = shown.iter().find(|path| is_private(path)).cloned();
        match private {
            Some(path) => self.risk(
                KEY,
                format!("image `host` shows {path} to every sandbox"),
                "list only directories of programs, such as /opt",
            ),
            None => self.pass(KEY, "image `host` shows nothing private"),
        }
    }

    fn registries(&mut self) {
        const KEY: &str = "images.plain_http_registries";
        let first = self.settings.list(KEY).first().cloned();
        match first {
            Some(registry) => self.risk(
                KEY,
                format!("images of {registry} can be exchanged on their way"),
                "give the registry a certificate, and take it out of the list",
            ),
            None => self.pass(KEY, "images come over TLS"),
        }
    }

    /// Rules for a container daemon, where this version can use one.
    fn docker(&mut self) {
        const ENABLED: &str = "providers.docker.enabled";
        if !self.settings.has(ENABLED) {
            return;
        }
        let is_default = self.settings.text("providers.default") == "docker";
        if !is_default && self.settings.parsed(ENABLED) != Some(true) {
            return;
        }
        for (name, key, example) in DOCKER_NEEDS {
            let unset = matches!(self.settings.text(key), "" | "0");
            self.judge(
                name,
                key,
                unset.then(|| ("is not set".to_owned(), format!("set {key}, for example to {example}"))),
            );
        }
        self.docker_seccomp();
        self.docker_capabilities();
    }

    fn docker_seccomp(&mut self) {
        const KEY: &str = "providers.docker.seccomp_profile";
        let open = matches!(self.settings.text(KEY), "" | "unconfined");
        let message = "every system call of the kernel is open to sandboxes";
        let bad = open.then(|| (message.to_owned(), format!("set {KEY} to default")));
        self.judge("docker.seccomp_profile", KEY, bad);
    }

    fn docker_capabilities(&mut self) {
        const ADDED: &str = "providers.docker.added_caps";
        const DROPPED: &str = "providers.docker.dropped_caps";
        let added = self.settings.list(ADDED).join(", ");
        let bad = (!added.is_empty()).then(|| (format!("sandboxes are given {added}"), format!("take {ADDED} out")));
        self.judge("docker.added_caps", ADDED, bad);
        let drops_all = self.settings.list(DROPPED).iter().any(|name| name.eq_ignore_ascii_case("all"));
        let message = "sandboxes keep powers that they do not need";
        let bad = (!drops_all).then(|| (message.to_owned(), format!("set {DROPPED} to [ALL]")));
        self.judge("docker.dropped_caps", DROPPED, bad);
    }

    /// A risk where there is something bad to say about a setting that exists.
    fn judge(&mut self, name: &str, key: &str, bad: Option<(String, String)>) {
        if !self.settings.has(key) {
            return;
        }
        let check = match bad {
            Some((message, fix)) => self.named(name, message, fix),
            None => Check::pass(name, "is as it should be"),
        };
        self.add(key, check);
    }
}

fn is_private(path: &str) -> bool {
    path == "/" || PRIVATE.iter().any(|private| Path::new(path).starts_with(private))
}

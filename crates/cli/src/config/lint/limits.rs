//! Whether what grows is bounded, and where it is kept.

use std::path::Path;

use stacyvm_api::Duration;

use super::Linter;
use crate::check::Check;

/// Emptied at boot, or by whoever cleans up.
const TEMPORARY: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

impl Linter<'_> {
    pub(super) fn storage(&mut self) {
        const PATH: &str = "database.path";
        self.data_dir();
        self.driver();
        let path = self.settings.text(PATH).to_owned();
        if Path::new(&path).starts_with("..") || Path::new(&path).components().any(|part| part.as_os_str() == "..") {
            self.risk(PATH, "leaves the data directory", "name a file in it, or write an absolute path");
        } else {
            self.pass(PATH, if Path::new(&path).is_absolute() { "is absolute" } else { "is in the data directory" });
        }
    }

    fn data_dir(&mut self) {
        const KEY: &str = "data_dir";
        let path = self.settings.text(KEY).to_owned();
        if path.is_empty() {
            return self.pass(KEY, "is the usual one");
        }
        if Path::new(&path).is_relative() {
            let message = format!("{path} depends on the directory the server is started in");
            return self.risk(KEY, message, "write an absolute path, such as /var/lib/stacyvm");
        }
        match TEMPORARY.iter().find(|temporary| Path::new(&path).starts_with(temporary)) {
            Some(temporary) => {
                let message = format!("{path} is in {temporary}, which is emptied now and then");
                self.risk(KEY, message, "use /var/lib/stacyvm");
            }
            None => self.pass(KEY, format!("is {path}")),
        }
    }

    fn driver(&mut self) {
        const DRIVER: &str = "database.driver";
        let driver = self.settings.text(DRIVER).to_owned();
        if !driver.starts_with("postgres") {
            return self.pass(DRIVER, format!("is {driver}, which needs no server"));
        }
        if self.settings.secret("database.dsn").is_none() {
            self.fail("database.dsn", "the store is Postgres, and there is no address of it", "set database.dsn");
        } else {
            self.pass("database.dsn", "says where Postgres is");
        }
    }

    pub(super) fn limits(&mut self) {
        self.sandbox_caps();
        self.queue();
        self.times();
        self.resources();
    }

    /// The first of these keys that is 0, which means "unlimited".
    fn unlimited(&self, keys: &[&'static str]) -> Option<&'static str> {
        let is_zero = |key: &str| self.settings.parsed::<f64>(key).is_some_and(|value| value <= 0.0);
        keys.iter().copied().find(|key| is_zero(key))
    }

    fn capped(&mut self, name: &str, keys: &[&'static str], well: &str, fix: &str) {
        let unlimited = self.unlimited(keys);
        let check = match unlimited {
            Some(key) => self.named(name, format!("{key} is 0, which is unlimited"), fix),
            None => Check::pass(name, well),
        };
        self.add(unlimited.unwrap_or(name), check);
    }

    fn sandbox_caps(&mut self) {
        self.capped(
            "defaults.sandbox_caps",
            &["defaults.max_sandboxes", "defaults.max_sandboxes_per_owner"],
            "the number of sandboxes is bounded, in all and for each owner",
            "set defaults.max_sandboxes and defaults.max_sandboxes_per_owner",
        );
    }

    fn queue(&mut self) {
        self.capped(
            "defaults.max_spawn_queue",
            &["defaults.max_spawn_queue"],
            "the queue is bounded",
            "set defaults.max_spawn_queue, for example to 100",
        );
    }

    fn times(&mut self) {
        let is_zero = |key: &str| self.settings.parsed::<Duration>(key).is_some_and(Duration::is_zero);
        let (exec, ttl) = (is_zero("defaults.max_exec_timeout"), is_zero("defaults.max_ttl"));
        let check = if exec {
            let fix = "set defaults.max_exec_timeout, for example to 10m";
            self.named("defaults.exec_timeouts", "a command may run for ever", fix)
        } else {
            Check::pass("defaults.exec_timeouts", "every command has a deadline")
        };
        self.add("defaults.max_exec_timeout", check);
        self.risk_if(
            ttl,
            "defaults.max_ttl",
            "every sandbox ends",
            "a sandbox may live for ever",
            "set defaults.max_ttl, for example to 24h",
        );
    }

    fn resources(&mut self) {
        self.capped(
            "defaults.resource_caps",
            &["defaults.max_memory_mb", "defaults.max_vcpus", "defaults.max_disk_size_mb"],
            "no sandbox may ask for more than its share of the host",
            "set defaults.max_memory_mb, defaults.max_vcpus and defaults.max_disk_size_mb",
        );
    }

    pub(super) fn logging(&mut self) {
        const KEY: &str = "logging.format";
        match self.settings.text(KEY) {
            "pretty" => self.risk(KEY, "programs that read logs cannot read this one", "set logging.format to json"),
            "auto" => self.pass(KEY, "is JSON unless a person watches"),
            _ => self.pass(KEY, "is JSON"),
        }
    }
}

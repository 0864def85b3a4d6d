//! What a certification is made with. The program fills it in: this crate reads
//! no environment and no configuration.

use std::path::PathBuf;
use std::time::Duration;

use crate::{Status, Target};

/// Everything but the target.
#[derive(Debug, Clone)]
pub struct CertifyOptions {
    /// What the names of the files beside the report begin with.
    pub name: String,
    /// The program whose server is started, and which runs `smoke`.
    pub program: PathBuf,
    pub version: String,
    pub commit: String,
    /// A server that runs already, instead of one of our own.
    pub given: Option<GivenServer>,
    /// Configuration of our own server.
    pub config: Option<PathBuf>,
    /// Image of the sandboxes.
    pub image: String,
    /// Imported before our own server starts, for hosts without a registry.
    pub image_archive: Option<PathBuf>,
    /// Sandboxes that are started to measure.
    pub samples: u32,
    pub slo_spawn_p95: Option<Duration>,
    pub slo_memory_overhead_mib: Option<u64>,
    /// What `make test` wrote: `target/test-result.json`.
    pub test_result: Option<PathBuf>,
    /// Restarts the given server.
    pub restart_command: Option<String>,
    pub settings: RuntimeSettings,
    /// Providers that this version has.
    pub known_providers: Vec<String>,
}

/// A server that somebody else started.
#[derive(Debug, Clone)]
pub struct GivenServer {
    pub url: String,
    pub api_key: Option<String>,
}

/// What a configuration says about the runtimes.
#[derive(Debug, Clone, Default)]
pub struct RuntimeSettings {
    pub docker_socket: PathBuf,
    pub docker_runtime: String,
    pub docker_network: String,
    pub firecracker_kernel: PathBuf,
    pub firecracker_rootfs: PathBuf,
    /// Empty where the one that the program carries is used.
    pub firecracker_agent: PathBuf,
    pub proot_rootfs: PathBuf,
    pub proot_workspace_base: PathBuf,
    pub proot_languages: Vec<String>,
    pub remote_url: String,
    /// Where the backend's key comes from; none where there is no key.
    pub remote_key: Option<KeySource>,
    /// What the environment says about the target's provider: a server of our
    /// own hears it, and nothing else of the environment.
    pub variables: Vec<(String, String)>,
}

/// Where a key was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySource {
    Environment,
    File,
    /// In the configuration file itself, where it should not be.
    Configuration,
}

/// What the program's own look at the host (`stacyvm doctor`) found.
#[derive(Debug, Clone)]
pub struct HostCheck {
    /// `docker.daemon`, `oci.cgroup`, …
    pub name: String,
    pub status: Status,
    pub message: String,
    pub fix: Option<String>,
}

impl RuntimeSettings {
    /// What the docker provider is asked to run with for a target, unless the
    /// configuration names one that fits.
    pub(crate) fn runtime_for(&self, target: Target) -> String {
        let fits = match target {
            Target::Gvisor => self.docker_runtime.contains("runsc") || self.docker_runtime.contains("gvisor"),
            Target::Kata => self.docker_runtime.contains("kata"),
            _ => return "runc".to_owned(),
        };
        let usual = if target == Target::Kata { "kata-runtime" } else { "runsc" };
        if fits { self.docker_runtime.clone() } else { usual.to_owned() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn options() -> CertifyOptions {
        CertifyOptions {
            name: "oci".to_owned(),
            program: PathBuf::from("/nowhere/stacyvm"),
            version: "0.0.0".to_owned(),
            commit: "abc".to_owned(),
            given: None,
            config: None,
            image: "alpine:latest".to_owned(),
            image_archive: None,
            samples: 1,
            slo_spawn_p95: None,
            slo_memory_overhead_mib: None,
            test_result: None,
            restart_command: None,
            settings: RuntimeSettings::default(),
            known_providers: vec!["oci".to_owned()],
        }
    }

    #[test]
    fn the_runtime_of_a_target_is_never_another_ones() {
        let settings = |name: &str| RuntimeSettings { docker_runtime: name.to_owned(), ..RuntimeSettings::default() };
        assert_eq!(settings("runc").runtime_for(Target::Gvisor), "runsc");
        assert_eq!(settings("runsc-kvm").runtime_for(Target::Gvisor), "runsc-kvm");
        assert_eq!(settings("runsc").runtime_for(Target::Kata), "kata-runtime");
        assert_eq!(settings("io.containerd.kata.v2").runtime_for(Target::Kata), "io.containerd.kata.v2");
        assert_eq!(settings("runsc").runtime_for(Target::Docker), "runc");
    }
}

//! Every runtime there is to know of, strongest isolation first. A new one is a
//! new row.

mod custom;
mod docker;
mod microvm;
mod oci;
mod proot;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::host::{DaemonInfo, Host};
use crate::check::{Check, Status};
use crate::config::{Config, Environment, Settings, default_of};

/// What stands between a sandbox and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Isolation {
    /// A kernel of its own behind a virtual processor.
    VirtualMachine,
    /// A kernel of its own that is an ordinary process.
    UserKernel,
    /// The host's kernel, with namespaces and filters.
    Container,
    /// Paths are translated; nothing is kept out.
    PathTranslation,
    /// Whatever the machines have that sandboxes are on.
    Elsewhere,
    /// Nothing runs at all.
    Imitation,
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::VirtualMachine => "virtual machine",
            Self::UserKernel => "kernel in user space",
            Self::Container => "container",
            Self::PathTranslation => "path translation",
            Self::Elsewhere => "the backend's",
            Self::Imitation => "none, runs nothing",
        })
    }
}

/// One way to run sandboxes.
pub(super) struct Runtime {
    /// Begins the names of its checks.
    pub(super) name: &'static str,
    /// The provider that uses it.
    pub(super) provider: &'static str,
    pub(super) isolation: Isolation,
    /// What to write to use it.
    pub(super) settings: &'static [(&'static str, &'static str)],
    check: Requirement,
}

/// What a runtime needs of a host.
enum Requirement {
    Kvm(microvm::Monitor),
    Daemon(docker::Wanted),
    Kernel,
    Proot,
    Backend,
    Nothing,
}

/// Every runtime, strongest isolation first.
pub(super) const RUNTIMES: [Runtime; 9] = [
    Runtime {
        name: "firecracker",
        provider: "firecracker",
        isolation: Isolation::VirtualMachine,
        settings: &[("providers.default", "firecracker"), ("providers.firecracker.enabled", "true")],
        check: Requirement::Kvm(microvm::Monitor::Firecracker),
    },
    Runtime {
        name: "qemu",
        provider: "qemu",
        isolation: Isolation::VirtualMachine,
        settings: &[("providers.default", "qemu"), ("providers.qemu.enabled", "true")],
        check: Requirement::Kvm(microvm::Monitor::Qemu),
    },
    Runtime {
        name: "kata",
        provider: "docker",
        isolation: Isolation::VirtualMachine,
        settings: &[("providers.default", "docker"), ("providers.docker.runtime", "kata-runtime")],
        check: Requirement::Daemon(docker::Wanted::Kata),
    },
    Runtime {
        name: "gvisor",
        provider: "docker",
        isolation: Isolation::UserKernel,
        settings: &[("providers.default", "docker"), ("providers.docker.runtime", "runsc")],
        check: Requirement::Daemon(docker::Wanted::Gvisor),
    },
    Runtime {
        name: "oci",
        provider: "oci",
        isolation: Isolation::Container,
        settings: &[("providers.default", "oci")],
        check: Requirement::Kernel,
    },
    Runtime {
        name: "docker",
        provider: "docker",
        isolation: Isolation::Container,
        settings: &[("providers.default", "docker"), ("providers.docker.runtime", "runc")],
        check: Requirement::Daemon(docker::Wanted::Runc),
    },
    Runtime {
        name: "proot",
        provider: "proot",
        isolation: Isolation::PathTranslation,
        settings: &[("providers.default", "proot"), ("providers.proot.enabled", "true")],
        check: Requirement::Proot,
    },
    Runtime {
        name: "custom",
        provider: "custom",
        isolation: Isolation::Elsewhere,
        settings: &[("providers.default", "custom"), ("providers.custom.enabled", "true")],
        check: Requirement::Backend,
    },
    Runtime {
        name: "mock",
        provider: "mock",
        isolation: Isolation::Imitation,
        settings: &[("providers.default", "mock"), ("providers.mock.enabled", "true")],
        check: Requirement::Nothing,
    },
];

/// What a runtime's checks know about the server that would use it.
#[derive(Default)]
pub(super) struct Wishes<'a> {
    /// None when the configuration cannot be read.
    pub(super) settings: Option<&'a Settings>,
    pub(super) server: Option<Server<'a>>,
}

/// A server that is not there, as it would be.
pub(super) struct Server<'a> {
    pub(super) config: &'a Config,
    pub(super) environment: &'a Environment,
    pub(super) data_dir: &'a Path,
    /// Whether callers would need a key.
    pub(super) demands_key: bool,
}

impl Wishes<'_> {
    /// A setting's text, or its default, also where this version has no effect
    /// for it.
    fn text(&self, key: &str) -> String {
        let set = self.settings.filter(|settings| settings.has(key)).map(|settings| settings.text(key).to_owned());
        set.unwrap_or_else(|| default_of(key).to_owned())
    }

    fn path(&self, key: &str) -> PathBuf {
        PathBuf::from(self.text(key))
    }
}

/// What this program and its configuration have to do with a runtime.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// This program can use it at all.
    pub(super) in_this_version: bool,
    /// A server with this configuration uses it.
    pub(super) enabled: bool,
}

/// What came of looking at one runtime.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Found {
    pub(super) name: &'static str,
    pub(super) provider: &'static str,
    pub(super) isolation: Isolation,
    /// Whether this program can use it at all.
    pub(super) in_this_version: bool,
    /// Whether a server with this configuration uses it.
    pub(super) enabled: bool,
    /// Whether sandboxes can be made with it, here and by this program.
    pub(super) usable: bool,
    /// What keeps it from that, in a few words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) missing: Option<String>,
    #[serde(skip)]
    pub(super) checks: Vec<Check>,
}

/// What the daemon answered, asked once for all runtimes that need it.
pub(super) type Daemon = Result<DaemonInfo, Check>;

pub(super) async fn ask_daemon(host: &Host, wishes: &Wishes<'_>) -> Daemon {
    docker::ask(host, &wishes.text("providers.docker.socket")).await
}

impl Runtime {
    /// Whether a server that uses the runtime's provider uses this very one.
    pub(super) fn is_chosen(&self, wishes: &Wishes<'_>) -> bool {
        match &self.check {
            Requirement::Daemon(wanted) => docker::Wanted::named(&wishes.text("providers.docker.runtime")) == *wanted,
            Requirement::Kvm(_)
            | Requirement::Kernel
            | Requirement::Proot
            | Requirement::Backend
            | Requirement::Nothing => true,
        }
    }

    /// Looks at the host. Nothing is made or changed.
    pub(super) async fn look(&self, host: &Host, wishes: &Wishes<'_>, daemon: &Daemon, standing: Standing) -> Found {
        let Standing { in_this_version, enabled } = standing;
        let mut checks = match &self.check {
            Requirement::Kvm(monitor) => microvm::check(host, wishes, *monitor),
            Requirement::Daemon(wanted) => docker::check(host, daemon, *wanted),
            Requirement::Kernel => oci::check(host).await,
            Requirement::Proot => proot::check(host, wishes).await,
            Requirement::Backend => custom::check(wishes).await,
            Requirement::Nothing => vec![Check::pass("mock", "needs nothing, and runs nothing")],
        };
        let first_failure = checks.iter().find(|check| check.status == Status::Fail);
        let missing = match first_failure {
            _ if !in_this_version => Some("not in this version".to_owned()),
            Some(check) => Some(format!("{}: {}", check.name, check.message)),
            None => None,
        };
        if !enabled || !in_this_version {
            // Nobody asked for it here: good to know, and no failure.
            for check in checks.iter_mut().filter(|check| check.status == Status::Fail) {
                check.status = Status::Warn;
            }
        }
        if !in_this_version {
            checks.insert(0, self.not_here());
        }
        Found {
            name: self.name,
            provider: self.provider,
            isolation: self.isolation,
            in_this_version,
            enabled,
            usable: missing.is_none(),
            missing,
            checks,
        }
    }

    fn not_here(&self) -> Check {
        Check::warn(
            self.name,
            format!("this version has no provider {}: what follows is only about the host", self.provider),
            "use another runtime of this list, or a version that has it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_isolation_comes_first() {
        assert!(RUNTIMES.is_sorted_by_key(|runtime| runtime.isolation));
    }

    #[test]
    fn every_runtime_says_how_it_is_chosen() {
        for runtime in RUNTIMES {
            assert_eq!(runtime.settings[0], ("providers.default", runtime.provider), "{}", runtime.name);
        }
    }

    /// What is found on a host without anything, for a runtime that this
    /// version has or has not.
    async fn look(name: &str, in_this_version: bool, enabled: bool) -> Found {
        let root = tempfile::tempdir().unwrap();
        let (host, wishes) = (Host::below(root.path()), Wishes::default());
        let daemon = ask_daemon(&host, &wishes).await;
        let runtime = RUNTIMES.into_iter().find(|runtime| runtime.name == name).unwrap();
        runtime.look(&host, &wishes, &daemon, Standing { in_this_version, enabled }).await
    }

    #[tokio::test]
    async fn what_this_version_has_not_is_never_usable_and_never_fails() {
        for name in ["firecracker", "qemu", "kata", "gvisor", "docker", "proot", "custom"] {
            let found = look(name, false, true).await;
            assert!(!found.usable && found.missing.as_deref() == Some("not in this version"), "{found:?}");
            assert!(found.checks.iter().all(|check| check.status != Status::Fail), "{found:?}");
            assert!(found.checks[0].message.contains("has no provider"), "{found:?}");
        }
    }

    #[tokio::test]
    async fn what_is_asked_for_and_missing_fails_with_a_fix() {
        for name in ["firecracker", "qemu", "kata", "gvisor", "docker", "proot", "custom"] {
            let found = look(name, true, true).await;
            assert!(!found.usable, "{found:?}");
            assert!(found.checks.iter().any(|check| check.status == Status::Fail), "{found:?}");
            let unasked = look(name, true, false).await;
            assert!(unasked.checks.iter().all(|check| check.status != Status::Fail), "{unasked:?}");
            assert_eq!(unasked.missing, found.missing, "it is not usable either way");
        }
        assert!(look("mock", true, false).await.usable);
    }
}

//! What a container daemon on this host can run.

use std::io::ErrorKind;

use super::super::host::{DaemonInfo, Host};
use super::super::install::{Package, install};
use super::{Daemon, microvm};
use crate::check::Check;

const GVISOR: &str = "install runsc as https://gvisor.dev/docs/user_guide/install says, then: runsc install && \
                      systemctl restart docker";
const KATA: &str = "install Kata Containers as https://katacontainers.io/docs says, and register kata-runtime in \
                    /etc/docker/daemon.json";

/// The OCI runtime behind the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Runc,
    Gvisor,
    Kata,
}

impl Wanted {
    /// By the name under which a daemon has it.
    pub(super) fn named(name: &str) -> Self {
        if name.contains("kata") {
            Self::Kata
        } else if name.contains("runsc") || name.contains("gvisor") {
            Self::Gvisor
        } else {
            Self::Runc
        }
    }
}

/// Asks the daemon once; why it does not answer otherwise.
pub(super) async fn ask(host: &Host, configured: &str) -> Daemon {
    const NAME: &str = "docker.daemon";
    let socket = match host.docker_socket(configured) {
        Ok(socket) => socket,
        Err(why) => return Err(Check::warn(NAME, why, "run the doctor on the daemon's host")),
    };
    let error = match host.daemon_info(&socket).await {
        Ok(info) => return Ok(info),
        Err(error) => error,
    };
    let fix = match error.kind() {
        ErrorKind::PermissionDenied => "sudo usermod -aG docker \"$USER\", and log in again".to_owned(),
        _ if host.program("dockerd").is_some() => "systemctl start docker".to_owned(),
        _ => install(host, Package::Docker),
    };
    Err(Check::fail(NAME, format!("no daemon answers at {}: {error}", socket.display()), fix))
}

pub(super) fn check(host: &Host, daemon: &Daemon, wanted: Wanted) -> Vec<Check> {
    let info = match daemon {
        Ok(info) => info,
        Err(unreachable) => return vec![rename(unreachable.clone(), wanted)],
    };
    let answers = format!("version {} answers", info.server_version);
    let mut checks = vec![rename(Check::pass("docker.daemon", answers), wanted)];
    match wanted {
        Wanted::Runc => checks.push(seccomp(info)),
        Wanted::Gvisor => checks.push(registered(info, "gvisor.runtime", &["runsc", "gvisor"], GVISOR)),
        Wanted::Kata => {
            checks.push(registered(info, "kata.runtime", &["kata"], KATA));
            checks.push(microvm::kvm(host, "kata.kvm"));
        }
    }
    checks
}

/// The same daemon for every runtime, under the name of each.
fn rename(check: Check, wanted: Wanted) -> Check {
    let name = match wanted {
        Wanted::Runc => "docker.daemon",
        Wanted::Gvisor => "gvisor.daemon",
        Wanted::Kata => "kata.daemon",
    };
    Check { name: name.to_owned(), ..check }
}

fn seccomp(info: &DaemonInfo) -> Check {
    const NAME: &str = "docker.seccomp";
    if info.security_options.iter().flatten().any(|option| option.contains("name=seccomp")) {
        return Check::pass(NAME, "the daemon filters system calls");
    }
    Check::warn(NAME, "the daemon does not filter system calls", "use a kernel with CONFIG_SECCOMP_FILTER")
}

fn registered(info: &DaemonInfo, name: &str, words: &[&str], fix: &str) -> Check {
    let found = info.runtimes.keys().find(|runtime| words.iter().any(|word| runtime.contains(word)));
    if let Some(runtime) = found {
        Check::pass(name, format!("the daemon knows it as {runtime}"))
    } else {
        let known: Vec<&str> = info.runtimes.keys().map(String::as_str).collect();
        Check::fail(name, format!("the daemon knows only {}", known.join(", ")), fix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    fn daemon(runtimes: &[&str]) -> DaemonInfo {
        let runtimes = runtimes.iter().map(|name| ((*name).to_owned(), serde_json::Value::Null)).collect();
        let security_options = Some(vec!["name=seccomp,profile=builtin".to_owned()]);
        DaemonInfo { server_version: "27.1".to_owned(), runtimes, security_options }
    }

    fn failures(wanted: Wanted, runtimes: &[&str], kvm: bool) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dev")).unwrap();
        if kvm {
            std::fs::write(root.path().join("dev/kvm"), "").unwrap();
        }
        let checks = check(&Host::below(root.path()), &Ok(daemon(runtimes)), wanted);
        checks.into_iter().filter(|check| check.status == Status::Fail).map(|check| check.name).collect()
    }

    #[test]
    fn each_runtime_needs_its_own_registration() {
        assert_eq!(failures(Wanted::Runc, &["runc"], false), [""; 0]);
        assert_eq!(failures(Wanted::Gvisor, &["runc"], false), ["gvisor.runtime"]);
        assert_eq!(failures(Wanted::Gvisor, &["runc", "runsc"], false), [""; 0]);
        assert_eq!(failures(Wanted::Kata, &["runc"], false), ["kata.runtime", "kata.kvm"]);
        assert_eq!(failures(Wanted::Kata, &["io.containerd.kata.v2"], true), [""; 0]);
    }
}

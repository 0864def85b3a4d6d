//! Whether the daemon can run sandboxes as configured, and what to do where it
//! cannot. Everything is asked through the very socket that sandboxes use.

use bollard::query_parameters::InspectNetworkOptions;
use stacyvm_sandbox::HealthReport;

use super::daemon::Facts;
use super::endpoint::Endpoint;
use super::error::{DockerError, chain, status};
use super::options::{Network, Seccomp};
use super::runtime::Promise;
use super::server::Server;

/// First version of the API with all that is used here (Docker 20.10).
const NEEDED_API: (u32, u32) = (1, 41);

/// Shims that Docker starts by their type without being told of them first.
const SHIM_TYPE: &str = "io.containerd.";

/// Looks at everything a sandbox needs, without side effects.
pub(super) async fn check(server: &Server) -> HealthReport {
    let mut report = HealthReport::default();
    let facts = match server.daemon.refresh().await {
        Ok(facts) => facts,
        Err(error) => {
            unreachable_daemon(server, &error, &mut report);
            return report;
        }
    };
    report.ok("docker.daemon", format!("Docker {} answers at {}", facts.version, server.daemon.endpoint));
    encryption(server, &mut report);
    version(server, &mut report).await;
    runtime(server, &facts, &mut report);
    network(server, &mut report).await;
    seccomp(server, &facts, &mut report);
    storage(&facts, &mut report);
    limits(&facts, facts.promise_of(&server.options.runtime), &mut report);
    agent(server, &facts, &mut report);
    restarts(&facts, &mut report);
    report
}

fn unreachable_daemon(server: &Server, error: &DockerError, report: &mut HealthReport) {
    let endpoint = &server.daemon.endpoint;
    let said = chain(error);
    let fix = match endpoint {
        Endpoint::Unix(path) if said.contains("ermission denied") => {
            format!("add the server's user to the group of {} (usually docker), or run it as root", path.display())
        }
        Endpoint::Unix(path) if !path.exists() => {
            format!("start the daemon (systemctl start docker); {} does not exist", path.display())
        }
        Endpoint::Unix(_) => "start the daemon (systemctl start docker)".to_owned(),
        Endpoint::Tcp { tls: Some(_), .. } => {
            "see that the daemon listens there with --tlsverify, and that the certificates fit".to_owned()
        }
        Endpoint::Tcp { tls: None, .. } => {
            "see that the daemon listens there; with TLS it needs certificates".to_owned()
        }
    };
    report.fail("docker.daemon", format!("{endpoint} does not answer: {said}"), fix);
}

fn encryption(server: &Server, report: &mut HealthReport) {
    if matches!(server.daemon.endpoint, Endpoint::Tcp { tls: None, .. }) {
        report.warn(
            "docker.tls",
            "the daemon is reached over TCP without TLS: whoever is on the way owns its host",
            "use tcp:// with DOCKER_TLS_VERIFY and certificates, or a socket",
        );
    }
}

async fn version(server: &Server, report: &mut HealthReport) {
    const NAME: &str = "docker.version";
    let (major, minor) = NEEDED_API;
    let found = match server.daemon.client.version().await {
        Ok(version) => version.api_version.unwrap_or_default(),
        Err(error) => return report.fail(NAME, chain(&error), "look at the daemon's log"),
    };
    let mut numbers = found.split('.').map_while(|part| part.parse::<u32>().ok());
    if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= NEEDED_API {
        report.ok(NAME, format!("its API is {found}"));
    } else {
        report.fail(NAME, format!("its API is {found}, older than {major}.{minor}"), "install Docker 20.10 or newer");
    }
}

fn runtime(server: &Server, facts: &Facts, report: &mut HealthReport) {
    const NAME: &str = "docker.runtime";
    let wanted = server.options.runtime.as_str();
    if facts.has_runtime(wanted) {
        let promise = match facts.promise_of(wanted) {
            Promise::HostKernel => "containers on the host's kernel",
            Promise::Gvisor => "gVisor; every sandbox is checked for it",
            Promise::OwnKernel => "virtual machines; every sandbox is checked for a kernel of its own",
            Promise::Nothing => "a runtime of a name that promises nothing",
        };
        return report.ok(NAME, format!("`{wanted}` is registered: {promise}"));
    }
    let known: Vec<&str> = facts.runtimes.iter().map(|(name, _)| name.as_str()).collect();
    let message = format!("the daemon knows no runtime `{wanted}`, only {}", known.join(", "));
    let fix = format!(
        "install it, add it to \"runtimes\" in the daemon's daemon.json ({{\"{wanted}\": {{\"path\": \"/path/of/it\"}}}}) \
         and restart the daemon; or set providers.docker.runtime to one of those"
    );
    if wanted.starts_with(SHIM_TYPE) {
        report.warn(NAME, format!("{message}; Docker 23 and newer may start it by its type"), fix);
    } else {
        report.fail(NAME, message, fix);
    }
}

async fn network(server: &Server, report: &mut HealthReport) {
    const NAME: &str = "docker.network";
    let wanted = &server.options.network;
    match wanted {
        Network::None => return report.ok(NAME, "sandboxes have no network: it is switched off"),
        Network::Host => {
            return report.warn(
                NAME,
                "sandboxes share the host's network, with all that listens on it",
                "set providers.docker.network_mode to bridge or a named network",
            );
        }
        Network::Bridge | Network::Named(_) => {}
    }
    match server.daemon.client.inspect_network(wanted.mode(), None::<InspectNetworkOptions>).await {
        Ok(_) => report.ok(NAME, format!("the network `{wanted}` exists")),
        Err(error) if status(&error) == Some(404) => report.fail(
            NAME,
            format!("the daemon has no network `{wanted}`"),
            match wanted {
                Network::Named(name) => format!("docker network create {name}"),
                _ => "start the daemon without --bridge=none, or set providers.docker.network_mode".to_owned(),
            },
        ),
        Err(error) => report.fail(NAME, chain(&error), "look at the daemon's log"),
    }
}

fn seccomp(server: &Server, facts: &Facts, report: &mut HealthReport) {
    const NAME: &str = "docker.seccomp";
    let fix = "use a kernel and a daemon with seccomp";
    match (&server.options.seccomp, facts.seccomp) {
        (Seccomp::Unconfined, _) => report.warn(
            NAME,
            "sandboxes may make any system call: seccomp is switched off",
            "set providers.docker.seccomp_profile to default",
        ),
        (Seccomp::Default, true) => report.ok(NAME, "system calls are filtered by the daemon's profile"),
        (Seccomp::Profile(_), true) => report.ok(NAME, "system calls are filtered by the configured profile"),
        (Seccomp::Default, false) => report.warn(NAME, "the daemon cannot filter system calls", fix),
        (Seccomp::Profile(_), false) => {
            report.fail(NAME, "the daemon cannot filter system calls, and a profile is configured", fix);
        }
    }
}

fn storage(facts: &Facts, report: &mut HealthReport) {
    const NAME: &str = "docker.storage";
    let driver = match facts.backing_filesystem.as_str() {
        "" => facts.storage_driver.clone(),
        filesystem => format!("{} on {filesystem}", facts.storage_driver),
    };
    if facts.may_bound_disks() {
        report.ok(NAME, format!("{driver}; it can bound the size of disks"));
    } else {
        report.ok(NAME, format!("{driver}; it cannot bound the size of disks"));
    }
}

fn limits(facts: &Facts, promise: Promise, report: &mut HealthReport) {
    const NAME: &str = "docker.limits";
    let all = [
        ("memory", facts.memory_limit),
        ("swap", facts.swap_limit),
        ("cpu", facts.cpu_limit),
        ("process", facts.pids_limit),
    ];
    let missing: Vec<&str> = all.iter().filter(|(_, held)| !held).map(|(name, _)| *name).collect();
    if missing.is_empty() && promise == Promise::Gvisor {
        report.ok(
            NAME,
            "memory, swap and cpu limits are enforced; gVisor counts no processes: pids_limit bounds the sandbox as a \
             whole",
        );
    } else if missing.is_empty() {
        report.ok(NAME, "memory, swap, cpu and process limits are enforced");
    } else {
        report.warn(
            NAME,
            format!("limits on {} cannot be enforced", missing.join(", ")),
            "give the daemon's host these control group controllers, or create sandboxes with allow_unenforced",
        );
    }
}

fn agent(server: &Server, facts: &Facts, report: &mut HealthReport) {
    const NAME: &str = "docker.agent";
    let own = std::env::consts::ARCH;
    // Both names are the kernel's (`uname -m`).
    if !facts.architecture.is_empty() && facts.architecture != own {
        return report.fail(
            NAME,
            format!("the daemon's machine is {}, our agent is for {own}", facts.architecture),
            "run a server of the daemon's architecture",
        );
    }
    match server.program.check() {
        Err(error) => report.fail(NAME, format!("our agent cannot be read: {error}"), "restart the server"),
        Ok(()) if server.program.is_shared() => report.ok(NAME, "the daemon mounts it from this host, read-only"),
        Ok(()) => report.ok(NAME, "it is kept in a volume of the daemon's, read-only"),
    }
}

fn restarts(facts: &Facts, report: &mut HealthReport) {
    const NAME: &str = "docker.live_restore";
    if facts.live_restore {
        report.ok(NAME, "sandboxes outlive a restart of the daemon");
    } else {
        report.warn(
            NAME,
            "a restart of the daemon ends every sandbox",
            "set \"live-restore\": true in the daemon's daemon.json",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_that_the_runtime_keeps_are_said_to_be_enforced() {
        let facts =
            Facts { memory_limit: true, swap_limit: true, cpu_limit: true, pids_limit: true, ..Facts::default() };
        let said = |promise| {
            let mut report = HealthReport::default();
            limits(&facts, promise, &mut report);
            report.findings.remove(0).message
        };
        assert_eq!(said(Promise::HostKernel), "memory, swap, cpu and process limits are enforced");
        let of_gvisor = said(Promise::Gvisor);
        assert!(of_gvisor.starts_with("memory, swap and cpu limits are enforced; gVisor counts no"), "{of_gvisor}");
    }
}

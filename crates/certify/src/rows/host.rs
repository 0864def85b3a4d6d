//! Rows H and V: what the host has, before any server is asked.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::process::Command;

use super::{Looked, Seen, daemon, language};
use crate::host::{Daemon, run as run_program, tail};
use crate::run::Run;
use crate::{CertifyOptions, HostCheck, KeySource, RuntimeSettings, Status, Target};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const RUN_LIMIT: Duration = Duration::from_mins(3);

/// Rows that the program's own look at the host answers, with its names.
const FROM_CHECKS: [(&str, &[&str]); 12] = [
    ("OC-H1", &["oci.kernel", "oci.overlay", "oci.namespaces", "oci.owners", "oci.user"]),
    ("OC-H2", &["oci.cgroup"]),
    ("OC-H3", &["oci.nft"]),
    ("DK-H1", &["docker.daemon", "docker.seccomp", "gvisor.daemon", "kata.daemon"]),
    ("GV-H1", &["gvisor.runtime"]),
    ("KT-H1", &["kata.runtime"]),
    ("KT-H2", &["kata.kvm"]),
    ("FC-H1", &["firecracker.kvm"]),
    ("FC-H2", &["firecracker.binary"]),
    ("QM-H1", &["qemu.kvm"]),
    ("QM-H2", &["qemu.binary"]),
    ("PR-H1", &["proot.binary"]),
];

pub(crate) async fn look(run: &mut Run<'_>, checks: &[HostCheck]) {
    for (id, names) in FROM_CHECKS {
        if run.has(id) {
            run.note(id, summed(checks, names));
        }
    }
    let options = run.options;
    let settings = &options.settings;
    if let Some(daemon) = daemon(run) {
        run.look("DK-H2", socket(&daemon, settings)).await;
        run.look("DK-H3", network(&daemon, settings)).await;
        let wanted = settings.runtime_for(run.target);
        for id in ["GV-H2", "KT-H3"] {
            run.look(id, configured(&daemon, options, &wanted)).await;
        }
        for id in ["GV-V1", "KT-V1"] {
            run.look(id, container_runs(options, &wanted)).await;
        }
    }
    run.settle("FC-H3", || Ok(kernel(settings)));
    run.settle("FC-H4", || Ok(rootfs(settings)));
    run.settle("FC-H5", || Ok(agent(settings)));
    run.settle("FC-H6", || Ok(guest_networks()));
    run.settle("PR-H2", || Ok(directory(&settings.proot_rootfs)));
    run.settle("PR-H3", || Ok(workspace(settings, checks)));
    run.settle("PR-H4", || Ok(languages(settings)));
    run.look("EX-H1", reachable(&settings.remote_url)).await;
    let target = run.target;
    run.settle("EX-H2", || Ok(key(target, settings)));
    run.settle("EX-H3", || Ok(address(&settings.remote_url)));
}

/// The worst of all checks whose names begin so.
fn summed(checks: &[HostCheck], names: &[&str]) -> Seen {
    let ours = |check: &&HostCheck| {
        names
            .iter()
            .any(|name| check.name == *name || check.name.strip_prefix(name).is_some_and(|it| it.starts_with('.')))
    };
    let found: Vec<&HostCheck> = checks.iter().filter(ours).collect();
    let Some(worst) = found.iter().max_by_key(|check| check.status) else {
        return Seen::unavailable("not available: nobody looked at the host for this", "stacyvm doctor");
    };
    let fix = worst.fix.clone().filter(|_| worst.status != Status::Pass);
    let evidence = found.iter().map(|check| format!("{}: {}", check.name, check.message)).collect();
    Seen { status: worst.status, message: worst.message.clone(), fix, evidence }
}

async fn socket(daemon: &Daemon, settings: &RuntimeSettings) -> Looked {
    let socket = settings.docker_socket.display();
    match daemon.ping().await {
        Ok(()) => Ok(Seen::pass(format!("{socket} answers"))),
        Err(why) => Ok(Seen::fail(why, "start the daemon, or set providers.docker.socket to where it listens")),
    }
}

async fn network(daemon: &Daemon, settings: &RuntimeSettings) -> Looked {
    let name = settings.docker_network.as_str();
    if matches!(name, "" | "none" | "bridge" | "host" | "default") || name.starts_with("container:") {
        return Ok(Seen::pass(format!("`{name}` is no network of its own name")));
    }
    if daemon.has_network(name).await? {
        return Ok(Seen::pass(format!("the daemon has the network {name}")));
    }
    Ok(Seen::fail(format!("the daemon has no network {name}"), format!("docker network create {name}")))
}

/// Our own server is started with the target's runtime; one that runs elsewhere
/// has to have it in its configuration.
async fn configured(daemon: &Daemon, options: &CertifyOptions, wanted: &str) -> Looked {
    let known = daemon.runtimes().await?;
    if !known.iter().any(|name| name == wanted) {
        let fix = format!("set providers.docker.runtime to one of {}", known.join(", "));
        return Ok(Seen::fail(format!("the daemon has no runtime {wanted}"), fix));
    }
    if options.settings.docker_runtime == wanted {
        return Ok(Seen::pass(format!("providers.docker.runtime is {wanted}, which the daemon has")));
    }
    let fix = format!("set providers.docker.runtime: {wanted} in the configuration of the server");
    let says = &options.settings.docker_runtime;
    if options.given.is_some() {
        // What that server really uses is proven on its sandboxes.
        return Ok(Seen::warn(format!("the configuration here says {says}; the server has its own"), fix));
    }
    Ok(Seen::warn(format!("the configuration says {says}; the server of this run was started with {wanted}"), fix))
}

/// The validation command of the matrix.
async fn container_runs(options: &CertifyOptions, wanted: &str) -> Looked {
    let socket = format!("unix://{}", options.settings.docker_socket.display());
    let mut command = Command::new("docker");
    command.args(["-H", &socket, "run", "--rm", "--network", "none", &format!("--runtime={wanted}")]);
    command.args(["alpine:latest", "echo", "ok"]);
    let ran = run_program(&mut command, RUN_LIMIT).await?;
    if ran.success && ran.output.lines().any(|line| line == "ok") {
        return Ok(Seen::pass(format!("docker run --runtime={wanted} alpine:latest echo ok said ok")));
    }
    Ok(Seen::fail(tail(&ran.output), format!("docker run --rm --runtime={wanted} alpine:latest echo ok")))
}

fn kernel(settings: &RuntimeSettings) -> Seen {
    let path = &settings.firecracker_kernel;
    if path.is_file() {
        return Seen::pass(format!("is {}", path.display()));
    }
    let fix = format!("put an uncompressed kernel (vmlinux) at {}", path.display());
    Seen::fail(format!("there is none at {}", path.display()), fix)
}

fn directory(path: &Path) -> Seen {
    if path.is_dir() {
        return Seen::pass(format!("is {}", path.display()));
    }
    let fix = format!("mkdir -p {0} && tar -xf rootfs.tar -C {0}", path.display());
    Seen::fail(format!("{} is no directory", path.display()), fix)
}

/// Root may write everywhere but to a read-only file system, so it is tried.
fn writable(path: &Path) -> Seen {
    match tempfile::Builder::new().prefix(".stacyvm-certify-").tempfile_in(path) {
        Ok(_) => Seen::pass(format!("{} can be written to", path.display())),
        Err(error) => {
            let fix = format!("mkdir -p {}, for the user who runs the server", path.display());
            Seen::fail(format!("{} cannot be written to: {error}", path.display()), fix)
        }
    }
}

/// Without a base of their own, workspaces are in the server's data directory,
/// which is the doctor's to judge.
fn workspace(settings: &RuntimeSettings, checks: &[HostCheck]) -> Seen {
    if settings.proot_workspace_base.as_os_str().is_empty() {
        return summed(checks, &["proot.workspace"]);
    }
    match writable(&settings.proot_workspace_base) {
        seen if seen.status == Status::Pass => summed(checks, &["proot.workspace"]),
        seen => seen,
    }
}

fn rootfs(settings: &RuntimeSettings) -> Seen {
    let path = &settings.firecracker_rootfs;
    if path.as_os_str().is_empty() {
        let fix = "set providers.firecracker.default_rootfs to use one that is there already";
        return Seen::warn("none is configured: it has to be built from the image", fix);
    }
    if path.is_file() {
        return Seen::pass(format!("is {}", path.display()));
    }
    Seen::fail(format!("there is none at {}", path.display()), "put it there, or leave default_rootfs empty")
}

fn agent(settings: &RuntimeSettings) -> Seen {
    let path = &settings.firecracker_agent;
    if path.as_os_str().is_empty() {
        return Seen::pass("the program carries it");
    }
    let is_executable = std::fs::metadata(path).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0);
    if is_executable {
        return Seen::pass(format!("is {}", path.display()));
    }
    let fix = "put it there with mode 0755, or leave agent_path out: the program carries one";
    Seen::fail(format!("there is none at {} that can be executed", path.display()), fix)
}

fn guest_networks() -> Seen {
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    if let Err(error) = tun {
        return Seen::fail(format!("/dev/net/tun cannot be opened: {error}"), "modprobe tun, and run as root");
    }
    let nft = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"].into_iter().find(|path| Path::new(path).exists());
    match nft {
        Some(path) => Seen::pass(format!("/dev/net/tun can be opened, and {path} makes rules")),
        None => Seen::fail("nft is not installed", "install nftables"),
    }
}

fn languages(settings: &RuntimeSettings) -> Seen {
    // Links in it are its own: not this host's files are meant.
    let is_there = |language: &str| {
        let places = ["bin", "usr/bin", "usr/local/bin"].map(|at| settings.proot_rootfs.join(at).join(language));
        places.iter().any(|place| place.symlink_metadata().is_ok())
    };
    let missing: Vec<&str> =
        settings.proot_languages.iter().map(String::as_str).filter(|language| !is_there(language)).collect();
    if settings.proot_languages.is_empty() {
        return Seen::pass("the configuration names no language");
    }
    if missing.is_empty() {
        return Seen::pass(format!("{} are in the root file system", settings.proot_languages.join(", ")));
    }
    let message = format!("{} has no {}", settings.proot_rootfs.display(), missing.join(", "));
    Seen::fail(message, language::fix(&settings.proot_languages, &missing))
}

fn parse(url: &str) -> Result<reqwest::Url, String> {
    if url.is_empty() {
        return Err("no address is configured".to_owned());
    }
    let parsed = reqwest::Url::parse(url).map_err(|error| format!("`{url}` is no address: {error}"))?;
    if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none_or(str::is_empty) {
        return Err(format!("`{url}` is not an http or https address"));
    }
    Ok(parsed)
}

fn address(url: &str) -> Seen {
    match parse(url) {
        Ok(parsed) if parsed.scheme() == "https" => Seen::pass(format!("{parsed} is well formed")),
        Ok(parsed) => Seen::warn(format!("{parsed} is not encrypted"), "use https"),
        Err(why) => Seen::fail(why, "set the provider's base_url to https://HOST"),
    }
}

/// Name, port and encryption one after the other, so that the report says which
/// of them it is.
async fn reachable(url: &str) -> Looked {
    let parsed = match parse(url) {
        Ok(parsed) => parsed,
        Err(why) => return Ok(Seen::fail(why, "set the provider's base_url to https://HOST")),
    };
    let (host, port) = (parsed.host_str().unwrap_or_default(), parsed.port_or_known_default().unwrap_or(443));
    let found: Vec<SocketAddr> = match lookup_host((host.trim_matches(['[', ']']), port)).await {
        Ok(found) => found.collect(),
        Err(error) => {
            return Ok(Seen::fail(format!("DNS: {host} is not found: {error}"), "check the name and this host's DNS"));
        }
    };
    let Some(first) = found.first() else {
        return Ok(Seen::fail(format!("DNS: {host} has no address"), "check the name"));
    };
    let connected = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(&found[..])).await;
    if !matches!(connected, Ok(Ok(_))) {
        let fix = "allow this host to reach that port, or use the right one";
        return Ok(Seen::fail(format!("TCP: {host} was found at {first}, and its port does not answer"), fix));
    }
    let seen = Seen::pass(format!("{host} is found, and its port {port} answers"));
    if parsed.scheme() == "http" {
        return Ok(seen.with("no TLS: the address is http"));
    }
    // A client of ours installs the one implementation of TLS.
    let _ = stacyvm_client::Client::new(&stacyvm_client::ClientOptions::new("http://127.0.0.1:1"));
    let http = reqwest::Client::builder().timeout(CONNECT_LIMIT).build().map_err(|error| error.to_string())?;
    match http.get(parsed.clone()).send().await {
        // Any answer at all came through TLS.
        Ok(answer) => Ok(seen.with(format!("TLS: it answers with {}", answer.status()))),
        Err(error) => {
            let why = crate::server::chain(&error);
            Ok(Seen::fail(format!("TLS: {why}"), "see that its certificate is valid and known to this host"))
        }
    }
}

fn key(target: Target, settings: &RuntimeSettings) -> Seen {
    let provider = target.provider();
    match settings.remote_key {
        Some(KeySource::Environment) => Seen::pass("the key comes from the environment"),
        Some(KeySource::File) => Seen::pass("the key comes from a file of its own"),
        Some(KeySource::Configuration) => Seen::fail(
            "the key stands in the configuration file",
            format!(
                "take it out, and set STACYVM_PROVIDERS_{}_API_KEY from your secret store",
                provider.to_uppercase()
            ),
        ),
        None => Seen::fail(
            "there is no key",
            format!("set STACYVM_PROVIDERS_{}_API_KEY from your secret store", provider.to_uppercase()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, status: Status) -> HostCheck {
        HostCheck { name: name.to_owned(), status, message: name.to_owned(), fix: Some("fix".to_owned()) }
    }

    #[test]
    fn the_worst_check_of_a_row_decides_and_none_is_no_pass() {
        let checks = [
            check("oci.cgroup.memory", Status::Warn),
            check("oci.cgroup", Status::Pass),
            check("oci.cgroups", Status::Fail),
        ];
        let seen = summed(&checks, &["oci.cgroup"]);
        assert_eq!((seen.status, seen.fix.as_deref(), seen.evidence.len()), (Status::Warn, Some("fix"), 2));
        assert_eq!(summed(&checks, &["oci.nft"]).status, Status::Unavailable);
        assert_eq!(summed(&checks[1..2], &["oci.cgroup"]).fix, None);
    }

    #[tokio::test]
    async fn dns_tcp_and_the_address_fail_apart() {
        let status = async |url: &str| {
            let seen = reachable(url).await.unwrap();
            (seen.status, seen.message)
        };
        let (bad, message) = status("ftp://x").await;
        assert!(bad == Status::Fail && message.contains("not an http"), "{message}");
        let (unknown, message) = status("https://no-such-host.invalid").await;
        assert!(unknown == Status::Fail && message.starts_with("DNS:"), "{message}");
        let (closed, message) = status("http://127.0.0.1:1").await;
        assert!(closed == Status::Fail && message.starts_with("TCP:"), "{message}");
        let plain = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (open, _) = status(&format!("http://{}", plain.local_addr().unwrap())).await;
        assert_eq!(open, Status::Pass);
        tokio::spawn(async move {
            while let Ok((stream, _)) = plain.accept().await {
                drop(stream);
            }
        });
    }

    #[test]
    fn a_key_in_the_configuration_fails() {
        let status = |source| {
            let settings = RuntimeSettings { remote_key: source, ..RuntimeSettings::default() };
            key(Target::E2b, &settings).status
        };
        assert_eq!(status(Some(KeySource::Environment)), Status::Pass);
        assert_eq!(status(Some(KeySource::Configuration)), Status::Fail);
        assert_eq!(status(None), Status::Fail);
    }
}

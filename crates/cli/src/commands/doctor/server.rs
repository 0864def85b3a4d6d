//! Whether a server could start here: its directory, its disk, its port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use stacyvm_api::Readiness;
use stacyvm_client::Client;
use stacyvm_server::{AcmeOptions, Life, StoredCertificate, TlsFiles, stored_certificates};

use crate::check::{Check, Strictness};
use crate::commands::Context;
use crate::commands::serve::{database, port_owner};
use crate::config::{Config, Environment, acme_options};
use crate::data_dir;
use crate::output::bytes;

/// Below this, the first image may not fit.
const LITTLE_SPACE_BYTES: u64 = 5 << 30;
const NO_SPACE_BYTES: u64 = 512 << 20;

/// A sandbox takes a few descriptors of the server.
const FEW_OPEN_FILES: u64 = 4096;

const CERTIFICATE_FILE: &str = "server.tls_cert_file";

/// A certificate that ends by then should have been renewed.
const SOON: Duration = Duration::from_hours(14 * 24);

/// How long a server that listens may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

pub(super) fn check(config: &Config, dir: &Path, environment: &Environment, strictness: Strictness) -> Vec<Check> {
    let mut checks = vec![directory(dir, strictness)];
    checks.extend(space(dir));
    checks.push(store(config, dir));
    checks.push(open_files());
    if let Some(options) = acme_options(config, dir, environment) {
        checks.extend(certificates(&options, &config.server.preview_domain, dir, strictness));
    }
    if let (Some(certificate), Some(key)) = (&config.server.tls_cert_file, &config.server.tls_key_file) {
        checks.extend(certificate_files(&TlsFiles { certificate: certificate.clone(), key: key.clone() }));
    }
    checks
}

/// Certificates that somebody else renews. What can be read and cannot be used is
/// the configuration's to say.
fn certificate_files(files: &TlsFiles) -> Option<Check> {
    for (name, path) in [(CERTIFICATE_FILE, &files.certificate), ("server.tls_key_file", &files.key)] {
        let shown = path.display();
        match rustix::fs::access(path, rustix::fs::Access::READ_OK) {
            Ok(()) if path.is_file() => {}
            Ok(()) => return None,
            Err(rustix::io::Errno::NOENT) => {
                let message = format!("{shown} does not exist: the server will not start");
                return Some(Check::fail(name, message, "put it there, or correct the setting"));
            }
            Err(error) => {
                let message = format!("{shown} cannot be read by this user: {error}");
                return Some(Check::warn(name, message, "run the server, and the doctor, as its owner"));
            }
        }
    }
    let end = files.check().ok()??;
    Some(life(&files.certificate, end, SystemTime::now()))
}

fn life(file: &Path, end: SystemTime, now: SystemTime) -> Check {
    const FIX: &str = "renew it and replace the files: a server that runs takes them in by itself";
    let days = |span: Duration| span.as_secs() / (24 * 60 * 60);
    let shown = file.display();
    match end.duration_since(now) {
        Err(error) => {
            let message = format!("the certificate in {shown} ended {} days ago", days(error.duration()));
            Check::fail(CERTIFICATE_FILE, message, FIX)
        }
        Ok(left) => {
            let message = format!("the certificate in {shown} ends in {} days", days(left));
            if left < SOON {
                Check::warn(CERTIFICATE_FILE, message, FIX)
            } else {
                Check::pass(CERTIFICATE_FILE, message)
            }
        }
    }
}

/// What a CA has issued to the server, and whether its program can be run.
fn certificates(options: &AcmeOptions, preview_domain: &str, dir: &Path, strictness: Strictness) -> Vec<Check> {
    const NAME: &str = "server.acme";
    const READ_WHY: &str = "/api/v1/diagnostics and the server's log say why";
    let stored = match stored_certificates(options, Some(preview_domain)) {
        Ok(stored) => stored,
        Err(error) => return vec![Check::fail(NAME, error.to_string(), "correct it: the server will not start")],
    };
    let runs = data_dir::holder(dir).is_some();
    let of = |stored: StoredCertificate| {
        let names = stored.names.join(", ");
        match stored.life {
            Some(Life { not_after, .. }) if not_after < SystemTime::now() => {
                Check::fail(NAME, format!("the certificate for {names} has ended"), READ_WHY)
            }
            Some(Life { overdue: true, .. }) => {
                Check::warn(NAME, format!("the certificate for {names} should have been renewed"), READ_WHY)
            }
            Some(_) => Check::pass(NAME, format!("there is a certificate for {names}")),
            None if runs => Check::warn(NAME, format!("there is no certificate for {names} yet"), READ_WHY),
            None => Check::pass(NAME, format!("a certificate for {names} is ordered by the next start")),
        }
    };
    let mut checks: Vec<Check> = stored.into_iter().map(of).collect();
    if let Some(hook) = &options.dns_hook {
        checks.push(hook_owner(&hook.program, strictness));
    }
    checks
}

/// Whoever can change the program can do what the server may.
fn hook_owner(program: &Path, strictness: Strictness) -> Check {
    const NAME: &str = "server.acme.dns_hook";
    let shown = program.display();
    let Ok(metadata) = program.metadata() else {
        return Check::fail(NAME, format!("{shown} cannot be looked at"), "name another program");
    };
    if metadata.mode() & 0o022 != 0 {
        let message = format!("others of this host can change {shown}, which the server runs");
        return Check::new(strictness.risk(), NAME, message, format!("chmod go-w {shown}"));
    }
    Check::pass(NAME, format!("{shown} can be run"))
}

/// The data directory, which a server makes where it is missing.
fn directory(dir: &Path, strictness: Strictness) -> Check {
    const NAME: &str = "data_dir";
    let shown = dir.display();
    let Ok(metadata) = dir.metadata() else { return missing(dir) };
    if !metadata.is_dir() {
        return Check::fail(NAME, format!("{shown} is no directory"), "name another with --data-dir");
    }
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != user {
        let message = format!("{shown} belongs to user {}, and this is user {user}", metadata.uid());
        return Check::warn(NAME, message, "run the server, and the doctor, as its owner");
    }
    if metadata.mode() & 0o077 != 0 {
        let message = format!("others of this host can look into {shown}");
        return Check::new(strictness.risk(), NAME, message, format!("chmod 700 {shown}"));
    }
    match data_dir::holder(dir) {
        Some(holder) => {
            let pid = holder.pid.map(|pid| format!(" (process {pid})")).unwrap_or_default();
            Check::pass(NAME, format!("{shown} is used by a server that runs{pid}"))
        }
        None => Check::pass(NAME, format!("{shown} is for its owner alone")),
    }
}

fn missing(dir: &Path) -> Check {
    const NAME: &str = "data_dir";
    let shown = dir.display();
    match existing_ancestor(dir) {
        Some(parent) if !parent.is_dir() => {
            Check::fail(NAME, format!("{} is no directory", parent.display()), "name another with --data-dir")
        }
        Some(parent) if rustix::fs::access(&parent, rustix::fs::Access::WRITE_OK).is_err() => {
            let message = format!("{shown} is missing and cannot be made in {}", parent.display());
            Check::fail(NAME, message, "name another with --data-dir, or run the server as root")
        }
        _ => Check::pass(NAME, format!("{shown} is made by the first start")),
    }
}

fn existing_ancestor(dir: &Path) -> Option<PathBuf> {
    dir.ancestors().find(|path| path.exists()).map(Path::to_owned)
}

fn space(dir: &Path) -> Option<Check> {
    const NAME: &str = "data_dir.space";
    let place = existing_ancestor(dir)?;
    let statistics = rustix::fs::statvfs(&place).ok()?;
    let free = statistics.f_bavail.saturating_mul(statistics.f_frsize);
    let message = format!("{} are free at {}", bytes(free), place.display());
    let fix = "free some, or name a directory on a larger disk with --data-dir";
    Some(if free < NO_SPACE_BYTES {
        Check::fail(NAME, message, fix)
    } else if free < LITTLE_SPACE_BYTES {
        Check::warn(NAME, message, fix)
    } else {
        Check::pass(NAME, message)
    })
}

/// Whether the store is there; `stacyvm db check` looks into it.
fn store(config: &Config, dir: &Path) -> Check {
    const NAME: &str = "database.path";
    let file = database(config, dir);
    let shown = file.display();
    let Ok(metadata) = file.metadata() else {
        return match file.parent().map(Path::is_dir) {
            Some(true) => Check::pass(NAME, format!("{shown} is made by the first start")),
            _ if file.starts_with(dir) => Check::pass(NAME, format!("{shown} is made by the first start")),
            _ => Check::warn(NAME, format!("the directory of {shown} is missing"), "make it, or correct database.path"),
        };
    };
    if !metadata.is_file() {
        return Check::fail(NAME, format!("{shown} is no file"), "correct database.path");
    }
    Check::pass(NAME, format!("{shown}, {}", bytes(metadata.len())))
}

fn open_files() -> Check {
    const NAME: &str = "host.open_files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.maximum {
        Some(most) if most < FEW_OPEN_FILES => Check::warn(
            NAME,
            format!("a server may open {most} files"),
            "ulimit -Hn 65536, or LimitNOFILE= of the unit",
        ),
        Some(most) => Check::pass(NAME, format!("a server may open {most} files")),
        None => Check::pass(NAME, "a server may open as many files as it likes"),
    }
}

/// Whether the port is free, or a server of ours has it.
pub(super) async fn port(context: &Context, config: &Config, dir: &Path) -> anyhow::Result<Vec<Check>> {
    const NAME: &str = "server.port";
    let (host, port) = (config.server.host.trim_matches(['[', ']']), config.server.port);
    let Some(address) = (host, port).to_socket_addrs().ok().and_then(|mut addresses| addresses.next()) else {
        let message = format!("{host} is no address of this host");
        return Ok(vec![Check::fail("server.host", message, "write 127.0.0.1, or an address of this host")]);
    };
    let Err(error) = TcpListener::bind(address) else {
        return Ok(vec![Check::pass(NAME, format!("{address} is free"))]);
    };
    if error.kind() != std::io::ErrorKind::AddrInUse {
        let message = format!("cannot listen on {address}: {error}");
        return Ok(vec![Check::fail(NAME, message, "pass another --port or --host")]);
    }
    let owner = port_owner(port);
    let ours = data_dir::holder(dir).and_then(|holder| holder.pid);
    match (&owner, ours) {
        (Some(owner), Some(pid)) if owner.ends_with(&format!("(process {pid})")) => {
            let client = context.client_or(&own_address(config, address))?;
            Ok(vec![
                Check::pass(NAME, format!("the server of this data directory listens on {address}")),
                ready(&client).await,
            ])
        }
        _ => {
            let by = owner.map(|owner| format!(" by {owner}")).unwrap_or_default();
            let message = format!("{address} is taken{by}");
            Ok(vec![Check::fail(NAME, message, "stop what uses it, or pass another --port")])
        }
    }
}

/// Where a server with this configuration answers on this machine.
fn own_address(config: &Config, mut listener: SocketAddr) -> String {
    let loopback: IpAddr = if listener.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    if listener.ip().is_unspecified() {
        listener.set_ip(loopback);
    }
    let is_secure = config.acme.enabled || config.server.tls_cert_file.is_some();
    format!("{}://{listener}", if is_secure { "https" } else { "http" })
}

async fn ready(client: &Client) -> Check {
    const NAME: &str = "server.ready";
    let fix = "stacyvm health";
    match tokio::time::timeout(ANSWER_LIMIT, client.ready()).await {
        Ok(Ok(readiness)) if readiness.status == "ready" => Check::pass(NAME, "it can make sandboxes"),
        Ok(Ok(readiness)) => Check::fail(NAME, format!("it cannot make sandboxes: {}", reason(&readiness)), fix),
        Ok(Err(error)) => Check::warn(NAME, format!("it was not asked: {error}"), "pass --server and --api-key"),
        Err(_) => Check::fail(NAME, format!("no answer within {} s", ANSWER_LIMIT.as_secs()), fix),
    }
}

fn reason(readiness: &Readiness) -> String {
    let provider = readiness.providers.iter().find(|provider| provider.default && !provider.healthy);
    match provider {
        Some(provider) => {
            format!("{}: {}", provider.name, provider.error.as_deref().unwrap_or("it does not say why"))
        }
        None => format!("store {}", readiness.store),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::check::Status;

    #[test]
    fn the_directory_is_there_and_closed_or_can_be_made() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("data");
        assert!(directory(&dir, Strictness::Production).message.ends_with("is made by the first start"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        assert_eq!(directory(&dir, Strictness::Development).status, Status::Warn);
        assert_eq!(directory(&dir, Strictness::Production).status, Status::Fail);
        std::fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        assert_eq!(directory(&dir, Strictness::Production).status, Status::Pass);
        let file = outer.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(directory(&file, Strictness::Development).status, Status::Fail);
        assert_eq!(directory(&file.join("below"), Strictness::Development).status, Status::Fail);
    }

    #[test]
    fn certificates_of_a_ca_and_their_hook_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let hook = dir.path().join("hook");
        std::fs::write(&hook, "#!/bin/sh").unwrap();
        let options = AcmeOptions {
            directory_url: "https://ca.example/directory".to_owned(),
            contact_email: "ops@example.com".to_owned(),
            external_account: None,
            ca_file: None,
            state_dir: dir.path().join("acme"),
            names: vec!["vm.example.com".to_owned()],
            dns_hook: Some(stacyvm_server::DnsHook {
                program: hook.clone(),
                environment: Vec::new(),
                timeout: ANSWER_LIMIT,
                settle: Duration::ZERO,
            }),
        };
        let look = || certificates(&options, "example.net", dir.path(), Strictness::Production);
        let checks = look();
        assert!(checks[0].status == Status::Fail && checks[0].message.contains("not executable"), "{checks:?}");
        std::fs::set_permissions(&hook, Permissions::from_mode(0o777)).unwrap();
        let statuses = look().into_iter().map(|check| check.status).collect::<Vec<_>>();
        assert_eq!(statuses, [Status::Pass, Status::Pass, Status::Fail], "everybody could change the hook");
        std::fs::set_permissions(&hook, Permissions::from_mode(0o755)).unwrap();
        let _lock = data_dir::DataDirLock::take(dir.path()).unwrap();
        let checks = look();
        assert!(checks[1].status == Status::Warn && checks[1].message.contains("*.example.net"), "{checks:?}");
        assert_eq!(checks[2].status, Status::Pass);
        assert!(!options.state_dir.exists(), "it only looks");
    }

    #[test]
    fn a_certificate_in_files_is_renewed_in_time() {
        let (now, day) = (SystemTime::now(), Duration::from_hours(24));
        for (end, status, said) in [
            (now + 90 * day, Status::Pass, "ends in 90 days"),
            (now + 13 * day, Status::Warn, "ends in 13 days"),
            (now - 2 * day, Status::Fail, "ended 2 days ago"),
        ] {
            let check = life(Path::new("/cert.pem"), end, now);
            assert!(check.status == status && check.message.ends_with(said), "{check:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let missing = TlsFiles { certificate: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
        let check = certificate_files(&missing).unwrap();
        assert!(check.status == Status::Fail && check.message.contains("does not exist"), "{check:?}");
    }

    #[test]
    fn a_server_that_holds_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        data_dir::create(dir.path()).unwrap();
        let _lock = data_dir::DataDirLock::take(dir.path()).unwrap();
        let check = directory(dir.path(), Strictness::Development);
        assert!(check.message.contains(&format!("process {}", std::process::id())), "{check:?}");
    }
}

//! What is wrong with a configuration beyond the form of its values: no server
//! starts with it, or no sandbox could be made.

use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::time::Duration;

use stacyvm_api::NetworkMode;
use stacyvm_engine::{DISK_RANGE_MIB, MEMORY_RANGE_MIB, PIDS_RANGE, VCPUS_RANGE};
use stacyvm_image::ImageReference;
use stacyvm_providers::docker::{CapabilitySet, Endpoint, Network, Seccomp, check_tmpfs};
use stacyvm_providers::proot;
use stacyvm_server::{ServerOptions, TlsError, TlsFiles, check_lists, check_preview_options};

use crate::commands::serve::{enabled_providers, logging};
use crate::config::problem::Problem;
use crate::config::schema::{Config, Defaults, Server};
use crate::config::site;
use crate::config::small_file::read_small_file;

/// Every comparison asks every runtime and pings every sandbox.
const MIN_RECONCILE_INTERVAL: Duration = Duration::from_secs(1);

/// A certificate with its chain has a few kilobytes.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// What no single setting can say about itself.
pub(super) fn check(config: &Config, problems: &mut Vec<Problem>) {
    let auth = &config.auth;
    let has_key = auth.api_key.is_some() || auth.admin_api_key.is_some();
    // Whether there are keys for `true` is known when the database is open.
    if auth.enabled == Some(false) && has_key {
        problems.push(
            Problem::new("auth.enabled", "authentication is off, but a key is set").hint("take one of the two out"),
        );
    }
    if config.rate_limit.cleanup_interval.is_zero() {
        problems.push(Problem::new("rate_limit.cleanup_interval", "cannot be zero").hint("write 1m"));
    }
    if let Err(why) = logging::filter(&config.logging.level) {
        problems.push(Problem::new("logging.level", why).hint(logging::FILTERS));
    }
    check_server(&config.server, problems);
    check_docker(config, has_key || auth.enabled == Some(true), problems);
    check_custom(config, problems);
    check_sizes(config, problems);
    check_image(config, "defaults.image", &config.defaults.image, problems);
    check_network(config, problems);
    if config.providers.reconcile_interval.get() < MIN_RECONCILE_INTERVAL {
        problems.push(
            Problem::new("providers.reconcile_interval", format!("is shorter than {MIN_RECONCILE_INTERVAL:?}"))
                .hint("write 1m, for example"),
        );
    }
    check_times(&config.defaults, problems);
}

fn check_times(defaults: &Defaults, problems: &mut Vec<Problem>) {
    if defaults.ttl.is_zero() {
        problems.push(Problem::new("defaults.ttl", "a sandbox of no time cannot be used").hint("write 30m"));
    }
    if !defaults.max_ttl.is_zero() && defaults.ttl > defaults.max_ttl {
        problems
            .push(Problem::new("defaults.ttl", "is longer than defaults.max_ttl").hint("lower it, or raise the other"));
    }
    if !defaults.max_exec_timeout.is_zero() && defaults.default_exec_timeout > defaults.max_exec_timeout {
        problems.push(
            Problem::new("defaults.default_exec_timeout", "is longer than defaults.max_exec_timeout")
                .hint("lower it, or raise the other"),
        );
    }
}

/// Within what every create is held to.
fn check_sizes(config: &Config, problems: &mut Vec<Problem>) {
    let (defaults, docker) = (&config.defaults, &config.docker);
    let whole = |range: RangeInclusive<u64>| *range.start() as f64..=*range.end() as f64;
    let some = |size: u64| (size > 0).then_some(size as f64);
    let sizes = [
        ("defaults.memory_mb", Some(defaults.memory_mb as f64), whole(MEMORY_RANGE_MIB), "512"),
        ("defaults.vcpus", Some(defaults.vcpus), VCPUS_RANGE, "1, or 0.5"),
        ("defaults.pids_limit", Some(defaults.pids_limit as f64), whole(PIDS_RANGE), "1024"),
        ("defaults.disk_size_mb", some(defaults.disk_size_mb), whole(DISK_RANGE_MIB), "10240"),
    ];
    let of_docker = [
        ("providers.docker.memory", docker.memory.map(|size| size.mib as f64), whole(MEMORY_RANGE_MIB), "512m"),
        ("providers.docker.cpus", docker.cpus.map(|processors| processors.0), VCPUS_RANGE, "1, or 0.5"),
        ("providers.docker.pids_limit", docker.pids_limit.and_then(some), whole(PIDS_RANGE), "1024"),
    ];
    let of_docker = of_docker.into_iter().filter(|_| is_docker_used(config));
    for (key, size, range, instead) in sizes.into_iter().chain(of_docker) {
        let Some(size) = size.filter(|size| !range.contains(size)) else { continue };
        let (min, max) = range.into_inner();
        let message = if size < min {
            format!("a sandbox needs {min} at least")
        } else {
            format!("{size} is more than a sandbox can have, which is {max}")
        };
        problems.push(Problem::new(key, message).hint(format!("write {instead}, for example")));
    }
}

/// A name that no runtime could find an image by. A backend's images have names
/// of its own.
fn check_image(config: &Config, key: &str, image: &str, problems: &mut Vec<Problem>) {
    let is_of_a_runtime = matches!(image, "host" | "rootfs") || config.custom.enabled;
    let wrong = match stacyvm_engine::check_image(image) {
        Err(error) => Some(error.to_string()),
        Ok(()) if is_of_a_runtime => None,
        Ok(()) => image.parse::<ImageReference>().err().map(|error| error.to_string()),
    };
    if let Some(why) = wrong {
        let hint = "write NAME[:TAG] or NAME@sha256:DIGEST, for example alpine:3.20";
        problems.push(Problem::new(key, why).hint(hint));
    }
}

/// `none` and `bridge`, or what an enabled runtime has besides.
fn check_network(config: &Config, problems: &mut Vec<Problem>) {
    let Some(NetworkMode::Named(name)) = config.defaults.network.as_deref().map(NetworkMode::parse) else { return };
    let enabled = enabled_providers(config);
    let is_dockers = is_docker_used(config) && config.docker.network_mode.trim() == name;
    let is_shared = enabled.contains(&"proot") && name == proot::SHARED_NETWORK;
    if !is_dockers && !is_shared {
        let message = format!("no provider that is enabled has a network `{name}`");
        problems.push(Problem::new("defaults.network", message).hint("write none or bridge, or take it out"));
    }
}

fn is_docker_used(config: &Config) -> bool {
    enabled_providers(config).contains(&"docker")
}

fn check_docker(config: &Config, needs_key: bool, problems: &mut Vec<Problem>) {
    let docker = &config.docker;
    let in_use = is_docker_used(config);
    if in_use && docker.network_mode.trim() == "host" && !needs_key {
        let message = "sandboxes would share this machine's network, and whoever can reach the server could use it";
        problems.push(
            Problem::new("providers.docker.network_mode", message)
                .hint("set auth.api_key or auth.enabled, or another network: bridge, none, or one made with `docker network create`"),
        );
    }
    if in_use {
        let socket = Some(docker.socket.trim()).filter(|socket| !socket.is_empty());
        let wrong = [
            ("dropped_caps", CapabilitySet::parse(&docker.dropped_caps, &docker.added_caps).err()),
            ("network_mode", Network::parse(&docker.network_mode).err()),
            ("seccomp_profile", Seccomp::read(&docker.seccomp_profile).err()),
            ("socket", socket.and_then(|socket| Endpoint::parse(socket, None).err())),
        ];
        let wrong = wrong.into_iter().filter_map(|(key, why)| Some((format!("providers.docker.{key}"), why?)));
        problems.extend(wrong.map(|(key, why)| Problem::new(key, why)));
    }
    if let Some(image) = docker.default_image.as_deref().filter(|_| in_use) {
        check_image(config, "providers.docker.default_image", image, problems);
    }
    for (path, options) in &docker.tmpfs {
        let is_absolute = path.starts_with('/');
        let why = if is_absolute { check_tmpfs(options) } else { Err(format!("`{path}` is not an absolute path")) };
        if let Err(why) = why {
            problems.push(Problem::new("providers.docker.tmpfs", why).hint("write `/cache: size=64m`, for example"));
        }
    }
}

fn check_custom(config: &Config, problems: &mut Vec<Problem>) {
    let custom = &config.custom;
    if matches!(custom.name.as_str(), "" | "auto" | "oci" | "mock" | "docker" | "firecracker" | "proot" | "e2b") {
        problems.push(
            Problem::new("providers.custom.name", "is the name of another provider")
                .hint("choose another, such as edge"),
        );
    }
    if custom.enabled && custom.base_url.trim().is_empty() {
        problems.push(Problem::new("providers.custom.base_url", "is empty, but the provider is enabled").hint(
            "write the backend's address, such as http://10.0.0.2:7425, or set STACYVM_PROVIDERS_CUSTOM_BASE_URL",
        ));
    }
    if custom.timeout.is_zero() {
        problems.push(Problem::new("providers.custom.timeout", "cannot be zero").hint("write 60s"));
    }
}

fn check_server(server: &Server, problems: &mut Vec<Problem>) {
    if let Err(error) = check_preview_options(&site::preview_options(server), server.port) {
        problems.push(Problem::of(&error));
    }
    let lists = ServerOptions {
        allowed_hosts: server.allowed_hosts.clone(),
        cors_origins: server.cors_allowed_origins.clone(),
        trusted_proxies: server.trusted_proxies.clone(),
        ..ServerOptions::default()
    };
    if let Err(error) = check_lists(&lists) {
        problems.push(Problem::of(&error));
    }
    if server.tls_cert_file.is_some() != server.tls_key_file.is_some() {
        problems.push(
            Problem::new("server.tls_cert_file", "a certificate and its key go together")
                .hint("set both server.tls_cert_file and server.tls_key_file"),
        );
    }
    if let (Some(certificate), Some(key)) = (&server.tls_cert_file, &server.tls_key_file) {
        check_certificate(&TlsFiles { certificate: certificate.clone(), key: key.clone() }, problems);
    }
    let hosts = [&server.host].into_iter().chain(&server.allowed_hosts).chain(&server.cors_allowed_origins);
    if let Some(shared) = site::shared(&server.preview_domain, hosts.map(String::as_str)) {
        let message = format!(
            "previews are of one site ({}) with `{}`: what runs in a sandbox could set that host's cookies and call it \
             as its own pages do",
            shared.site, shared.host
        );
        problems.push(
            Problem::new("server.preview_domain", message)
                .hint("use a domain of another name for previews, such as example-preview.com"),
        );
    }
}

/// Files that are not here, or not for this user, may be where the server runs.
fn check_certificate(files: &TlsFiles, problems: &mut Vec<Problem>) {
    const HINT: &str = "name PEM files of a certificate with its chain, and of the key that it was made for";
    let (of_certificate, of_key) = ("server.tls_cert_file", "server.tls_key_file");
    for (key, path) in [(of_certificate, &files.certificate), (of_key, &files.key)] {
        match read_small_file(path, MAX_PEM_BYTES) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => return,
            Err(error) => {
                let message = format!("cannot read {}: {error}", path.display());
                return problems.push(Problem::new(key, message).hint(HINT));
            }
        }
    }
    if let Err(error) = files.check() {
        let key = match &error {
            TlsError::NoKey(_) => of_key,
            TlsError::Read { path, .. } if *path == files.key => of_key,
            TlsError::Read { .. } | TlsError::Empty(_) | TlsError::Unusable(_) => of_certificate,
        };
        problems.push(Problem::new(key, error.to_string()).hint(HINT));
    }
}

//! The configuration in the terms of the crates that act on it.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use stacyvm_api::NetworkMode;
use stacyvm_engine::{
    EngineOptions, Limits, Retention, SandboxDefaults, ServerSecret, SpawnOverflow, Timing, UnknownSandboxes,
};
use stacyvm_image::ImageStoreOptions;
use stacyvm_server::{
    AdminFallback, Authentication, ProbeAccess, RateLimitKey, RateLimitOptions, Secret, ServerOptions, TlsFiles,
    TlsOptions,
};

use crate::commands::version;
use crate::config::{
    Config, DatabaseDriver, Environment, OverflowMode, RateLimit, RateLimitBy, UnknownPolicy, acme_options,
    preview_options,
};
use crate::data_dir::SECRET_BYTES;

/// The image store's place in the data directory.
const IMAGES_DIR: &str = "images";

pub(super) fn engine(
    config: &Config,
    data_dir: &Path,
    secret: [u8; SECRET_BYTES],
    default_provider: &str,
) -> EngineOptions {
    let defaults = &config.defaults;
    EngineOptions {
        defaults: SandboxDefaults {
            image: defaults.image.clone(),
            memory_mb: defaults.memory_mb,
            vcpus: defaults.vcpus,
            pids_limit: defaults.pids_limit,
            disk_size_mb: limit(defaults.disk_size_mb),
            ttl: defaults.ttl.get(),
            network: defaults.network.as_deref().map(NetworkMode::parse),
        },
        limits: Limits {
            max_sandboxes: limit(defaults.max_sandboxes),
            max_sandboxes_per_owner: limit(defaults.max_sandboxes_per_owner),
            max_ttl: time_limit(defaults.max_ttl.get()),
            default_exec_timeout: time_limit(defaults.default_exec_timeout.get()),
            max_exec_timeout: time_limit(defaults.max_exec_timeout.get()),
            max_memory_mb: limit(defaults.max_memory_mb),
            max_vcpus: (defaults.max_vcpus > 0.0).then_some(defaults.max_vcpus),
            max_disk_size_mb: limit(defaults.max_disk_size_mb),
            ..Limits::default()
        },
        spawn_overflow: match defaults.spawn_overflow {
            OverflowMode::Reject => SpawnOverflow::Reject,
            OverflowMode::Queue => SpawnOverflow::Queue {
                max_waiters: defaults.max_spawn_queue,
                timeout: defaults.spawn_queue_timeout.get(),
            },
        },
        unknown_sandboxes: match config.providers.unknown_sandboxes {
            UnknownPolicy::Remove => UnknownSandboxes::Remove,
            UnknownPolicy::Adopt => UnknownSandboxes::Adopt,
        },
        timing: Timing { reconcile_interval: config.providers.reconcile_interval.get(), ..Timing::default() },
        retention: Retention {
            destroyed_sandboxes: config.retention.destroyed_sandboxes.get(),
            exec_log: config.retention.exec_log.get(),
            operation_log: config.retention.operation_log.get(),
            audit_log: time_limit(config.auth.admin_audit_retention.get()),
            events: config.retention.events,
            ..Retention::default()
        },
        ..EngineOptions::new(database(config, data_dir), ServerSecret::new(secret), default_provider)
    }
}

/// The store's file.
pub(crate) fn database(config: &Config, data_dir: &Path) -> PathBuf {
    match config.database.driver {
        DatabaseDriver::Sqlite => data_dir.join(&config.database.path),
    }
}

pub(super) fn server(config: &Config, data_dir: &Path, environment: &Environment) -> ServerOptions {
    let key = |secret: &Option<crate::config::Secret>| secret.as_ref().and_then(|secret| Secret::new(secret.expose()));
    let settings = &config.server;
    ServerOptions {
        host: settings.host.clone(),
        port: settings.port,
        api_key: key(&config.auth.api_key),
        admin_api_key: key(&config.auth.admin_api_key),
        admin_fallback: if config.auth.admin_fallback_enabled {
            AdminFallback::Enabled
        } else {
            AdminFallback::Disabled
        },
        authentication: match config.auth.enabled {
            None => Authentication::WhenThereIsAKey,
            Some(true) => Authentication::Required,
            Some(false) => Authentication::Off,
        },
        rate_limit: rate_limit(&config.rate_limit),
        failures_per_minute: NonZeroU32::new(config.auth.failures_per_minute),
        trusted_proxies: settings.trusted_proxies.clone(),
        probes: if settings.public_probes { ProbeAccess::Public } else { ProbeAccess::Authenticated },
        allowed_hosts: settings.allowed_hosts.clone(),
        cors_origins: settings.cors_allowed_origins.clone(),
        preview: preview_options(settings),
        tls: tls(config, data_dir, environment),
        version: version::this(),
        shutdown_grace: settings.shutdown_timeout.get(),
        ..ServerOptions::default()
    }
}

fn tls(config: &Config, data_dir: &Path, environment: &Environment) -> Option<TlsOptions> {
    if let Some(acme) = acme_options(config, data_dir, environment) {
        return Some(TlsOptions::Acme(acme));
    }
    let (certificate, key) = (config.server.tls_cert_file.clone()?, config.server.tls_key_file.clone()?);
    Some(TlsOptions::Files(TlsFiles { certificate, key }))
}

/// Off, too, when no number of requests is set.
fn rate_limit(settings: &RateLimit) -> Option<RateLimitOptions> {
    let requests_per_minute = NonZeroU32::new(settings.requests_per_minute).filter(|_| settings.enabled)?;
    Some(RateLimitOptions {
        requests_per_minute,
        burst: NonZeroU32::new(settings.burst).unwrap_or(requests_per_minute),
        key_by: match settings.key_by {
            None | Some(RateLimitBy::Owner) => RateLimitKey::Owner,
            Some(RateLimitBy::ApiKey) => RateLimitKey::ApiKey,
            Some(RateLimitBy::Address) => RateLimitKey::Address,
        },
        bucket_ttl: settings.bucket_ttl.get(),
        cleanup_interval: settings.cleanup_interval.get(),
    })
}

/// The image store, which `oci` and `stacyvm image` share.
pub(crate) fn image_store(config: &Config, data_dir: &Path, environment: &Environment) -> ImageStoreOptions {
    let images = &config.images;
    ImageStoreOptions {
        max_bytes: images.max_size_mb << 20,
        docker_config: docker_config(config, environment),
        plain_http_registries: images.plain_http_registries.clone(),
        ..ImageStoreOptions::new(data_dir.join(IMAGES_DIR))
    }
}

/// Docker's `config.json` with registry credentials.
pub(super) fn docker_config(config: &Config, environment: &Environment) -> Option<PathBuf> {
    let of_user = || Some(docker_dir(environment)?.join("config.json")).filter(|path| path.exists());
    config.images.docker_config.clone().or_else(of_user)
}

/// Where docker's own client keeps its configuration.
pub(super) fn docker_dir(environment: &Environment) -> Option<PathBuf> {
    let of_home = || environment.home.as_ref().map(|home| home.join(".docker"));
    environment.get("DOCKER_CONFIG").map(PathBuf::from).or_else(of_home)
}

pub(super) fn non_blank(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Zero is "unlimited" in the file.
fn limit(value: u64) -> Option<u64> {
    (value > 0).then_some(value)
}

fn time_limit(value: Duration) -> Option<Duration> {
    (!value.is_zero()).then_some(value)
}

//! What a server is told when it starts. `crates/cli` fills this from the
//! configuration; nothing here reads the environment.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use stacyvm_api::Version;
use subtle::ConstantTimeEq;

use crate::tls::TlsOptions;

/// Default port of the REST API (http-api 1).
pub const DEFAULT_PORT: u16 = 7423;

/// Largest JSON body, file contents excepted.
const DEFAULT_JSON_BYTES: usize = 1 << 20;

/// Largest JSON body that carries a file (`POST …/files`). Larger files go
/// through the raw upload, which has no limit of its own.
const DEFAULT_FILE_JSON_BYTES: usize = 64 << 20;

/// Refused requests of one address in a minute.
const DEFAULT_FAILURES_PER_MINUTE: u32 = 60;

/// How long open requests may go on after a shutdown was asked for.
const DEFAULT_SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Address or name to listen on. Anything but loopback needs a key.
    pub host: String,
    /// Zero takes a free port; see [`Server::addresses`](crate::Server::addresses).
    pub port: u16,
    pub api_key: Option<Secret>,
    pub admin_api_key: Option<Secret>,
    pub admin_fallback: AdminFallback,
    pub authentication: Authentication,
    pub rate_limit: Option<RateLimitOptions>,
    /// Requests without a valid key that one address may make in a minute; more
    /// are answered 429, and keys that can be guessed are not compared then.
    /// `None` allows any number.
    pub failures_per_minute: Option<NonZeroU32>,
    /// Addresses and networks of proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<String>,
    pub probes: ProbeAccess,
    /// `Host` values to answer to besides loopback names: `name`, `name:port`
    /// or `*.domain`.
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://app.example.com`) whose pages may call the API; `*`
    /// means any and needs a key.
    pub cors_origins: Vec<String>,
    pub body_limits: BodyLimits,
    pub preview: PreviewOptions,
    /// TLS on every listener; plain HTTP without it.
    pub tls: Option<TlsOptions>,
    pub version: Version,
    pub shutdown_grace: Duration,
}

/// Whether the API key also opens the admin routes when there is no admin key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminFallback {
    Enabled,
    Disabled,
}

/// Whether callers need a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authentication {
    /// Once there is or ever was one: configured, or stored.
    WhenThereIsAKey,
    /// A server without any key does not start.
    Required,
    /// A server with a key does not start.
    Off,
}

/// How often everybody may call (http-api 4.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateLimitOptions {
    pub requests_per_minute: NonZeroU32,
    /// Requests at once after a pause.
    pub burst: NonZeroU32,
    pub key_by: RateLimitKey,
    /// How long an idle caller is remembered, and how often that is looked at.
    pub bucket_ttl: Duration,
    pub cleanup_interval: Duration,
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateLimitKey {
    /// Those for one owner, else those with one key, else those of one address.
    /// An owner is the one a key is bound to, or the one whom a configured key or
    /// one with `admin:*` names.
    Owner,
    /// Those with one key, else those of one address.
    ApiKey,
    /// Those of one address.
    Address,
}

impl RateLimitKey {
    /// The published word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::ApiKey => "api_key",
            Self::Address => "ip",
        }
    }
}

/// Who may read `/live`, `/health` and `/ready`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeAccess {
    Public,
    Authenticated,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimits {
    pub json_bytes: usize,
    pub file_json_bytes: usize,
}

/// Where ports of sandboxes are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PreviewOptions {
    /// Domain below which every port has a host of its own,
    /// `{port}-{sandbox}.{domain}`; with a port where browsers see another one
    /// than this server's. `None` shows none by host.
    pub domain: Option<String>,
    /// How browsers see that domain when a proxy is in front:
    /// `https://preview.example.com`.
    pub url: Option<String>,
    /// A port of its own, where paths name previews: `/{sandbox}/{port}/…`.
    pub path_port: Option<u16>,
}

/// Characters from which on a key is taken for a random one, that nobody finds by
/// trying (control-plane 3.3).
const UNGUESSABLE_BYTES: usize = 32;

/// Keys below this length are not looked for in logs: they would be found in
/// ordinary words.
const RECOGNISABLE_BYTES: usize = 16;

/// A key that is compared in constant time and never printed.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// `None` for blank text, so that an empty setting is no key.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    pub(crate) fn matches(&self, presented: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(presented).into()
    }

    pub(crate) fn can_be_guessed(&self) -> bool {
        self.0.len() < UNGUESSABLE_BYTES
    }

    /// The text without this key, if it holds it.
    pub(crate) fn hidden_in(&self, text: &str) -> Option<String> {
        let held = self.0.len() >= RECOGNISABLE_BYTES && text.contains(&self.0);
        held.then(|| text.replace(&self.0, "…"))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: DEFAULT_PORT,
            api_key: None,
            admin_api_key: None,
            admin_fallback: AdminFallback::Enabled,
            authentication: Authentication::WhenThereIsAKey,
            rate_limit: None,
            failures_per_minute: NonZeroU32::new(DEFAULT_FAILURES_PER_MINUTE),
            trusted_proxies: Vec::new(),
            probes: ProbeAccess::Public,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            body_limits: BodyLimits { json_bytes: DEFAULT_JSON_BYTES, file_json_bytes: DEFAULT_FILE_JSON_BYTES },
            preview: PreviewOptions::default(),
            tls: None,
            version: Version {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                commit: "unknown".to_owned(),
                os: std::env::consts::OS.to_owned(),
                arch: std::env::consts::ARCH.to_owned(),
                envd_version: String::new(),
            },
            shutdown_grace: DEFAULT_SHUTDOWN_GRACE,
        }
    }
}

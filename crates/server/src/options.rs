//! What a server is told when it starts. `crates/cli` fills this from the
//! configuration; nothing here reads the environment.

use std::fmt;
use std::time::Duration;

use stacyvm_api::Version;
use subtle::ConstantTimeEq;

use crate::tls::TlsFiles;

/// Default port of the REST API (http-api 1).
pub const DEFAULT_PORT: u16 = 7423;

/// Largest JSON body, file contents excepted.
const DEFAULT_JSON_BYTES: usize = 1 << 20;

/// Largest JSON body that carries a file (`POST …/files`). Larger files go
/// through the raw upload, which has no limit of its own.
const DEFAULT_FILE_JSON_BYTES: usize = 64 << 20;

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
    pub tls: Option<TlsFiles>,
    pub version: Version,
    pub shutdown_grace: Duration,
}

/// Whether the API key also opens the admin routes when there is no admin key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminFallback {
    Enabled,
    Disabled,
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

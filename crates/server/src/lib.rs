//! The HTTP surface: routes, authentication, streaming, and the API document.
//!
//! A request passes, in this order, the edge (request id, guards against web
//! pages, CORS, panics, access log), the router, the gate (identity, rate limit,
//! scope, audit), the body rule of its route and the handler. Failures become bodies in one place,
//! [`error`]; routes are declared in one table, [`routes`].
//!
//! What happens to sandboxes is the engine's; this crate knows HTTP and nothing
//! of providers.

mod acme;
mod audit;
mod auth;
mod connection;
mod edge;
mod error;
mod extract;
mod gate;
mod guard;
mod host_stats;
mod linger;
mod metrics;
mod openapi;
mod options;
mod peer;
mod preview;
mod rate_limit;
mod reply;
mod routes;
mod server;
mod table;
mod tls;
mod unread;
mod utf8;
mod x509;

use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use stacyvm_engine::Engine;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use acme::{
    AcmeError, AcmeOptions, DnsHook, ExternalAccount, Life, StoredCertificate, UnusableCertificate,
    check_options as check_acme_options, is_certifiable, stored_certificates,
};
pub use auth::Scope;
pub use options::{
    AdminFallback, Authentication, BodyLimits, DEFAULT_PORT, PreviewOptions, ProbeAccess, RateLimitKey,
    RateLimitOptions, Secret, ServerOptions,
};
use preview::Scheme;
pub use preview::check_options as check_preview_options;
pub use server::{Server, check_lists};
pub use table::{BASE, BodyRule, RouteInfo};
pub use tls::{TlsError, TlsFiles, TlsOptions};

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(
        "refusing to listen on {host}{} without a key: anybody who can reach it could run code here. \
         Make one (stacyvm key create --data-dir), set auth.api_key (STACYVM_AUTH_API_KEY), or listen on 127.0.0.1",
        meaning(.host, .address)
    )]
    OpenBeyondLoopback { host: String, address: IpAddr },
    #[error(
        "refusing to let pages of any origin (`*` in server.cors_allowed_origins) call a server without a key. \
         Make one (stacyvm key create), set auth.api_key, or list the origins"
    )]
    OpenToEveryOrigin,
    #[error(
        "callers need a key, and no key is valid. Set auth.api_key, or make a key: \
         stacyvm key create NAME --scope read --scope api --scope admin --data-dir DIR"
    )]
    NoUsableKey,
    #[error(
        "auth.enabled is false, and there are valid keys: the server would look closed and be open. \
         Take the setting out, or revoke the keys"
    )]
    KeysWithoutAuthentication,
    #[error("server.trusted_proxies: `{0}` is no address or network; write for example 10.0.0.5 or 10.0.0.0/8")]
    TrustedProxy(String),
    #[error("server.cors_allowed_origins: `{0}` is not an origin; write for example https://app.example.com")]
    CorsOrigin(String),
    #[error("server.allowed_hosts: `{0}` is not a host; write for example api.example.com or *.example.com")]
    AllowedHost(String),
    #[error(
        "server.preview_domain: `{0}` is not a domain; write for example localhost or preview.example.com, or leave it \
         empty and set server.preview_port, where paths name previews"
    )]
    PreviewDomain(String),
    #[error(
        "server.preview_domain: names below `{0}` are those of strangers (it is a public suffix); write a domain of \
         your own, such as example-preview.com"
    )]
    PreviewDomainOfAll(String),
    #[error(
        "server.preview_url: `{0}` is not an address of server.preview_domain; write for example \
         https://preview.example.com"
    )]
    PreviewUrl(String),
    #[error(
        "server.preview_url: `{0}` says how browsers see server.preview_domain, which is empty; set both, or neither"
    )]
    PreviewUrlAlone(String),
    #[error(
        "server.preview_port: {0} is server.port too; write another, because paths there name nothing but previews"
    )]
    PreviewPort(u16),
    #[error("server.tls_cert_file and server.tls_key_file")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Acme(#[from] AcmeError),
    #[error("the host name `{host}` cannot be resolved")]
    Resolve {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot listen on {address}{}", in_use(.source))]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// Every route of the table, for tests and tools.
pub fn route_list() -> Vec<RouteInfo> {
    routes::table().into_iter().map(|route| route.info).collect()
}

/// The API document, as checked in.
pub fn openapi_json() -> String {
    let document = openapi::document(&routes::table(), env!("CARGO_PKG_VERSION"));
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
}

/// What every handler works with.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) options: ServerOptions,
    pub(crate) auth: auth::Authenticator,
    pub(crate) gate: gate::Gate,
    pub(crate) guard: guard::Guard,
    pub(crate) previews: preview::Previews,
    pub(crate) started: Instant,
    /// Cancelled when the server shuts down: streams end on it.
    pub(crate) closing: CancellationToken,
    /// WebSockets, which outlive their HTTP request.
    pub(crate) sockets: TaskTracker,
    pub(crate) http_metrics: metrics::HttpMetrics,
    pub(crate) host_stats: host_stats::HostStats,
    pub(crate) tls: Option<tls::Tls>,
    /// The API document's bytes.
    pub(crate) document: Bytes,
}

/// How this server's own listener is reached.
#[derive(Clone, Copy)]
struct Listener {
    scheme: Scheme,
    port: u16,
    /// Where paths name previews.
    preview_port: Option<u16>,
    beyond_loopback: bool,
}

impl App {
    fn new(
        options: ServerOptions,
        engine: Engine,
        listener: Listener,
        tls: Option<tls::Tls>,
    ) -> Result<Self, ServerError> {
        Ok(Self(Arc::new(Shared {
            auth: auth::Authenticator::new(&options, engine.keys().clone()),
            gate: gate::Gate::new(&options)?,
            guard: guard::Guard::new(&options, listener.beyond_loopback)?,
            previews: preview::Previews::new(&options, &engine, listener)?,
            started: Instant::now(),
            closing: CancellationToken::new(),
            sockets: TaskTracker::new(),
            http_metrics: metrics::HttpMetrics::default(),
            host_stats: host_stats::HostStats::default(),
            tls,
            document: openapi_json().into(),
            engine,
            options,
        })))
    }
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// The address, where the host was given as a name.
fn meaning(host: &str, address: &IpAddr) -> String {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.parse() == Ok(*address) { String::new() } else { format!(" ({address})") }
}

fn in_use(source: &std::io::Error) -> &'static str {
    if source.kind() == std::io::ErrorKind::AddrInUse {
        ": another program listens there already; stop it or choose another port with --port"
    } else {
        ""
    }
}

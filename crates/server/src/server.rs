//! Listening, accepting connections, and ending in good order.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use stacyvm_engine::Engine;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{self, Site, Surface};
use crate::guard::Guard;
use crate::linger::Lingering;
use crate::peer::TrustedProxies;
use crate::preview::{Arrival, Domain, Scheme};
use crate::tls::{HANDSHAKE_TIME, Tls, https_only, is_challenge, is_plain_http};
use crate::{App, Listener, ServerError, ServerOptions, check_preview_options};

/// Open connections at most; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16_384;

/// Pause after `accept` failed, usually for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A peer that went away without a word is noticed after about this long.
const KEEPALIVE_IDLE: Duration = Duration::from_mins(1);

/// A bound server that does not answer yet.
pub struct Server {
    app: App,
    main: Vec<TcpListener>,
    preview_paths: Vec<TcpListener>,
    tls: Option<Tls>,
}

/// What [`Server::bind`] would say of the lists of hosts, origins and proxies.
pub fn check_lists(options: &ServerOptions) -> Result<(), ServerError> {
    Guard::new(options, false)?;
    TrustedProxies::parse(&options.trusted_proxies).map(drop)
}

impl Server {
    /// Takes the address. Beyond loopback, and for pages of any origin, a key
    /// is demanded.
    pub async fn bind(options: ServerOptions, engine: Engine) -> Result<Self, ServerError> {
        check_preview_options(&options.preview, options.port)?;
        let targets = resolve(&options.host, options.port).await?;
        let beyond_loopback = targets.iter().find(|address| !address.ip().to_canonical().is_loopback());
        let main = listen(&targets).await?;
        let preview_paths = match options.preview.path_port {
            Some(port) => listen(&resolve(&options.host, port).await?).await?,
            None => Vec::new(),
        };
        let previews = options.preview.domain.as_deref().and_then(Domain::parse);
        let tls = options.tls.as_ref().map(|tls| Tls::open(tls, previews.as_ref())).transpose()?;
        let listener = Listener {
            scheme: scheme(tls.as_ref()),
            port: addresses(&main).first().map_or(options.port, SocketAddr::port),
            preview_port: addresses(&preview_paths).first().map(SocketAddr::port),
            beyond_loopback: beyond_loopback.is_some(),
        };
        let app = App::new(options, engine, listener, tls.clone())?;
        app.auth.check()?;
        if let (Some(address), true) = (beyond_loopback, app.auth.is_open()) {
            return Err(ServerError::OpenBeyondLoopback { host: app.options.host.clone(), address: address.ip() });
        }
        if app.guard.allows_any_origin() && app.auth.is_open() {
            return Err(ServerError::OpenToEveryOrigin);
        }
        Ok(Self { app, main, preview_paths, tls })
    }

    /// Whether callers need a key.
    pub fn demands_key(&self) -> bool {
        !self.app.auth.is_open()
    }

    /// Resolves once callers need a key, which they then do to the end.
    pub fn key_demanded(&self) -> impl Future<Output = ()> + Send + use<> {
        let auth = self.app.auth.clone();
        async move { auth.closed().await }
    }

    /// Where it listens: more than one for a name such as `localhost`.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        addresses(&self.main)
    }

    /// Whether it speaks TLS.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// Where paths name previews, if anywhere.
    pub fn preview_addresses(&self) -> Vec<SocketAddr> {
        addresses(&self.preview_paths)
    }

    /// Answers until `shutdown` resolves, then lets open requests end for the
    /// configured grace. Streams are told to end at once; commands run on.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let grace = self.app.options.shutdown_grace;
        let connections = TaskTracker::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let cut = CancellationToken::new();
        let router = crate::routes::router(&self.app);
        let mut background = JoinSet::new();
        background.spawn(Arc::clone(&self.app.previews.pool).sweep(self.app.closing.clone()));
        if let Some(tls) = &self.tls {
            tls.keep(&mut background, &self.app.closing);
        }
        let main = self.main.into_iter().map(|listener| (listener, Surface::Main));
        let paths = self.preview_paths.into_iter().map(|listener| (listener, Surface::PreviewPaths));
        for (listener, surface) in main.chain(paths) {
            let acceptor = Acceptor {
                site: Arc::new(Site { app: self.app.clone(), router: router.clone(), surface }),
                tls: self.tls.as_ref().map(|tls| tls.acceptor.clone()),
                connections: connections.clone(),
                slots: slots.clone(),
                cut: cut.clone(),
            };
            background.spawn(acceptor.run(listener));
        }

        shutdown.await;
        self.app.closing.cancel();
        while background.join_next().await.is_some() {}
        connections.close();
        self.app.sockets.close();
        let drained = async {
            connections.wait().await;
            self.app.sockets.wait().await;
        };
        if tokio::time::timeout(grace, drained).await.is_err() {
            tracing::warn!(open = connections.len(), "requests were still open after the grace period and are cut off");
            cut.cancel();
            connections.wait().await;
        }
    }
}

struct Acceptor {
    site: Arc<Site>,
    tls: Option<TlsAcceptor>,
    connections: TaskTracker,
    slots: Arc<Semaphore>,
    cut: CancellationToken,
}

impl Acceptor {
    async fn run(self, listener: TcpListener) {
        loop {
            let accepted = async {
                let slot = self.slots.clone().acquire_owned().await.ok()?;
                Some((slot, listener.accept().await))
            };
            let next = tokio::select! {
                () = self.site.app.closing.cancelled() => return,
                next = accepted => next,
            };
            match next {
                Some((slot, Ok((stream, peer)))) => {
                    prepare(&stream);
                    let arrival = Arrival { peer: peer.ip().to_canonical(), scheme: scheme(self.tls.as_ref()) };
                    let stream = Lingering::new(stream, self.connections.clone(), self.cut.clone());
                    let served = self.serve(stream, arrival);
                    self.connections.spawn(async move {
                        served.await;
                        drop(slot);
                    });
                }
                Some((_slot, Err(error))) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
                None => return,
            }
        }
    }

    fn serve(&self, stream: Lingering, arrival: Arrival) -> impl Future<Output = ()> + Send + use<> {
        let (site, tls, cut) = (Arc::clone(&self.site), self.tls.clone(), self.cut.clone());
        async move {
            let Some(tls) = tls else { return connection::serve(stream, site, arrival, cut).await };
            let Ok(Some(first)) = tokio::time::timeout(HANDSHAKE_TIME, stream.first_byte()).await else {
                return tracing::debug!("a client ended, or said nothing, before a TLS handshake");
            };
            if is_plain_http(first) {
                return refuse_plain_http(stream).await;
            }
            match tokio::time::timeout(HANDSHAKE_TIME, tls.accept(stream)).await {
                Ok(Ok(stream)) if is_challenge(stream.get_ref().1) => {}
                Ok(Ok(stream)) => connection::serve(stream, site, arrival, cut).await,
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            }
        }
    }
}

/// Says to whoever speaks plain HTTP to a port that speaks TLS what is wrong.
async fn refuse_plain_http(mut stream: Lingering) {
    let sent = tokio::time::timeout(HANDSHAKE_TIME, stream.write_all(&https_only())).await;
    tracing::debug!(?sent, "a client spoke plain HTTP to a port that speaks TLS");
}

fn scheme<T>(tls: Option<&T>) -> Scheme {
    if tls.is_some() { Scheme::Https } else { Scheme::Http }
}

fn prepare(stream: &TcpStream) {
    // Small answers must not wait for an acknowledgement of the one before.
    stream.set_nodelay(true).ok();
    // Tunnels and event streams may say nothing for hours.
    rustix::net::sockopt::set_socket_keepalive(stream, true).ok();
    rustix::net::sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE).ok();
}

fn addresses(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
}

async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, ServerError> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let failed = |source| ServerError::Resolve { host: host.to_owned(), source };
    let mut found: Vec<SocketAddr> = tokio::net::lookup_host((bare, port)).await.map_err(failed)?.collect();
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        return Err(failed(std::io::Error::other("the name has no address")));
    }
    Ok(found)
}

/// Listens on every address, on one port also when any free one was asked for.
/// A name such as `localhost` may have an address that this machine lacks; one
/// listener is enough.
async fn listen(targets: &[SocketAddr]) -> Result<Vec<TcpListener>, ServerError> {
    let mut listeners: Vec<TcpListener> = Vec::with_capacity(targets.len());
    let mut failure = None;
    let mut port = 0;
    for target in targets {
        let mut target = *target;
        if target.port() == 0 {
            target.set_port(port);
        }
        match TcpListener::bind(target).await {
            Ok(listener) => {
                port = listener.local_addr().map_or(port, |address| address.port());
                listeners.push(listener);
            }
            Err(source) if source.kind() == std::io::ErrorKind::AddrInUse => {
                return Err(ServerError::Bind { address: target, source });
            }
            Err(source) => failure = Some(ServerError::Bind { address: target, source }),
        }
    }
    match failure {
        Some(failure) if listeners.is_empty() => Err(failure),
        _ => Ok(listeners),
    }
}

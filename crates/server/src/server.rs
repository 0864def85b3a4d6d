//! Listening, serving connections, and ending in good order.

use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use stacyvm_engine::Engine;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use crate::linger::Lingering;
use crate::peer::Peer;
use crate::{App, ServerError, ServerOptions};

/// Open connections at most; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16_384;

/// A connection that sends no request head for this long is closed; also the
/// longest a head may take (http-api 1: idle keep-alive 60 s).
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// Pause after `accept` failed, usually for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// HTTP/2: with the defaults, uploads are several times slower.
const H2_STREAM_WINDOW_BYTES: u32 = 1 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const H2_MAX_FRAME_BYTES: u32 = 256 << 10;
const H2_MAX_STREAMS: u32 = 1024;
const H2_KEEPALIVE: Duration = Duration::from_secs(30);

/// A bound server that does not answer yet.
pub struct Server {
    app: App,
    router: Router,
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
}

impl Server {
    /// Takes the address. Beyond loopback, and for pages of any origin, a key
    /// is demanded.
    pub async fn bind(options: ServerOptions, engine: Engine) -> Result<Self, ServerError> {
        let targets = resolve(&options.host, options.port).await?;
        let beyond_loopback = targets.iter().find(|address| !address.ip().to_canonical().is_loopback());
        let app = App::new(options, engine, beyond_loopback.is_some())?;
        app.auth.check()?;
        if let (Some(address), true) = (beyond_loopback, app.auth.is_open()) {
            return Err(ServerError::OpenBeyondLoopback { host: app.options.host.clone(), address: address.ip() });
        }
        if app.guard.allows_any_origin() && app.auth.is_open() {
            return Err(ServerError::OpenToEveryOrigin);
        }
        let listeners = listen(&targets).await?;
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        let router = crate::routes::router(&app);
        Ok(Self { app, router, listeners, addresses })
    }

    /// Whether callers need a key.
    pub fn demands_key(&self) -> bool {
        !self.app.auth.is_open()
    }

    /// Where it listens: more than one for a name such as `localhost`.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Answers until `shutdown` resolves, then lets open requests end for the
    /// configured grace. Streams are told to end at once; commands run on.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let grace = self.app.options.shutdown_grace;
        let connections = TaskTracker::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let cut = CancellationToken::new();
        let acceptors: Vec<_> = self
            .listeners
            .into_iter()
            .map(|listener| {
                let acceptor = Acceptor {
                    router: self.router.clone(),
                    connections: connections.clone(),
                    slots: slots.clone(),
                    closing: self.app.closing.clone(),
                    cut: cut.clone(),
                };
                tokio::spawn(acceptor.run(listener))
            })
            .collect();

        shutdown.await;
        self.app.closing.cancel();
        for acceptor in acceptors {
            acceptor.await.ok();
        }
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
    router: Router,
    connections: TaskTracker,
    slots: Arc<Semaphore>,
    closing: CancellationToken,
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
                () = self.closing.cancelled() => return,
                next = accepted => next,
            };
            match next {
                Some((slot, Ok((stream, peer)))) => {
                    // Small answers must not wait for an acknowledgement of the
                    // one before.
                    stream.set_nodelay(true).ok();
                    let stream = Lingering::new(stream, self.connections.clone(), self.cut.clone());
                    self.connections.spawn(serve_connection(
                        stream,
                        Peer(peer.ip()),
                        slot,
                        self.router.clone(),
                        self.closing.clone(),
                        self.cut.clone(),
                    ));
                }
                Some((_slot, Err(error))) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
                None => return,
            }
        }
    }
}

async fn serve_connection(
    stream: Lingering,
    peer: Peer,
    _slot: OwnedSemaphorePermit,
    router: Router,
    closing: CancellationToken,
    cut: CancellationToken,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        let mut router = router.clone();
        async move { Ok::<_, Infallible>(Service::call(&mut router, request).await.unwrap_or_else(|never| match never {})) }
    });
    let builder = connection_builder();
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                result = connection.as_mut() => result,
                () = cut.cancelled() => return,
            }
        }
    };
    if let Err(error) = result {
        // Clients that go away mid-request are ordinary.
        tracing::debug!(%error, "a connection ended early");
    }
}

fn connection_builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_frame_size(H2_MAX_FRAME_BYTES)
        .max_concurrent_streams(H2_MAX_STREAMS)
        .keep_alive_interval(H2_KEEPALIVE);
    builder
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

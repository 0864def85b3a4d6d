//! Connections: accepting them, demanding the token, finding the handler.

use std::convert::Infallible;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use stacyvm_envd::http as paths;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::wakeful::Wakeful;
use crate::{Failure, Sandbox, rpc, web};

pub(crate) type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Connections at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 512;

/// Who has not shown the token by then is sent away.
const UNKNOWN_FOR: Duration = Duration::from_secs(15);
const HEADER_TIME: Duration = Duration::from_secs(15);

/// A stream that nobody reads holds back this much and no more; the connection's
/// window is the sum over all streams, so that none of them waits for another.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const MAX_STREAMS: u32 = 256;
const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * MAX_STREAMS;
const FRAME_BYTES: u32 = 128 << 10;
const SEND_BUFFER_BYTES: usize = 128 << 10;
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// After a failed accept (no descriptors left) before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who may connect at all, before anything is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peers {
    /// The socket itself is out of the guest's reach.
    Anybody,
    /// The socket lies in the guest's own tree. Whoever comes from outside (the
    /// host, or a bridge that a runtime put into the container) has no parent
    /// in this pid namespace; everything the guest can start has one.
    FromOutside,
}

impl Peers {
    fn admits(self, stream: &UnixStream) -> bool {
        match self {
            Self::Anybody => true,
            Self::FromOutside => match stream.peer_cred().map(|peer| peer.pid()) {
                // A process of another pid namespace has no number in ours.
                Ok(None | Some(0)) => true,
                Ok(Some(pid)) => crate::process::parent(pid) == Some(0),
                Err(_) => false,
            },
        }
    }
}

/// Serves until the listener fails for good.
pub(crate) async fn accept(listener: UnixListener, peers: Peers, sandbox: Arc<Sandbox>) -> io::Result<()> {
    let service = rpc::service(Arc::clone(&sandbox));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) if peers.admits(&stream) => {
                let connection = connection(stream, Arc::clone(&sandbox), service.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Ok(_) => {}
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(stream: UnixStream, sandbox: Arc<Sandbox>, service: rpc::Service) {
    let known = Arc::new(AtomicBool::new(false));
    let shown = Arc::clone(&known);
    let handler = service_fn(move |request| {
        let sandbox = Arc::clone(&sandbox);
        let service = service.clone();
        let known = Arc::clone(&shown);
        async move { Ok::<_, Infallible>(answer(request, sandbox, service, &known).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(MAX_HEADER_BYTES);
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(Wakeful::new(stream)), handler);
    tokio::pin!(serving);
    tokio::select! {
        // What a client does wrong on its connection is its own affair.
        _ = &mut serving => return,
        () = sleep(UNKNOWN_FOR) => {}
    }
    if known.load(Ordering::Relaxed) {
        let _ = serving.await;
    }
}

/// One request; a panic in its handler is an answer, not the agent's end.
async fn answer(
    request: Request<Incoming>,
    sandbox: Arc<Sandbox>,
    service: rpc::Service,
    known: &AtomicBool,
) -> Response<Body> {
    if request.uri().path() == paths::HEALTH {
        return web::empty(StatusCode::NO_CONTENT);
    }
    if !has_token(&request, &sandbox) {
        return web::unauthorized();
    }
    known.store(true, Ordering::Relaxed);
    let request = request.map(web::Upload::new);
    match AssertUnwindSafe(route(request, sandbox, service)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => web::failure(&Failure::Internal("the agent could not handle this request".to_owned())),
    }
}

async fn route(request: Request<web::Upload>, sandbox: Arc<Sandbox>, mut service: rpc::Service) -> Response<Body> {
    let method = request.method().clone();
    let result = match (request.uri().path(), &method) {
        (paths::FILES, &Method::GET) => web::files::download(&sandbox, &request).await,
        (paths::FILES, &Method::POST) => web::files::upload(&sandbox, request).await,
        (paths::ARCHIVE, &Method::GET) => web::archive::download(&sandbox, &request).await,
        (paths::ARCHIVE, &Method::PUT) => web::archive::upload(&sandbox, request).await,
        (paths::DIAL, &Method::GET) => web::dial::dial(&sandbox, request).await,
        (paths::ENVS, &Method::GET) => Ok(web::json(&sandbox.env())),
        (paths::METRICS, &Method::GET) => web::info::metrics().await,
        (paths::INIT, &Method::POST) => web::info::init(&sandbox, request).await,
        (paths::FILES | paths::ARCHIVE | paths::DIAL | paths::ENVS | paths::METRICS | paths::INIT, _) => {
            Ok(web::empty(StatusCode::METHOD_NOT_ALLOWED))
        }
        _ => {
            let response = match tower_service::Service::call(&mut service, request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            return response.map(|body| body.map_err(Into::into).boxed_unsync());
        }
    };
    result.unwrap_or_else(|failure| web::failure(&failure))
}

fn has_token(request: &Request<Incoming>, sandbox: &Sandbox) -> bool {
    let given = request.headers().get(paths::TOKEN_HEADER);
    sandbox.is_token(given.map_or(&b""[..], http::HeaderValue::as_bytes))
}

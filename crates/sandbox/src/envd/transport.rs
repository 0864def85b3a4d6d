//! Connections to one agent.
//!
//! Calls share HTTP/2 connections: one is opened ahead, more when needed; they
//! are opened again when broken and closed when idle. Each carries few enough streams that its
//! window is the sum of theirs: a stream that nobody reads never holds up
//! another. Bulk bytes get an HTTP/1.1 connection of their own ([`super::bulk`]).

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{BoxFuture, ClientBody, ClientTransport};
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use stacyvm_envd::http::HEALTH;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::error::is_gone;
use crate::{AgentChannel, AgentIo, SessionError};

/// Streams of one connection; below what the agent allows.
const MAX_STREAMS: usize = 64;

/// Connections of one session: more calls at once are an error.
const MAX_CONNECTIONS: usize = 64;

const STREAM_WINDOW_BYTES: u32 = 512 << 10;
const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * MAX_STREAMS as u32;
const FRAME_BYTES: u32 = 128 << 10;
const SEND_BUFFER_BYTES: usize = 256 << 10;
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// An agent that lives accepts a connection at once.
const OPEN_TIME: Duration = Duration::from_secs(5);

/// A connection without streams is closed after this long: there may be
/// thousands of sandboxes.
const IDLE_TIME: Duration = Duration::from_secs(30);

/// A call that waits for longer asks whether the agent lives at all; then after
/// twice as long, and so on.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// An agent that lives says so by then, even among processes that leave it
/// hardly any processor.
const SIGN_TIME: Duration = Duration::from_secs(10);

/// Why a request could not be sent or answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransportError {
    #[error("the agent cannot be reached")]
    Open(#[source] io::Error),
    #[error("the connection to the agent broke")]
    Broken(#[source] hyper::Error),
    #[error("too many calls to one sandbox at once")]
    Crowded,
}

#[derive(Clone)]
pub(super) struct Transport {
    shared: Arc<Shared>,
}

struct Shared {
    channel: Arc<dyn AgentChannel>,
    connections: Mutex<Vec<Connection>>,
}

#[derive(Clone)]
struct Connection {
    sender: SendRequest<ClientBody>,
    /// Streams that are open.
    streams: Arc<AtomicUsize>,
}

impl Transport {
    pub(super) fn new(channel: Arc<dyn AgentChannel>) -> Self {
        Self { shared: Arc::new(Shared { channel, connections: Mutex::default() }) }
    }

    /// Opens the first connection in the background, unless a call comes first.
    pub(super) fn open_ahead(&self) {
        let transport = self.clone();
        tokio::spawn(async move {
            // Calls say what is wrong.
            let _ = transport.reserve().await;
        });
    }

    /// A byte stream of its own.
    pub(super) async fn open(&self) -> Result<Box<dyn AgentIo>, TransportError> {
        match timeout(OPEN_TIME, self.shared.channel.open()).await {
            Ok(opened) => opened.map_err(TransportError::Open),
            Err(_) => Err(TransportError::Open(io::ErrorKind::TimedOut.into())),
        }
    }

    /// What `call` comes to, unless the agent stops before.
    pub(super) async fn while_alive<T>(
        &self,
        call: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            result = call => result,
            () = self.agent_stops() => {
                Err(self.judge(SessionError::Unavailable(Some("the agent shows no sign of life".into()))).await)
            }
        }
    }

    /// Resolves once the agent does not even say that it lives.
    async fn agent_stops(&self) {
        let mut wait = FIRST_LOOK;
        loop {
            sleep(wait).await;
            if !matches!(timeout(SIGN_TIME, Box::pin(self.shows_life())).await, Ok(true)) {
                return;
            }
            wait *= 2;
        }
    }

    /// Asks on a connection of its own: an agent that can take none is as good
    /// as stopped, however many it has.
    async fn shows_life(&self) -> bool {
        let Ok(stream) = self.open().await else { return false };
        let Ok((mut sender, connection)) = http1::handshake(TokioIo::new(stream)).await else { return false };
        let request = Request::builder().uri(HEALTH).header(header::HOST, "agent").body(Empty::<Bytes>::new());
        let Ok(request) = request else { return false };
        tokio::select! {
            answer = sender.send_request(request) => answer.is_ok(),
            _ = connection => false,
        }
    }

    /// A failure to answer, or the sandbox's end? Nobody listens any more after
    /// the latter.
    pub(super) async fn judge(&self, error: SessionError) -> SessionError {
        if !matches!(error, SessionError::Unavailable(_)) {
            return error;
        }
        match self.open().await {
            Err(TransportError::Open(refused)) if is_gone(&refused) => SessionError::Gone,
            Ok(_) | Err(TransportError::Open(_) | TransportError::Broken(_) | TransportError::Crowded) => error,
        }
    }

    /// A place on a connection that is not full.
    async fn reserve(&self) -> Result<(Connection, Reserved), TransportError> {
        let mut connections = self.shared.connections.lock().await;
        connections.retain(|connection| !connection.sender.is_closed());
        for connection in connections.iter() {
            if let Some(reserved) = Reserved::take(connection) {
                return Ok((connection.clone(), reserved));
            }
        }
        if connections.len() >= MAX_CONNECTIONS {
            return Err(TransportError::Crowded);
        }
        let (sender, driver) = builder()
            .handshake::<_, ClientBody>(TokioIo::new(self.open().await?))
            .await
            .map_err(TransportError::Broken)?;
        let connection = Connection { sender, streams: Arc::default() };
        // Ends when the connection breaks or its last sender is dropped.
        tokio::spawn(async move {
            let _ = driver.await;
        });
        if connections.is_empty() {
            tokio::spawn(close_idle(Arc::downgrade(&self.shared)));
        }
        connections.push(connection.clone());
        let reserved = Reserved::take(&connection).ok_or(TransportError::Crowded)?;
        Ok((connection, reserved))
    }

    async fn send_once(
        &self,
        request: Request<ClientBody>,
    ) -> Result<Response<StreamBody>, (TransportError, Option<Request<ClientBody>>)> {
        let (mut connection, reserved) = match self.reserve().await {
            Ok(found) => found,
            Err(error) => return Err((error, None)),
        };
        if let Err(error) = connection.sender.ready().await {
            return Err((TransportError::Broken(error), Some(request)));
        }
        match connection.sender.try_send_request(request).await {
            Ok(response) => Ok(response.map(|inner| StreamBody { inner, _reserved: reserved })),
            Err(mut failed) => {
                let unsent = failed.take_message();
                Err((TransportError::Broken(failed.into_error()), unsent))
            }
        }
    }
}

impl ClientTransport for Transport {
    type ResponseBody = StreamBody;
    type Error = TransportError;

    fn send(&self, request: Request<ClientBody>) -> BoxFuture<'static, Result<Response<StreamBody>, TransportError>> {
        let transport = self.clone();
        Box::pin(async move {
            match transport.send_once(request).await {
                Ok(response) => Ok(response),
                // The connection had broken before anything was sent on it.
                Err((_, Some(request))) => transport.send_once(request).await.map_err(|(error, _)| error),
                Err((error, None)) => Err(error),
            }
        })
    }
}

/// A response body that gives its place back when it is dropped.
pub(super) struct StreamBody {
    inner: Incoming,
    _reserved: Reserved,
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

struct Reserved(Arc<AtomicUsize>);

impl Reserved {
    fn take(connection: &Connection) -> Option<Self> {
        let streams = &connection.streams;
        if streams.fetch_add(1, Ordering::AcqRel) < MAX_STREAMS {
            return Some(Self(Arc::clone(streams)));
        }
        streams.fetch_sub(1, Ordering::AcqRel);
        None
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Closes what stays without streams; ends with the last connection.
async fn close_idle(shared: Weak<Shared>) {
    let mut idle_before: Vec<Arc<AtomicUsize>> = Vec::new();
    loop {
        sleep(IDLE_TIME).await;
        let Some(shared) = shared.upgrade() else { return };
        let mut connections = shared.connections.lock().await;
        let is_idle = |connection: &Connection| connection.streams.load(Ordering::Acquire) == 0;
        // Idle now and at the last look: dropping the sender closes it.
        connections.retain(|connection| {
            let was_idle = idle_before.iter().any(|before| Arc::ptr_eq(before, &connection.streams));
            !(connection.sender.is_closed() || was_idle && is_idle(connection))
        });
        idle_before = connections.iter().filter(|c| is_idle(c)).map(|c| Arc::clone(&c.streams)).collect();
        if connections.is_empty() {
            return;
        }
    }
}

fn builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(MAX_HEADER_BYTES);
    builder
}

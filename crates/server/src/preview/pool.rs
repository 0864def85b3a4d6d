//! Connections to what listens inside sandboxes: dialed through the agent, kept
//! for a moment after an answer, bounded for each sandbox.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use stacyvm_api::SandboxId;
use stacyvm_engine::{Caller, Engine, EngineError};
use stacyvm_sandbox::{AgentIo, DialTarget, SessionError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::address::Address;
use super::body::{Progress, RequestBody};

/// Connections into one sandbox at once, of all ports, tunnels included.
const MAX_CONNECTIONS: usize = 256;

/// Wait for one of them to become free.
const ROOM_TIME: Duration = Duration::from_secs(5);

/// Until the agent has connected, or said that it cannot.
const DIAL_TIME: Duration = Duration::from_secs(10);

/// Connections kept for one port.
const MAX_PARKED: usize = 32;

/// How long. Common servers close after 5 s without a request, and a request
/// must not meet that.
const PARKED_TIME: Duration = Duration::from_secs(4);

const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Head of an answer at most.
pub(super) const MAX_HEAD_BYTES: usize = 64 << 10;
pub(super) const MAX_HEADERS: usize = 256;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{MAX_CONNECTIONS} connections into sandbox {0} are open, which is the maximum")]
    Crowded(SandboxId),
    #[error("port {} of sandbox {} could not be reached in time", .0.port, .0.id)]
    Slow(Address),
}

/// Connections by where they lead.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    parked: HashMap<Address, Vec<Parked>>,
    rooms: HashMap<SandboxId, Arc<Semaphore>>,
}

struct Parked {
    connection: GuestConnection,
    since: Instant,
}

/// An HTTP/1.1 connection to a guest. Dropping it closes it.
pub(super) struct GuestConnection {
    pub(super) sender: SendRequest<RequestBody>,
    _task: AbortOnDrop,
}

/// A connection in use, and the way back.
pub(super) struct Lease {
    pool: Arc<Pool>,
    address: Address,
    connection: GuestConnection,
    request: Option<Arc<Progress>>,
}

impl Pool {
    /// A byte stream to the port, with a place among the sandbox's connections.
    pub(crate) async fn dial(&self, engine: &Engine, address: &Address) -> Result<Placed, DialError> {
        let room = self.room(&address.id);
        let Ok(Ok(place)) = timeout(ROOM_TIME, room.acquire_owned()).await else {
            return Err(DialError::Crowded(address.id.clone()));
        };
        // Ports do not ask who calls: their access was looked at before.
        let dial = async {
            let session = engine.session(&Caller::default(), &address.id).await?;
            session.dial(DialTarget::Port(address.port)).await.map_err(EngineError::from)
        };
        match timeout(DIAL_TIME, dial).await {
            Ok(stream) => Ok(Placed { stream: stream?, _place: place }),
            Err(_) => Err(DialError::Slow(address.clone())),
        }
    }

    pub(super) async fn connect(&self, engine: &Engine, address: &Address) -> Result<GuestConnection, DialError> {
        let stream = self.dial(engine, address).await?;
        let opened = http1::Builder::new()
            .max_header_size(MAX_HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(stream))
            .await;
        let (sender, connection) =
            opened.map_err(|error| EngineError::from(SessionError::Unavailable(Some(Box::new(error)))))?;
        let task = tokio::spawn(async move {
            // The sender hears of what goes wrong.
            connection.with_upgrades().await.ok();
        });
        Ok(GuestConnection { sender, _task: AbortOnDrop(task) })
    }

    /// A connection that was kept and can be written to at once.
    pub(super) fn take(&self, address: &Address) -> Option<GuestConnection> {
        let mut state = self.lock();
        let parked = state.parked.get_mut(address)?;
        parked.retain(|parked| !parked.connection.sender.is_closed());
        // The last one used is the least likely to be closed.
        let at = parked.iter().rposition(|parked| parked.connection.sender.is_ready())?;
        Some(parked.remove(at).connection)
    }

    fn park(&self, address: Address, connection: GuestConnection) {
        if connection.sender.is_closed() {
            return;
        }
        let mut state = self.lock();
        let parked = state.parked.entry(address).or_default();
        if parked.len() < MAX_PARKED {
            parked.push(Parked { connection, since: Instant::now() });
        }
    }

    fn room(&self, id: &SandboxId) -> Arc<Semaphore> {
        let mut state = self.lock();
        if let Some(room) = state.rooms.get(id) {
            return Arc::clone(room);
        }
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        state.rooms.insert(id.clone(), Arc::clone(&room));
        room
    }

    /// Closes what was kept long enough, until the server ends.
    pub(crate) async fn sweep(self: Arc<Self>, closing: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.close_old(),
                () = closing.cancelled() => break,
            }
        }
        self.lock().parked.clear();
    }

    fn close_old(&self) {
        let mut state = self.lock();
        let is_young = |parked: &Parked| parked.since.elapsed() < PARKED_TIME && !parked.connection.sender.is_closed();
        state.parked.retain(|_, parked| {
            parked.retain(is_young);
            !parked.is_empty()
        });
        // Whoever waits for a place holds the room too.
        state.rooms.retain(|_, room| Arc::strong_count(room) > 1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    pub(super) fn new(
        pool: Arc<Pool>,
        address: Address,
        connection: GuestConnection,
        request: Option<Arc<Progress>>,
    ) -> Self {
        Self { pool, address, connection, request }
    }

    /// The answer is complete. A connection whose request is not cannot be used
    /// again.
    pub(super) fn park(self) {
        if self.request.is_none_or(|request| request.has_ended()) {
            self.pool.park(self.address, self.connection);
        }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A dialed stream that counts until it is dropped.
pub(crate) struct Placed {
    stream: Box<dyn AgentIo>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Placed {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

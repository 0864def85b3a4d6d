//! Connections that stopped being HTTP: WebSockets and whatever else two ends
//! agree on. Bytes go both ways until both have ended, or one has and the other
//! is silent, or the server does, or the key with which they were asked for.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::pool::GuestConnection;
use crate::App;
use crate::auth::Identity;

/// Moved at once, in each direction.
const COPY_BYTES: usize = 64 << 10;

/// Once one end has ended, the other may be silent this long: each of them takes
/// one of the sandbox's connections, and a guest need not close its own.
const HALF_CLOSED_PATIENCE: Duration = Duration::from_mins(1);

/// Joins a browser and a guest once both have switched.
pub(super) fn join(app: &App, identity: Identity, browser: OnUpgrade, guest: OnUpgrade, connection: GuestConnection) {
    relay(app, identity, async move {
        let both = tokio::try_join!(browser, guest).map_err(io::Error::other)?;
        // Until here the guest's stream was that connection's.
        drop(connection);
        Ok((TokioIo::new(both.0), TokioIo::new(both.1)))
    });
}

/// Relays between two streams in a task that ends with the server, or the
/// identity.
pub(crate) fn relay<A, B>(
    app: &App,
    identity: Identity,
    streams: impl Future<Output = io::Result<(A, B)>> + Send + 'static,
) where
    A: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let closing = app.closing.clone();
    app.sockets.spawn(async move {
        let copied = async {
            let (near, far) = streams.await?;
            copy(near, far).await
        };
        tokio::select! {
            // Either end may go away at any time.
            _ended = copied => {}
            () = closing.cancelled() => {}
            () = identity.ended() => {}
        }
    });
}

/// Moves bytes both ways until both streams have ended, or one has and nothing
/// comes from the other.
async fn copy<A, B>(near: A, far: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let activity = Arc::new(Activity::default());
    let mut near = Watched { stream: near, activity: Arc::clone(&activity) };
    let mut far = Watched { stream: far, activity: Arc::clone(&activity) };
    tokio::select! {
        ended = copy_bidirectional_with_sizes(&mut near, &mut far, COPY_BYTES, COPY_BYTES) => ended.map(drop),
        () = activity.is_left() => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// What was read of two streams.
#[derive(Default)]
struct Activity {
    bytes: AtomicU64,
    /// One of them has ended.
    ended: Notify,
}

impl Activity {
    /// Resolves when one has ended and the other is silent for too long.
    async fn is_left(&self) {
        self.ended.notified().await;
        loop {
            let before = self.bytes.load(Ordering::Relaxed);
            sleep(HALF_CLOSED_PATIENCE).await;
            if self.bytes.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }
}

/// A stream whose bytes are counted as they are read.
struct Watched<S> {
    stream: S,
    activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        match buffer.filled().len() - before {
            0 if buffer.remaining() > 0 => self.activity.ended.notify_one(),
            count => drop(self.activity.bytes.fetch_add(count as u64, Ordering::Relaxed)),
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_end_that_nobody_answers_is_an_end_after_a_while() {
        let (visitor, near) = duplex(64);
        let (far, mut guest) = duplex(64);
        let copied = tokio::spawn(copy(near, far));
        let (mut from_guest, mut to_guest) = tokio::io::split(visitor);
        to_guest.write_all(b"bye").await.unwrap();
        to_guest.shutdown().await.unwrap();

        // What the guest still says gets through, however slowly.
        let mut said = Vec::new();
        guest.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"bye");
        for _ in 0..3 {
            sleep(HALF_CLOSED_PATIENCE / 2).await;
            guest.write_all(b"x").await.unwrap();
            assert_eq!(from_guest.read_u8().await.unwrap(), b'x');
        }
        let silent_since = Instant::now();
        let ended = copied.await.unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(silent_since.elapsed() <= HALF_CLOSED_PATIENCE * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn two_ends_that_are_open_may_be_silent_for_ever() {
        let (_visitor, near) = duplex(64);
        let (far, _guest) = duplex(64);
        let copied = tokio::time::timeout(HALF_CLOSED_PATIENCE * 100, copy(near, far)).await;
        assert!(copied.is_err());
    }
}

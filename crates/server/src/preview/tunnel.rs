//! Connections that stopped being HTTP: WebSockets and whatever else two ends
//! agree on. Bytes go both ways until both have ended, or the server does, or the key
//! with which they were asked for.

use std::io;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};

use super::pool::GuestConnection;
use crate::App;
use crate::auth::Identity;

/// Moved at once, in each direction.
const COPY_BYTES: usize = 64 << 10;

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
        let copy = async {
            let (mut near, mut far) = streams.await?;
            copy_bidirectional_with_sizes(&mut near, &mut far, COPY_BYTES, COPY_BYTES).await
        };
        tokio::select! {
            // Either end may go away at any time.
            _ended = copy => {}
            () = closing.cancelled() => {}
            () = identity.ended() => {}
        }
    });
}

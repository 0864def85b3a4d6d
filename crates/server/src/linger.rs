//! Closing connections so that the last answer arrives.
//!
//! A request can be answered before all of its body was read: too large, no
//! such sandbox, no key. Closing a socket with unread bytes makes the kernel
//! send a reset, and a reset makes the client's kernel throw away the answer
//! that it had received already. So what is still coming is read and dropped
//! for a while, until the client has closed its side.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest wait for a client that goes on sending.
const LINGER: Duration = Duration::from_secs(2);

const DISCARD_BYTES: usize = 64 << 10;

/// A connection that lingers when it is dropped.
pub(crate) struct Lingering {
    stream: Option<TcpStream>,
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl Lingering {
    /// `tasks` owns the waiting; `cut` ends it early.
    pub(crate) fn new(stream: TcpStream, tasks: TaskTracker, cut: CancellationToken) -> Self {
        Self { stream: Some(stream), tasks, cut }
    }

    /// The first byte that the client sends, which stays to be read.
    pub(crate) async fn first_byte(&self) -> Option<u8> {
        let mut byte = [0];
        let count = self.stream.as_ref()?.peek(&mut byte).await.ok()?;
        (count > 0).then_some(byte[0])
    }

    fn inner(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        let cut = self.cut.clone();
        // Outside of a runtime nothing can wait, and nobody is left to answer.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.tasks.spawn_on(
                async move {
                    tokio::select! {
                        _ = tokio::time::timeout(LINGER, discard(stream)) => {}
                        () = cut.cancelled() => {}
                    }
                },
                &runtime,
            );
        }
    }
}

async fn discard(mut stream: TcpStream) {
    tokio::io::AsyncWriteExt::shutdown(&mut stream).await.ok();
    let mut waste = vec![0; DISCARD_BYTES];
    while matches!(stream.read(&mut waste).await, Ok(count) if count > 0) {}
}

impl AsyncRead for Lingering {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.inner()?.poll_read(context, into)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.inner()?.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner()?.poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner()?.poll_shutdown(context)
    }
}

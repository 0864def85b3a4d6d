//! The agent's side of a connection, where the kernel may not say that the other
//! side has ended.
//!
//! gVisor (seen with release 20221219) can lose the wake-up for a unix socket
//! whose peer shut down its direction while the sandbox was busy: an upload that
//! broke off then kept its handler, and what it had written so far, until
//! something else came. Whoever asks again is told.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::kernel;

/// How long the end of a stream may go unnoticed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A stream that asks the kernel itself now and then, where that is needed.
pub(crate) struct Wakeful {
    stream: UnixStream,
    next_look: Option<Pin<Box<Sleep>>>,
}

impl Wakeful {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let next_look = kernel::is_gvisor().then(|| Box::pin(sleep(LOOK_AGAIN)));
        Self { stream, next_look }
    }

    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl AsyncRead for Wakeful {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            return Poll::Ready(read);
        }
        let Some(next_look) = &mut this.next_look else { return Poll::Pending };
        loop {
            ready!(next_look.as_mut().poll(context));
            next_look.as_mut().reset(Instant::now() + LOOK_AGAIN);
            // Past the runtime, which still believes that nothing is there.
            match rustix::net::recv(&this.stream, buffer.initialize_unfilled(), RecvFlags::DONTWAIT) {
                Ok((_, length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Wakeful {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
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

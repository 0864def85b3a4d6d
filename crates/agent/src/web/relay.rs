//! Joining two sockets without touching their bytes: each direction goes through
//! a pipe of the kernel's, which hands pages on (`splice(2)`). A preview is as
//! fast as what it goes through, and copying here would cost a third of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptor::watch_descriptor;

/// What a direction holds at most. A sandbox with very many connections gets
/// smaller pipes from the kernel, which works too (`pipe(7)`).
const PIPE_BYTES: usize = 256 << 10;

/// Relays until both directions have ended, or one has failed. `first` was read
/// from `near` already.
pub(super) async fn relay(near: OwnedFd, first: Bytes, far: OwnedFd) -> io::Result<()> {
    let (near, far) = (Socket::new(near)?, Socket::new(far)?);
    let forth = async {
        far.send_all(&first).await?;
        pump(&near, &far).await
    };
    tokio::try_join!(forth, pump(&far, &near)).map(drop)
}

/// A stream socket that does not block.
struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        watch_descriptor(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    async fn when<T>(&self, interest: Interest, act: impl Fn(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        self.0.async_io(interest, |socket| act(socket.as_fd())).await
    }

    async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = self
                .when(Interest::WRITABLE, |socket| {
                    Ok(rustix::net::send(socket, bytes, rustix::net::SendFlags::NOSIGNAL)?)
                })
                .await?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }
}

/// One direction, up to its end, which the other side is told.
async fn pump(from: &Socket, to: &Socket) -> io::Result<()> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // A smaller pipe does as well.
    let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    loop {
        // The pipe is empty here, so that only the socket can make this wait.
        let mut held =
            from.when(Interest::READABLE, |socket| Ok(splice(socket, None, &writer, None, PIPE_BYTES, flags)?)).await?;
        if held == 0 {
            break;
        }
        while held > 0 {
            held -= to.when(Interest::WRITABLE, |socket| Ok(splice(&reader, None, socket, None, held, flags)?)).await?;
        }
    }
    match to.when(Interest::WRITABLE, |socket| Ok(rustix::net::shutdown(socket, Shutdown::Write)?)).await {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

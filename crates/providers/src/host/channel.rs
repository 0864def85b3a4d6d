//! The way to a sandbox's agent: a unix socket in a directory of ours.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use stacyvm_sandbox::{AgentChannel, AgentIo};
use tokio::net::UnixStream;

/// In a sandbox's directory.
const SOCKET: &str = "agent.sock";

/// Opens streams to one sandbox's agent.
pub(crate) struct SocketChannel {
    directory: OwnedFd,
}

impl SocketChannel {
    pub(crate) fn new(sandbox: &Path) -> io::Result<Self> {
        Ok(Self { directory: open_dir(sandbox)? })
    }
}

#[async_trait]
impl AgentChannel for SocketChannel {
    async fn open(&self) -> io::Result<Box<dyn AgentIo>> {
        Ok(Box::new(UnixStream::connect(path_in(&self.directory)).await?))
    }
}

/// The socket that the agent will inherit. Bound by the host in a directory
/// that is never visible inside, so that only the host can connect.
pub(crate) fn listen(sandbox: &Path) -> io::Result<OwnedFd> {
    let directory = open_dir(sandbox)?;
    Ok(UnixListener::bind(path_in(&directory))?.into())
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// A socket's address holds at most 107 bytes; this way a data directory may
/// be as deep as it likes.
fn path_in(directory: &OwnedFd) -> String {
    format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), SOCKET)
}

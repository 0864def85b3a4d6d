//! Byte streams through a backend: to our agent, and to ports inside.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use stacyvm_sandbox::{AgentChannel, AgentIo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::CallError;
use super::http::Http;

/// Opens connections to the agent of one sandbox.
pub(super) struct Tunnel {
    pub(super) http: Http,
    pub(super) backend_id: String,
}

#[async_trait]
impl AgentChannel for Tunnel {
    async fn open(&self) -> io::Result<Box<dyn AgentIo>> {
        match self.http.stream(&["sandboxes", &self.backend_id, "agent"], &[]).await {
            Ok(stream) => Ok(Box::new(Raw(stream))),
            // The kind that says that nobody is there any more.
            Err(error) if error.is_gone() => Err(io::Error::new(io::ErrorKind::NotFound, error)),
            Err(error @ CallError::TimedOut(_)) => Err(io::Error::new(io::ErrorKind::TimedOut, error)),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

/// An upgraded connection.
pub(super) struct Raw(pub(super) reqwest::Upgraded);

impl AsyncRead for Raw {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for Raw {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

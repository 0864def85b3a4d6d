//! Ports inside a sandbox: what listens, who may open the preview, and raw
//! connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use reqwest::header::{CONNECTION, HeaderValue, UPGRADE};
use reqwest::{Method, StatusCode};
use stacyvm_api::{Duration, Port, PortAccess, PortLink, PortLinkRequest, PortRequest};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{ClientError, SandboxClient};

/// After the answer the connection's bytes are the port's.
const FORWARD_PROTOCOL: HeaderValue = HeaderValue::from_static("stacyvm-forward");

/// A connection to a port inside a sandbox. Each direction ends by itself.
#[derive(Debug)]
pub struct Forwarded(reqwest::Upgraded);

impl SandboxClient {
    /// TCP ports that something listens on inside, in order.
    pub async fn ports(&self) -> Result<Vec<Port>, ClientError> {
        self.client.get(&["sandboxes", self.id.as_str(), "ports"]).await
    }

    /// One port, whether or not something listens there.
    pub async fn port(&self, port: u16) -> Result<Port, ClientError> {
        self.client.get(&["sandboxes", self.id.as_str(), "ports", &port.to_string()]).await
    }

    /// Says who may open the preview of a port.
    pub async fn set_port_access(&self, port: u16, access: PortAccess) -> Result<Port, ClientError> {
        let path = ["sandboxes", self.id.as_str(), "ports", &port.to_string()];
        self.client.call(Method::PUT, &path, &PortRequest { access }).await
    }

    /// A link that opens the preview of a port for a while: 1h unless given.
    pub async fn port_link(&self, port: u16, ttl: Option<Duration>) -> Result<PortLink, ClientError> {
        let path = ["sandboxes", self.id.as_str(), "ports", &port.to_string(), "link"];
        self.client.call(Method::POST, &path, &PortLinkRequest { ttl }).await
    }

    /// A raw connection to a port.
    pub async fn forward(&self, port: u16) -> Result<Forwarded, ClientError> {
        let path = ["sandboxes", self.id.as_str(), "ports", &port.to_string(), "forward"];
        let request = self
            .client
            .upgrade_request(&path)?
            .header(CONNECTION, HeaderValue::from_static("upgrade"))
            .header(UPGRADE, FORWARD_PROTOCOL);
        let response = self.client.send(request).await?;
        let agreed = response.headers().get(UPGRADE) == Some(&FORWARD_PROTOCOL);
        if response.status() != StatusCode::SWITCHING_PROTOCOLS || !agreed {
            return Err(ClientError::Protocol("the server did not open a raw connection".to_owned()));
        }
        response.upgrade().await.map(Forwarded).map_err(|error| self.client.broken(error))
    }
}

impl AsyncRead for Forwarded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for Forwarded {
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

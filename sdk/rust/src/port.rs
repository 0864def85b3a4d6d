//! Ports inside a sandbox: what listens, who may open the preview, and raw
//! connections.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use reqwest::header::{CONNECTION, HeaderValue, UPGRADE};
use reqwest::{Method, StatusCode, Url};
use stacyvm_api::{Duration, Port, PortAccess, PortLink, PortLinkRequest, PortRequest};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::{CONNECT_TIMEOUT, build_for, is_loopback};
use crate::{ClientError, SandboxClient};

/// Carries a link's token for programs.
const TRAFFIC_TOKEN: &str = "e2b-traffic-access-token";

/// Longest page of a preview that is read.
const MAX_PREVIEW_BYTES: usize = 16 * 1024 * 1024;

/// After the answer the connection's bytes are the port's.
const FORWARD_PROTOCOL: HeaderValue = HeaderValue::from_static("stacyvm-forward");

/// A connection to a port inside a sandbox. Each direction ends by itself.
#[derive(Debug)]
pub struct Forwarded(reqwest::Upgraded);

/// What a preview answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewAnswer {
    pub status: u16,
    /// At most a little more than 16 MiB of it.
    pub body: Vec<u8>,
}

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

    /// Opens a page of a port's preview at its public address, as a browser
    /// does. Names below `localhost` lead to where the server is; all others
    /// are looked up, so that a missing wildcard record shows. The server's key
    /// is not sent: what answers is a guest.
    pub async fn open_preview(&self, port: u16, path: &str) -> Result<PreviewAnswer, ClientError> {
        let invalid = |why: String| ClientError::InvalidArgument { what: "preview", why };
        let described = self.port(port).await?;
        let Some(address) = described.url else {
            let why = "this server has no previews: neither server.preview_domain nor server.preview_port is set";
            return Err(invalid(why.to_owned()));
        };
        let mut url = Url::parse(&address).map_err(|error| ClientError::Protocol(format!("{address}: {error}")))?;
        // Where paths name ports, the page's own begins behind that.
        url.set_path(&format!("{}{path}", url.path().trim_end_matches('/')));
        let mut builder =
            reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).redirect(reqwest::redirect::Policy::none());
        let host = url.host_str().unwrap_or_default().to_owned();
        if is_loopback(&url) {
            builder = builder.no_proxy();
        } else if host.ends_with(".localhost") {
            builder = builder.no_proxy().resolve_to_addrs(&host, &self.server_addresses(&url).await?);
        }
        let http = build_for(builder, &url)?;
        let mut request = http.get(url);
        if described.access == PortAccess::Token {
            request = request.header(TRAFFIC_TOKEN, self.port_link(port, None).await?.token);
        }
        let response = request.send().await.map_err(|error| self.client.broken(error))?;
        let status = response.status().as_u16();
        Ok(PreviewAnswer { status, body: self.client.bounded_body(response, MAX_PREVIEW_BYTES).await? })
    }

    /// Where the server itself is, with the port of a preview.
    async fn server_addresses(&self, preview: &Url) -> Result<Vec<SocketAddr>, ClientError> {
        let server = self.client.url(&["live"])?;
        let host = server.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = preview.port_or_known_default().unwrap_or_default();
        let found = tokio::net::lookup_host((host, port)).await;
        Ok(found.map_err(|error| crate::client::transport(self.client.server(), error))?.collect())
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

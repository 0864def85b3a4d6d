//! How requests get to the daemon: one connection each, over a unix socket, TCP
//! or TLS.
//!
//! `bollard` brings transports of its own. Ours is there because theirs wants
//! the socket to exist when the client is made, pulls in a second stack for
//! TLS, and writes registry credentials in an alphabet that the daemon does not
//! read.

use std::io;
use std::sync::Arc;

use bollard::BollardRequest;
use bollard::errors::Error;
use http::header::HOST;
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::endpoint::{Endpoint, TlsFiles};

/// Carries credentials of a registry, base64 of JSON.
const REGISTRY_AUTH: &str = "x-registry-auth";

/// Opens connections to one daemon.
#[derive(Clone)]
pub(super) struct Transport {
    endpoint: Arc<Endpoint>,
    tls: Option<Tls>,
}

#[derive(Clone)]
struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Transport {
    /// Reads the TLS files; opens nothing.
    pub(super) fn new(endpoint: Endpoint) -> Result<Self, String> {
        let tls = match &endpoint {
            Endpoint::Tcp { host, tls: Some(files), .. } => Some(Tls::read(host, files)?),
            Endpoint::Unix(_) | Endpoint::Tcp { tls: None, .. } => None,
        };
        Ok(Self { endpoint: Arc::new(endpoint), tls })
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let stream = match &*self.endpoint {
            Endpoint::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            Endpoint::Tcp { host, port, .. } => TcpStream::connect((host.as_str(), *port)).await?,
        };
        stream.set_nodelay(true)?;
        match &self.tls {
            Some(tls) => Ok(Box::new(tls.connector.connect(tls.name.clone(), stream).await?)),
            None => Ok(Box::new(stream)),
        }
    }

    /// Sends one request.
    pub(super) async fn send(self, request: BollardRequest) -> Result<Response<Incoming>, Error> {
        let stream = self.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the answer's body, or with the stream that it turns into.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the docker daemon broke");
            }
        });
        Ok(sender.send_request(prepare(request)?).await?)
    }
}

/// The request line of HTTP/1.1, and credentials as the daemon reads them.
fn prepare<B>(mut request: Request<B>) -> Result<Request<B>, Error> {
    let target = request.uri().path_and_query().cloned();
    *request.uri_mut() = target.map_or_else(|| Uri::from_static("/"), Uri::from);
    request.headers_mut().insert(HOST, HeaderValue::from_static("docker"));
    if let Some(credentials) = request.headers_mut().get_mut(REGISTRY_AUTH) {
        *credentials = url_safe(credentials)?;
        credentials.set_sensitive(true);
    }
    Ok(request)
}

/// The daemon decodes base64's alphabet for URLs (RFC 4648, section 5) only.
fn url_safe(credentials: &HeaderValue) -> Result<HeaderValue, Error> {
    let translated = credentials.as_bytes().iter().map(|byte| match byte {
        b'+' => b'-',
        b'/' => b'_',
        other => *other,
    });
    HeaderValue::from_bytes(&translated.collect::<Vec<u8>>()).map_err(|error| Error::from(http::Error::from(error)))
}

impl Tls {
    fn read(host: &str, files: &TlsFiles) -> Result<Self, String> {
        let unusable = |path: &std::path::Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let mut roots = RootCertStore::empty();
        let authorities = CertificateDer::pem_file_iter(&files.ca).map_err(|error| unusable(&files.ca, &error))?;
        for authority in authorities {
            let authority = authority.map_err(|error| unusable(&files.ca, &error))?;
            roots.add(authority).map_err(|error| unusable(&files.ca, &error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match &files.identity {
            None => config.with_no_client_auth(),
            Some(identity) => {
                let chain = CertificateDer::pem_file_iter(&identity.certificate)
                    .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                    .map_err(|error| unusable(&identity.certificate, &error))?;
                let key =
                    PrivateKeyDer::from_pem_file(&identity.key).map_err(|error| unusable(&identity.key, &error))?;
                config.with_client_auth_cert(chain, key).map_err(|error| unusable(&identity.certificate, &error))?
            }
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_for_the_daemon() {
        let request = Request::get("x://host/images/create?tag=1").header(REGISTRY_AUTH, "a+b/c=").body(()).unwrap();
        let request = prepare(request).unwrap();
        assert_eq!(request.uri(), "/images/create?tag=1");
        assert_eq!(request.headers()[REGISTRY_AUTH], "a-b_c=");
        assert!(request.headers()[REGISTRY_AUTH].is_sensitive());
    }

    #[test]
    fn unreadable_certificates_are_named() {
        let files = TlsFiles { ca: "/nonexistent/ca.pem".into(), identity: None };
        let endpoint = Endpoint::parse("tcp://box", Some(files)).unwrap();
        let message = Transport::new(endpoint).err().unwrap();
        assert!(message.contains("/nonexistent/ca.pem"), "{message}");
    }
}

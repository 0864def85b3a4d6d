//! The connection to one server and what every call shares: address, key,
//! headers, and the reading of answers.

use std::net::IpAddr;
use std::sync::{Arc, Once};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::TlsProblem;
use crate::{ApiError, ClientError};

/// Time to reach the server. Requests themselves have no deadline.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Silence after which the kernel asks whether the peer is still there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);

/// Longest error body that is read.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// Longest JSON answer that is read.
const MAX_JSON_BYTES: usize = 256 * 1024 * 1024;

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const USER_ID: HeaderName = HeaderName::from_static("x-user-id");
const NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How to reach a server.
#[derive(Clone)]
pub struct ClientOptions {
    /// `http://host:port`, possibly with a path in front of `/api/v1`.
    pub server: String,
    pub api_key: Option<String>,
    /// Whom sandboxes are accounted to (`X-User-ID`).
    pub owner: Option<String>,
    pub certificates: Certificates,
}

/// Which certificates a server may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Certificates {
    /// Those that this machine trusts, for the server's name.
    #[default]
    Trusted,
    /// Any: for a server that is known to be the one by other means.
    Any,
}

impl ClientOptions {
    pub fn new(server: impl Into<String>) -> Self {
        Self { server: server.into(), api_key: None, owner: None, certificates: Certificates::Trusted }
    }
}

/// A client of one server. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    /// HTTP/1.1 only: WebSockets begin with an upgrade, which HTTP/2 lacks.
    upgrade: reqwest::Client,
    base: Url,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("server", &self.inner.base.as_str()).finish_non_exhaustive()
    }
}

impl Client {
    /// Checks the options; nothing is sent yet.
    pub fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        install_tls_provider();
        let base = parse_server(&options.server)?;
        let headers = default_headers(options)?;
        let build = |builder: reqwest::ClientBuilder| {
            let builder = builder
                .default_headers(headers.clone())
                .user_agent(concat!("stacyvm-rust/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_keepalive(KEEPALIVE_AFTER)
                .redirect(reqwest::redirect::Policy::none());
            let builder = match options.certificates {
                Certificates::Trusted => builder,
                Certificates::Any => builder.tls_danger_accept_invalid_certs(true),
            };
            // A proxy from the environment knows no way back to this machine.
            let builder = if is_loopback(&base) { builder.no_proxy() } else { builder };
            build_for(builder, &base)
        };
        let http = build(reqwest::Client::builder())?;
        let upgrade = build(reqwest::Client::builder().http1_only())?;
        Ok(Self { inner: Arc::new(Inner { http, upgrade, base }) })
    }

    /// The server's address, as given.
    pub fn server(&self) -> &str {
        self.inner.base.as_str().trim_end_matches('/')
    }

    /// The address of a path below `/api/v1`. Each segment is encoded.
    pub(crate) fn url(&self, segments: &[&str]) -> Result<Url, ClientError> {
        // Such a segment would be dropped, and the request would go to another
        // resource: `DELETE /sandboxes/..` deletes more than one sandbox.
        if let Some(bad) = segments.iter().find(|segment| matches!(**segment, "" | "." | "..")) {
            return Err(ClientError::InvalidArgument { what: "name", why: format!("`{bad}` cannot name anything") });
        }
        let mut url = self.inner.base.clone();
        let mut path = url.path_segments_mut().map_err(|()| ClientError::InvalidArgument {
            what: "server address",
            why: "it cannot have a path".to_owned(),
        })?;
        path.pop_if_empty().extend(["api", "v1"]).extend(segments);
        drop(path);
        Ok(url)
    }

    pub(crate) fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        Ok(self.inner.http.request(method, self.url(segments)?))
    }

    /// A request that is going to become a WebSocket.
    pub(crate) fn upgrade_request(&self, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        Ok(self.inner.upgrade.get(self.url(segments)?))
    }

    /// Sends a request and turns every answer but a success into an error.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|error| self.broken(error))?;
        if response.status().is_success() || response.status() == reqwest::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        Err(self.refusal(response).await)
    }

    /// Sends a request and reads its JSON answer.
    pub(crate) async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request).await?;
        self.read_json(response).await
    }

    pub(crate) async fn read_json<T: DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        let path = response.url().path().to_owned();
        let body = self.bounded_body(response, MAX_JSON_BYTES).await?;
        if body.len() > MAX_JSON_BYTES {
            return Err(ClientError::Protocol(format!("{path} answered with more than {MAX_JSON_BYTES} bytes")));
        }
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(format!("{path}: {error}")))
    }

    /// Sends a JSON body and reads a JSON answer.
    pub(crate) async fn call<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        body: &B,
    ) -> Result<T, ClientError> {
        self.json(self.request(method, segments)?.json(body)).await
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, segments: &[&str]) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, segments)?).await
    }

    pub(crate) async fn delete(&self, segments: &[&str]) -> Result<(), ClientError> {
        self.send(self.request(Method::DELETE, segments)?).await.map(drop)
    }

    pub(crate) fn broken(&self, error: reqwest::Error) -> ClientError {
        if let Some(problem) = TlsProblem::behind(&error) {
            return ClientError::Tls { server: self.server().to_owned(), problem };
        }
        if error.is_connect() {
            return ClientError::Connect { server: self.server().to_owned(), source: error };
        }
        transport(self.server(), error)
    }

    pub(crate) async fn read_text(&self, response: Response) -> Result<String, ClientError> {
        let body = self.bounded_body(response, MAX_JSON_BYTES).await?;
        String::from_utf8(body).map_err(|_| ClientError::Protocol("the answer is not text".to_owned()))
    }

    pub(crate) async fn refusal(&self, response: Response) -> ClientError {
        let status = response.status().as_u16();
        let request_id = response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
        match self.bounded_body(response, MAX_ERROR_BYTES).await {
            Ok(body) => ApiError::from_body(status, request_id, &body).into(),
            Err(error) => error,
        }
    }

    /// The body, cut soon after `limit` bytes.
    pub(crate) async fn bounded_body(&self, mut response: Response, limit: usize) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while body.len() <= limit {
            match response.chunk().await.map_err(|error| transport(self.server(), error))? {
                Some(chunk) => body.extend_from_slice(&chunk),
                None => break,
            }
        }
        Ok(body)
    }
}

/// Where the next page of a list begins, if there is one.
pub(crate) fn next_cursor(response: &Response) -> Option<String> {
    response.headers().get(NEXT_CURSOR).and_then(|cursor| cursor.to_str().ok()).map(str::to_owned)
}

pub(crate) fn transport(server: &str, error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
    ClientError::Transport { server: server.to_owned(), source: Box::new(error) }
}

/// Without TLS no certificates are needed, which not every machine has.
pub(crate) fn build_for(builder: reqwest::ClientBuilder, base: &Url) -> Result<reqwest::Client, ClientError> {
    let is_plain = base.scheme() == "http";
    let builder = if is_plain { builder.tls_certs_only([]) } else { builder };
    builder.build().map_err(|error| ClientError::NoTls(error.into()))
}

fn parse_server(server: &str) -> Result<Url, ClientError> {
    let invalid = |why: String| ClientError::InvalidArgument { what: "server address", why };
    let text = server.trim();
    let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let url = Url::parse(&text).map_err(|error| invalid(format!("`{server}` is not an address: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err(invalid(format!("`{server}` is not an http or https address")));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(invalid("it holds a user or password; keys go in the API key".to_owned()));
    }
    Ok(url)
}

fn default_headers(options: &ClientOptions) -> Result<HeaderMap, ClientError> {
    let mut headers = HeaderMap::new();
    let mut set = |name: HeaderName, what: &'static str, value: &Option<String>| -> Result<(), ClientError> {
        let Some(value) = value.as_deref().filter(|value| !value.is_empty()) else { return Ok(()) };
        let mut value = HeaderValue::from_str(value).map_err(|_| ClientError::InvalidArgument {
            what,
            why: "it holds characters that a header cannot carry".to_owned(),
        })?;
        value.set_sensitive(true);
        headers.insert(name, value);
        Ok(())
    };
    set(API_KEY, "API key", &options.api_key)?;
    set(USER_ID, "owner", &options.owner)?;
    Ok(headers)
}

pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The workspace uses one TLS implementation, rustls with ring. Whoever came
/// first has installed it already; that is fine.
fn install_tls_provider() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(server: &str) -> Client {
        Client::new(&ClientOptions::new(server)).unwrap()
    }

    #[test]
    fn addresses_may_leave_out_the_scheme_and_may_have_a_path() {
        assert_eq!(client("127.0.0.1:7423").server(), "http://127.0.0.1:7423");
        assert_eq!(client("https://example.org/vm/").server(), "https://example.org/vm");
        let url = client("https://example.org/vm/").url(&["templates", "a/b c"]).unwrap();
        assert_eq!(url.as_str(), "https://example.org/vm/api/v1/templates/a%2Fb%20c");
    }

    #[test]
    fn addresses_that_cannot_be_servers_are_refused() {
        for server in ["", "ftp://example.org", "http://", "http://[1", "mailto:x@y", "http://u:p@h"] {
            assert!(Client::new(&ClientOptions::new(server)).is_err(), "{server:?}");
        }
    }

    #[test]
    fn segments_that_would_reach_another_resource_are_refused() {
        for name in ["", ".", ".."] {
            let error = client("127.0.0.1:1").url(&["sandboxes", name]).unwrap_err();
            assert!(error.to_string().contains("cannot name anything"), "{error}");
        }
    }

    #[test]
    fn keys_do_not_show_in_debug_output() {
        let options = ClientOptions { api_key: Some("hunter2".into()), ..ClientOptions::new("127.0.0.1:1") };
        assert!(!format!("{:?}", Client::new(&options).unwrap()).contains("hunter2"));
    }

    #[test]
    fn keys_that_no_header_can_carry_are_refused() {
        let options = ClientOptions { api_key: Some("a\nb".into()), ..ClientOptions::new("127.0.0.1:1") };
        assert!(Client::new(&options).unwrap_err().to_string().contains("API key"));
    }
}

//! Calls to a backend: where they go, how long and how large they may be.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, TryStreamExt};
use reqwest::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use stacyvm_api::backend::{Failure, KEY_HEADER, STREAM_PROTOCOL};
use tokio::time::timeout;

use super::error::{CallError, Said};

/// One answer that is kept in memory, at most.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Body of a failure that is read for its code, at most.
const FAILURE_BYTES_MAX: usize = 64 << 10;
/// A machine that lives accepts a connection at once.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// A connection that is not used is given up before a backend is likely to.
const IDLE_TIME_MAX: Duration = Duration::from_secs(2);
/// A dead machine is noticed below a stream that says nothing.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("base_url is not an address such as http://10.0.0.2:7425: {0}")]
    Malformed(String),
    #[error("the backend's key is not a header value")]
    Key,
    #[error("no secure connection can be made from this machine (are CA certificates installed?)")]
    Client(#[source] reqwest::Error),
}

/// A backend's address with its key.
#[derive(Debug, Clone)]
pub(super) struct Http {
    client: reqwest::Client,
    base: Url,
    /// For answers, and for the beginning of streams.
    limit: Duration,
    /// Whether the backend says that its failures are for callers.
    speaks: Arc<AtomicBool>,
}

impl Http {
    pub(super) fn new(base: &str, key: Option<&str>, limit: Duration) -> Result<Self, AddressError> {
        // The workspace uses one TLS implementation; whoever came first has
        // installed it already, which is fine.
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let base = parse(base)?;
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            let mut value = HeaderValue::try_from(key).map_err(|_| AddressError::Key)?;
            value.set_sensitive(true);
            headers.insert(HeaderName::from_static(KEY_HEADER), value);
        }
        let builder = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("stacyvm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIME_MAX.min(limit))
            .tcp_keepalive(KEEPALIVE_AFTER)
            .pool_idle_timeout(IDLE_TIME_MAX)
            // The key is for this address and no other.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            // Connections are upgraded, which HTTP/2 does differently.
            .http1_only();
        // Without TLS no certificates are needed, which not every machine has.
        let builder = if base.scheme() == "http" { builder.tls_certs_only([]) } else { builder };
        let client = builder.build().map_err(AddressError::Client)?;
        Ok(Self { client, base, limit, speaks: Arc::default() })
    }

    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Whether words of failures are kept from now on, for all that share this.
    pub(super) fn set_speaks(&self, speaks: bool) {
        self.speaks.store(speaks, Ordering::Relaxed);
    }

    /// What a failure says to callers, from a backend that may speak to them.
    pub(super) fn said(&self, failure: &Failure) -> Option<Box<Said>> {
        if self.speaks.load(Ordering::Relaxed) { Said::of(failure) } else { None }
    }

    /// A request to a path below the base; each segment is encoded.
    pub(super) fn request(&self, method: Method, path: &[&str], query: &[(&str, &str)]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            // A segment `..` would be dropped and name something else; the ids
            // that a backend chose are checked where they come in.
            segments.pop_if_empty().extend(path.iter().filter(|it| !matches!(**it, "" | "." | "..")));
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.client.request(method, url)
    }

    pub(super) fn get(&self, path: &[&str], query: &[(&str, &str)]) -> RequestBuilder {
        self.request(Method::GET, path, query)
    }

    pub(super) fn post<T: Serialize>(&self, path: &[&str], body: &T) -> RequestBuilder {
        self.request(Method::POST, path, &[]).json(body)
    }

    /// The beginning of a successful answer. What follows has no time limit.
    pub(super) async fn begin(&self, request: RequestBuilder) -> Result<Response, CallError> {
        self.within(self.limit, self.head(request)).await
    }

    /// As [`Http::begin`] where the answer only comes when something ended.
    pub(super) async fn begin_unbounded(&self, request: RequestBuilder) -> Result<Response, CallError> {
        self.head(request).await
    }

    /// A whole answer.
    pub(super) async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, CallError> {
        self.json_within(self.limit, request).await
    }

    pub(super) async fn json_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        request: RequestBuilder,
    ) -> Result<T, CallError> {
        let body = self.within(limit, async { whole(self.head(request).await?, ANSWER_BYTES_MAX).await }).await?;
        parse_json(&body)
    }

    /// A call of which only the success counts.
    pub(super) async fn done(&self, request: RequestBuilder) -> Result<(), CallError> {
        self.within(self.limit, self.head(request)).await.map(drop)
    }

    /// A connection that carries plain bytes from here on.
    pub(super) async fn stream(&self, path: &[&str], query: &[(&str, &str)]) -> Result<reqwest::Upgraded, CallError> {
        let request = self
            .get(path, query)
            .header(CONNECTION, HeaderValue::from_static("upgrade"))
            .header(UPGRADE, HeaderValue::from_static(STREAM_PROTOCOL));
        self.upgrade(request).await.map(|(stream, _)| stream)
    }

    pub(super) async fn upgrade(&self, request: RequestBuilder) -> Result<(reqwest::Upgraded, HeaderMap), CallError> {
        self.within(self.limit, async {
            let response = self.head(request).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(CallError::Garbage("the connection was not upgraded"));
            }
            let headers = response.headers().clone();
            Ok((response.upgrade().await.map_err(broken)?, headers))
        })
        .await
    }

    async fn head(&self, request: RequestBuilder) -> Result<Response, CallError> {
        let response = request.send().await.map_err(broken)?;
        let status = response.status();
        if status.is_redirection() {
            return Err(CallError::Garbage("it is a redirect"));
        }
        if !status.is_client_error() && !status.is_server_error() {
            return Ok(response);
        }
        let body = whole(response, FAILURE_BYTES_MAX).await.unwrap_or_default();
        let failure = serde_json::from_slice::<Failure>(&body).ok();
        let said = failure.as_ref().and_then(|failure| self.said(failure));
        Err(CallError::Refused { status: status.as_u16(), code: failure.map(|failure| failure.code), said })
    }

    async fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        timeout(limit, call).await.map_err(|_| CallError::TimedOut(limit))?
    }
}

/// A body that never ends by itself.
pub(super) fn body(response: Response) -> impl Stream<Item = Result<Bytes, CallError>> + Send + Unpin {
    Box::pin(response.bytes_stream().map_err(broken))
}

/// An answer that was read to its end.
pub(super) async fn whole_json<T: DeserializeOwned>(response: Response) -> Result<T, CallError> {
    parse_json(&whole(response, ANSWER_BYTES_MAX).await?)
}

fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, CallError> {
    // The parser's message would quote the body.
    serde_json::from_slice(body).map_err(|_| CallError::Garbage("it is not the JSON that was expected"))
}

async fn whole(response: Response, most: usize) -> Result<Bytes, CallError> {
    let mut stream = body(response);
    let mut gathered = BytesMut::new();
    while let Some(piece) = stream.try_next().await? {
        if gathered.len() + piece.len() > most {
            return Err(CallError::Garbage("it is too large"));
        }
        gathered.extend_from_slice(&piece);
    }
    Ok(gathered.freeze())
}

fn broken(error: reqwest::Error) -> CallError {
    let error = error.without_url();
    if error.is_connect() {
        CallError::Unreachable(error)
    } else if is_not_http(&error) {
        CallError::Garbage("it is not HTTP")
    } else {
        CallError::Broken(Some(io::Error::other(error)))
    }
}

fn is_not_http(error: &reqwest::Error) -> bool {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.filter_map(|cause| cause.downcast_ref::<hyper::Error>()).any(hyper::Error::is_parse)
}

fn parse(base: &str) -> Result<Url, AddressError> {
    let malformed = |why: &str| AddressError::Malformed(why.to_owned());
    let url = Url::parse(base.trim()).map_err(|error| AddressError::Malformed(error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(malformed("it has to begin with http:// or https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(malformed("put the key into api_key_file, not into the address"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(malformed("it must have no query and no fragment"));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_paths_are_encoded() {
        for bad in ["", "10.0.0.1:80", "ftp://x", "http://", "http://u:p@h", "http://h/?q=1", "http://h/#f"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let http = Http::new("http://h:1/below/", None, Duration::from_secs(1)).unwrap();
        let request = http.get(&["status", "a/b?c"], &[("path", "/x y&z=1")]).build().unwrap();
        assert_eq!(request.url().as_str(), "http://h:1/below/status/a%2Fb%3Fc?path=%2Fx+y%26z%3D1");
        assert!(matches!(Http::new("http://h", Some("a\nb"), Duration::from_secs(1)), Err(AddressError::Key)));
    }
}

//! Requests to the CA: bounded in time and size, over TLS only, to nobody whom
//! it sends us on to.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use reqwest::Certificate;
use serde::Deserialize;

use super::AcmeError;
use super::order::OrderError;

/// For one request and its answer.
const REQUEST_TIME: Duration = Duration::from_secs(30);

const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Certificate chains are a few KiB.
const MAX_ANSWER_BYTES: usize = 1 << 20;

#[derive(Clone)]
pub(super) struct CaClient(reqwest::Client);

/// Why an answer was not read to its end.
#[derive(Debug, thiserror::Error)]
enum Unread {
    #[error(transparent)]
    Broken(#[from] reqwest::Error),
    #[error("the answer is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
}

impl CaClient {
    pub(super) fn new(ca_file: Option<&Path>) -> Result<Self, AcmeError> {
        let mut builder = reqwest::Client::builder()
            .timeout(REQUEST_TIME)
            .connect_timeout(CONNECT_TIME)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .https_only(true);
        if let Some(path) = ca_file {
            builder = builder.tls_certs_only(roots(path)?);
        }
        builder.build().map(Self).map_err(AcmeError::Client)
    }
}

/// What every directory lists (RFC 8555 7.1.1), as far as it is used here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Directory {
    #[expect(dead_code, reason = "that it is there is what counts")]
    new_account: String,
    #[expect(dead_code, reason = "that it is there is what counts")]
    new_order: String,
}

impl CaClient {
    /// Whether an address is that of a CA's directory. Without this look a slip in
    /// it shows as whatever the page there makes of the protocol.
    pub(super) async fn check_directory(&self, url: &str) -> Result<(), OrderError> {
        let unreachable = |error: reqwest::Error| OrderError::Unreachable { url: url.to_owned(), error };
        let none = |why: String| Err(OrderError::NoDirectory { url: url.to_owned(), why });
        let response = self.0.get(url).send().await.map_err(unreachable)?;
        if !response.status().is_success() {
            return none(format!("it answers HTTP {}", response.status().as_u16()));
        }
        let body = match whole(response).await {
            Ok(body) => body,
            Err(Unread::Broken(error)) => return Err(unreachable(error)),
            Err(error @ Unread::TooLong) => return none(error.to_string()),
        };
        match serde_json::from_slice::<Directory>(&body) {
            Ok(_) => Ok(()),
            Err(_) => none("what is there is not one".to_owned()),
        }
    }
}

impl HttpClient for CaClient {
    fn request(
        &self,
        request: http::Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let client = self.0.clone();
        Box::pin(async move { call(&client, request).await.map_err(Error::Other) })
    }
}

async fn call(
    client: &reqwest::Client,
    request: http::Request<BodyWrapper<Bytes>>,
) -> Result<BytesResponse, Box<dyn std::error::Error + Send + Sync>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let request = reqwest::Request::try_from(http::Request::from_parts(head, body))?;
    let mut response = client.execute(request).await?;
    let mut answer = http::Response::new(());
    *answer.status_mut() = response.status();
    *answer.headers_mut() = std::mem::take(response.headers_mut());
    let body = match whole(response).await {
        Ok(body) => body,
        // Whether it was the connection is looked for by type.
        Err(Unread::Broken(error)) => return Err(error.into()),
        Err(error @ Unread::TooLong) => return Err(error.into()),
    };
    Ok(BytesResponse::from(answer.map(|()| Full::new(body))))
}

async fn whole(mut response: reqwest::Response) -> Result<Bytes, Unread> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(Unread::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// The roots in a file.
pub(super) fn roots(path: &Path) -> Result<Vec<Certificate>, AcmeError> {
    let refused = |why: String| AcmeError::Roots { path: path.to_owned(), why };
    let pem = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let roots = Certificate::from_pem_bundle(&pem).map_err(|error| refused(error.to_string()))?;
    if roots.is_empty() { Err(refused("there is no certificate in it".to_owned())) } else { Ok(roots) }
}

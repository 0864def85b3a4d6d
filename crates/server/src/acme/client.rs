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

use super::AcmeError;

/// For one request and its answer.
const REQUEST_TIME: Duration = Duration::from_secs(30);

const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Certificate chains are a few KiB.
const MAX_ANSWER_BYTES: usize = 1 << 20;

#[derive(Clone)]
pub(super) struct CaClient(reqwest::Client);

#[derive(Debug, thiserror::Error)]
#[error("the CA's answer is longer than {MAX_ANSWER_BYTES} bytes")]
struct TooLong;

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
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(TooLong.into());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(BytesResponse::from(answer.map(|()| Full::new(bytes.freeze()))))
}

/// The roots in a file.
pub(super) fn roots(path: &Path) -> Result<Vec<Certificate>, AcmeError> {
    let refused = |why: String| AcmeError::Roots { path: path.to_owned(), why };
    let pem = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let roots = Certificate::from_pem_bundle(&pem).map_err(|error| refused(error.to_string()))?;
    if roots.is_empty() { Err(refused("there is no certificate in it".to_owned())) } else { Ok(roots) }
}

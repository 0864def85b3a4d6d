//! Talks to registries: the OCI distribution API, read side.
//!
//! `oci-client` would do most of this, but it takes manifests and token answers
//! of any length into memory, cannot use identity tokens, and turns a refused
//! login into an anonymous request; a server that pulls what its users name
//! needs all three right. Requests are bounded in size, time and number.

mod auth;
mod credentials;
mod download;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use oci_spec::image::{ImageIndex, MediaType};
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Method, Response, StatusCode, redirect};
use serde::Deserialize;

use crate::store::MAX_DOCUMENT_BYTES;
use crate::{Digest, ImageError, ImageReference, Platform};
use auth::Tokens;
pub use credentials::Credentials;
pub(crate) use download::BlobRequest;

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A registry that sends nothing for this long is gone.
const IDLE_DEADLINE: Duration = Duration::from_secs(30);
/// For anything but a layer.
const DOCUMENT_DEADLINE: Duration = Duration::from_mins(1);
const MAX_REDIRECTS: usize = 5;
/// Tries for a manifest or token before giving up; users wait meanwhile.
const MAX_ATTEMPTS: u32 = 3;
/// What failed this slowly (no answer from DNS, no route) is not tried again.
const RETRY_WINDOW: Duration = Duration::from_secs(8);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(8);
/// What a registry may say about an error, as far as it is shown.
const MAX_ERROR_BYTES: u64 = 16 << 10;
const MAX_SHOWN_CHARS: usize = 300;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[derive(Debug, Clone, Default)]
pub(crate) struct RegistryOptions {
    pub(crate) docker_config: Option<PathBuf>,
    pub(crate) plain_http_registries: Vec<String>,
}

pub(crate) struct Registry {
    options: RegistryOptions,
    plain_hosts: Arc<Vec<String>>,
    /// Made when first needed: without CA certificates it cannot be made, and
    /// a loopback registry needs none.
    secure: OnceLock<Result<Client, String>>,
    /// Never through a proxy.
    plain: OnceLock<Result<Client, String>>,
    tokens: Tokens,
}

/// A manifest as the registry sent it, digest checked.
#[derive(Debug, Clone)]
pub(crate) struct RawManifest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
}

/// A manifest for our platform, and the index it came from.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) manifest: RawManifest,
    pub(crate) index: Option<Digest>,
}

/// Why one try failed, and whether another makes sense.
enum Failure {
    Final(ImageError),
    Passing { error: ImageError, wait: Option<Duration> },
}

impl Registry {
    pub(crate) fn new(options: RegistryOptions) -> Self {
        // Somebody in this process may have chosen one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain_hosts = Arc::new(options.plain_http_registries.clone());
        Self { options, plain_hosts, secure: OnceLock::new(), plain: OnceLock::new(), tokens: Tokens::default() }
    }

    /// Asks what `reference` means now, for `platform`.
    pub(crate) async fn resolve(
        &self,
        reference: &ImageReference,
        platform: &Platform,
    ) -> Result<Resolved, ImageError> {
        let first = self.manifest(reference, &reference.selector()).await?;
        let Some(index) = parse_index(reference, &first.bytes)? else {
            return Ok(Resolved { manifest: first, index: None });
        };
        let chosen = select_platform(reference, &index, platform)?;
        let manifest = self.manifest(reference, chosen.as_str()).await?;
        if parse_index(reference, &manifest.bytes)?.is_some() {
            return Err(ImageError::malformed(reference, "an index inside an index"));
        }
        Ok(Resolved { manifest, index: Some(first.digest) })
    }

    /// A manifest by tag or digest, as it is.
    pub(crate) async fn manifest(&self, reference: &ImageReference, selector: &str) -> Result<RawManifest, ImageError> {
        retrying(MAX_ATTEMPTS, || self.try_manifest(reference, selector)).await
    }

    async fn try_manifest(&self, reference: &ImageReference, selector: &str) -> Result<RawManifest, Failure> {
        let mut headers = HeaderMap::new();
        for kind in [OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST] {
            headers.append(header::ACCEPT, HeaderValue::from_static(kind));
        }
        let path = format!("manifests/{selector}");
        let response = self.send(reference, &path, headers, Some(DOCUMENT_DEADLINE)).await?;
        let stated = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let stated = stated.and_then(|value| value.parse::<Digest>().ok());
        let bytes = bounded_body(reference, response, MAX_DOCUMENT_BYTES).await?;
        let digest = Digest::of(&bytes);
        let expected = [selector.parse::<Digest>().ok(), stated];
        if let Some(expected) = expected.into_iter().flatten().find(|expected| *expected != digest) {
            return Err(Failure::Final(ImageError::DigestMismatch {
                what: format!("the manifest of `{reference}`"),
                expected: expected.to_string(),
                actual: digest.to_string(),
            }));
        }
        Ok(RawManifest { bytes, digest })
    }

    /// Sends one GET below the repository, logging in when asked to. Answers
    /// other than success are errors.
    async fn send(
        &self,
        reference: &ImageReference,
        path: &str,
        headers: HeaderMap,
        deadline: Option<Duration>,
    ) -> Result<Response, Failure> {
        let host = reference.registry_host();
        let scheme = if is_plain(host, &self.plain_hosts) { "http" } else { "https" };
        let url = format!("{scheme}://{host}/v2/{}/{path}", reference.repository());
        let client = self.client(reference, host)?;
        let known = self.tokens.get(reference);
        let had_token = known.is_some();
        let build = |authorization: Option<HeaderValue>| {
            let mut request = client.request(Method::GET, &url).headers(headers.clone());
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            match deadline {
                Some(deadline) => request.timeout(deadline),
                None => request,
            }
        };
        let mut response = build(known).send().await.map_err(|error| transport(reference, error))?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let challenges = challenges(&response);
            if had_token {
                self.tokens.forget(reference);
            }
            let authorization = self.log_in(reference, &challenges).await?;
            response = build(Some(authorization)).send().await.map_err(|error| transport(reference, error))?;
        }
        if response.status().is_success() { Ok(response) } else { Err(refusal(reference, response).await) }
    }

    fn client(&self, reference: &ImageReference, host: &str) -> Result<&Client, Failure> {
        let hosts = &self.plain_hosts;
        let client = if is_plain(host, hosts) {
            // Certificates are only for what it redirects to.
            let build = || client_builder(hosts).no_proxy().build();
            let without = |_: reqwest::Error| client_builder(hosts).no_proxy().tls_certs_only([]).build();
            self.plain.get_or_init(|| build().or_else(without).map_err(|error| root_cause(&error)))
        } else {
            let explain = |error: reqwest::Error| {
                format!("no TLS client (are CA certificates installed?): {}", root_cause(&error))
            };
            self.secure.get_or_init(|| client_builder(hosts).build().map_err(explain))
        };
        client.as_ref().map_err(|reason| {
            let cause = Arc::new(std::io::Error::other(reason.clone()));
            Failure::Final(ImageError::RegistryUnavailable { reference: reference.to_string(), cause })
        })
    }
}

fn client_builder(plain_hosts: &Arc<Vec<String>>) -> reqwest::ClientBuilder {
    let plain_hosts = plain_hosts.clone();
    // Registries send blobs from elsewhere; never from https to http, and
    // never into plain HTTP that was not allowed. Credentials stay behind.
    let policy = redirect::Policy::custom(move |attempt| {
        let url = attempt.url();
        let is_allowed = match url.scheme() {
            "https" => true,
            "http" => {
                let came_securely = attempt.previous().last().is_some_and(|previous| previous.scheme() == "https");
                !came_securely && is_plain(&authority(url), &plain_hosts)
            }
            _ => false,
        };
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirects")
        } else if is_allowed {
            attempt.follow()
        } else {
            attempt.error("redirect to a place that is not allowed")
        }
    });
    Client::builder()
        .user_agent(concat!("stacyvm/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_DEADLINE)
        .read_timeout(IDLE_DEADLINE)
        .redirect(policy)
}

fn authority(url: &reqwest::Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (host, _) => host.unwrap_or_default().to_owned(),
    }
}

/// Plain HTTP: loopback, where nobody listens in, and what the operator listed.
fn is_plain(host: &str, listed: &[String]) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = name == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || listed.iter().any(|entry| entry == host || entry == name)
}

fn challenges(response: &Response) -> Vec<String> {
    let values = response.headers().get_all(header::WWW_AUTHENTICATE).iter();
    values.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect()
}

async fn bounded_body(reference: &ImageReference, response: Response, limit: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| transport(reference, error))?;
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(Failure::Final(ImageError::TooLarge {
                what: format!("an answer of the registry of `{reference}`"),
                limit,
            }));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// A request that got no answer. The URL is left out of the cause: redirect
/// targets carry signatures.
fn transport(reference: &ImageReference, error: reqwest::Error) -> Failure {
    if error.is_redirect() || error.is_builder() {
        return Failure::Final(ImageError::malformed(reference, root_cause(&error)));
    }
    let error =
        ImageError::RegistryUnavailable { reference: reference.to_string(), cause: Arc::new(error.without_url()) };
    Failure::Passing { error, wait: None }
}

/// The innermost message, which is the one that says something.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    shown(&cause.to_string())
}

/// Text of a stranger, fit for a terminal.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN_CHARS).collect()
}

/// What an answer other than success means.
async fn refusal(reference: &ImageReference, response: Response) -> Failure {
    let status = response.status();
    let wait = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let wait = wait.and_then(|value| value.parse().ok()).map(|seconds| Duration::from_secs(seconds).min(MAX_BACKOFF));
    let body = bounded_body(reference, response, MAX_ERROR_BYTES).await.unwrap_or_default();
    let reason = error_text(status, &body);
    let named = reference.to_string();
    match status {
        StatusCode::NOT_FOUND => Failure::Final(ImageError::NotFound { reference: named }),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Failure::Final(ImageError::AccessDenied { reference: named, reason })
        }
        StatusCode::TOO_MANY_REQUESTS => Failure::Passing { error: ImageError::RateLimited { reference: named }, wait },
        _ if status.is_server_error() => {
            let cause = Arc::new(std::io::Error::other(reason));
            Failure::Passing { error: ImageError::RegistryUnavailable { reference: named, cause }, wait }
        }
        _ => Failure::Final(ImageError::malformed(reference, format!("the registry answers {reason}"))),
    }
}

fn error_text(status: StatusCode, body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        message: String,
    }
    let message = serde_json::from_slice::<Envelope>(body).ok();
    let message =
        message.and_then(|envelope| envelope.errors.into_iter().map(|entry| entry.message).find(|m| !m.is_empty()));
    match message {
        Some(message) => format!("{status}: {}", shown(&message)),
        None => status.to_string(),
    }
}

async fn retrying<T, F>(attempts: u32, mut attempt: impl FnMut() -> F) -> Result<T, ImageError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let started = Instant::now();
    let mut backoff = FIRST_BACKOFF;
    let mut left = attempts;
    loop {
        left -= 1;
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing { error, .. }) if left == 0 || started.elapsed() >= RETRY_WINDOW => return Err(error),
            Err(Failure::Passing { wait, .. }) => {
                tokio::time::sleep(wait.unwrap_or(backoff)).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}

/// An index, or `None` if the document is something else. What it says it is
/// counts more than headers: both kinds are told by their fields.
pub(crate) fn parse_index(reference: &dyn std::fmt::Display, bytes: &[u8]) -> Result<Option<ImageIndex>, ImageError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Probe {
        #[serde(default)]
        schema_version: u32,
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    let malformed = |error: serde_json::Error| ImageError::malformed(reference, format!("manifest: {error}"));
    let probe: Probe = serde_json::from_slice(bytes).map_err(malformed)?;
    if probe.schema_version != 2 {
        return Err(ImageError::Unsupported { what: "a manifest of schema version 1".into() });
    }
    let is_index = probe.manifests.is_some();
    // One document with both meanings is made to show different readers
    // different images (CVE-2021-41190).
    let says_index = probe.media_type.as_deref().map(|kind| kind == OCI_INDEX || kind == DOCKER_INDEX);
    if (is_index && probe.layers.is_some()) || says_index.is_some_and(|says| says != is_index) {
        return Err(ImageError::malformed(reference, "neither clearly an index nor a manifest"));
    }
    if is_index { serde_json::from_slice(bytes).map(Some).map_err(malformed) } else { Ok(None) }
}

/// The manifest to use on `platform`. Entries of the wanted variant come
/// first, then those without one.
pub(crate) fn select_platform(
    reference: &dyn std::fmt::Display,
    index: &ImageIndex,
    platform: &Platform,
) -> Result<Digest, ImageError> {
    let is_manifest = |kind: &MediaType| {
        *kind == MediaType::ImageManifest || matches!(kind, MediaType::Other(name) if name == DOCKER_MANIFEST)
    };
    let images = || index.manifests().iter().filter(|entry| is_manifest(entry.media_type()));
    let fitting: Vec<_> = images()
        .filter(|entry| entry.platform().as_ref().is_none_or(|p| platform.accepts(p.os(), p.architecture())))
        .collect();
    let variant_of =
        |entry: &&&oci_spec::image::Descriptor| entry.platform().as_ref().and_then(|p| p.variant().clone());
    let chosen = fitting
        .iter()
        .find(|entry| platform.variant.is_some() && variant_of(entry) == platform.variant)
        .or_else(|| fitting.iter().find(|entry| variant_of(entry).is_none()))
        .or_else(|| fitting.first());
    if let Some(entry) = chosen {
        return crate::store::descriptor_digest(&reference.to_string(), entry);
    }
    let names = images().filter_map(|entry| entry.platform().as_ref());
    let available: Vec<String> = names.map(|p| format!("{}/{}", p.os(), p.architecture())).take(20).collect();
    Err(ImageError::PlatformUnavailable {
        reference: reference.to_string(),
        platform: platform.to_string(),
        available: if available.is_empty() { "no image".into() } else { available.join(", ") },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_what_is_listed() {
        let listed = vec!["registry.lan:5000".to_owned(), "old.lan".to_owned()];
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
            "registry.lan:5000",
            "old.lan:80",
        ] {
            assert!(is_plain(host, &listed), "{host}");
        }
        for host in ["docker.io", "10.0.0.1:5000", "registry.lan", "localhost.example", "127.0.0.1.example:5000", "::2"]
        {
            assert!(!is_plain(host, &listed), "{host}");
        }
    }

    #[test]
    fn a_document_with_two_meanings_is_refused() {
        let both = br#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#;
        assert!(matches!(parse_index(&"x", both), Err(ImageError::Malformed { .. })));
        let lying = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","layers":[]}}"#);
        assert!(matches!(parse_index(&"x", lying.as_bytes()), Err(ImageError::Malformed { .. })));
        let old = br#"{"schemaVersion":1,"fsLayers":[]}"#;
        assert!(matches!(parse_index(&"x", old), Err(ImageError::Unsupported { .. })));
        assert!(parse_index(&"x", br#"{"schemaVersion":2,"layers":[]}"#).unwrap().is_none());
    }

    #[test]
    fn the_platform_decides() {
        let entry = |arch: &str, variant: &str, digest: &Digest| {
            format!(
                r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":1,
                "platform":{{"os":"linux","architecture":"{arch}"{variant}}}}}"#
            )
        };
        let digests: Vec<Digest> = (0..4u8).map(|n| Digest::of(&[n])).collect();
        let json = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
            entry("arm", r#","variant":"v6""#, &digests[0]),
            entry("arm", r#","variant":"v7""#, &digests[1]),
            entry("amd64", "", &digests[2]),
            entry("unknown", "", &digests[3]),
        );
        let index = parse_index(&"x", json.as_bytes()).unwrap().unwrap();
        let platform = |architecture: &str, variant: Option<&str>| Platform {
            os: oci_spec::image::Os::Linux,
            architecture: architecture.into(),
            variant: variant.map(str::to_owned),
        };
        let chosen = |platform: &Platform| select_platform(&"x", &index, platform);
        assert_eq!(chosen(&platform("amd64", None)).unwrap(), digests[2]);
        assert_eq!(chosen(&platform("arm", Some("v7"))).unwrap(), digests[1]);
        assert_eq!(chosen(&platform("arm", None)).unwrap(), digests[0]);
        match chosen(&platform("s390x", None)) {
            Err(ImageError::PlatformUnavailable { available, .. }) => assert!(available.contains("linux/amd64")),
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn words_of_a_registry_are_made_harmless() {
        assert_eq!(shown("a\x1b[31mb\n"), "a [31mb ");
        let body = br#"{"errors":[{"code":"DENIED","message":"no\nentry"}]}"#;
        assert_eq!(error_text(StatusCode::FORBIDDEN, body), "403 Forbidden: no entry");
        assert_eq!(error_text(StatusCode::BAD_GATEWAY, b"<html>"), "502 Bad Gateway");
    }

    #[test]
    fn tokens_are_kept_per_repository_until_they_expire() {
        let tokens = Tokens::default();
        let a: ImageReference = "127.0.0.1:1/a".parse().unwrap();
        let b: ImageReference = "127.0.0.1:1/b".parse().unwrap();
        tokens.put(&a, HeaderValue::from_static("Bearer x"), Duration::from_mins(1));
        assert!(tokens.get(&a).is_some());
        assert!(tokens.get(&b).is_none());
        tokens.put(&b, HeaderValue::from_static("Bearer y"), Duration::ZERO);
        assert!(tokens.get(&b).is_none());
    }
}

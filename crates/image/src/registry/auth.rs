//! Logging in: the registry says how in its challenge, we follow it as far as
//! is safe. Tokens are asked for pulling one repository, nothing more.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::ChallengeRef;
use reqwest::header::{self, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::credentials::{self, Credentials};
use super::{DOCUMENT_DEADLINE, Failure, Registry, authority, bounded_body, is_plain, refusal, transport};
use crate::{ImageError, ImageReference};

/// "If omitted, this defaults to 60 seconds" (distribution token spec).
const DEFAULT_TOKEN_SECONDS: u64 = 60;
const MAX_TOKEN_SECONDS: u64 = 24 * 60 * 60;
/// A token that is about to expire is not worth sending.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
/// Tokens of a few kilobytes exist.
const MAX_TOKEN_ANSWER_BYTES: u64 = 256 << 10;
const CLIENT_ID: &str = "stacyvm";

/// What to send with requests, by registry host and repository.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<(String, String), (HeaderValue, Instant)>>);

impl Tokens {
    pub(super) fn get(&self, reference: &ImageReference) -> Option<HeaderValue> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (value, expires_at) = tokens.get(&key(reference))?;
        (*expires_at > Instant::now() + TOKEN_MARGIN).then(|| value.clone())
    }

    pub(super) fn put(&self, reference: &ImageReference, value: HeaderValue, lifetime: Duration) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        tokens.retain(|_, (_, expires_at)| *expires_at > now);
        tokens.insert(key(reference), (value, now + lifetime));
    }

    pub(super) fn forget(&self, reference: &ImageReference) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&key(reference));
    }
}

fn key(reference: &ImageReference) -> (String, String) {
    (reference.registry_host().to_owned(), reference.repository().to_owned())
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    expires_in: Option<u64>,
}

impl Registry {
    /// Answers a registry's challenge; the result is kept for the next request.
    pub(super) async fn log_in(
        &self,
        reference: &ImageReference,
        challenges: &[String],
    ) -> Result<HeaderValue, Failure> {
        let credentials = credentials::find(self.options.docker_config.as_deref(), reference.registry())
            .await
            .map_err(Failure::Final)?;
        if let Credentials::RegistryToken(token) = &credentials {
            return secret_header(reference, &format!("Bearer {token}"));
        }
        let parsed: Vec<ChallengeRef<'_>> =
            challenges.iter().filter_map(|text| http_auth::parse_challenges(text).ok()).flatten().collect();
        let find = |scheme: &str| parsed.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        let (value, lifetime) = if let Some(bearer) = find("bearer") {
            self.fetch_token(reference, bearer, &credentials).await?
        } else if find("basic").is_some() {
            let Credentials::Password { user, password } = &credentials else {
                return Err(denied(reference, "it asks for a password"));
            };
            (basic_header(reference, user, password)?, Duration::from_secs(MAX_TOKEN_SECONDS))
        } else {
            return Err(denied(reference, "it asks for a kind of login we do not know"));
        };
        self.tokens.put(reference, value.clone(), lifetime);
        Ok(value)
    }

    /// <https://distribution.github.io/distribution/spec/auth/token/>, and the
    /// OAuth2 variant for identity tokens.
    async fn fetch_token(
        &self,
        reference: &ImageReference,
        challenge: &ChallengeRef<'_>,
        credentials: &Credentials,
    ) -> Result<(HeaderValue, Duration), Failure> {
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = parameter("realm").and_then(|realm| Url::parse(&realm).ok());
        let mut realm = realm.ok_or_else(|| denied(reference, "its login service has no address"))?;
        let host = authority(&realm);
        // Credentials go over TLS, or stay on this machine.
        let is_safe = realm.scheme() == "https" || (realm.scheme() == "http" && is_plain(&host, &self.plain_hosts));
        if !is_safe {
            return Err(denied(reference, "its login service is not reached over https"));
        }
        let service = parameter("service");
        let scope = format!("repository:{}:pull", reference.repository());
        let client = self.client(reference, &host)?;
        let request = if let Credentials::IdentityToken(token) = credentials {
            let mut form = form_url();
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("refresh_token", token)
                .append_pair("client_id", CLIENT_ID)
                .append_pair("scope", &scope)
                .extend_pairs(service.iter().map(|service| ("service", service)));
            client
                .request(Method::POST, realm)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or_default().to_owned())
        } else {
            realm
                .query_pairs_mut()
                .extend_pairs(service.iter().map(|service| ("service", service)))
                .append_pair("scope", &scope);
            let request = client.request(Method::GET, realm);
            match credentials {
                Credentials::Password { user, password } => request.basic_auth(user, Some(password)),
                Credentials::Anonymous | Credentials::IdentityToken(_) | Credentials::RegistryToken(_) => request,
            }
        };
        let response = request.timeout(DOCUMENT_DEADLINE).send().await.map_err(|error| transport(reference, error))?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND => {
                return Err(denied(reference, "its login service refuses our credentials"));
            }
            _ => return Err(refusal(reference, response).await),
        }
        let body = bounded_body(reference, response, MAX_TOKEN_ANSWER_BYTES).await?;
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| denied(reference, "its login service gives no token"))?;
        let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
        if token.is_empty() {
            return Err(denied(reference, "its login service gives no token"));
        }
        let seconds = answer.expires_in.unwrap_or(DEFAULT_TOKEN_SECONDS).clamp(1, MAX_TOKEN_SECONDS);
        Ok((secret_header(reference, &format!("Bearer {token}"))?, Duration::from_secs(seconds)))
    }
}

/// Only its query part is used, which has the form encoding.
fn form_url() -> Url {
    Url::parse("form:").unwrap_or_else(|_| unreachable!("a constant that parses"))
}

fn basic_header(reference: &ImageReference, user: &str, password: &str) -> Result<HeaderValue, Failure> {
    secret_header(reference, &format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

fn secret_header(reference: &ImageReference, text: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(text).map_err(|_| denied(reference, "its token is not valid"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn denied(reference: &ImageReference, reason: &str) -> Failure {
    Failure::Final(ImageError::AccessDenied { reference: reference.to_string(), reason: reason.to_owned() })
}

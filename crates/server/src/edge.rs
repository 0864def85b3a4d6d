//! The outermost layer: every request passes here first and every response
//! last. Request ids, the guards against web pages, CORS, panics, the envelope
//! of failures, the access log and the HTTP metrics.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use stacyvm_api::ErrorCode;
use tracing::Instrument as _;

use crate::auth::Authenticator;
use crate::error::{ApiError, REQUEST_ID};
use crate::extract::Reached;
use crate::guard::{self, CorsGrant};
use crate::table::{BASE, NO_STORE};
use crate::unread::BodyRead;
use crate::{App, gate};

/// Longest request id that is taken over from a client.
const REQUEST_ID_MAX_BYTES: usize = 128;

/// Answers of the API are data: as a page they may do nothing.
const API_POLICY: &str = "default-src 'none'; frame-ancestors 'none'; sandbox";

/// Label of requests that no route matched, so that scanners cannot grow the
/// metrics.
const UNMATCHED: &str = "unmatched";

pub(crate) async fn edge(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let request_id = request_id(&app.auth, request.headers());
    request.extensions_mut().insert(RequestId(request_id.clone()));
    let method = request.method().clone();
    let path = app.auth.without_keys(request.uri().path()).into_owned();
    let is_api = path.starts_with(BASE);
    let route = request.extensions().get::<MatchedPath>().cloned();

    let body_read = BodyRead::watch(&mut request);
    // Whatever is logged meanwhile can be found by the id.
    let span = tracing::info_span!("request", request_id);
    let (mut response, grant) = pass(&app, request, next).instrument(span).await;
    let failure = envelope(&mut response, &request_id);
    grant.apply(response.headers_mut());
    protect(response.headers_mut(), is_api);
    body_read.settle(&mut response).await;
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }

    let status = response.status();
    let elapsed = started.elapsed();
    let route = route.as_ref().map_or(UNMATCHED, MatchedPath::as_str);
    app.http_metrics.observe(&method, route, status, elapsed);
    log(&app, &method, &path, status, elapsed, &request_id, failure.as_ref());
    response
}

/// The id of a request: an extension of it.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(String);

impl RequestId {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The guards, then the routes. A panic becomes an error of this request only.
async fn pass(app: &App, mut request: Request, next: Next) -> (Response, CorsGrant) {
    let host = authority(&request);
    if let Err(refused) = app.guard.check_host(host.as_ref()) {
        return (refuse(app, &request, refused), CorsGrant::None);
    }
    let mut grant = CorsGrant::None;
    if request.uri().path().starts_with(BASE) {
        if guard::is_preflight(request.method(), request.headers()) {
            return preflight(app, &request, host.as_ref());
        }
        match app.guard.check_origin(request.headers(), host.as_ref()) {
            Ok(granted) => grant = granted,
            Err(refused) => return (refuse(app, &request, refused), CorsGrant::None),
        }
    }
    request.extensions_mut().insert(Reached(host));
    let response = AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|panic| {
        tracing::error!(panic = panic_text(panic.as_ref()), "a request handler panicked");
        ApiError::for_status(StatusCode::INTERNAL_SERVER_ERROR).into_response()
    });
    (response, grant)
}

fn preflight(app: &App, request: &Request, host: Option<&Authority>) -> (Response, CorsGrant) {
    match app.guard.check_preflight(request.headers(), host) {
        Ok(grant) => {
            let mut response = StatusCode::OK.into_response();
            grant.apply_preflight(response.headers_mut());
            (response, CorsGrant::None)
        }
        Err(refused) => (refuse(app, request, refused), CorsGrant::None),
    }
}

/// Refused before any route looks at it.
fn refuse(app: &App, request: &Request, refused: ApiError) -> Response {
    let response = refused.into_response();
    if response.status() == StatusCode::FORBIDDEN {
        gate::refused_at_the_edge(app, request, response.status());
    }
    response
}

/// Which server the request means: HTTP/2 and proxies say it in the URI,
/// HTTP/1.1 in `Host`. Two different answers are none.
pub(crate) fn authority<B>(request: &http::Request<B>) -> Option<Authority> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let header = match (hosts.next(), hosts.next()) {
        (Some(value), None) => Some(value.to_str().ok()?.parse::<Authority>().ok()?),
        (None, _) => None,
        (Some(_), Some(_)) => return None,
    };
    match (request.uri().authority(), header) {
        (Some(uri), Some(header)) if *uri != header => None,
        (Some(uri), _) => Some(uri.clone()),
        (None, Some(header)) => Some(header),
        // HTTP/1.0 has no Host; only programs still speak it.
        (None, None) if request.version() == Version::HTTP_10 => Some(Authority::from_static("localhost")),
        (None, None) => None,
    }
}

/// Gives every failed response the one body; answers what failed.
fn envelope(response: &mut Response, request_id: &str) -> Option<ApiError> {
    let status = response.status();
    let known = response.extensions_mut().remove::<ApiError>();
    let is_ours = response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value == "application/json");
    let failure = match known {
        Some(failure) => failure,
        None if (status.is_client_error() || status.is_server_error()) && !is_ours => ApiError::for_status(status),
        None => return None,
    };
    *response.body_mut() = Body::from(failure.body(request_id));
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, NO_STORE);
    Some(failure)
}

/// What keeps browsers from doing more with an answer than reading it: what a
/// sandbox wrote must never run as a page of this origin, nor be framed, kept or
/// told to others.
fn protect(headers: &mut HeaderMap, is_api: bool) {
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if is_api {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(API_POLICY));
        headers.entry(header::CACHE_CONTROL).or_insert(NO_STORE);
    } else {
        headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(API_POLICY));
    }
}

/// The client's own id where it is short and printable and holds no key, else a
/// new one.
fn request_id(auth: &Authenticator, headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given {
        Some(text) if !text.is_empty() && text.len() <= REQUEST_ID_MAX_BYTES && !auth.finds_key_in(text) => {
            text.to_owned()
        }
        _ => random_uuid(),
    }
}

/// A version 4 UUID (RFC 9562 5.4).
pub(crate) fn random_uuid() -> String {
    let mut bits: u128 = rand::random();
    bits = (bits & !(0xf << 76)) | (0x4 << 76);
    bits = (bits & !(0x3 << 62)) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn log(
    app: &App,
    method: &http::Method,
    path: &str,
    status: StatusCode,
    elapsed: std::time::Duration,
    request_id: &str,
    failure: Option<&ApiError>,
) {
    let duration_ms = elapsed.as_secs_f64() * 1000.0;
    let status = status.as_u16();
    let Some(failure) = failure else {
        tracing::info!(target: "stacyvm::access", %method, path, status, duration_ms, request_id);
        return;
    };
    let (code, message, cause) = (failure.code(), &*app.auth.without_keys(failure.message()), failure.cause());
    if code == ErrorCode::InternalError || cause.is_some() {
        tracing::warn!(target: "stacyvm::access", %method, path, status, duration_ms, request_id, %code, message, cause);
    } else {
        tracing::info!(target: "stacyvm::access", %method, path, status, duration_ms, request_id, %code, message);
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("unknown")
}

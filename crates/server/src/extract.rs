//! Reading requests: callers, path ids, queries and JSON bodies, each refused
//! with a message that says what is wrong.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use stacyvm_api::{ErrorCode, ExecId, OwnerId, SandboxId};
use stacyvm_engine::{Caller, has_key_form};

use crate::App;
use crate::auth::Identity;
use crate::error::ApiError;
use crate::preview::Address;
use crate::table::{BodyRule, Rule};

/// A JSON body has to arrive within this time (http-api 1: read timeout).
const JSON_BODY_DEADLINE: Duration = Duration::from_secs(30);

/// Longest `Idempotency-Key`.
const IDEMPOTENCY_KEY_MAX_BYTES: usize = 255;

/// The authenticated caller, as the engine sees it.
pub(crate) struct From(pub(crate) Caller);

/// The authenticated caller, with what its key allows.
pub(crate) struct Who(pub(crate) Identity);

/// A JSON body. An empty one is an error unless the route's rule says
/// otherwise; `null` is an object of defaults, but for commands and files.
pub(crate) struct Json<T>(pub(crate) T);

/// The query string, with `+` and `%20` as spaces.
pub(crate) struct Query<T>(pub(crate) T);

/// The sandbox named in the path.
pub(crate) struct Sandbox(pub(crate) SandboxId);

/// The host at which this server was reached.
#[derive(Clone, Default)]
pub(crate) struct Reached(pub(crate) Option<Authority>);

/// The port named in the path, of its sandbox.
pub(crate) struct SandboxPort(pub(crate) Address);

/// The command named in the path, in its sandbox.
pub(crate) struct Exec(pub(crate) SandboxId, pub(crate) ExecId);

/// Any single name in the path, decoded once.
pub(crate) struct Name(pub(crate) String);

/// Who calls: the identity from the keys, the tenant as the caller says, and so
/// the owner unless the key is bound to one.
pub(crate) fn caller(headers: &HeaderMap, identity: &Identity) -> Result<Caller, ApiError> {
    let named = owner_header(headers, "x-user-id")?;
    let owner = match (identity.owner(), named) {
        (Some(bound), Some(named)) if *bound != named => {
            return Err(ApiError::new(ErrorCode::Forbidden, format!("this key acts for {bound} only"))
                .hint("leave the header X-User-ID out, or use a key without an owner"));
        }
        (bound, named) => named.or_else(|| bound.cloned()),
    };
    let tenant = owner_header(headers, "x-tenant-id")?.map(String::from);
    Ok(Caller { owner, bound_to: identity.owner().cloned(), actor: identity.actor(), tenant })
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(text) if !text.is_empty() && text.len() <= IDEMPOTENCY_KEY_MAX_BYTES => Ok(Some(text.to_owned())),
        _ => Err(ApiError::bad_request(format!(
            "Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_MAX_BYTES} printable characters"
        ))),
    }
}

fn owner_header(headers: &HeaderMap, name: &'static str) -> Result<Option<OwnerId>, ApiError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = std::str::from_utf8(value.as_bytes()).map_err(|_| bad_header(name, "it is not UTF-8"))?;
    // It would stay in records for ever.
    if has_key_form(text.trim().as_bytes()) {
        return Err(bad_header(name, "it holds an API key; keys go into X-API-Key"));
    }
    OwnerId::parse_optional(text).map_err(|error| bad_header(name, &error.to_string()))
}

fn bad_header(name: &str, why: &str) -> ApiError {
    ApiError::bad_request(format!("header {name}: {why}"))
}

impl FromRequestParts<App> for From {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, ApiError> {
        // Always there: the route table puts it in before any handler runs.
        Ok(Self(parts.extensions.get::<Caller>().cloned().unwrap_or_default()))
    }
}

impl FromRequestParts<App> for Who {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, ApiError> {
        // Like the caller, from the route table.
        Ok(Self(parts.extensions.get::<Identity>().cloned().unwrap_or(Identity::NOBODY)))
    }
}

impl FromRequestParts<App> for Reached {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, ApiError> {
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
}

impl FromRequestParts<App> for Sandbox {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Name(id) = Name::from_request_parts(parts, app).await?;
        sandbox_id(&id).map(Self)
    }
}

impl FromRequestParts<App> for SandboxPort {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Path((id, port)) = Path::<(String, String)>::from_request_parts(parts, app).await.map_err(bad_path)?;
        let id = sandbox_id(&id)?;
        match port.parse() {
            Ok(port) if port > 0 => Ok(Self(Address { id, port })),
            Ok(_) | Err(_) => Err(ApiError::bad_request(format!("`{port}` is not a port; write 1 to 65535"))),
        }
    }
}

impl FromRequestParts<App> for Exec {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Path((id, exec_id)) = Path::<(String, String)>::from_request_parts(parts, app).await.map_err(bad_path)?;
        let sandbox = sandbox_id(&id)?;
        let exec_id = exec_id.parse().map_err(|_| {
            ApiError::new(ErrorCode::NotFound, format!("command {exec_id} is not known in sandbox {id}"))
        })?;
        Ok(Self(sandbox, exec_id))
    }
}

impl FromRequestParts<App> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Path(name) = Path::<String>::from_request_parts(parts, app).await.map_err(bad_path)?;
        Ok(Self(name))
    }
}

/// A text that can't be an id names no sandbox.
fn sandbox_id(text: &str) -> Result<SandboxId, ApiError> {
    text.parse().map_err(|_| ApiError::new(ErrorCode::NotFound, format!("sandbox {text} does not exist")))
}

#[expect(clippy::needless_pass_by_value, reason = "used with map_err")]
fn bad_path(rejection: axum::extract::rejection::PathRejection) -> ApiError {
    ApiError::bad_request(format!("the path cannot be read: {}", rejection.body_text()))
}

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, ApiError> {
        let axum::extract::Query(value) = axum::extract::Query::try_from_uri(&parts.uri).map_err(|rejection| {
            let cause =
                std::error::Error::source(&rejection).map_or_else(|| rejection.body_text(), ToString::to_string);
            ApiError::bad_request(format!("query: {cause}"))
        })?;
        Ok(Self(value))
    }
}

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let rule = request.extensions().get::<Rule>().map_or(BodyRule::Json, |rule| rule.body);
        let limit = match rule {
            BodyRule::FileJson => app.options.body_limits.file_json_bytes,
            BodyRule::None | BodyRule::OptionalJson | BodyRule::Json | BodyRule::Upload => {
                app.options.body_limits.json_bytes
            }
        };
        let bytes = tokio::time::timeout(JSON_BODY_DEADLINE, read_body(request, limit))
            .await
            .map_err(|_| ApiError::new(ErrorCode::Timeout, "the request body did not arrive in time"))??;
        match parse(&bytes, rule)? {
            Some(value) => Ok(Self(value)),
            None => parse(b"{}", rule)?.map(Self).ok_or_else(|| ApiError::bad_request("the body is empty")),
        }
    }
}

async fn read_body(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: usize| length > limit) {
        return Err(too_large(limit));
    }
    let mut body: Body = request.into_body();
    let mut all = BytesMut::with_capacity(declared.unwrap_or(0));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("the request body ended early"))?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(ErrorCode::PayloadTooLarge, format!("the request body is larger than {limit} bytes"))
        .hint("send large files with PUT /api/v1/sandboxes/{id}/files, which has no limit")
}

/// `None` stands for "all defaults".
fn parse<T: DeserializeOwned>(bytes: &[u8], rule: BodyRule) -> Result<Option<T>, ApiError> {
    if bytes.is_empty() {
        return match rule {
            BodyRule::OptionalJson | BodyRule::None => Ok(None),
            BodyRule::Json | BodyRule::FileJson | BodyRule::Upload => {
                Err(ApiError::bad_request("the request body is empty; send a JSON object"))
            }
        };
    }
    // Neither a command nor a file can be made of defaults.
    if bytes.trim_ascii() == b"null" && rule != BodyRule::FileJson {
        return Ok(None);
    }
    // serde would take a list for the fields of an object in order.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(ApiError::bad_request("the request body must be a JSON object"));
    }
    // serde skips unknown fields without looking at their bytes.
    let text = std::str::from_utf8(bytes).map_err(|_| ApiError::bad_request("the request body is not UTF-8"))?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match path.as_str() {
            "." | "?" => ApiError::bad_request(format!("the request body is not valid: {inner}")),
            field => ApiError::bad_request(format!("field `{field}`: {inner}")),
        }
    })?;
    deserializer.end().map_err(|error| ApiError::bad_request(format!("the request body is not valid: {error}")))?;
    Ok(Some(value))
}

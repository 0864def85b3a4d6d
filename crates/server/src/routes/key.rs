//! API keys: made, listed, revoked by administrators.

use axum::extract::State;
use stacyvm_api::{ApiKey, ApiKeyQuery, ApiKeyRequest, CreatedApiKey, ErrorCode, KeyRevokeQuery, KeyScope, StatusBody};
use stacyvm_engine::{LastAdminKey, RevokedKeys};

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Json, Name, Query};
use crate::options::Authentication;
use crate::reply::Reply;

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn create(
    State(app): State<App>,
    From(caller): From,
    Json(request): Json<ApiKeyRequest>,
) -> Answer<CreatedApiKey> {
    if app.options.authentication == Authentication::Off {
        return Err(ApiError::new(ErrorCode::Conflict, "authentication is off, so that a key would have no effect")
            .hint("take `auth.enabled: false` out of the configuration and start the server again"));
    }
    // From the first key on, the server is closed to whoever has none.
    let administers = request.scopes.as_ref().is_some_and(|scopes| scopes.contains(&KeyScope::Admin));
    if !administers && !app.auth.can_be_administered() {
        return Err(ApiError::new(ErrorCode::Conflict, "the first key must have the scope admin:*")
            .hint("without one nobody could make or revoke keys; make that one first"));
    }
    Ok(Reply::created(app.engine.keys().create(&caller.actor, request).await?))
}

pub(super) async fn list(State(app): State<App>, Query(query): Query<ApiKeyQuery>) -> Answer<Vec<ApiKey>> {
    let revoked = if query.revoked { RevokedKeys::Included } else { RevokedKeys::LeftOut };
    Ok(Reply::ok(app.engine.keys().list(revoked).await?))
}

pub(super) async fn revoke(
    State(app): State<App>,
    Name(id): Name,
    Query(query): Query<KeyRevokeQuery>,
) -> Answer<StatusBody> {
    // What cannot be an id may be a key: it is not repeated.
    let id = id.parse().map_err(|_| ApiError::new(ErrorCode::NotFound, "there is no key of that id"))?;
    let may_go = query.force || app.auth.has_configured_admin();
    let last_admin = if may_go { LastAdminKey::Revoked } else { LastAdminKey::Kept };
    app.engine.keys().revoke(&id, last_admin).await?;
    Ok(Reply::ok(StatusBody::new("revoked")))
}

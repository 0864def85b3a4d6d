//! Per-owner limits.

use axum::extract::State;
use stacyvm_api::{ErrorCode, KeyScope, OwnerId, OwnerQuota, OwnerQuotaRequest, OwnerUsage, QuotaSummary, StatusBody};

use crate::App;
use crate::auth::Identity;
use crate::error::ApiError;
use crate::extract::{From, Json, Name, Who};
use crate::reply::Reply;

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn list(State(app): State<App>) -> Answer<Vec<OwnerQuota>> {
    Ok(Reply::ok(app.engine.list_quotas()))
}

pub(super) async fn summary(State(app): State<App>) -> Answer<QuotaSummary> {
    Ok(Reply::ok(app.engine.quota_summary()))
}

pub(super) async fn get(State(app): State<App>, Name(owner): Name) -> Answer<OwnerQuota> {
    Ok(Reply::ok(app.engine.get_quota(&owner_id(&owner)?)?))
}

pub(super) async fn put(
    State(app): State<App>,
    From(caller): From,
    Who(identity): Who,
    Name(owner): Name,
    Json(request): Json<OwnerQuotaRequest>,
) -> Answer<OwnerQuota> {
    check_may_change(&identity)?;
    Ok(Reply::ok(app.engine.put_quota(&caller, &owner_id(&owner)?, &request).await?))
}

pub(super) async fn remove(
    State(app): State<App>,
    From(caller): From,
    Who(identity): Who,
    Name(owner): Name,
) -> Answer<StatusBody> {
    check_may_change(&identity)?;
    app.engine.delete_quota(&caller, &owner_id(&owner)?).await?;
    Ok(Reply::ok(StatusBody::new("deleted")))
}

pub(super) async fn usage(State(app): State<App>, Name(owner): Name) -> Answer<OwnerUsage> {
    Ok(Reply::ok(app.engine.owner_usage(&owner_id(&owner)?)))
}

/// A key that is bound to an owner must not lift that owner's limits.
fn check_may_change(identity: &Identity) -> Result<(), ApiError> {
    if identity.owner().is_none() || identity.holds(KeyScope::Admin) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Forbidden, "a key that acts for one owner cannot change quotas"))
}

fn owner_id(text: &str) -> Result<OwnerId, ApiError> {
    text.parse().map_err(|error: stacyvm_api::ParseIdError| ApiError::bad_request(error.to_string()))
}

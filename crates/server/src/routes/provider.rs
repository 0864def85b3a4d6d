//! Runtimes and their health.

use std::collections::BTreeMap;

use axum::extract::State;
use stacyvm_api::{ProviderDetail, ProviderHealth};

use crate::App;
use crate::error::ApiError;
use crate::extract::Name;
use crate::reply::Reply;

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn list(State(app): State<App>) -> Answer<Vec<ProviderHealth>> {
    Ok(Reply::ok(app.engine.providers()))
}

pub(super) async fn get(State(app): State<App>, Name(name): Name) -> Answer<ProviderDetail> {
    Ok(Reply::ok(app.engine.provider(&name)?))
}

pub(super) async fn test(State(app): State<App>) -> Answer<BTreeMap<String, bool>> {
    Ok(Reply::ok(app.engine.test_providers().await))
}

//! Sandboxes: create, list, show, extend, destroy, and what they report.

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use stacyvm_api::{
    AdmissionDecision, CreateRequest, ExtendRequest, ListQuery, PruneResult, Sandbox as SandboxBody, SandboxStats,
    StatusBody,
};
use stacyvm_engine::{CreateOptions, Destroyed};

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Json, Name, Query, Sandbox, idempotency_key};
use crate::reply::Reply;

/// Lines of a log when the query names no number, or none that makes sense.
const DEFAULT_LOG_LINES: usize = 100;
const MAX_LOG_LINES: usize = 10_000;

/// Largest page of a list.
const MAX_PAGE: u32 = 1000;

type Answer<T> = Result<Reply<T>, ApiError>;

/// A sandbox as callers see it: the engine does not know how the server is
/// reached.
pub(super) fn shown(app: &App, sandbox: SandboxBody) -> SandboxBody {
    SandboxBody { preview_domain: app.previews.published_domain(), ..sandbox }
}

pub(super) async fn create(
    State(app): State<App>,
    From(caller): From,
    headers: HeaderMap,
    Json(request): Json<CreateRequest>,
) -> Answer<SandboxBody> {
    let options = CreateOptions { idempotency_key: idempotency_key(&headers)? };
    let sandbox = app.engine.create(&caller, request, options).await?;
    Ok(Reply::created(shown(&app, sandbox)))
}

pub(super) async fn list(
    State(app): State<App>,
    From(caller): From,
    Query(query): Query<ListQuery>,
) -> Answer<Vec<SandboxBody>> {
    if query.limit.is_some_and(|limit| limit == 0 || limit > MAX_PAGE) {
        return Err(ApiError::bad_request(format!("query: limit must be 1 to {MAX_PAGE}")));
    }
    let page = app.engine.list(&caller, &query).await?;
    let sandboxes = page.items.into_iter().map(|sandbox| shown(&app, sandbox)).collect();
    Ok(Reply::ok(sandboxes).next_cursor(page.next_cursor.as_deref()))
}

pub(super) async fn prune(State(app): State<App>, From(caller): From) -> Answer<PruneResult> {
    Ok(Reply::ok(PruneResult { pruned: app.engine.prune(&caller).await? }))
}

pub(super) async fn admission(
    State(app): State<App>,
    From(caller): From,
    Json(request): Json<CreateRequest>,
) -> Answer<AdmissionDecision> {
    Ok(Reply::ok(app.engine.admission(&caller, &request).await?))
}

pub(super) async fn get(State(app): State<App>, From(caller): From, Sandbox(id): Sandbox) -> Answer<SandboxBody> {
    Ok(Reply::ok(shown(&app, app.engine.get(&caller, &id)?)))
}

pub(super) async fn destroy(State(app): State<App>, From(caller): From, Name(id): Name) -> Answer<StatusBody> {
    // What cannot be an id names nothing, and destroying nothing succeeds.
    let Ok(id) = id.parse() else { return Ok(Reply::ok(StatusBody::new("destroyed"))) };
    Ok(match app.engine.destroy(&caller, &id).await? {
        Destroyed::Done => Reply::ok(StatusBody::new("destroyed")),
        Destroyed::Retrying => Reply::with(StatusCode::ACCEPTED, StatusBody::new("destroying")),
    })
}

pub(super) async fn extend(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Json(request): Json<ExtendRequest>,
) -> Answer<SandboxBody> {
    if request.ttl.is_zero() {
        return Err(ApiError::bad_request("field `ttl`: it must be longer than zero"));
    }
    Ok(Reply::ok(shown(&app, app.engine.extend(&caller, &id, request.ttl).await?)))
}

pub(super) async fn stats(State(app): State<App>, From(caller): From, Sandbox(id): Sandbox) -> Answer<SandboxStats> {
    Ok(Reply::ok(app.engine.stats(&caller, &id).await?))
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsQuery {
    /// 1 to 10000; 100 unless given.
    #[param(value_type = Option<u32>)]
    lines: Option<String>,
}

pub(super) async fn logs(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<LogsQuery>,
) -> Answer<Vec<String>> {
    // Published behaviour: what is no positive number means the default.
    let asked = query.lines.and_then(|text| text.trim().parse::<usize>().ok()).filter(|lines| *lines > 0);
    let lines = asked.unwrap_or(DEFAULT_LOG_LINES).min(MAX_LOG_LINES);
    Ok(Reply::ok(app.engine.console(&caller, &id, lines).await?))
}

//! Sandboxes: made, looked at, ended.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use stacyvm_api::backend::{
    Capabilities, Code, DeadlineRequest, Feature, Listed, SpawnRequest, Spawned, Stats, Status,
};
use stacyvm_sandbox::RuntimeState;

use crate::error::{Answer, Refusal};
use crate::state::{App, parsed};

const DEFAULT_LOG_LINES: usize = 100;

pub(super) async fn health(State(app): State<App>) -> Answer<Json<Value>> {
    match app.provider.check().await.reason() {
        None => Ok(Json(json!({ "status": "ok" }))),
        Some(reason) => Err(Refusal::new(503, Code::Unavailable, reason)),
    }
}

pub(super) async fn capabilities(State(app): State<App>) -> Json<Capabilities> {
    let can = app.provider.capabilities();
    let mut features = vec![
        Feature::Errors,
        Feature::Exit,
        Feature::Bytes,
        Feature::Details,
        Feature::Archive,
        Feature::Spec,
        Feature::Inventory,
        Feature::Logs,
    ];
    let more = [
        (can.stats, Feature::Stats),
        (can.pty, Feature::Terminal),
        (can.dial, Feature::Dial),
        // The fake has none; every other runtime of ours starts one.
        (!can.imitated, Feature::Agent),
    ];
    features.extend(more.into_iter().filter(|(has, _)| *has).map(|(_, feature)| feature));
    Json(Capabilities {
        features,
        network: can.network,
        survives_restart: can.survives_restart,
        imitated: can.imitated,
        oom_ends_sandbox: can.oom_ends_sandbox,
        runtime: Some(app.provider.name().to_owned()),
    })
}

pub(super) async fn spawn(
    State(app): State<App>,
    Json(request): Json<SpawnRequest>,
) -> Answer<(StatusCode, Json<Spawned>)> {
    let (id, created) = app.create(request).await?;
    let spawned = Spawned { id: id.to_string(), limits: Some(created.limits), image_digest: created.image_digest };
    Ok((StatusCode::CREATED, Json(spawned)))
}

pub(super) async fn status(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<Status>> {
    let wanted = parsed(&id)?;
    let found = app.provider.list().await?.into_iter().find(|sandbox| sandbox.id == wanted);
    let sandbox = found.ok_or_else(Refusal::not_found)?;
    Ok(Json(Status { id: Some(id), state: Some(word(sandbox.state).to_owned()) }))
}

pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<Listed>>> {
    let all = app.provider.list().await?.into_iter().map(|sandbox| Listed {
        id: sandbox.id.to_string(),
        state: Some(word(sandbox.state).to_owned()),
        image: sandbox.image,
        created_at: sandbox.created_at,
        metadata: sandbox.metadata,
        limits: sandbox.limits,
    });
    Ok(Json(all.collect()))
}

pub(super) async fn destroy(State(app): State<App>, Path(id): Path<String>) -> Answer<StatusCode> {
    app.destroy(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn deadline(
    State(app): State<App>,
    Path(id): Path<String>,
    Json(request): Json<DeadlineRequest>,
) -> Answer<StatusCode> {
    app.session(&id).await?.set_deadline(request.expires_at).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn stats(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<Stats>> {
    let usage = app.provider.usage(&parsed(&id)?).await?;
    Ok(Json(Stats {
        cpu_usec: usage.cpu_usec,
        memory_bytes: usage.memory_bytes,
        memory_limit_bytes: usage.memory_limit_bytes,
        pids: usage.pids,
        pids_limit: usage.pids_limit,
        oom_kills: usage.oom_kills,
        pids_refused: usage.pids_refused,
        pids_kills: usage.pids_kills,
        disk_kills: usage.disk_kills,
        disk_bytes: usage.disk_bytes,
        disk_limit_bytes: usage.disk_limit_bytes,
    }))
}

#[derive(Debug, Deserialize)]
pub(super) struct LogQuery {
    lines: Option<usize>,
}

pub(super) async fn logs(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
) -> Answer<Json<Vec<String>>> {
    let session = app.session(&id).await?;
    Ok(Json(session.console(query.lines.unwrap_or(DEFAULT_LOG_LINES)).await?))
}

fn word(state: RuntimeState) -> &'static str {
    match state {
        RuntimeState::Running => "running",
        RuntimeState::Paused => "paused",
        RuntimeState::Dead => "stopped",
    }
}

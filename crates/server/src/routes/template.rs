//! Templates: named create requests.

use axum::extract::State;
use http::HeaderMap;
use stacyvm_api::{Sandbox, StatusBody, Template, TemplateSpawnRequest};
use stacyvm_engine::CreateOptions;

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Json, Name, idempotency_key};
use crate::reply::Reply;
use crate::routes::sandbox::shown;

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn create(
    State(app): State<App>,
    From(caller): From,
    Json(template): Json<Template>,
) -> Answer<Template> {
    Ok(Reply::created(app.engine.create_template(&caller, template).await?))
}

pub(super) async fn list(State(app): State<App>) -> Answer<Vec<Template>> {
    Ok(Reply::ok(app.engine.list_templates().await?))
}

pub(super) async fn get(State(app): State<App>, Name(name): Name) -> Answer<Template> {
    Ok(Reply::ok(app.engine.get_template(&name).await?))
}

pub(super) async fn update(
    State(app): State<App>,
    From(caller): From,
    Name(name): Name,
    Json(template): Json<Template>,
) -> Answer<Template> {
    Ok(Reply::ok(app.engine.update_template(&caller, &name, template).await?))
}

pub(super) async fn remove(State(app): State<App>, From(caller): From, Name(name): Name) -> Answer<StatusBody> {
    app.engine.delete_template(&caller, &name).await?;
    Ok(Reply::ok(StatusBody::new("deleted")))
}

pub(super) async fn spawn(
    State(app): State<App>,
    From(caller): From,
    Name(name): Name,
    headers: HeaderMap,
    Json(request): Json<TemplateSpawnRequest>,
) -> Answer<Sandbox> {
    let options = CreateOptions { idempotency_key: idempotency_key(&headers)? };
    let sandbox = app.engine.spawn_template(&caller, &name, request, options).await?;
    Ok(Reply::created(shown(&app, sandbox)))
}

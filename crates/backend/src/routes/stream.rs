//! Connections that become plain bytes: to the agent, and to ports inside.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use stacyvm_api::backend::{Code, STREAM_PROTOCOL};
use stacyvm_sandbox::{AgentIo, DialTarget, SessionError};
use tokio::io::copy_bidirectional;

use crate::error::{Answer, Refusal};
use crate::state::App;

const PROTOCOL: HeaderValue = HeaderValue::from_static(STREAM_PROTOCOL);

#[derive(Debug, Deserialize)]
pub(super) struct DialQuery {
    port: Option<u16>,
    socket: Option<String>,
}

pub(super) async fn ports(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<Vec<u16>>> {
    Ok(Json(app.session(&id).await?.ports().await?))
}

pub(super) async fn dial(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<DialQuery>,
    request: Request,
) -> Answer<Response> {
    wants_stream(&request)?;
    let target = match (query.port, query.socket) {
        (Some(port), None) => DialTarget::Port(port),
        (None, Some(path)) => DialTarget::Unix(path),
        (Some(_), Some(_)) | (None, None) => return Err(Refusal::bad_request("name a port or a socket")),
    };
    let stream = app.session(&id).await?.dial(target).await?;
    Ok(carry(request, stream))
}

pub(super) async fn agent(State(app): State<App>, Path(id): Path<String>, request: Request) -> Answer<Response> {
    wants_stream(&request)?;
    let opened = app.agent(&id).await?.open().await;
    let stream = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Refusal::not_found(),
        _ => SessionError::Unavailable(Some(error.into())).into(),
    })?;
    Ok(carry(request, stream))
}

fn wants_stream(request: &Request) -> Answer<()> {
    if request.headers().get(header::UPGRADE) == Some(&PROTOCOL) {
        return Ok(());
    }
    Err(Refusal::new(426, Code::BadRequest, format!("send Connection: upgrade and Upgrade: {STREAM_PROTOCOL}")))
}

/// Carries bytes until both sides ended. Each direction ends by itself.
fn carry(mut request: Request, mut stream: Box<dyn AgentIo>) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(client) = upgrade.await else { return };
        // Either side may break off at any time; the other then sees the end.
        let _ = copy_bidirectional(&mut TokioIo::new(client), &mut stream).await;
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, PROTOCOL);
    response
}

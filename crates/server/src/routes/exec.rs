//! Commands: run, list, and act on one by its id.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde::Deserialize;
use stacyvm_api::{
    ContentEncoding, ExecRequest, ExecResult, ProcessSummary, ResizeRequest, SignalRequest, StatusBody, StdinRequest,
};
use stacyvm_engine::{RunningExec, StartOptions};
use stacyvm_sandbox::TerminalSize;

use crate::App;
use crate::error::ApiError;
use crate::extract::{Exec, From, Json, Query, Sandbox};
use crate::reply::Reply;
use crate::routes::exec_stream::{self, ChunkForm};

/// The media type parameter that asks for the exit line.
const EXIT_PARAMETER: &str = "exit=1";

type Answer<T> = Result<Reply<T>, ApiError>;

/// Buffered, streamed, or in the background, as the request asks.
pub(super) async fn run(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    headers: HeaderMap,
    Json(request): Json<ExecRequest>,
) -> Result<Response, ApiError> {
    if request.background == Some(true) {
        let started = app.engine.start_exec(&caller, &id, request.clone(), start_options(&request)).await?;
        return Ok(background(started).into_response());
    }
    if request.stream == Some(true) {
        let form = chunk_form(&request, &headers);
        let started = app.engine.start_exec(&caller, &id, request.clone(), start_options(&request)).await?;
        return Ok(exec_stream::respond(&app, &id, started, form));
    }
    Ok(Reply::ok(app.engine.exec(&caller, &id, request).await?).into_response())
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// At most this many; 100 unless given.
    limit: Option<u32>,
    /// From the header `X-Next-Cursor` of the page before.
    cursor: Option<String>,
}

pub(super) async fn log(
    State(app): State<App>,
    From(caller): From,
    Sandbox(id): Sandbox,
    Query(query): Query<LogQuery>,
) -> Answer<Vec<ProcessSummary>> {
    let page = app.engine.exec_log(&caller, &id, query.limit, query.cursor.as_deref()).await?;
    Ok(Reply::ok(page.items).next_cursor(page.next_cursor.as_deref()))
}

pub(super) async fn show(
    State(app): State<App>,
    From(caller): From,
    Exec(id, exec_id): Exec,
) -> Answer<ProcessSummary> {
    Ok(Reply::ok(app.engine.exec_summary(&caller, &id, &exec_id).await?))
}

pub(super) async fn signal(
    State(app): State<App>,
    From(caller): From,
    Exec(id, exec_id): Exec,
    Json(request): Json<SignalRequest>,
) -> Answer<StatusBody> {
    app.engine.signal(&caller, &id, &exec_id, &request.signal).await?;
    Ok(Reply::ok(StatusBody::new("signalled")))
}

pub(super) async fn stdin(
    State(app): State<App>,
    From(caller): From,
    Exec(id, exec_id): Exec,
    Json(request): Json<StdinRequest>,
) -> Answer<StatusBody> {
    let data = input_bytes(request.data, request.data_b64.as_deref())?;
    if !data.is_empty() {
        app.engine.send_input(&caller, &id, &exec_id, data).await?;
    }
    if request.close == Some(true) {
        app.engine.close_stdin(&caller, &id, &exec_id).await?;
    }
    Ok(Reply::ok(StatusBody::new("written")))
}

pub(super) async fn resize(
    State(app): State<App>,
    From(caller): From,
    Exec(id, exec_id): Exec,
    Json(ResizeRequest { cols, rows }): Json<ResizeRequest>,
) -> Answer<StatusBody> {
    app.engine.resize(&caller, &id, &exec_id, terminal_size(cols, rows)?).await?;
    Ok(Reply::ok(StatusBody::new("resized")))
}

/// Input given as text or as base64.
pub(super) fn input_bytes(data: String, data_b64: Option<&str>) -> Result<Bytes, ApiError> {
    match data_b64 {
        None => Ok(data.into()),
        Some(text) => BASE64
            .decode(text)
            .map(Bytes::from)
            .map_err(|error| ApiError::bad_request(format!("field `data_b64`: {error}"))),
    }
}

pub(super) fn terminal_size(cols: u16, rows: u16) -> Result<TerminalSize, ApiError> {
    if cols == 0 || rows == 0 {
        return Err(ApiError::bad_request("a terminal has at least one column and one row"));
    }
    Ok(TerminalSize { cols, rows })
}

fn start_options(request: &ExecRequest) -> StartOptions {
    StartOptions { terminal: None, keep_stdin_open: request.keep_stdin_open == Some(true) }
}

/// Clients of a buffered exec read these keys, so they are here too.
fn background(started: RunningExec) -> Reply<ExecResult> {
    Reply::accepted(ExecResult { exec_id: Some(started.exec_id), ..ExecResult::default() })
}

fn chunk_form(request: &ExecRequest, headers: &HeaderMap) -> ChunkForm {
    let accepts_exit =
        |value: &HeaderValue| value.to_str().is_ok_and(|text| text.replace(' ', "").contains(EXIT_PARAMETER));
    ChunkForm {
        base64: request.encoding == Some(ContentEncoding::Base64),
        extended: request.stream_exit == Some(true) || headers.get_all(header::ACCEPT).iter().any(accepts_exit),
    }
}

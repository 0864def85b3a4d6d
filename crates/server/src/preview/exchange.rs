//! One request to a guest and the head of its answer.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use stacyvm_api::ErrorCode;
use stacyvm_engine::{Engine, EngineError};
use stacyvm_sandbox::SessionError;
use tokio::time::timeout;

use super::address::Address;
use super::body::{Progress, RequestBody};
use super::pool::{DialError, GuestConnection, MAX_HEAD_BYTES, MAX_HEADERS, Pool};
use crate::error::ApiError;

/// A guest that is asked for an answer, and to which nothing more is sent, has
/// this long to begin it.
const ANSWER_TIME: Duration = Duration::from_mins(5);

/// Why there is no answer to pass on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the guest broke the connection off, or does not speak HTTP")]
    Broken(#[source] hyper::Error),
    #[error("the guest did not answer in time")]
    Silent,
}

/// An answer whose body is still coming on its connection.
pub(super) struct Exchanged {
    pub(super) response: Response<Incoming>,
    pub(super) connection: GuestConnection,
    pub(super) progress: Option<Arc<Progress>>,
}

/// Which connections a request may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connections {
    Kept,
    /// It will become something else than HTTP.
    Fresh,
}

/// Sends the request on a connection that was kept or on a new one. One that
/// was kept may be closing just now: what the guest cannot have acted on, or may
/// act on twice, is sent again on a new one.
pub(super) async fn exchange(
    pool: &Pool,
    engine: &Engine,
    address: &Address,
    request: Request<RequestBody>,
    connections: Connections,
) -> Result<Exchanged, ExchangeError> {
    let progress = request.body().progress();
    let kept = if connections == Connections::Kept { pool.take(address) } else { None };
    let request = match kept {
        None => request,
        Some(connection) => {
            let again = repeatable(&request);
            match send(connection, request, progress.as_ref()).await {
                Ok(exchanged) => return Ok(exchanged),
                Err(Unsent { request: Some(request), .. }) => *request,
                Err(Unsent { error, .. }) => match (again, error) {
                    (Some(request), ExchangeError::Broken(_)) => request,
                    (_, error) => return Err(error),
                },
            }
        }
    };
    let connection = pool.connect(engine, address).await?;
    send(connection, request, progress.as_ref()).await.map_err(|unsent| unsent.error)
}

/// A failed request, given back when nothing of it was written.
struct Unsent {
    error: ExchangeError,
    request: Option<Box<Request<RequestBody>>>,
}

async fn send(
    mut connection: GuestConnection,
    request: Request<RequestBody>,
    progress: Option<&Arc<Progress>>,
) -> Result<Exchanged, Unsent> {
    let silent = || Unsent { error: ExchangeError::Silent, request: None };
    let sent = {
        let sending = connection.sender.try_send_request(request);
        tokio::pin!(sending);
        loop {
            match timeout(ANSWER_TIME, sending.as_mut()).await {
                Ok(sent) => break sent,
                // An upload takes as long as it takes.
                Err(_) if progress.is_some_and(|progress| progress.take_moved()) => {}
                Err(_) => return Err(silent()),
            }
        }
    };
    match sent {
        Ok(response) => Ok(Exchanged { response, connection, progress: progress.cloned() }),
        Err(mut failed) => {
            let request = TrySendError::take_message(&mut failed).map(Box::new);
            Err(Unsent { error: ExchangeError::Broken(failed.into_error()), request })
        }
    }
}

/// A copy of a request that changes nothing and has no body.
fn repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if !safe || !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(RequestBody::empty());
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    Some(copy)
}

/// The failure as the caller sees it.
pub(super) fn failure(error: ExchangeError, address: &Address) -> ApiError {
    let Address { id, port } = address;
    match error {
        ExchangeError::Dial(error) => dial_failure(error, address),
        ExchangeError::Silent => ApiError::new(
            ErrorCode::GatewayTimeout,
            format!("what listens on port {port} of sandbox {id} did not answer within {} s", ANSWER_TIME.as_secs()),
        ),
        ExchangeError::Broken(error) if error.is_parse_too_large() => ApiError::new(
            ErrorCode::BadGateway,
            format!(
                "what listens on port {port} of sandbox {id} answered with more than {MAX_HEADERS} headers or \
                 {MAX_HEAD_BYTES} bytes of them"
            ),
        ),
        ExchangeError::Broken(error) => ApiError::new(
            ErrorCode::BadGateway,
            format!("what listens on port {port} of sandbox {id} broke the connection off, or does not speak HTTP"),
        )
        .because(&error),
    }
}

/// The same for a connection that could not be made.
pub(crate) fn dial_failure(error: DialError, address: &Address) -> ApiError {
    let Address { id, port } = address;
    match error {
        DialError::Engine(EngineError::Session(SessionError::PortClosed(_))) => {
            ApiError::new(ErrorCode::PortClosed, format!("nothing listens on port {port} of sandbox {id}"))
                .hint("start a server inside; listening on 127.0.0.1 is enough")
        }
        DialError::Engine(EngineError::Session(SessionError::Gone)) => {
            ApiError::from(EngineError::SandboxNotFound(id.clone()))
        }
        DialError::Engine(error) => ApiError::from(error),
        error @ (DialError::Crowded(_) | DialError::Slow(_)) => {
            ApiError::new(ErrorCode::Unavailable, error.to_string())
        }
    }
}

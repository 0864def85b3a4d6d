//! One request to a guest and the head of its answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use stacyvm_api::ErrorCode;
use stacyvm_engine::{Engine, EngineError};
use stacyvm_sandbox::SessionError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::address::Address;
use super::body::{Consent, Progress, RequestBody};
use super::pool::{DialError, GuestConnection, MAX_HEAD_BYTES, MAX_HEADERS, Pool};
use crate::error::ApiError;

/// A guest that is asked for an answer, and to which nothing more is sent, has
/// this long to begin it.
const ANSWER_TIME: Duration = Duration::from_mins(5);

/// Interim answers (RFC 9110 15.2) before the one that counts. Each costs this
/// server's time and a guest nothing, and few servers send more than two.
const MAX_INTERIM_ANSWERS: usize = 128;

/// Why there is no answer to pass on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the guest broke the connection off, or does not speak HTTP")]
    Broken(#[source] hyper::Error),
    #[error("the guest did not answer in time")]
    Silent,
    #[error("the guest sends interim answers without end")]
    Endless,
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

/// Where a request goes.
pub(super) struct Way<'a> {
    pub(super) pool: &'a Pool,
    pub(super) engine: &'a Engine,
    pub(super) address: &'a Address,
    pub(super) connections: Connections,
}

/// Sends the request on a connection that was kept or on a new one. One that
/// was kept may be closing just now: what the guest cannot have acted on, or may
/// act on twice, is sent again on a new one.
pub(super) async fn exchange(
    way: &Way<'_>,
    request: Request<RequestBody>,
    consent: Option<&Consent>,
) -> Result<Exchanged, ExchangeError> {
    let Way { pool, engine, address, connections } = *way;
    let progress = request.body().progress();
    let kept = if connections == Connections::Kept { pool.take(address) } else { None };
    let request = match kept {
        None => request,
        Some(connection) => {
            let again = repeatable(&request);
            match send(connection, request, progress.as_ref(), consent).await {
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
    send(connection, request, progress.as_ref(), consent).await.map_err(|unsent| unsent.error)
}

/// A failed request, given back when nothing of it was written.
struct Unsent {
    error: ExchangeError,
    request: Option<Box<Request<RequestBody>>>,
}

async fn send(
    mut connection: GuestConnection,
    mut request: Request<RequestBody>,
    progress: Option<&Arc<Progress>>,
    consent: Option<&Consent>,
) -> Result<Exchanged, Unsent> {
    let failed = |error| Unsent { error, request: None };
    let endless = watch_interim(&mut request, consent.cloned());
    let sent = {
        let sending = connection.sender.try_send_request(request);
        tokio::pin!(sending);
        loop {
            let sent = tokio::select! {
                sent = timeout(ANSWER_TIME, sending.as_mut()) => sent,
                () = endless.cancelled() => return Err(failed(ExchangeError::Endless)),
            };
            match sent {
                Ok(sent) => break sent,
                // An upload takes as long as it takes.
                Err(_) if progress.is_some_and(|progress| progress.take_moved()) => {}
                Err(_) => return Err(failed(ExchangeError::Silent)),
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

/// Hears the interim answers to a request. What it returns is cancelled when
/// there are too many of them.
fn watch_interim(request: &mut Request<RequestBody>, consent: Option<Consent>) -> CancellationToken {
    let endless = CancellationToken::new();
    let (heard, count) = (endless.clone(), AtomicUsize::new(0));
    hyper::ext::on_informational(request, move |interim| {
        if interim.status() == StatusCode::CONTINUE
            && let Some(consent) = &consent
        {
            consent.give();
        }
        if count.fetch_add(1, Ordering::Relaxed) >= MAX_INTERIM_ANSWERS {
            heard.cancel();
        }
    });
    endless
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
        ExchangeError::Endless => ApiError::new(
            ErrorCode::BadGateway,
            format!(
                "what listens on port {port} of sandbox {id} sent more than {MAX_INTERIM_ANSWERS} interim answers (1xx) \
                 and none that counts"
            ),
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

//! Ports of a sandbox: what listens, who may open the preview, signed links,
//! and raw connections.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use hyper_util::rt::TokioIo;
use stacyvm_api::{ErrorCode, Port, PortLink, PortLinkRequest, PortRequest, Timestamp};
use stacyvm_engine::{Caller, EngineError};

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Json, Reached, Sandbox, SandboxPort, Who};
use crate::preview::{self, AGENT_PORT, Address, TOKEN_PARAMETER, dial_failure, relay};
use crate::reply::Reply;

/// How long a link works.
const DEFAULT_LINK_TTL: Duration = Duration::from_hours(1);
const MAX_LINK_TTL: Duration = Duration::from_hours(720);

/// The protocol of a raw connection: after 101 its bytes are the port's.
const FORWARD_PROTOCOL: HeaderValue = HeaderValue::from_static("stacyvm-forward");

type Answer<T> = Result<Reply<T>, ApiError>;

pub(super) async fn list(
    State(app): State<App>,
    From(caller): From,
    reached: Reached,
    Sandbox(id): Sandbox,
) -> Answer<Vec<Port>> {
    let listening = listening(&app, &caller, &id).await?;
    let ports = listening.into_iter().map(|port| {
        let address = Address { id: id.clone(), port };
        describe(&app, &caller, &reached, &address, true)
    });
    Ok(Reply::ok(ports.collect::<Result<_, _>>()?))
}

pub(super) async fn get(
    State(app): State<App>,
    From(caller): From,
    reached: Reached,
    SandboxPort(address): SandboxPort,
) -> Answer<Port> {
    let listening = listening(&app, &caller, &address.id).await?.contains(&address.port);
    Ok(Reply::ok(describe(&app, &caller, &reached, &address, listening)?))
}

pub(super) async fn set(
    State(app): State<App>,
    From(caller): From,
    reached: Reached,
    SandboxPort(address): SandboxPort,
    Json(request): Json<PortRequest>,
) -> Answer<Port> {
    check_own(&address)?;
    app.engine.set_port_access(&caller, &address.id, address.port, request.access).await?;
    let listening = listening(&app, &caller, &address.id).await?.contains(&address.port);
    Ok(Reply::ok(describe(&app, &caller, &reached, &address, listening)?))
}

pub(super) async fn link(
    State(app): State<App>,
    From(caller): From,
    Who(identity): Who,
    Reached(host): Reached,
    SandboxPort(address): SandboxPort,
    Json(request): Json<PortLinkRequest>,
) -> Answer<PortLink> {
    check_own(&address)?;
    app.engine.port_access(&caller, &address.id, address.port)?;
    let ttl = request.ttl.map_or(DEFAULT_LINK_TTL, stacyvm_api::Duration::get);
    if ttl < Duration::from_secs(1) || ttl > MAX_LINK_TTL {
        let (least, most) = (Duration::from_secs(1), MAX_LINK_TTL);
        let text = |span: Duration| stacyvm_api::Duration::from(span);
        return Err(ApiError::bad_request(format!("field `ttl`: it must be {} to {}", text(least), text(most))));
    }
    let url = app.previews.url(&address, host.as_ref()).ok_or_else(|| {
        ApiError::new(ErrorCode::Unsupported, "this server has no previews")
            .hint("set server.preview_domain, for example to localhost, or server.preview_port")
    })?;
    // Tokens end at whole seconds.
    let wanted = Timestamp::now() + ttl;
    let end = identity.stored().and_then(|key| key.expires_at()).map_or(wanted, |end| end.min(wanted));
    let expires_at = Timestamp::from_unix_ms(end.unix_ms().div_euclid(1000) * 1000);
    let token = app.previews.signer.sign(&address, expires_at, identity.key_id());
    Ok(Reply::created(PortLink { url: format!("{url}?{TOKEN_PARAMETER}={token}"), token, expires_at }))
}

/// A raw connection, as `stacyvm forward` uses it. Pages cannot ask for this
/// protocol, only programs can.
pub(super) async fn forward(
    State(app): State<App>,
    From(caller): From,
    Who(identity): Who,
    SandboxPort(address): SandboxPort,
    mut request: Request,
) -> Result<Response, ApiError> {
    check_own(&address)?;
    if request.headers().get(header::UPGRADE) != Some(&FORWARD_PROTOCOL) {
        return Err(ApiError::new(ErrorCode::UpgradeRequired, "this route carries a raw connection")
            .hint("send the headers Connection: upgrade and Upgrade: stacyvm-forward")
            .header(header::UPGRADE, FORWARD_PROTOCOL));
    }
    app.engine.port_access(&caller, &address.id, address.port)?;
    let upgrade = hyper::upgrade::on(&mut request);
    let dialed = app.previews.pool.dial(&app.engine, &address).await;
    let stream = dialed.map_err(|error| dial_failure(error, &address))?;
    relay(&app, identity, async move {
        let client = upgrade.await.map_err(io::Error::other)?;
        Ok((TokioIo::new(client), stream))
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, FORWARD_PROTOCOL);
    Ok(response)
}

async fn listening(app: &App, caller: &Caller, id: &stacyvm_api::SandboxId) -> Result<Vec<u16>, ApiError> {
    let session = app.engine.session(caller, id).await?;
    Ok(session.ports().await.map_err(EngineError::from)?)
}

fn describe(
    app: &App,
    caller: &Caller,
    reached: &Reached,
    address: &Address,
    listening: bool,
) -> Result<Port, ApiError> {
    let set = app.engine.port_access(caller, &address.id, address.port)?;
    let access = preview::access(set, &app.auth);
    Ok(Port { port: address.port, listening, access, url: app.previews.url(address, reached.0.as_ref()) })
}

fn check_own(address: &Address) -> Result<(), ApiError> {
    if address.port == AGENT_PORT {
        return Err(ApiError::bad_request(format!("port {AGENT_PORT} is the agent's")).hint("use another port"));
    }
    Ok(())
}

//! Live preview: what listens on a port inside a sandbox, as a site of its own.
//!
//! ```text
//! browser ─► address ─► access ─► headers ─► exchange ─► pool ─► agent ─► port
//!            (which)    (may it)  (cleaned)  (one request)  │
//!    ▲                                                      └─► tunnel (WebSockets)
//!    └─────────── page (401, 404, 502) or headers + body ◄──┘
//! ```
//!
//! Everything goes through the agent's dial, so it works on every runtime and
//! without a network. Both sides are strangers: a guest never sees a key, token
//! or cookie of ours, and cannot reach the cookies of other hosts; a request for
//! a preview never reaches the API, whose guards refuse what previews send it.

mod access;
mod address;
mod body;
mod exchange;
mod headers;
mod page;
mod pool;
mod token;
mod tunnel;

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use stacyvm_api::{ErrorCode, PortAccess, Timestamp};
use stacyvm_engine::Engine;

use crate::auth::{Authenticator, Identity};
use crate::error::ApiError;
use crate::options::{PreviewOptions, ServerOptions};
use crate::{App, Listener, ServerError, gate};
pub(crate) use access::TOKEN_PARAMETER;
use access::{Decision, Door, Name, Refusal};
pub(crate) use address::{Address, Domain};
use address::{PathForm, path_prefix};
use body::{Consent, GuestBody, RequestBody};
pub(crate) use exchange::dial_failure;
use exchange::{Connections, Exchanged, Way, exchange};
use headers::{Framing, Origin};
use pool::{Lease, Pool};
use token::Signer;
pub(crate) use tunnel::relay;

/// The agent's, by the name it has in E2B's SDKs. A guest that listens there
/// must not be taken for it.
pub(crate) const AGENT_PORT: u16 = 49983;

const EVENT_STREAM: &str = "text/event-stream";

/// Everything about previews that requests share.
pub(crate) struct Previews {
    /// Without one, only the listener for paths shows previews.
    domain: Option<Domain>,
    base: Option<Base>,
    /// Where paths name previews.
    paths: Option<Base>,
    pub(crate) signer: Signer,
    pub(crate) pool: Arc<Pool>,
}

/// How a connection came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) peer: IpAddr,
    pub(crate) scheme: Scheme,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// What browsers write around a preview's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Base {
    scheme: Scheme,
    port: u16,
}

/// A request to a port and how it names it.
struct Visit<'a> {
    address: Address,
    host: Authority,
    arrival: Arrival,
    name: Name<'a>,
}

/// A request whose host names a preview.
pub(crate) struct Named<'a> {
    domain: &'a Domain,
    host: Authority,
    address: Address,
}

/// A visit that may go on to its port.
struct Admitted<'a> {
    visit: &'a Visit<'a>,
    /// Where it comes from.
    caller: IpAddr,
    /// Whose key opened the port, or made the link that did.
    identity: &'a Identity,
}

/// What no preview could be shown with.
pub fn check_options(options: &PreviewOptions, port: u16) -> Result<(), ServerError> {
    named_below(options)?;
    match options.path_port {
        Some(path_port) if path_port == port && port != 0 => Err(ServerError::PreviewPort(port)),
        Some(_) | None => Ok(()),
    }
}

/// The domain below which previews are, and where a proxy shows it.
fn named_below(options: &PreviewOptions) -> Result<Option<(Domain, Option<Base>)>, ServerError> {
    let PreviewOptions { domain, url, .. } = options;
    let Some(text) = domain else {
        return url.as_ref().map_or(Ok(None), |url| Err(ServerError::PreviewUrlAlone(url.clone())));
    };
    let domain = Domain::parse(text).ok_or_else(|| ServerError::PreviewDomain(text.clone()))?;
    if domain.is_registrys() {
        return Err(ServerError::PreviewDomainOfAll(text.clone()));
    }
    let shown = match url {
        None => None,
        Some(url) => Some(Base::parse(url, &domain).ok_or_else(|| ServerError::PreviewUrl(url.clone()))?),
    };
    Ok(Some((domain, shown)))
}

impl Visit<'_> {
    /// The front of the path that names the port, where the path does. The token
    /// in it is none of the guest's business.
    fn guest_prefix(&self) -> Option<String> {
        self.is_by_path().then(|| path_prefix(&self.address, None))
    }

    /// Makes a guest's head one that the browser may see.
    fn show(&self, headers: &mut HeaderMap) {
        match self.name {
            Name::Host(_) => headers::for_browser(headers, None),
            Name::Path { token } => {
                headers::for_browser(headers, Some(&path_prefix(&self.address, token)));
                if token.is_some() {
                    headers::keep_address(headers);
                }
            }
        }
    }

    fn is_by_path(&self) -> bool {
        matches!(self.name, Name::Path { .. })
    }
}

impl Previews {
    pub(crate) fn new(options: &ServerOptions, engine: &Engine, listener: Listener) -> Result<Self, ServerError> {
        let (domain, shown) = named_below(&options.preview)?.unzip();
        let own = |domain: &Domain| Base { scheme: listener.scheme, port: domain.port.unwrap_or(listener.port) };
        let base = shown.flatten().or_else(|| domain.as_ref().map(own));
        let paths = listener.preview_port.map(|port| Base { scheme: listener.scheme, port });
        let signer = Signer::new(engine.derived_key(token::KEY_PURPOSE));
        Ok(Self { domain, base, paths, signer, pool: Arc::default() })
    }

    /// The preview that a request names by its host.
    pub(crate) fn named<B>(&self, request: &Request<B>) -> Option<Named<'_>> {
        let domain = self.domain.as_ref()?;
        let host = crate::edge::authority(request)?;
        let address = domain.address(&host)?;
        Some(Named { domain, host, address })
    }

    /// What SDKs write behind `http://<port>-<id>.`, so that it leads here. With
    /// TLS it is the bare domain: `http://` and the port of `https://` is nothing.
    pub(crate) fn published_domain(&self) -> Option<String> {
        let (domain, base) = (self.domain.as_ref()?, self.base?);
        let is_usual = base.scheme == Scheme::Https || base.port == base.scheme.default_port();
        Some(if is_usual { domain.name().to_owned() } else { format!("{}:{}", domain.name(), base.port) })
    }

    /// Where browsers find a port, where they can. Without a domain it is below
    /// the host at which this server was reached.
    pub(crate) fn url(&self, address: &Address, reached: Option<&Authority>) -> Option<String> {
        if address.port == AGENT_PORT {
            return None;
        }
        if let Some((domain, base)) = self.domain.as_ref().zip(self.base) {
            return Some(format!("{}/", base.origin(&domain.host(address))));
        }
        Some(format!("{}{}/", self.paths?.origin(reached?.host()), path_prefix(address, None)))
    }

    /// The scheme that browsers see: a proxy in front may have taken TLS off.
    fn scheme(&self, arrival: Arrival) -> &'static str {
        self.base.map_or(arrival.scheme, |base| base.scheme).name()
    }
}

impl Base {
    fn origin(self, host: &str) -> String {
        let port = if self.port == self.scheme.default_port() { String::new() } else { format!(":{}", self.port) };
        format!("{}://{host}{port}", self.scheme.name())
    }

    /// `https://preview.example.com`, of the domain that previews are below.
    fn parse(url: &str, domain: &Domain) -> Option<Self> {
        let url: Uri = url.parse().ok()?;
        let scheme = match url.scheme_str()? {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return None,
        };
        let same = url.host()?.eq_ignore_ascii_case(domain.name());
        let port = url.port_u16().unwrap_or(scheme.default_port());
        (same && url.path() == "/" && url.query().is_none()).then_some(Self { scheme, port })
    }
}

/// Who may open a port: as somebody said, else like the API, which the first
/// stored key closes while the server runs.
pub(crate) fn access(set: Option<PortAccess>, auth: &Authenticator) -> PortAccess {
    set.unwrap_or_else(|| if auth.is_open() { PortAccess::Public } else { PortAccess::Token })
}

/// A request whose host names a preview.
pub(crate) async fn by_host(app: &App, named: Named<'_>, arrival: Arrival, request: Request<Incoming>) -> Response {
    let Named { domain, host, address } = named;
    serve(app, &Visit { address, host, arrival, name: Name::Host(domain) }, request).await
}

/// The refusal of a host that means a preview and names none. It is given only
/// where the host is none of ours, and says why.
pub(crate) fn misnamed(app: &App, request: &Request<Incoming>) -> Option<Response> {
    let domain = app.previews.domain.as_ref()?;
    let host = crate::edge::authority(request).filter(|host| domain.is_mistaken_in_port(host))?;
    app.guard.check_host(Some(&host)).err()?;
    let message = format!("`{host}` names no preview: its port is none, which is 1 to 65535 without zeros in front");
    let hint = format!("previews are at names like 3000-sb-4f9k2m0x7c1v8b3n5q6w.{}", domain.name());
    Some(page::failure(page::wants_page(request.headers()), ApiError::bad_request(message).hint(hint)))
}

/// A request on the listener where paths name previews. What it answers is
/// never of one origin with anything.
pub(crate) async fn by_path(app: &App, arrival: Arrival, mut request: Request<Incoming>) -> Response {
    let wants_page = page::wants_page(request.headers());
    let mut response = match named_by_path(app, &request) {
        Ok((PathForm::At { address, token, path }, host)) => {
            let visit = Visit { address, host, arrival, name: Name::Path { token: token.as_deref() } };
            *request.uri_mut() = Uri::from(path);
            return serve(app, &visit, request).await;
        }
        Ok((PathForm::NeedsSlash(path), _)) => match HeaderValue::try_from(path) {
            Ok(location) => page::redirect(location, None),
            Err(_) => page::failure(wants_page, ApiError::bad_request("the path cannot be read")),
        },
        Err(failure) => page::failure(wants_page, failure),
    };
    headers::confine_page(response.headers_mut());
    response
}

fn named_by_path(app: &App, request: &Request<Incoming>) -> Result<(PathForm, Authority), ApiError> {
    let host = crate::edge::authority(request);
    app.guard.check_host(host.as_ref())?;
    let form = request.uri().path_and_query().and_then(PathForm::parse);
    let unknown = || {
        ApiError::new(ErrorCode::NotFound, "the path names no preview")
            .hint("paths here look like /sb-4f9k2m0x7c1v8b3n5q6w/3000/")
    };
    form.zip(host).ok_or_else(unknown)
}

async fn serve(app: &App, visit: &Visit<'_>, request: Request<Incoming>) -> Response {
    let wants_page = page::wants_page(request.headers());
    match answer(app, visit, request).await {
        Ok(response) => response,
        Err(failure) => {
            let mut response = page::failure(wants_page, failure);
            if visit.is_by_path() {
                headers::confine_page(response.headers_mut());
            }
            response
        }
    }
}

async fn answer(app: &App, visit: &Visit<'_>, mut request: Request<Incoming>) -> Result<Response, ApiError> {
    let address = &visit.address;
    check_target(address, request.method())?;
    let access = access(app.engine.reachable_port(&address.id, address.port).await?, &app.auth);
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let (signer, keys) = (&app.previews.signer, app.engine.keys());
    let door = Door { signer, keys, name: visit.name, now: Timestamp::now() };
    let caller = app.gate.caller(visit.arrival.peer, &head.headers);
    let identity = match door.decide(&head, address, access) {
        Decision::Admit { key } => key.map_or(Identity::NOBODY, Identity::Stored),
        Decision::Exchange { location, cookie } => {
            let mut response = page::redirect(location, cookie);
            if visit.is_by_path() {
                headers::confine_page(response.headers_mut());
            }
            return Ok(response);
        }
        Decision::Refuse(refusal) => match gate::visitor(app, &head, &visit.host, caller)? {
            Identity::Anonymous(_) => return Err(refused(refusal, address)),
            identity @ (Identity::Configured(_) | Identity::Stored(_)) => identity,
        },
    };
    let admitted = Admitted { visit, caller, identity: &identity };
    gate::while_valid(&identity, forward(app, &admitted, head, body, upgrade)).await
}

fn check_target(address: &Address, method: &Method) -> Result<(), ApiError> {
    if address.port == AGENT_PORT {
        return Err(ApiError::new(ErrorCode::NotFound, format!("port {AGENT_PORT} is the agent's and has no preview"))
            .hint("listen on another port"));
    }
    if method == Method::CONNECT {
        return Err(ApiError::new(ErrorCode::MethodNotAllowed, "this is no forward proxy")
            .hint("`stacyvm forward` gives a local port for a port inside a sandbox"));
    }
    Ok(())
}

fn refused(refusal: Refusal, address: &Address) -> ApiError {
    let Address { id, port } = address;
    let (code, message) = match refusal {
        Refusal::NoToken => (ErrorCode::Unauthorized, format!("port {port} of sandbox {id} is not public")),
        Refusal::BadToken => (
            ErrorCode::Unauthorized,
            format!("this link to port {port} of sandbox {id} has expired, or is for another port"),
        ),
        Refusal::ForeignPage => (
            ErrorCode::Forbidden,
            format!("a page of another site may not use your session on port {port} of sandbox {id}"),
        ),
    };
    ApiError::new(code, message).hint(format!("`stacyvm preview {id} {port}` prints a link that opens it"))
}

/// Passes an admitted request on, and its answer back.
async fn forward(
    app: &App,
    admitted: &Admitted<'_>,
    mut head: Parts,
    body: Incoming,
    upgrade: OnUpgrade,
) -> Result<Response, ApiError> {
    let visit = admitted.visit;
    let prefix = visit.guest_prefix();
    let wanted = if head.version == Version::HTTP_11 { headers::wanted_upgrade(&head.headers) } else { None };
    let consent = headers::lists(&head.headers, &header::EXPECT, "100-continue").then(Consent::default);
    let origin = Origin {
        host: &visit.host,
        scheme: app.previews.scheme(visit.arrival),
        caller: admitted.caller,
        version: head.version,
        prefix: prefix.as_deref(),
    };
    headers::for_guest(&mut head.headers, &origin);
    if let Some(protocol) = &wanted {
        headers::set_upgrade(&mut head.headers, protocol.clone());
    }
    let mut request = Request::new(RequestBody::new(body, consent.as_ref()));
    *request.method_mut() = head.method;
    *request.uri_mut() = Uri::from(access::guest_path(&head.uri));
    *request.headers_mut() = head.headers;
    let connections = if wanted.is_some() { Connections::Fresh } else { Connections::Kept };
    let way = Way { pool: &app.previews.pool, engine: &app.engine, address: &visit.address, connections };
    let exchanged = exchange(&way, request, consent.as_ref()).await;
    if let Some(consent) = consent {
        consent.settle();
    }
    let exchanged = exchanged.map_err(|error| exchange::failure(error, &visit.address))?;
    if exchanged.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return switch(app, admitted, exchanged, wanted.as_ref(), upgrade);
    }
    pass_back(app, visit, exchanged).await
}

async fn pass_back(app: &App, visit: &Visit<'_>, exchanged: Exchanged) -> Result<Response, ApiError> {
    let Exchanged { response, connection, progress } = exchanged;
    let Address { id, port } = &visit.address;
    let unreadable = |why: &str| {
        ApiError::new(ErrorCode::BadGateway, format!("what listens on port {port} of sandbox {id} answered with {why}"))
    };
    let framing = headers::framing(response.headers()).map_err(|coding| {
        unreadable(&format!("the transfer coding `{coding}`, which nobody asked for"))
            .hint("use Content-Encoding for compressed content, and no other transfer coding than chunked")
    })?;
    let (mut head, incoming) = response.into_parts();
    visit.show(&mut head.headers);
    head.version = Version::HTTP_11;
    head.extensions.clear();
    let lease = Lease::new(Arc::clone(&app.previews.pool), visit.address.clone(), connection, progress);
    let mut body = GuestBody::new(incoming, lease);
    if framing == Framing::Chunked {
        let begun = body.begin().await;
        begun.map_err(|error| unreadable("a body whose chunks cannot be read").because(&error))?;
    }
    if is_event_stream(&head.headers) {
        body = body.ends_with(&app.closing);
    }
    Ok(Response::from_parts(head, Body::new(body)))
}

/// The guest takes up a protocol that was asked for.
fn switch(
    app: &App,
    admitted: &Admitted<'_>,
    exchanged: Exchanged,
    wanted: Option<&HeaderValue>,
    browser: OnUpgrade,
) -> Result<Response, ApiError> {
    let Exchanged { mut response, connection, .. } = exchanged;
    let visit = admitted.visit;
    let Address { id, port } = &visit.address;
    let chosen = response.headers().get(header::UPGRADE).cloned();
    let agreed = chosen.filter(|chosen| wanted.is_some_and(|wanted| offers(wanted, chosen)));
    let protocol = agreed.ok_or_else(|| {
        let message = format!("what listens on port {port} of sandbox {id} switched to a protocol nobody asked for");
        ApiError::new(ErrorCode::BadGateway, message)
    })?;
    let guest = hyper::upgrade::on(&mut response);
    let (mut head, _none) = response.into_parts();
    visit.show(&mut head.headers);
    headers::set_upgrade(&mut head.headers, protocol);
    head.version = Version::HTTP_11;
    head.extensions.clear();
    tunnel::join(app, admitted.identity.clone(), browser, guest, connection);
    Ok(Response::from_parts(head, Body::empty()))
}

/// Whether the answer's protocol is among the offered ones.
fn offers(offered: &HeaderValue, chosen: &HeaderValue) -> bool {
    let mut list = HeaderMap::with_capacity(1);
    list.insert(header::UPGRADE, offered.clone());
    chosen.to_str().is_ok_and(|chosen| headers::lists(&list, &header::UPGRADE, chosen.trim()))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(EVENT_STREAM.as_bytes()))
}

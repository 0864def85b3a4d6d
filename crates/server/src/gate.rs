//! What a request passes between the router and its handler.
//!
//! ```text
//! identity ─► limit ─► scope ─► handler ─► response
//!    │401       │429      │403      └─ ends early when the key does
//!    └─ 429 for an address that was refused too often
//! ```
//!
//! The routes that need no key pass without any of it.

use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, StatusCode};
use http_body::{Frame, SizeHint};
use stacyvm_api::ErrorCode;
use stacyvm_engine::{AuditKind, Caller};

use crate::audit::{self, Call, RefusalBudget};
use crate::auth::{self, Guesses, Identity, Scope};
use crate::error::{self, ApiError};
use crate::options::ServerOptions;
use crate::peer::{Peer, TrustedProxies, subscriber};
use crate::rate_limit::{Allowance, Buckets, Rate, RateLimitStats, RateLimiter, Taken, too_many};
use crate::{App, ServerError, extract};

/// The state of every limit.
#[derive(Debug)]
pub(crate) struct Gate {
    proxies: TrustedProxies,
    limiter: Option<RateLimiter>,
    /// Requests without a valid key, by address; `None` counts none.
    failures: Option<Buckets<IpAddr>>,
    refusals: RefusalBudget,
}

/// A request that may go on to its handler.
#[derive(Debug)]
pub(crate) struct Pass {
    pub(crate) caller: Caller,
    identity: Identity,
    address: IpAddr,
    allowance: Option<Allowance>,
}

/// Why a request may not go on.
struct Refusal {
    error: ApiError,
    identity: Identity,
    allowance: Option<Allowance>,
}

impl Gate {
    pub(crate) fn new(options: &ServerOptions) -> Result<Self, ServerError> {
        let failures = options.failures_per_minute.map(|count| Rate { burst: count.get(), per_minute: count.get() });
        Ok(Self {
            proxies: TrustedProxies::parse(&options.trusted_proxies)?,
            limiter: options.rate_limit.as_ref().map(RateLimiter::new),
            failures: failures.map(Buckets::new),
            refusals: RefusalBudget::default(),
        })
    }

    pub(crate) fn refusals(&self) -> &RefusalBudget {
        &self.refusals
    }

    pub(crate) fn limiter(&self) -> Option<&RateLimiter> {
        self.limiter.as_ref()
    }

    pub(crate) fn stats(&self) -> RateLimitStats {
        self.limiter.as_ref().map(RateLimiter::stats).unwrap_or_default()
    }

    /// Where the request comes from.
    pub(crate) fn address<B>(&self, request: &http::Request<B>) -> IpAddr {
        let peer = request.extensions().get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0);
        self.caller(peer, request.headers())
    }

    /// The same, of a connection from `peer`.
    pub(crate) fn caller(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        self.proxies.caller(peer, headers)
    }

    /// Who calls, as far as that may still be found out from that address.
    fn identify(&self, app: &App, headers: &HeaderMap, address: IpAddr) -> Result<Identity, ApiError> {
        let (address, now) = (subscriber(address), Instant::now());
        let exhausted = self.failures.as_ref().is_some_and(|failures| failures.is_empty(&address, now));
        let guesses = if exhausted { Guesses::Ignored } else { Guesses::Compared };
        let identity = app.auth.identify(headers, guesses);
        if let (Some(failures), true) = (&self.failures, identity.is_anonymous() && !app.auth.is_open())
            && let Taken::Empty { next_after } = failures.take(address, now)
        {
            return Err(too_many(
                "too many requests without a valid key came from your address".to_owned(),
                next_after,
            ));
        }
        Ok(identity)
    }

    fn admit(&self, app: &App, scope: Scope, request: &Request, address: IpAddr) -> Result<Pass, Refusal> {
        let headers = request.headers();
        if app.auth.is_public(scope) {
            let caller = extract::caller(headers, &Identity::NOBODY);
            let pass = |caller| Pass { caller, identity: Identity::NOBODY, address, allowance: None };
            return caller.map(pass).map_err(|error| Refusal { error, identity: Identity::NOBODY, allowance: None });
        }
        let identity = match self.identify(app, headers, address) {
            Ok(identity) => identity,
            Err(error) => return Err(Refusal { error, identity: Identity::NOBODY, allowance: None }),
        };
        let authenticated = if identity.is_anonymous() { app.auth.authorize(&identity, scope) } else { Ok(()) };
        if let Err(error) = authenticated {
            return Err(Refusal { error, identity, allowance: None });
        }
        let caller = extract::caller(headers, &identity);
        let named = caller.as_ref().ok().and_then(|caller| caller.owner.as_ref());
        let allowance = match self.limiter.as_ref().map(|limiter| limiter.take(&identity, named, address)).transpose() {
            Ok(allowance) => allowance,
            Err((error, allowance)) => return Err(Refusal { error, identity, allowance: Some(allowance) }),
        };
        match app.auth.authorize(&identity, scope).and(caller) {
            Ok(caller) => Ok(Pass { caller, identity, address, allowance }),
            Err(error) => Err(Refusal { error, identity, allowance }),
        }
    }
}

/// Admits the request, or answers it.
pub(crate) fn admit(app: &App, scope: Scope, request: &Request) -> Result<Pass, Box<Response>> {
    let address = app.gate.address(request);
    app.gate.admit(app, scope, request, address).map_err(|refusal| {
        let Refusal { error, identity, allowance } = refusal;
        let denied = matches!(error.code(), ErrorCode::Unauthorized | ErrorCode::Forbidden);
        let mut response = error.into_response();
        if denied {
            audit::refused(app, request, address, &identity, response.status());
        }
        if let Some(allowance) = allowance {
            allowance.show(response.headers_mut());
        }
        Box::new(response)
    })
}

/// A key that somebody took for an id must not reach handlers, which name ids in
/// errors, logs and metrics.
pub(crate) fn check_path(app: &App, request: &Request) -> Result<(), ApiError> {
    if app.auth.finds_key_in(request.uri().path()) {
        return Err(ApiError::bad_request("the path holds an API key").hint("keys go into the header X-API-Key"));
    }
    Ok(())
}

impl Pass {
    /// Begins the record of this call, if there is to be one.
    pub(crate) fn record(&self, app: &App, scope: Scope, request: &Request) -> Option<Call> {
        let kind = if scope == Scope::Admin { AuditKind::Admin } else { AuditKind::Call };
        let call = || Call::begin(app, request, self.address, &self.identity, kind).made_by(&self.caller);
        audit::is_recorded(scope).then(call)
    }

    /// Runs the handler, while the key is valid.
    pub(crate) async fn run(&self, scope: Scope, mut request: Request, next: Next) -> Response {
        request.extensions_mut().insert(self.caller.clone());
        request.extensions_mut().insert(self.identity.clone());
        // Administration is brief, and may be what revokes the key.
        if scope == Scope::Admin {
            return next.run(request).await;
        }
        let answer = async { Ok(next.run(request).await) };
        while_valid(&self.identity, answer).await.unwrap_or_else(IntoResponse::into_response)
    }

    pub(crate) fn show_limit(&self, response: &mut Response) {
        if let Some(allowance) = self.allowance {
            allowance.show(response.headers_mut());
        }
    }
}

/// Whose key a visitor of a preview shows, if it opens ports: that takes what
/// making a link to them takes. Most visitors show none, which is no failure;
/// wrong ones count like those of callers, so that previews are no place to try
/// keys out.
pub(crate) fn visitor(app: &App, head: &Parts, host: &Authority, address: IpAddr) -> Result<Identity, ApiError> {
    if !auth::presents_key(&head.headers) || app.auth.is_open() {
        return Ok(Identity::NOBODY);
    }
    let identity = app.gate.identify(app, &head.headers, address)?;
    let judged = app.auth.authorize(&identity, Scope::Api);
    if let Err(refused) = &judged {
        audit::visitor_refused(app, head, host, address, &identity, error::status(refused.code()));
    }
    match &identity {
        // A link is the other way in, so the preview says what is wanted.
        Identity::Anonymous(_) => Ok(identity),
        Identity::Configured(_) | Identity::Stored(_) => judged.map(|()| identity),
    }
}

/// Waits for an answer. When the key is revoked or expires meanwhile, what works
/// on it is dropped, or the body that it is still sending breaks off.
pub(crate) async fn while_valid(
    identity: &Identity,
    answer: impl Future<Output = Result<Response, ApiError>>,
) -> Result<Response, ApiError> {
    let Some(key) = identity.stored() else { return answer.await };
    let response = tokio::select! {
        biased;
        response = answer => response?,
        () = key.ended() => {
            return Err(ApiError::new(ErrorCode::Unauthorized, "the API key has ended, and this call with it"));
        }
    };
    let ended = Arc::clone(key);
    Ok(response.map(|body| Body::new(WhileValid { body, ended: Box::pin(async move { ended.ended().await }) })))
}

/// A body that breaks off when the key ends with which it was asked for.
struct WhileValid {
    body: Body,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl http_body::Body for WhileValid {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.ended.as_mut().poll(context).is_ready() {
            let reason = std::io::Error::new(std::io::ErrorKind::PermissionDenied, "the API key has ended");
            return Poll::Ready(Some(Err(axum::Error::new(reason))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Records a request that was refused before any route looked at it.
pub(crate) fn refused_at_the_edge(app: &App, request: &Request, status: StatusCode) {
    audit::refused(app, request, app.gate.address(request), &Identity::NOBODY, status);
}

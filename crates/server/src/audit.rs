//! The record of calls: who changed what, and who was refused.
//!
//! Everything that needs `api:*` or `admin:*` is recorded, streams and
//! WebSockets when their head goes out, and also a call whose client goes away
//! before that. Refusals are recorded whatever they were for, but only so many
//! of one address and of all, so that strangers cannot fill the log. Neither
//! queries nor bodies nor keys are in a record.

use std::net::IpAddr;
use std::time::Instant;

use axum::extract::Request;
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, StatusCode, header};
use stacyvm_api::{KeyId, OwnerId};
use stacyvm_engine::{AuditEntry, AuditKind, Caller};

use crate::App;
use crate::auth::{Identity, Scope};
use crate::edge::RequestId;
use crate::peer::subscriber;
use crate::rate_limit::{Buckets, Rate, Taken};

/// Refusals that are recorded of one address, and of all together.
const REFUSALS_OF_ONE: Rate = Rate { burst: 30, per_minute: 30 };
const REFUSALS_OF_ALL: Rate = Rate { burst: 600, per_minute: 600 };

/// Longest name of a program that is kept.
const USER_AGENT_MAX_CHARS: usize = 256;

/// Status of a call whose client went away before the answer: nginx's number
/// for the same. It is in no answer, only in the record.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Whether calls of a route are recorded.
pub(crate) fn is_recorded(scope: Scope) -> bool {
    match scope {
        Scope::Api | Scope::Admin => true,
        Scope::Public | Scope::Probe | Scope::Read => false,
    }
}

/// How many refusals may still be recorded.
#[derive(Debug)]
pub(crate) struct RefusalBudget {
    of_one: Buckets<IpAddr>,
    of_all: Buckets<()>,
}

impl Default for RefusalBudget {
    fn default() -> Self {
        Self { of_one: Buckets::new(REFUSALS_OF_ONE), of_all: Buckets::new(REFUSALS_OF_ALL) }
    }
}

impl RefusalBudget {
    fn allows(&self, address: IpAddr) -> bool {
        let now = Instant::now();
        let token = |taken| matches!(taken, Taken::Token { .. });
        token(self.of_one.take(subscriber(address), now)) && token(self.of_all.take((), now))
    }
}

/// Records a refusal that happened at once.
pub(crate) fn refused(app: &App, request: &Request, address: IpAddr, identity: &Identity, status: StatusCode) {
    if app.gate.refusals().allows(address) {
        let call = Call::begin(app, request, address, identity, AuditKind::Denied);
        call.end(status);
    }
}

/// Records a key that was refused at a preview, under the preview's host.
pub(crate) fn visitor_refused(
    app: &App,
    head: &Parts,
    host: &Authority,
    address: IpAddr,
    identity: &Identity,
    status: StatusCode,
) {
    if app.gate.refusals().allows(address) {
        let mut call = Call::of(app, head.method.as_str(), &head.headers, address, identity, AuditKind::Denied);
        call.path = app.auth.without_keys(&format!("//{host}{}", head.uri.path())).into_owned();
        call.end(status);
    }
}

/// A call under way. Dropping it without an end records that it broke off.
pub(crate) struct Call {
    app: App,
    kind: AuditKind,
    actor: String,
    key: Option<KeyId>,
    owner: Option<OwnerId>,
    tenant: Option<String>,
    method: String,
    path: String,
    request_id: String,
    remote_addr: IpAddr,
    user_agent: String,
    started: Instant,
    recorded: bool,
}

impl Call {
    pub(crate) fn begin(app: &App, request: &Request, address: IpAddr, identity: &Identity, kind: AuditKind) -> Self {
        let mut call = Self::of(app, request.method().as_str(), request.headers(), address, identity, kind);
        call.path = app.auth.without_keys(request.uri().path()).into_owned();
        if let Some(id) = request.extensions().get::<RequestId>() {
            id.as_str().clone_into(&mut call.request_id);
        }
        call
    }

    fn of(app: &App, method: &str, headers: &HeaderMap, address: IpAddr, identity: &Identity, kind: AuditKind) -> Self {
        Self {
            app: app.clone(),
            kind,
            actor: identity.actor(),
            key: identity.key_id().cloned(),
            owner: identity.owner().cloned(),
            tenant: None,
            method: method.to_owned(),
            path: String::new(),
            request_id: String::new(),
            remote_addr: address,
            user_agent: app.auth.without_keys(&user_agent(headers)).into_owned(),
            started: Instant::now(),
            recorded: false,
        }
    }

    /// Whom the call is for.
    pub(crate) fn made_by(mut self, caller: &Caller) -> Self {
        self.owner.clone_from(&caller.owner);
        self.tenant.clone_from(&caller.tenant);
        self
    }

    pub(crate) fn end(mut self, status: StatusCode) {
        self.record(status.as_u16());
    }

    fn record(&mut self, status: u16) {
        if std::mem::replace(&mut self.recorded, true) {
            return;
        }
        let take = std::mem::take::<String>;
        self.app.engine.record_call(AuditEntry {
            kind: self.kind,
            actor: take(&mut self.actor),
            key: self.key.take(),
            owner: self.owner.take(),
            tenant: self.tenant.take(),
            method: take(&mut self.method),
            path: take(&mut self.path),
            status,
            duration: self.started.elapsed(),
            request_id: take(&mut self.request_id),
            remote_addr: self.remote_addr.to_string(),
            user_agent: take(&mut self.user_agent),
        });
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let status =
            if std::thread::panicking() { StatusCode::INTERNAL_SERVER_ERROR.as_u16() } else { CLIENT_CLOSED_REQUEST };
        self.record(status);
    }
}

fn user_agent(headers: &HeaderMap) -> String {
    let value = headers.get(header::USER_AGENT).map(|value| String::from_utf8_lossy(value.as_bytes()));
    value.unwrap_or_default().chars().filter(|c| !c.is_control()).take(USER_AGENT_MAX_CHARS).collect()
}

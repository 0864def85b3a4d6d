//! What a route is, and how a table of them becomes a router.
//!
//! A route is declared once, with method, path, scope, what body it takes and
//! its handler; the API document is written from the same declaration. There is
//! no other way to add a handler, so that none can go without a scope.

use axum::Router;
use axum::extract::{Request, State};
use axum::handler::Handler;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use stacyvm_api::ErrorCode;

use crate::App;
use crate::auth::Scope;
use crate::error::ApiError;
use crate::gate;
use crate::guard::UPLOAD_HEADER;
use crate::openapi::Doc;

/// Prefix of the REST API (http-api 1).
pub const BASE: &str = "/api/v1";

/// What a request to a route may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BodyRule {
    /// Nothing, or `{}` from clients that always send something.
    None,
    /// JSON, or nothing at all.
    OptionalJson,
    Json,
    /// JSON with a file in it, which may be larger.
    FileJson,
    /// Raw bytes of any length, with the header `X-StacyVM-Upload`.
    Upload,
}

/// A route as tests and documents see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    pub method: Method,
    /// Full path with `{parameters}`.
    pub path: String,
    pub scope: Scope,
    pub body: BodyRule,
    /// Answers with a trailing slash too.
    pub slash: bool,
}

pub(crate) struct Route {
    pub(crate) info: RouteInfo,
    pub(crate) doc: Doc,
    handler: MethodRouter<App>,
}

/// What the table demands of one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    scope: Scope,
    pub(crate) body: BodyRule,
}

impl Route {
    fn new<H, T>(method: Method, path: &str, scope: Scope, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::GET);
        let info = RouteInfo { method, path: format!("{BASE}{path}"), scope, body: BodyRule::None, slash: false };
        Self { info, doc: Doc::default(), handler: on(filter, handler) }
    }

    /// The same handler below `/admin`, for administrators.
    pub(crate) fn for_admins(self, path: &str) -> Self {
        let info = RouteInfo { path: format!("{BASE}/admin{path}"), scope: Scope::Admin, ..self.info };
        Self { info, ..self }
    }

    /// Not below `/api/v1`.
    pub(crate) fn at_root(mut self, path: &str) -> Self {
        path.clone_into(&mut self.info.path);
        self
    }

    /// Answers with a trailing slash too.
    pub(crate) fn slash(mut self) -> Self {
        self.info.slash = true;
        self
    }

    pub(crate) fn body(mut self, body: BodyRule) -> Self {
        self.info.body = body;
        self
    }

    pub(crate) fn doc(mut self, doc: Doc) -> Self {
        self.doc = doc;
        self
    }
}

macro_rules! methods {
    ($($name:ident $method:ident),*) => {$(
        pub(crate) fn $name<H, T>(path: &str, scope: Scope, handler: H) -> Route
        where
            H: Handler<T, App>,
            T: 'static,
        {
            Route::new(Method::$method, path, scope, handler)
        }
    )*};
}
methods!(get GET, post POST, put PUT, delete DELETE);

/// A router that knows every route and refuses everything else.
pub(crate) fn router(app: &App, table: Vec<Route>) -> Router<App> {
    let mut router = Router::new();
    for route in table {
        let rule = Rule { scope: route.info.scope, body: route.info.body };
        let handler = route.handler.route_layer(from_fn_with_state((app.clone(), rule), enforce));
        if route.info.slash {
            router = router.route(&format!("{}/", route.info.path), handler.clone());
        }
        router = router.route(&route.info.path, handler);
    }
    router.fallback(unknown_path).method_not_allowed_fallback(unknown_method)
}

/// Holds a request against its route's declaration before the handler runs.
async fn enforce(State((app, rule)): State<(App, Rule)>, mut request: Request, next: Next) -> Response {
    let pass = match gate::admit(&app, rule.scope, &request) {
        Ok(pass) => pass,
        Err(refused) => return *refused,
    };
    let call = pass.record(&app, rule.scope, &request);
    let mut response = match gate::check_path(&app, &request).and_then(|()| check_body(rule.body, &request)) {
        Ok(()) => {
            request.extensions_mut().insert(rule);
            pass.run(rule.scope, request, next).await
        }
        Err(failure) => failure.into_response(),
    };
    if let Some(call) = call {
        call.end(response.status());
    }
    pass.show_limit(&mut response);
    response
}

/// Mutations must have a content type that no HTML form can send.
fn check_body(rule: BodyRule, request: &Request) -> Result<(), ApiError> {
    if matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    if rule == BodyRule::Upload {
        let marked = request.headers().contains_key(UPLOAD_HEADER);
        return if marked {
            Ok(())
        } else {
            Err(ApiError::new(ErrorCode::UnsupportedMediaType, "an upload must carry the header X-StacyVM-Upload")
                .hint("send the header X-StacyVM-Upload: 1; it keeps web pages from uploading"))
        };
    }
    let has_type = request.headers().contains_key(header::CONTENT_TYPE);
    if is_json(request.headers()) || (!has_type && request.body().is_end_stream()) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::UnsupportedMediaType, "the request body must be JSON")
        .hint("send the header Content-Type: application/json"))
}

fn is_json(headers: &HeaderMap) -> bool {
    let text = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn unknown_path(State(app): State<App>, request: Request) -> Response {
    unmatched(&app, &request, StatusCode::NOT_FOUND)
}

async fn unknown_method(State(app): State<App>, request: Request) -> Response {
    unmatched(&app, &request, StatusCode::METHOD_NOT_ALLOWED)
}

/// Unknown paths and methods of the API show themselves only to callers that
/// may read.
fn unmatched(app: &App, request: &Request, status: StatusCode) -> Response {
    if request.uri().path().starts_with(BASE)
        && let Err(refused) = gate::admit(app, Scope::Read, request)
    {
        return *refused;
    }
    ApiError::for_status(status).into_response()
}

/// Answers of the API are never stored by caches.
pub(crate) const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

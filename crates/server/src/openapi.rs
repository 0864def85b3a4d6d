//! The API document: written from the route table, served at
//! `/swagger/doc.json`, shown by Swagger UI, and checked in as
//! `docs/openapi.json`.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use stacyvm_api::{ErrorBody, ErrorCode};
use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::path::{OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ArrayBuilder, Components, ObjectBuilder, Schema, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ContentBuilder, HttpMethod, InfoBuilder, License, OpenApi, OpenApiBuilder, Ref, RefOr, Required, ResponseBuilder,
    ServerBuilder,
};
use utoipa::{IntoParams, ToSchema};

use crate::App;
use crate::auth::Scope;
use crate::error::ApiError;
use crate::table::{BASE, BodyRule, Route};

type NamedSchema = (String, RefOr<Schema>);

/// Media type and shape of a body.
type Content = (&'static str, RefOr<Schema>);

/// Status, what it means, and the body if there is one.
type Answer = (StatusCode, &'static str, Option<Content>);

/// What the document says about a route beyond its declaration.
#[derive(Default)]
pub(crate) struct Doc {
    id: &'static str,
    summary: &'static str,
    description: &'static str,
    parameters: Vec<Parameter>,
    request: Option<Content>,
    answers: Vec<Answer>,
    schemas: Vec<NamedSchema>,
}

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";
const BYTES: &str = "application/octet-stream";

/// The page runs its own files and talks to this server only. Swagger UI sets
/// styles in its elements and has its icons in `data:` addresses.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
    img-src 'self' data:; connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'";

impl Doc {
    pub(crate) fn new(id: &'static str, summary: &'static str) -> Self {
        Self { id, summary, ..Self::default() }
    }

    pub(crate) fn text(mut self, description: &'static str) -> Self {
        self.description = description;
        self
    }

    pub(crate) fn query<T: IntoParams>(mut self) -> Self {
        self.parameters.extend(T::into_params(|| Some(ParameterIn::Query)));
        self
    }

    pub(crate) fn header(mut self, name: &'static str, description: &'static str) -> Self {
        self.parameters.push(text_parameter(name, ParameterIn::Header, description));
        self
    }

    pub(crate) fn takes<T: ToSchema>(mut self) -> Self {
        self.request = Some((JSON, self.reference::<T>()));
        self
    }

    pub(crate) fn takes_bytes(mut self, content_type: &'static str) -> Self {
        self.request = Some((content_type, binary()));
        self
    }

    pub(crate) fn gives<T: ToSchema>(self, description: &'static str) -> Self {
        self.gives_with::<T>(StatusCode::OK, description)
    }

    pub(crate) fn gives_with<T: ToSchema>(mut self, status: StatusCode, description: &'static str) -> Self {
        let schema = self.reference::<T>();
        self.answers.push((status, description, Some((JSON, schema))));
        self
    }

    pub(crate) fn gives_list<T: ToSchema>(mut self, description: &'static str) -> Self {
        let items = self.reference::<T>();
        let list = RefOr::T(Schema::Array(ArrayBuilder::new().items(items).build()));
        self.answers.push((StatusCode::OK, description, Some((JSON, list))));
        self
    }

    /// Lines of JSON, one `T` each.
    pub(crate) fn gives_lines<T: ToSchema>(mut self, description: &'static str) -> Self {
        let schema = self.reference::<T>();
        self.answers.push((StatusCode::OK, description, Some((NDJSON, schema))));
        self
    }

    pub(crate) fn gives_bytes(self, description: &'static str) -> Self {
        self.gives_raw(StatusCode::OK, BYTES, description)
    }

    pub(crate) fn gives_raw(
        mut self,
        status: StatusCode,
        content_type: &'static str,
        description: &'static str,
    ) -> Self {
        let schema = if content_type == JSON { any_object() } else { binary() };
        self.answers.push((status, description, Some((content_type, schema))));
        self
    }

    pub(crate) fn gives_nothing(mut self, status: StatusCode, description: &'static str) -> Self {
        self.answers.push((status, description, None));
        self
    }

    /// Puts a type into the document that no body shows as such.
    pub(crate) fn names<T: ToSchema>(mut self) -> Self {
        self.reference::<T>();
        self
    }

    fn reference<T: ToSchema>(&mut self) -> RefOr<Schema> {
        let name = T::name().into_owned();
        if name == "String" {
            return T::schema();
        }
        T::schemas(&mut self.schemas);
        self.schemas.push((name.clone(), T::schema()));
        RefOr::Ref(Ref::from_schema_name(name))
    }
}

/// The document of these routes.
pub(crate) fn document(routes: &[Route], version: &str) -> OpenApi {
    let mut paths = utoipa::openapi::path::Paths::new();
    let mut components = Components::new();
    let mut tags = BTreeSet::new();
    let mut schemas = Vec::new();
    ErrorBody::schemas(&mut schemas);
    schemas.push((ErrorBody::name().into_owned(), <ErrorBody as utoipa::PartialSchema>::schema()));
    for route in routes {
        tags.insert(tag(route));
        schemas.extend(route.doc.schemas.iter().cloned());
        let item = PathItem::new(method(&route.info.method), operation(route));
        match paths.paths.get_mut(&route.info.path) {
            Some(known) => known.merge_operations(item),
            None => {
                paths.paths.insert(route.info.path.clone(), item);
            }
        }
    }
    components.schemas.extend(schemas);
    let key = |header: &str| RefOr::T(SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new(header))));
    components.security_schemes.insert("api_key".to_owned(), key("X-API-Key"));
    components.security_schemes.insert("admin_api_key".to_owned(), key("X-Admin-API-Key"));
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("StacyVM")
                .version(version)
                .description(Some("Sandboxes that run code for AI agents."))
                .license(Some(License::builder().name("Apache-2.0").identifier(Some("Apache-2.0")).build())),
        )
        .servers(Some([ServerBuilder::new().url("/").build()]))
        .paths(paths)
        .components(Some(components))
        .tags(Some(tags.into_iter().map(|name| TagBuilder::new().name(name).build())))
        .build()
}

/// `GET /swagger/doc.json`.
pub(crate) async fn doc_json(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(JSON))], app.document.clone()).into_response()
}

/// `GET /swagger/`, with and without the slash.
pub(crate) async fn ui_root() -> Result<Response, ApiError> {
    ui_file("index.html")
}

/// What that page loads.
pub(crate) async fn ui(Path(path): Path<String>) -> Result<Response, ApiError> {
    ui_file(&path)
}

fn ui_file(path: &str) -> Result<Response, ApiError> {
    let config = Arc::new(utoipa_swagger_ui::Config::from("/swagger/doc.json"));
    let file = utoipa_swagger_ui::serve(path, config)
        .ok()
        .flatten()
        .ok_or_else(|| ApiError::new(ErrorCode::NotFound, "no such page"))?;
    let content_type = HeaderValue::from_str(&file.content_type).unwrap_or(HeaderValue::from_static(BYTES));
    let mut bytes = file.bytes.into_owned();
    if let (true, Ok(page)) = (path == "index.html", std::str::from_utf8(&bytes)) {
        // The page's links are relative; this makes them right at `/swagger`
        // too, without a redirect.
        bytes = page.replacen("<head>", "<head><base href=\"/swagger/\">", 1).into_bytes();
    }
    let mut response = ([(header::CONTENT_TYPE, content_type)], bytes).into_response();
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    if file.gzpipped {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

fn operation(route: &Route) -> OperationBuilder {
    let doc = &route.doc;
    // The admin alias of a route is an operation of its own.
    let id = if route.info.path.starts_with(&format!("{BASE}/admin/")) {
        format!("admin_{}", doc.id)
    } else {
        doc.id.to_owned()
    };
    let mut operation = OperationBuilder::new()
        .operation_id(Some(id))
        .summary(Some(doc.summary))
        .tag(tag(route))
        .parameters(Some(path_parameters(&route.info.path).chain(doc.parameters.iter().cloned())))
        .securities(Some(securities(route.info.scope)))
        .extensions(Some(Extensions::builder().add("x-stacyvm-scope", route.info.scope.name()).build()));
    if !doc.description.is_empty() {
        operation = operation.description(Some(doc.description));
    }
    if route.info.body == BodyRule::Upload {
        let text = "Any value. Web pages of other origins cannot send it.";
        let parameter = text_parameter("X-StacyVM-Upload", ParameterIn::Header, text);
        operation = operation.parameter(ParameterBuilder::from(parameter).required(Required::True));
    }
    if let Some((content_type, schema)) = &doc.request {
        let required = if route.info.body == BodyRule::OptionalJson { Required::False } else { Required::True };
        let content = ContentBuilder::new().schema(Some(schema.clone())).build();
        let body = RequestBodyBuilder::new().content(*content_type, content).required(Some(required)).build();
        operation = operation.request_body(Some(body));
    }
    let statuses: BTreeSet<StatusCode> = doc.answers.iter().map(|answer| answer.0).collect();
    for status in statuses {
        let same: Vec<&Answer> = doc.answers.iter().filter(|answer| answer.0 == status).collect();
        let description: Vec<&str> = same.iter().map(|answer| answer.1).collect();
        let mut response = ResponseBuilder::new().description(description.join(" "));
        for (content_type, schema) in same.iter().filter_map(|answer| answer.2.as_ref()) {
            response = response.content(*content_type, ContentBuilder::new().schema(Some(schema.clone())).build());
        }
        operation = operation.response(status.as_str(), response.build());
    }
    let error = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
    operation.response("default", ResponseBuilder::new().description("It failed.").content(JSON, error).build())
}

fn path_parameters(path: &str) -> impl Iterator<Item = Parameter> {
    path.split('/').filter_map(|segment| {
        let name = segment.strip_prefix('{')?.strip_suffix('}')?.trim_start_matches('*');
        let parameter = text_parameter(name, ParameterIn::Path, "");
        Some(ParameterBuilder::from(parameter).required(Required::True).build())
    })
}

fn text_parameter(name: &str, place: ParameterIn, description: &str) -> Parameter {
    let mut parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(Required::False)
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)));
    if !description.is_empty() {
        parameter = parameter.description(Some(description));
    }
    parameter.build()
}

fn securities(scope: Scope) -> Vec<SecurityRequirement> {
    let key = |name: &str| SecurityRequirement::new(name, Vec::<String>::new());
    match scope {
        Scope::Public | Scope::Probe => Vec::new(),
        Scope::Read | Scope::Api | Scope::Admin => vec![key("api_key"), key("admin_api_key")],
    }
}

/// The first part of the path below the base names the group.
fn tag(route: &Route) -> String {
    let path = route.info.path.strip_prefix(BASE).unwrap_or(&route.info.path);
    let mut parts = path.split('/').filter(|part| !part.is_empty() && !part.starts_with('{'));
    let first = parts.next().unwrap_or("system");
    match (first, parts.next()) {
        ("sandboxes", Some(part @ ("files" | "exec"))) => part.to_owned(),
        ("sandboxes" | "templates" | "providers" | "quotas" | "events" | "metrics" | "admin" | "swagger", _) => {
            first.to_owned()
        }
        _ => "system".to_owned(),
    }
}

fn method(method: &http::Method) -> HttpMethod {
    match *method {
        http::Method::POST => HttpMethod::Post,
        http::Method::PUT => HttpMethod::Put,
        http::Method::DELETE => HttpMethod::Delete,
        http::Method::PATCH => HttpMethod::Patch,
        _ => HttpMethod::Get,
    }
}

fn binary() -> RefOr<Schema> {
    let object = ObjectBuilder::new().schema_type(Type::String).content_media_type(BYTES);
    RefOr::T(Schema::Object(object.build()))
}

fn any_object() -> RefOr<Schema> {
    RefOr::T(Schema::Object(ObjectBuilder::new().schema_type(Type::Object).build()))
}

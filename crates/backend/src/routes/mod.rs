//! The protocol's routes, one file per subject.

mod exec;
mod file;
mod sandbox;
mod stream;
mod terminal;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{MethodRouter, delete, get, post};

use crate::state::App;
use crate::{error, guard};

/// A request that is kept in memory, at most.
const BODY_BYTES_MAX: usize = 1 << 20;
/// The same where it holds the text of a file.
const TEXT_BODY_BYTES_MAX: usize = 96 << 20;

/// Every route, as `docs/custom-backend.openapi.json` has them too.
pub const ROUTES: [(&str, &str); 25] = [
    ("GET", "/health"),
    ("GET", "/capabilities"),
    ("POST", "/spawn"),
    ("GET", "/status/{id}"),
    ("GET", "/sandboxes"),
    ("DELETE", "/sandboxes/{id}"),
    ("POST", "/sandboxes/{id}/deadline"),
    ("GET", "/sandboxes/{id}/stats"),
    ("GET", "/sandboxes/{id}/logs"),
    ("GET", "/sandboxes/{id}/terminal"),
    ("GET", "/sandboxes/{id}/ports"),
    ("GET", "/sandboxes/{id}/dial"),
    ("GET", "/sandboxes/{id}/agent"),
    ("POST", "/exec"),
    ("GET", "/files"),
    ("POST", "/files"),
    ("PUT", "/files"),
    ("DELETE", "/files"),
    ("GET", "/files/list"),
    ("GET", "/files/stat"),
    ("GET", "/files/glob"),
    ("POST", "/files/move"),
    ("POST", "/files/chmod"),
    ("POST", "/files/mkdir"),
    ("GET|PUT", "/files/archive"),
];

pub(crate) fn router(app: App) -> Router {
    let mut router = Router::new();
    for (method, path) in ROUTES {
        router = router.route(path, handler(method, path));
    }
    router
        .layer(from_fn(error::typed))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn_with_state(app.clone(), guard::check))
        .with_state(app)
}

/// The table is the router: a route that is in one and not in the other is not
/// possible.
fn handler(method: &str, path: &str) -> MethodRouter<App> {
    match (method, path) {
        ("GET", "/health") => get(sandbox::health),
        ("GET", "/capabilities") => get(sandbox::capabilities),
        ("POST", "/spawn") => post(sandbox::spawn),
        ("GET", "/status/{id}") => get(sandbox::status),
        ("GET", "/sandboxes") => get(sandbox::list),
        ("DELETE", "/sandboxes/{id}") => delete(sandbox::destroy),
        ("POST", "/sandboxes/{id}/deadline") => post(sandbox::deadline),
        ("GET", "/sandboxes/{id}/stats") => get(sandbox::stats),
        ("GET", "/sandboxes/{id}/logs") => get(sandbox::logs),
        ("GET", "/sandboxes/{id}/terminal") => get(terminal::open),
        ("GET", "/sandboxes/{id}/ports") => get(stream::ports),
        ("GET", "/sandboxes/{id}/dial") => get(stream::dial),
        ("GET", "/sandboxes/{id}/agent") => get(stream::agent),
        ("POST", "/exec") => post(exec::run),
        ("GET", "/files") => get(file::read),
        ("POST", "/files") => post(file::write).layer(DefaultBodyLimit::max(TEXT_BODY_BYTES_MAX)),
        ("PUT", "/files") => axum::routing::put(file::upload),
        ("DELETE", "/files") => delete(file::remove),
        ("GET", "/files/list") => get(file::list),
        ("GET", "/files/stat") => get(file::stat),
        ("GET", "/files/glob") => get(file::glob),
        ("POST", "/files/move") => post(file::rename),
        ("POST", "/files/chmod") => post(file::chmod),
        ("POST", "/files/mkdir") => post(file::mkdir),
        ("GET|PUT", "/files/archive") => get(file::archive).put(file::extract),
        (method, path) => unreachable!("{method} {path} has no handler"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;
    use stacyvm_api::backend::{Code, Feature};

    use super::*;

    fn document() -> Value {
        let text = include_str!("../../../../docs/custom-backend.openapi.json");
        serde_json::from_str(text).expect("the document is JSON")
    }

    #[test]
    fn every_route_has_a_handler_and_is_described() {
        let mut routed = BTreeSet::new();
        for (methods, path) in ROUTES {
            drop(handler(methods, path));
            routed.extend(methods.split('|').map(|method| (method.to_lowercase(), path.to_owned())));
        }
        let document = document();
        let paths = document["paths"].as_object().expect("paths");
        let described: BTreeSet<_> = paths
            .iter()
            .flat_map(|(path, item)| {
                item.as_object().expect("a path").keys().map(|method| (method.clone(), path.clone()))
            })
            .collect();
        assert_eq!(routed, described);
    }

    /// Words of the document that this version does not know would be new ones
    /// that nobody reads.
    #[test]
    fn the_document_knows_the_words_of_the_protocol() {
        let document = document();
        let schemas = &document["components"]["schemas"];
        for word in schemas["Failure"]["properties"]["code"]["enum"].as_array().expect("codes") {
            let code: Code = serde_json::from_value(word.clone()).expect("a word");
            assert_ne!(code, Code::Unknown, "{word}");
        }
        for word in schemas["Capabilities"]["properties"]["features"]["items"]["enum"].as_array().expect("features") {
            let feature: Feature = serde_json::from_value(word.clone()).expect("a word");
            assert_ne!(feature, Feature::Unknown, "{word}");
        }
    }
}

//! The API document is checked in, fresh, and covers every route.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

/// Set to write the document instead of comparing it.
const UPDATE: &str = "UPDATE_OPENAPI";

fn document() -> Value {
    serde_json::from_str(&stacyvm_server::openapi_json()).unwrap()
}

#[test]
fn the_document_is_checked_in_as_the_code_writes_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let current = stacyvm_server::openapi_json();
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &current).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == current,
        "docs/openapi.json is stale; write it anew with: {UPDATE}=1 cargo test -p stacyvm-server --test it openapi"
    );
}

#[test]
fn every_route_is_documented_with_its_scope() {
    let document = document();
    let mut ids = BTreeSet::new();
    for route in stacyvm_server::route_list() {
        let method = route.method.as_str().to_ascii_lowercase();
        let operation = &document["paths"][&route.path][&method];
        assert!(operation.is_object(), "{} {} is not in the document", route.method, route.path);
        assert_eq!(operation["x-stacyvm-scope"], route.scope.name(), "{} {}", route.method, route.path);
        let id = operation["operationId"].as_str().unwrap_or_default();
        assert!(!id.is_empty() && ids.insert(id.to_owned()), "operation id `{id}` of {} is not unique", route.path);
        assert!(operation["summary"].is_string(), "{id} has no summary");
        for name in route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            let declared = operation["parameters"].as_array().is_some_and(|all| {
                all.iter().any(|item| item["name"] == name.trim_start_matches('*') && item["in"] == "path")
            });
            assert!(declared, "{id} does not declare the path parameter {name}");
        }
    }
    let paths = document["paths"].as_object().unwrap();
    let operations: usize = paths.values().map(|item| item.as_object().unwrap().len()).sum();
    assert_eq!(operations, ids.len(), "the document has operations that no route has");
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    let document = document();
    let mut references = BTreeSet::new();
    collect_references(&document, &mut references);
    assert!(references.len() > 20, "the document has schemas: {references:?}");
    for reference in references {
        let name = reference.strip_prefix("#/components/schemas/").expect("references are to schemas");
        assert!(document["components"]["schemas"][name].is_object(), "{reference} leads nowhere");
    }
}

fn collect_references(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            into.extend(object.get("$ref").and_then(Value::as_str).map(str::to_owned));
            object.values().for_each(|value| collect_references(value, into));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, into)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

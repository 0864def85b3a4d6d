//! The schema of the configuration file, for editors that complete and check
//! it while it is written.

use serde_json::{Map, Value, json};

use crate::config::reserved::RESERVED;
use crate::config::schema::{Entry, entries};
use crate::config::setting::Shape;

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// What `stacyvm_api::Duration` reads, such as `1h30m` or `0`.
const DURATION: &str = r"^\+?(0|(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+)$";

/// The schema as a document.
pub(crate) fn json_schema() -> Value {
    let mut root = section();
    for entry in entries() {
        insert(&mut root, entry, setting(entry));
    }
    for reserved in RESERVED {
        let mut schema = setting(&reserved.entry);
        schema["deprecated"] = json!(true);
        schema["description"] = json!("Known, without an effect in this version.");
        insert(&mut root, &reserved.entry, schema);
    }
    root["$schema"] = json!(DIALECT);
    root["title"] = json!("StacyVM configuration");
    root["description"] = json!("Settings of `stacyvm serve`. An unknown key stops the server.");
    root
}

/// An empty section; sections may be left empty.
fn section() -> Value {
    json!({ "type": ["object", "null"], "additionalProperties": false, "properties": {} })
}

/// Puts a setting below the sections that its key names.
fn insert(root: &mut Value, entry: &Entry, schema: Value) {
    let mut place = root;
    let mut names = entry.key.split('.').peekable();
    while let Some(name) = names.next() {
        let Some(properties) = place["properties"].as_object_mut() else { return };
        if names.peek().is_none() {
            properties.insert(name.to_owned(), schema);
            return;
        }
        place = properties.entry(name).or_insert_with(section);
    }
}

fn setting(entry: &Entry) -> Value {
    let mut schema = shape(entry.shape);
    schema.insert("description".to_owned(), json!(entry.meaning()));
    if let Some(default) = default(entry) {
        schema.insert("default".to_owned(), default);
    }
    Value::Object(schema)
}

/// `key:` with nothing behind it leaves the default, so null is fine for all.
/// Text may look like a number, and a duration may be a plain 0.
fn shape(shape: Shape) -> Map<String, Value> {
    let schema = match shape {
        Shape::Text => json!({ "type": ["string", "number", "null"] }),
        Shape::Secret => json!({ "type": ["string", "number", "null"], "writeOnly": true }),
        Shape::Number => json!({ "type": ["integer", "null"], "minimum": 0 }),
        Shape::Fraction => json!({ "type": ["number", "null"], "minimum": 0 }),
        Shape::Switch => json!({ "type": ["boolean", "null"] }),
        Shape::Duration => json!({
            "type": ["string", "integer", "null"], "pattern": DURATION, "minimum": 0, "maximum": 0,
        }),
        Shape::List => json!({ "type": ["array", "string", "null"], "items": { "type": ["string", "number"] } }),
        Shape::Map => json!({ "type": ["object", "null"], "additionalProperties": { "type": ["string", "number"] } }),
        Shape::Secrets => json!({
            "type": ["array", "object", "null"],
            "items": { "type": "string" },
            "additionalProperties": { "type": "string" },
            "writeOnly": true,
        }),
        Shape::Choice(words) => {
            let mut values: Vec<Value> = words.iter().map(|word| json!(word)).collect();
            values.push(Value::Null);
            json!({ "enum": values })
        }
    };
    match schema {
        Value::Object(schema) => schema,
        _ => Map::new(),
    }
}

/// The default as the file would have it, where there is one.
fn default(entry: &Entry) -> Option<Value> {
    let text = entry.default;
    if text.is_empty() {
        return None;
    }
    Some(match entry.shape {
        Shape::Number => json!(text.parse::<u64>().ok()?),
        Shape::Fraction => json!(text.parse::<f64>().ok()?),
        Shape::Switch => json!(text == "true"),
        Shape::List => json!(text.split(',').map(str::trim).collect::<Vec<_>>()),
        Shape::Text | Shape::Secret | Shape::Duration | Shape::Choice(_) => json!(text),
        Shape::Map | Shape::Secrets => return None,
    })
}

#[cfg(test)]
mod tests {
    use boon::{Compiler, SchemaIndex, Schemas};

    use super::*;

    /// The schema, compiled by a validator that is not ours.
    struct Validator {
        schemas: Schemas,
        index: SchemaIndex,
    }

    impl Validator {
        fn new() -> Self {
            let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
            compiler.add_resource("stacyvm.json", json_schema()).expect("a resource");
            // Compiling checks the schema against its meta-schema.
            let index = compiler.compile("stacyvm.json", &mut schemas).unwrap_or_else(|error| panic!("{error:#}"));
            Self { schemas, index }
        }

        fn errors(&self, document: &Value) -> Option<String> {
            self.schemas.validate(document, self.index).err().map(|error| format!("{error:#}"))
        }
    }

    #[test]
    fn the_schema_takes_what_the_loader_takes() {
        let validator = Validator::new();
        for document in [
            json!({}),
            json!(null),
            json!({ "server": null, "auth": { "api_key": "k" } }),
            json!({ "server": { "port": 7423, "allowed_hosts": ["a", "b"] }, "defaults": { "vcpus": 0.5, "ttl": "1h30m" } }),
            json!({ "server": { "allowed_hosts": "a, b" }, "defaults": { "max_ttl": 0, "spawn_overflow": "queue" } }),
            json!({ "auth": { "worker_tokens": { "a": "t" }, "worker_signing_keys": ["k"] } }),
        ] {
            assert_eq!(validator.errors(&document), None, "{document}");
        }
        for document in [
            json!({ "server": { "prot": 7423 } }),
            json!({ "server": { "port": "7423" } }),
            json!({ "server": { "port": -1 } }),
            json!({ "defaults": { "ttl": "30" } }),
            json!({ "defaults": { "ttl": 30 } }),
            json!({ "defaults": { "spawn_overflow": "drop" } }),
            json!({ "auth": { "enabled": "yes" } }),
            json!([]),
        ] {
            assert!(validator.errors(&document).is_some(), "{document}");
        }
    }
}

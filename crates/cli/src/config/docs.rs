//! Keeps the table in `docs/configuration.md`, and the schema for editors
//! beside it, equal to the settings there are.
//!
//! `UPDATE_DOCS=1 cargo test -p stacyvm config::docs` writes it anew.

use std::fmt::Write as _;
use std::path::Path;

use crate::config::json_schema::json_schema;
use crate::config::reserved::RESERVED;
use crate::config::schema::{Entry, entries};
use crate::config::setting::Shape;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.schema.json");
const BEGIN: &str = "<!-- settings:begin, written by `UPDATE_DOCS=1 cargo test -p stacyvm config::docs` -->\n";
const END: &str = "<!-- settings:end -->\n";

#[test]
fn the_page_lists_every_setting() {
    let page = std::fs::read_to_string(PAGE).expect("docs/configuration.md");
    let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the table");
    let (_, after) = rest.split_once(END).expect("the table on the page has an end");
    let fresh = format!("{before}{BEGIN}{}{END}{after}", table());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(Path::new(PAGE), &fresh).expect("docs/configuration.md can be written");
        return;
    }
    assert!(page == fresh, "docs/configuration.md is not what the schema says: run the command named on the page");
}

#[test]
fn the_schema_for_editors_knows_every_setting() {
    let fresh = format!("{:#}\n", json_schema());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(SCHEMA, &fresh).expect("the schema can be written");
        return;
    }
    let checked_in = std::fs::read_to_string(SCHEMA).unwrap_or_default();
    assert!(
        checked_in == fresh,
        "docs/configuration.schema.json is not what `stacyvm config schema` prints: write it anew"
    );
}

fn table() -> String {
    let mut page = String::new();
    let mut section = "";
    for entry in entries() {
        let this = entry.key.rsplit_once('.').map_or("", |(section, _)| section);
        if page.is_empty() || this != section {
            let title = if this.is_empty() { "General".to_owned() } else { format!("`{this}`") };
            let _ = write!(page, "\n### {title}\n\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n");
            section = this;
        }
        let _ = writeln!(page, "| `{}` | {} | {} | {} |", entry.key, kind(entry), default(entry), meaning(entry));
    }
    page.push_str("\n### Known, without an effect in this version\n\n");
    let keys: Vec<_> = RESERVED.iter().map(|reserved| format!("`{}`", reserved.entry.key)).collect();
    let _ = write!(page, "{}\n\n", keys.join(", "));
    page
}

fn kind(entry: &Entry) -> String {
    match entry.shape {
        Shape::Text => "text".to_owned(),
        Shape::Secret => "secret".to_owned(),
        Shape::Secrets => "secrets".to_owned(),
        Shape::Number => "whole number".to_owned(),
        Shape::Fraction => "number".to_owned(),
        Shape::Switch => "true or false".to_owned(),
        Shape::Duration => "duration".to_owned(),
        Shape::List => "list".to_owned(),
        Shape::Map => "map".to_owned(),
        Shape::Choice(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
    }
}

fn default(entry: &Entry) -> String {
    if entry.default.is_empty() { "–".to_owned() } else { format!("`{}`", entry.default) }
}

fn meaning(entry: &Entry) -> String {
    entry.meaning().replace('|', "\\|")
}

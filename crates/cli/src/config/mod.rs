//! The server's configuration: one YAML file, overridden by `STACYVM_*`
//! environment variables.
//!
//! [`schema`] is the one place that lists keys, environment names, defaults and
//! their meaning; the table in `docs/configuration.md` is written from it. What
//! is wrong is reported all at once, each with its place: an unknown key names
//! the nearest known one, a wrong type names key and line.

mod acme;
mod check;
mod json_schema;
mod lint;
mod load;
mod problem;
mod reserved;
mod schema;
mod setting;
mod settings;
mod site;
mod small_file;
mod source;

#[cfg(test)]
mod docs;

pub(crate) use acme::options as acme_options;
pub(crate) use json_schema::json_schema;
pub(crate) use lint::lint;
pub(crate) use load::{Environment, Given, Loaded, examine, load, load_with};
pub(crate) use problem::ConfigError;
pub(crate) use schema::{
    Config, DatabaseDriver, Docker, LogFormat, Logging, OverflowMode, PreviewMode, RateLimit, RateLimitBy,
    UnknownPolicy,
};
pub(crate) use schema::{default_of, meaning_of, shape_of};
pub(crate) use setting::{Secret, Setting, Shape};
pub(crate) use settings::{Content, Settings, Source, Value};
pub(crate) use site::preview_options;
pub(crate) use small_file::{MAX_KEY_FILE_BYTES, read_small_file};

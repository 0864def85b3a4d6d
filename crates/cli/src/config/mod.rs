//! The server's configuration: one YAML file, overridden by `STACYVM_*`
//! environment variables.
//!
//! [`schema`] is the one place that lists keys, environment names, defaults and
//! their meaning; the table in `docs/configuration.md` is written from it. What
//! is wrong is reported all at once, each with its place: an unknown key names
//! the nearest known one, a wrong type names key and line.

mod load;
mod problem;
mod reserved;
mod schema;
mod setting;
mod site;
mod source;

#[cfg(test)]
mod docs;

pub(crate) use load::{Environment, load};
pub(crate) use schema::{
    Config, DatabaseDriver, Docker, LogFormat, Logging, OverflowMode, PreviewMode, RateLimit, RateLimitBy,
    UnknownPolicy,
};
pub(crate) use setting::Secret;

//! Every setting's value and where it was written, for commands that show or
//! judge a configuration.
//!
//! [`Config`](super::Config) is for code that acts on settings; this is for
//! code that talks about them. Only keys that this version acts on are here, so
//! that a rule about a missing feature finds out by asking.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::config::schema::Entry;
use crate::config::setting::{Raw, Secret, Setting, Shape};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    /// `stacyvm.yaml:12`.
    File {
        name: String,
        line: usize,
    },
    /// A variable of the environment.
    Environment(String),
    /// An option of the command line, such as `--port`.
    Option(&'static str),
    /// A file that holds nothing but this secret.
    KeyFile(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { name, line } => write!(f, "{name}:{line}"),
            Self::Environment(name) => f.write_str(name),
            Self::Option(flag) => f.write_str(flag),
            Self::KeyFile(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A setting as it holds.
#[derive(Debug, Clone)]
pub(crate) struct Value {
    pub(crate) key: &'static str,
    pub(crate) source: Source,
    pub(crate) content: Content,
}

/// What a setting is set to. Secrets are kept apart from text, so that showing
/// one is a decision and not an oversight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Text(String),
    List(Vec<String>),
    Map(BTreeMap<String, String>),
    Secret(Secret),
}

impl Content {
    fn new(shape: Shape, raw: &Raw) -> Self {
        match (shape, raw) {
            (Shape::Secret | Shape::Secrets, raw) => Self::Secret(Secret::new(joined(raw))),
            (Shape::List, Raw::Scalar { text, .. }) => Self::List(Vec::parse(text).unwrap_or_default()),
            (_, Raw::Scalar { text, .. }) => Self::Text(text.trim().to_owned()),
            (_, Raw::List(items)) => Self::List(items.clone()),
            (_, Raw::Map(entries)) => Self::Map(entries.clone()),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::List(items) => items.is_empty(),
            Self::Map(entries) => entries.is_empty(),
            Self::Secret(secret) => secret.expose().is_empty(),
        }
    }
}

fn joined(raw: &Raw) -> String {
    match raw {
        Raw::Scalar { text, .. } => text.trim().to_owned(),
        Raw::List(items) => items.join(","),
        Raw::Map(entries) => entries.values().cloned().collect::<Vec<_>>().join(","),
    }
}

/// What people see of a value; secrets are hidden.
impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Secret(secret) if secret.expose().is_empty() => Ok(()),
            Self::Secret(_) => f.write_str("(hidden)"),
            Self::Text(text) => f.write_str(text),
            Self::List(items) => f.write_str(&items.join(", ")),
            Self::Map(entries) => {
                let pairs: Vec<_> = entries.iter().map(|(name, value)| format!("{name}={value}")).collect();
                f.write_str(&pairs.join(", "))
            }
        }
    }
}

/// The effective configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    values: Vec<Value>,
}

impl Settings {
    /// The next value, in the order of the schema.
    pub(super) fn push(&mut self, entry: &Entry, written: Option<(Source, &Raw)>) {
        let default = Raw::Scalar { text: entry.default.to_owned(), quoted: false };
        let (source, raw) = written.unwrap_or((Source::Default, &default));
        self.values.push(Value { key: entry.key, source, content: Content::new(entry.shape, raw) });
    }

    /// A secret that came from a file of its own.
    pub(super) fn set_from_key_file(&mut self, key: &str, path: &std::path::Path, secret: &Secret) {
        if let Some(value) = self.values.iter_mut().find(|value| value.key == key) {
            value.source = Source::KeyFile(path.to_owned());
            value.content = Content::Secret(secret.clone());
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Value> {
        self.values.iter()
    }

    /// The value of a setting; none when this version does not act on it.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.values.iter().find(|value| value.key == key)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// A scalar as its type. Values were checked when they were read, so that
    /// what does not parse here is a default of another kind.
    pub(crate) fn parsed<T: Setting>(&self, key: &str) -> Option<T> {
        match &self.get(key)?.content {
            Content::Text(text) => T::parse(text).ok(),
            Content::List(_) | Content::Map(_) | Content::Secret(_) => None,
        }
    }

    /// Text, empty when it is not set.
    pub(crate) fn text(&self, key: &str) -> &str {
        match self.get(key).map(|value| &value.content) {
            Some(Content::Text(text)) => text,
            _ => "",
        }
    }

    pub(crate) fn list(&self, key: &str) -> &[String] {
        match self.get(key).map(|value| &value.content) {
            Some(Content::List(items)) => items,
            _ => &[],
        }
    }

    /// A secret that is set to something.
    pub(crate) fn secret(&self, key: &str) -> Option<&Secret> {
        match self.get(key).map(|value| &value.content) {
            Some(Content::Secret(secret)) if !secret.expose().is_empty() => Some(secret),
            _ => None,
        }
    }

    /// Settings made up for a test of rules.
    #[cfg(test)]
    pub(crate) fn of(values: Vec<Value>) -> Self {
        Self { values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_in_every_form() {
        let map = Raw::Map(BTreeMap::from([("worker".to_owned(), "hunter2".to_owned())]));
        for (shape, raw) in [
            (Shape::Secret, Raw::Scalar { text: "hunter2".to_owned(), quoted: false }),
            (Shape::Secrets, Raw::List(vec!["hunter2".to_owned()])),
            (Shape::Secrets, map),
        ] {
            let content = Content::new(shape, &raw);
            assert_eq!(content.to_string(), "(hidden)");
            assert!(!format!("{content:?}").contains("hunter2"), "{content:?}");
        }
        let unset = Content::new(Shape::Secret, &Raw::Scalar { text: String::new(), quoted: false });
        assert_eq!((unset.to_string().as_str(), unset.is_empty()), ("", true));
    }

    #[test]
    fn lists_written_with_commas_are_lists() {
        let content = Content::new(Shape::List, &Raw::Scalar { text: "a, b".to_owned(), quoted: false });
        assert_eq!(content, Content::List(vec!["a".to_owned(), "b".to_owned()]));
    }
}

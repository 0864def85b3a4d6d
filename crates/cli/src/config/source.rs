//! The file and the environment as flat keys with their places.

use std::collections::BTreeMap;

use saphyr::{MarkedYaml, Scalar, ScalarStyle, YamlData, YamlLoader};
use saphyr_parser::{Parser, StrInput};

use crate::config::problem::Problem;
use crate::config::setting::Raw;
use crate::config::settings::Source;

/// Longest configuration that is read; ours are a few kilobytes.
pub(crate) const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A value and where it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) source: Source,
    pub(crate) raw: Raw,
}

/// What is known about keys while a file is taken apart.
pub(crate) trait Keys {
    /// A setting of this name exists.
    fn is_setting(&self, key: &str) -> bool;
    /// Settings below this name exist.
    fn is_section(&self, key: &str) -> bool;
    /// The known name most like this one.
    fn nearest(&self, key: &str) -> Option<&'static str>;
}

/// Settings of a YAML file, by key.
pub(crate) fn parse_file(
    name: &str,
    text: &str,
    keys: &dyn Keys,
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, Placed> {
    let mut flat = Flat { name, keys, problems, settings: BTreeMap::new() };
    match documents(text) {
        Err((line, message)) => flat.problem(line, format!("not YAML: {message}")),
        Ok(documents) if documents.len() > 1 => {
            flat.problem(documents[1].span.start.line(), "the file holds more than one YAML document".to_owned());
        }
        Ok(documents) => {
            if let Some(root) = documents.first() {
                flat.section("", root);
            }
        }
    }
    flat.settings
}

fn documents(text: &str) -> Result<Vec<MarkedYaml<'_>>, (usize, String)> {
    let mut loader = YamlLoader::<MarkedYaml<'_>>::default();
    // Values keep the text they were written as: the key's type decides what
    // `007` or `yes` mean, not YAML.
    loader.early_parse(false);
    let parsed = Parser::new(StrInput::new(text)).load(&mut loader, true);
    let failed = parsed.err().or_else(|| loader.error().cloned());
    match failed {
        Some(error) => Err((error.marker().line(), error.info().to_owned())),
        None => Ok(loader.into_documents()),
    }
}

struct Flat<'a> {
    name: &'a str,
    keys: &'a dyn Keys,
    problems: &'a mut Vec<Problem>,
    settings: BTreeMap<String, Placed>,
}

impl Flat<'_> {
    fn at(&self, line: usize) -> Source {
        Source::File { name: self.name.to_owned(), line }
    }

    fn problem(&mut self, line: usize, message: String) {
        self.problems.push(Problem::new(self.at(line).to_string(), message));
    }

    fn section(&mut self, prefix: &str, node: &MarkedYaml<'_>) {
        let YamlData::Mapping(mapping) = &node.data else {
            if !is_null(node) {
                let what = if prefix.is_empty() { "the file".to_owned() } else { format!("`{prefix}`") };
                self.problem(node.span.start.line(), format!("{what} must be a section of keys and values"));
            }
            return;
        };
        for (key, value) in mapping {
            let line = key.span.start.line();
            let Some((name, _)) = scalar(key) else {
                self.problem(line, "a key must be text".to_owned());
                continue;
            };
            let path = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            self.entry(&path, line, value);
        }
    }

    fn entry(&mut self, path: &str, line: usize, value: &MarkedYaml<'_>) {
        if self.keys.is_setting(path) {
            match raw(value) {
                // `key:` with nothing behind it leaves the default.
                Ok(None) => {}
                Ok(Some(raw)) => {
                    let source = self.at(line);
                    self.settings.insert(path.to_owned(), Placed { source, raw });
                }
                Err(message) => self.problem(line, format!("`{path}` {message}")),
            }
        } else if self.keys.is_section(path) {
            self.section(path, value);
        } else {
            let problem = Problem::new(self.at(line).to_string(), format!("unknown key `{path}`"));
            self.problems.push(match self.keys.nearest(path) {
                Some(nearest) => problem.hint(format!("did you mean `{nearest}`?")),
                None => problem,
            });
        }
    }
}

fn raw(node: &MarkedYaml<'_>) -> Result<Option<Raw>, &'static str> {
    const PLAIN: &str = "may hold only plain values inside";
    match &node.data {
        _ if is_null(node) => Ok(None),
        YamlData::Sequence(items) => {
            let items: Option<Vec<_>> = items.iter().map(|item| scalar(item).map(|(text, _)| text)).collect();
            items.map(|items| Some(Raw::List(items))).ok_or(PLAIN)
        }
        YamlData::Mapping(entries) => {
            let entries: Option<BTreeMap<_, _>> =
                entries.iter().map(|(key, value)| Some((scalar(key)?.0, scalar(value)?.0))).collect();
            entries.map(|entries| Some(Raw::Map(entries))).ok_or(PLAIN)
        }
        _ => match scalar(node) {
            Some((text, quoted)) => Ok(Some(Raw::Scalar { text, quoted })),
            None => Err(PLAIN),
        },
    }
}

fn scalar(node: &MarkedYaml<'_>) -> Option<(String, bool)> {
    match &node.data {
        YamlData::Representation(text, style, _) => Some((text.to_string(), *style != ScalarStyle::Plain)),
        YamlData::Value(Scalar::String(text)) => Some((text.to_string(), false)),
        _ => None,
    }
}

fn is_null(node: &MarkedYaml<'_>) -> bool {
    match &node.data {
        YamlData::Representation(text, ScalarStyle::Plain, _) => matches!(text.as_ref(), "" | "~" | "null"),
        YamlData::Value(value) => *value == Scalar::Null,
        _ => false,
    }
}

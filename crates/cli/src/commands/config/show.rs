//! `stacyvm config show`: every setting, and where it comes from.

use clap::Args;
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::commands::Context;
use crate::commands::settings::SettingArgs;
use crate::config::{Content, Environment, Loaded, Source, Value};
use crate::output::{Output, Tone};

/// Show every setting as it holds, and where it was written
///
/// Takes the settings of `stacyvm serve` as options, so that the answer is the
/// same. Secrets are hidden.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm config show
  stacyvm config show --changed
  stacyvm config show --config /etc/stacyvm/stacyvm.yaml --json
  stacyvm config show --port 8000 | grep server.port")]
pub(super) struct ShowArgs {
    #[command(flatten)]
    settings: SettingArgs,
    /// Only settings that are not at their default
    #[arg(long)]
    changed: bool,
}

/// A setting, for `--json`.
#[derive(Debug, Serialize)]
struct Shown {
    key: &'static str,
    /// `null` when it is not set, or when it is a secret.
    value: Json,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    hidden: bool,
    /// `default`, `file`, `environment`, `option` or `key_file`.
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
}

pub(super) fn run(context: &Context, args: &ShowArgs) -> anyhow::Result<()> {
    let loaded = args.settings.load(&Environment::of_this_process())?;
    for warning in &loaded.warnings {
        context.output.note(&format!("warning: {warning}"));
    }
    let wanted = |value: &&Value| !args.changed || value.source != Source::Default;
    let values: Vec<&Value> = loaded.settings.iter().filter(wanted).collect();
    let file = loaded.file.as_ref().map(|file| file.display().to_string());
    let shown: Vec<Shown> = values.iter().map(|value| Shown::new(value)).collect();
    let page = json!({ "file": file, "settings": shown });
    context.output.show(&page, |_| table(context.output, &loaded, &values))
}

impl Shown {
    fn new(value: &Value) -> Self {
        let (source, place) = match &value.source {
            Source::Default => ("default", None),
            Source::File { .. } => ("file", Some(value.source.to_string())),
            Source::Environment(_) => ("environment", Some(value.source.to_string())),
            Source::Option(_) => ("option", Some(value.source.to_string())),
            Source::KeyFile(_) => ("key_file", Some(value.source.to_string())),
        };
        let is_empty = value.content.is_empty();
        let (shown, hidden) = match &value.content {
            Content::Secret(_) => (Json::Null, !is_empty),
            Content::Text(_) if is_empty => (Json::Null, false),
            Content::Text(text) => (json!(text), false),
            Content::List(items) => (json!(items), false),
            Content::Map(entries) => (json!(entries), false),
        };
        Self { key: value.key, value: shown, hidden, source, place }
    }
}

fn table(output: Output, loaded: &Loaded, values: &[&Value]) -> String {
    let file = match &loaded.file {
        Some(file) => format!("# file: {}\n", file.display()),
        None => "# file: none\n".to_owned(),
    };
    let rows = values.iter().map(|value| {
        let source = value.source.to_string();
        let shown = if value.content.is_empty() { "-".to_owned() } else { value.content.to_string() };
        let tone = if value.source == Source::Default { Tone::Faint } else { Tone::Strong };
        vec![value.key.to_owned(), shown, output.paint(tone, &source)]
    });
    file + &output.table(&["KEY", "VALUE", "SOURCE"], rows.collect())
}

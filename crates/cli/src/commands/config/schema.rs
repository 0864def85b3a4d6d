//! `stacyvm config schema`: what editors need to help with the file.

use clap::Args;

use crate::config::json_schema;
use crate::output::print;

/// Print the JSON schema of the configuration file, for editors
///
/// In editors with the YAML language server, this line at the top of the file
/// makes them complete keys and point out mistakes:
///
///   # yaml-language-server: $schema=stacyvm.schema.json
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm config schema > stacyvm.schema.json")]
pub(super) struct SchemaArgs {}

pub(super) fn run(SchemaArgs {}: &SchemaArgs) -> anyhow::Result<()> {
    print(&format!("{:#}\n", json_schema()))
}

//! `stacyvm config`: what a server would be configured with, and whether that
//! is wise. No server is needed.

mod lint;
mod schema;
mod show;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::commands::Context;

/// Show, judge and describe the configuration
///
/// Works without a server, on the file and the variables that `stacyvm serve`
/// would read here.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    Show(show::ShowArgs),
    Lint(lint::LintArgs),
    Schema(schema::SchemaArgs),
}

pub(crate) fn run(context: &Context, args: &ConfigArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        ConfigCommand::Show(args) => show::run(context, args).map(|()| ExitCode::SUCCESS),
        ConfigCommand::Lint(args) => lint::run(context, args),
        ConfigCommand::Schema(args) => schema::run(args).map(|()| ExitCode::SUCCESS),
    }
}

//! `stacyvm man`: manual pages of every command, made from what `--help` says.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};

use crate::commands::Cli;
use crate::output::print;

/// Write manual pages for man(1)
///
/// One for each command, `stacyvm.1` and `stacyvm-spawn.1` for example.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm man /usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Directory for the pages; made where it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(crate) fn run(args: &ManArgs) -> anyhow::Result<()> {
    let directory = &args.directory;
    let cannot = || format!("cannot write manual pages to {}", directory.display());
    std::fs::create_dir_all(directory).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), directory).with_context(cannot)?;
    print(&format!("manual pages are in {}\n", directory.display()))
}

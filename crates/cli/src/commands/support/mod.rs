//! `stacyvm support`: what to send to whoever helps.

mod bundle;
mod facts;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_api::Timestamp;

use self::facts::Missing;
use crate::commands::Context;
use crate::commands::db::stamp;
use crate::commands::settings::PlaceArgs;
use crate::private_file::{Existing, PrivateFile};

/// Gather what somebody who helps needs to know
#[derive(Debug, Args)]
pub(crate) struct SupportArgs {
    #[command(subcommand)]
    command: SupportCommand,
}

#[derive(Debug, Subcommand)]
enum SupportCommand {
    Bundle(BundleArgs),
}

/// Write a file without secrets that says how this server is set up
///
/// It holds numbers, switches, versions and names of checks, and nothing that
/// anybody wrote: no keys, names, paths, addresses, commands, output or logs.
/// Works without a server; where one runs it is asked for its health. Read the
/// file before you send it: it is short JSON.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm support bundle
  stacyvm support bundle bundle.json --config /etc/stacyvm/stacyvm.yaml")]
struct BundleArgs {
    /// File to write; named after the time unless given
    path: Option<PathBuf>,
    /// Replace the file where it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

pub(crate) async fn run(context: &Context, args: &SupportArgs) -> anyhow::Result<()> {
    let SupportCommand::Bundle(args) = &args.command;
    let now = Timestamp::now();
    let path = args.path.clone().unwrap_or_else(|| PathBuf::from(format!("stacyvm-support-{}.json", stamp(now))));
    let mut file = PrivateFile::begin(&path, Existing::new(args.force))?;
    let bundle = bundle::gather(context, &args.place, now).await;
    file.write(format!("{:#}\n", serde_json::to_value(&bundle)?).as_bytes())?;
    let path = file.finish()?;
    for Missing { what, why } in bundle.missing() {
        context.output.note(&format!("the bundle says nothing of the {what}: {why}"));
    }
    context.output.show(&json!({ "path": path }), |_| {
        format!("wrote {}; it holds no secrets, but read it before you send it\n", path.display())
    })
}

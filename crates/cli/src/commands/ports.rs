//! `stacyvm ports`: what listens inside a sandbox.

use clap::Args;
use stacyvm_api::{PortAccess, SandboxId};

use crate::commands::Context;

/// List the TCP ports that something listens on inside a sandbox
///
/// Each with the address of its preview and who may open it. `stacyvm preview`
/// changes that and prints links.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm ports sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm ports --json sb-4f9k2m0x7c1v8b3n5q6w")]
pub(crate) struct PortsArgs {
    /// The sandbox
    id: SandboxId,
}

pub(crate) async fn run(context: &Context, args: PortsArgs) -> anyhow::Result<()> {
    let ports = context.client()?.sandbox(args.id).ports().await?;
    context.output.show(&ports, |ports| {
        if ports.is_empty() {
            return "nothing listens\n".to_owned();
        }
        let rows = ports
            .iter()
            .map(|it| {
                let url = it.url.clone().unwrap_or_else(|| "-".to_owned());
                vec![it.port.to_string(), access_name(it.access).to_owned(), url]
            })
            .collect();
        context.output.table(&["PORT", "ACCESS", "PREVIEW"], rows)
    })
}

fn access_name(access: PortAccess) -> &'static str {
    match access {
        PortAccess::Public => "public",
        PortAccess::Token => "token",
    }
}

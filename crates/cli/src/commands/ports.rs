//! `stacyvm ports`: what listens inside a sandbox.

use clap::Args;
use serde::Serialize;
use stacyvm_api::SandboxId;

use crate::commands::Context;

/// List the TCP ports that something listens on inside a sandbox
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm ports sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm ports --json sb-4f9k2m0x7c1v8b3n5q6w")]
pub(crate) struct PortsArgs {
    /// The sandbox
    id: SandboxId,
}

#[derive(Debug, Serialize)]
struct Listening {
    port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    preview_host: Option<String>,
}

pub(crate) async fn run(context: &Context, args: PortsArgs) -> anyhow::Result<()> {
    let sandbox = context.client()?.sandbox(args.id);
    let record = sandbox.get().await?;
    let preview_host =
        |port: u16| record.preview_domain.as_ref().map(|domain| format!("{port}-{}.{domain}", record.id));
    let ports: Vec<_> =
        sandbox.ports().await?.into_iter().map(|port| Listening { port, preview_host: preview_host(port) }).collect();
    context.output.show(&ports, |ports| {
        if ports.is_empty() {
            return "nothing listens\n".to_owned();
        }
        let rows = ports
            .iter()
            .map(|it| vec![it.port.to_string(), it.preview_host.clone().unwrap_or_else(|| "-".to_owned())])
            .collect();
        context.output.table(&["PORT", "PREVIEW HOST"], rows)
    })
}

//! `stacyvm inspect`: everything about one sandbox.

use std::fmt::Write as _;

use clap::Args;
use stacyvm_api::{Limit, Sandbox, SandboxId};

use crate::commands::Context;
use crate::output::{self, Output, Tone};

/// Show a sandbox
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm inspect sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm inspect --json sb-4f9k2m0x7c1v8b3n5q6w | jq .limits")]
pub(crate) struct InspectArgs {
    /// The sandbox
    id: SandboxId,
}

pub(crate) async fn run(context: &Context, args: InspectArgs) -> anyhow::Result<()> {
    let sandbox = context.client()?.sandbox(args.id).get().await?;
    context.output.show(&sandbox, |sandbox| page(context.output, sandbox))
}

fn page(output: Output, sandbox: &Sandbox) -> String {
    let mut page = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(page, "{} {value}", output.paint(Tone::Strong, &format!("{name:<10}")));
    };
    line("id", sandbox.id.as_str());
    line("state", &output.state(sandbox.state));
    if let Some(reason) = &sandbox.reason {
        line("reason", reason);
    }
    line("image", &sandbox.image);
    line("provider", &sandbox.provider);
    line("memory", &output::bytes(sandbox.memory_mb << 20));
    line("vcpus", &sandbox.vcpus.to_string());
    if let Some(disk) = sandbox.disk_size_mb {
        line("disk", &output::bytes(disk << 20));
    }
    if let Some(network) = &sandbox.network {
        let allowed =
            if network.allow.is_empty() { String::new() } else { format!(", allows {}", network.allow.join(", ")) };
        line("network", &format!("{}{allowed}", network.mode.as_str()));
    }
    if let Some(limits) = &sandbox.limits {
        line("enforced", &names(&limits.enforced));
        if !limits.unenforced.is_empty() {
            line("unenforced", &output.paint(Tone::Warning, &names(&limits.unenforced)));
        }
    }
    if let Some(owner) = &sandbox.owner_id {
        line("owner", owner.as_str());
    }
    for (key, value) in &sandbox.metadata {
        line("metadata", &format!("{key}={value}"));
    }
    line("created", &format!("{} ({})", sandbox.created_at, output::relative(sandbox.created_at)));
    line("expires", &format!("{} ({})", sandbox.expires_at, output::relative(sandbox.expires_at)));
    page
}

fn names(limits: &[Limit]) -> String {
    let name = |limit: &Limit| match limit {
        Limit::Memory => "memory",
        Limit::Swap => "swap",
        Limit::Cpu => "cpu",
        Limit::Pids => "pids",
        Limit::Disk => "disk",
    };
    if limits.is_empty() { "none".to_owned() } else { limits.iter().map(name).collect::<Vec<_>>().join(", ") }
}

//! `stacyvm preview`: the address of what listens inside, and who may open it.

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde::Serialize;
use stacyvm_api::{Duration, PortAccess, SandboxId, Timestamp};

use crate::commands::Context;
use crate::failure::Advice;
use crate::output::print;

/// Print an address that opens a port of a sandbox in a browser
///
/// Where the port is not public, the address carries a token that works for a
/// while. The server behind it may be started later.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm preview sb-4f9k2m0x7c1v8b3n5q6w 3000
  stacyvm preview sb-4f9k2m0x7c1v8b3n5q6w 3000 --ttl 24h
  stacyvm preview sb-4f9k2m0x7c1v8b3n5q6w 3000 --access public")]
pub(crate) struct PreviewArgs {
    /// The sandbox
    id: SandboxId,
    /// The port inside
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Say who may open it from now on
    #[arg(long, value_name = "WHO")]
    access: Option<Access>,
    /// How long the address works, where it carries a token
    #[arg(long, value_name = "DURATION")]
    ttl: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Access {
    /// Whoever knows the address
    Public,
    /// Holders of a link or of the API key
    Token,
}

#[derive(Debug, Serialize)]
struct Address {
    url: String,
    access: PortAccess,
    listening: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
}

/// Where the agent of every sandbox would listen for E2B's clients.
const AGENT_PORT: u16 = 49983;

pub(crate) async fn run(context: &Context, args: PreviewArgs) -> anyhow::Result<()> {
    let sandbox = context.client()?.sandbox(args.id);
    let port = match args.access {
        None => sandbox.port(args.port).await?,
        Some(Access::Public) => sandbox.set_port_access(args.port, PortAccess::Public).await?,
        Some(Access::Token) => sandbox.set_port_access(args.port, PortAccess::Token).await?,
    };
    let address = match (port.access, args.ttl) {
        (PortAccess::Public, Some(_)) => {
            return Err(Advice::new("this port is public; its address has no end", "leave out --ttl").into());
        }
        (PortAccess::Public, None) => {
            let url = port.url.with_context(|| no_address(args.port))?;
            Address { url, access: port.access, listening: port.listening, expires_at: None }
        }
        (PortAccess::Token, ttl) => {
            let link = sandbox.port_link(args.port, ttl).await?;
            Address { url: link.url, access: port.access, listening: port.listening, expires_at: Some(link.expires_at) }
        }
    };
    if context.output.is_json() {
        return context.output.show(&address, |_| String::new());
    }
    print(&format!("{}\n", address.url))?;
    if !address.listening {
        context.output.note(&format!("nothing listens on port {} yet; the page waits for it", args.port));
    }
    Ok(())
}

/// Why a port has no address.
fn no_address(port: u16) -> String {
    match port {
        AGENT_PORT => format!("port {AGENT_PORT} is the agent's, which has no preview; take another port"),
        _ => "this server has no previews: server.preview_domain is not set".to_owned(),
    }
}

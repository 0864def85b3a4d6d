//! `stacyvm preview`: the address of what listens inside, and who may open it.

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

impl From<Access> for PortAccess {
    fn from(access: Access) -> Self {
        match access {
            Access::Public => Self::Public,
            Access::Token => Self::Token,
        }
    }
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

/// Refuses the port that nobody but StacyVM talks to.
pub(super) fn refuse_agent_port(port: u16) -> Result<(), Advice> {
    if port != AGENT_PORT {
        return Ok(());
    }
    Err(Advice::new(format!("port {AGENT_PORT} is the agent's, and is shown to nobody"), "take another port"))
}

pub(crate) async fn run(context: &Context, args: PreviewArgs) -> anyhow::Result<()> {
    refuse_agent_port(args.port)?;
    let sandbox = context.client()?.sandbox(args.id);
    let port = sandbox.port(args.port).await?;
    let wanted = args.access.map(PortAccess::from);
    let access = wanted.unwrap_or(port.access);
    let url = port.url.ok_or_else(no_address)?;
    let address = match (access, args.ttl) {
        (PortAccess::Public, Some(_)) => {
            return Err(Advice::new("this port is public; its address has no end", "leave out --ttl").into());
        }
        (PortAccess::Public, None) => Address { url, access, listening: port.listening, expires_at: None },
        (PortAccess::Token, ttl) => {
            let link = sandbox.port_link(args.port, ttl).await?;
            Address { url: link.url, access, listening: port.listening, expires_at: Some(link.expires_at) }
        }
    };
    // Last, so that whoever is told of a failure need not undo anything.
    if let Some(wanted) = wanted {
        sandbox.set_port_access(args.port, wanted).await?;
    }
    if context.output.is_json() {
        return context.output.show(&address, |_| String::new());
    }
    print(&format!("{}\n", address.url))?;
    if !address.listening {
        context.output.note(&format!("nothing listens on port {} yet; the page waits for it", args.port));
    }
    Ok(())
}

fn no_address() -> Advice {
    Advice::new(
        "this server has no previews",
        "its operator can set server.preview_domain, for example to localhost, or server.preview_port",
    )
}

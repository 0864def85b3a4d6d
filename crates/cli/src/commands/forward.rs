//! `stacyvm forward`: a port of a sandbox as a port of this machine.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stacyvm_api::SandboxId;
use stacyvm_client::SandboxClient;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::commands::preview::refuse_agent_port;
use crate::commands::{Context, stop_when_told};
use crate::failure::Advice;
use crate::output::{Output, json_line, print};

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 128;

/// Moved at once, in each direction.
const COPY_BYTES: usize = 64 << 10;

/// Pause after `accept` failed, usually for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Reach a port of a sandbox as a port of this machine
///
/// Any protocol over TCP: databases, HTTP, SSH. It works whatever the sandbox's
/// network is, and until Ctrl-C.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm forward sb-4f9k2m0x7c1v8b3n5q6w 5432
  stacyvm forward sb-4f9k2m0x7c1v8b3n5q6w 80 --local-port 8080")]
pub(crate) struct ForwardArgs {
    /// The sandbox
    id: SandboxId,
    /// The port inside
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// The port here: the same number unless given; 0 takes a free one
    #[arg(long, short = 'p', value_name = "PORT")]
    local_port: Option<u16>,
    /// Address to listen on; anything but loopback lets others in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    address: IpAddr,
}

pub(crate) async fn run(context: &Context, args: ForwardArgs) -> anyhow::Result<()> {
    refuse_agent_port(args.port)?;
    let sandbox = context.client()?.sandbox(args.id.clone());
    // A mistake in the id is better heard of now than at the first connection.
    sandbox.port(args.port).await?;
    let local_port = args.local_port.unwrap_or(args.port);
    let listener = TcpListener::bind((args.address, local_port)).await.map_err(|error| {
        let message = format!("cannot listen on {}:{local_port}: {error}", args.address);
        Advice::new(message, "choose another port with --local-port, or 0 for a free one")
    })?;
    announce(context.output, &args, &listener)?;
    let stop = stop_when_told();
    tokio::select! {
        () = serve(context.output, listener, sandbox, args.port) => Ok(()),
        ended = tokio::signal::ctrl_c() => ended.context("wait for Ctrl-C"),
        () = stop.cancelled() => Ok(()),
    }
}

fn announce(output: Output, args: &ForwardArgs, listener: &TcpListener) -> anyhow::Result<()> {
    let local = listener.local_addr().context("learn the local port")?;
    if output.is_json() {
        return json_line(&json!({ "listening": local, "sandbox": args.id, "port": args.port }));
    }
    print(&format!("{local} is port {} of {}; Ctrl-C ends it\n", args.port, args.id))
}

/// Accepts until it is dropped, and its connections with it.
async fn serve(output: Output, listener: TcpListener, sandbox: SandboxClient, port: u16) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _peer)) => {
                let sandbox = sandbox.clone();
                connections.spawn(async move {
                    if let Err(error) = relay(stream, &sandbox, port).await {
                        output.note(&format!("a connection failed: {error:#}"));
                    }
                    drop(place);
                });
            }
            Err(error) => {
                output.note(&format!("a connection could not be accepted: {error}"));
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn relay(mut local: TcpStream, sandbox: &SandboxClient, port: u16) -> anyhow::Result<()> {
    local.set_nodelay(true).ok();
    let mut inside = sandbox.forward(port).await?;
    // Either side may go away at any time.
    copy_bidirectional_with_sizes(&mut local, &mut inside, COPY_BYTES, COPY_BYTES).await.ok();
    Ok(())
}

//! The static program inside every StacyVM sandbox.
//!
//! It serves the agent protocol (`crates/envd`, docs/agent-protocol.md) on a
//! unix socket that it inherits: commands, terminals, files, ports. As PID 1 it
//! is also the sandbox's init. It needs nothing of the image, neither a C
//! library nor a shell, and trusts nothing of it.
//!
//! - `boot`: from the launcher's configuration to a running server; `init`: the
//!   same as the first program of somebody else's container; `kernel`: what
//!   both run on.
//! - `serve`: connections, the token, routes; `wakeful`: a kernel that forgets
//!   to say that one has ended.
//! - `rpc`: the Connect services; `web`: the plain HTTP part.
//! - `process`, `files`, `net`, `console`: what they offer.
//! - `lifecycle`: the sandbox's end; `signals`: what may bring it.

mod boot;
mod bridge;
mod console;
mod descriptor;
mod failure;
mod files;
mod heap;
mod init;
mod kernel;
mod lifecycle;
mod net;
mod process;
mod rpc;
mod sandbox;
mod serve;
mod signals;
mod user;
mod wakeful;
mod web;

use std::process::ExitCode;

use crate::boot::Tracer;
use crate::failure::Failure;
use crate::sandbox::Sandbox;

const USAGE: &str = "usage: stacyvm-agent serve [--traced] | init SOCKET | connect SOCKET | version";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let tracer = if arguments == ["serve", "--traced"] { Tracer::Launcher } else { Tracer::Nobody };
    boot::harden(tracer);
    let result = match arguments.as_slice() {
        ["serve"] | ["serve", "--traced"] => boot::serve(tracer),
        ["init", socket] => init::init(socket),
        ["connect", socket] => bridge::connect(socket),
        ["version"] => {
            println!("stacyvm-agent {} (envd {})", env!("CARGO_PKG_VERSION"), stacyvm_envd::ENVD_VERSION);
            Ok(())
        }
        _ => Err(std::io::Error::other(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stacyvm-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

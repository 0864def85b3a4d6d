//! Measures StacyVM beside other runtimes: one run, one machine, the same
//! image, the same command, and the ratio printed.
//!
//! ```text
//! main ─► server (a real `stacyvm serve`) ─► latency · burst · idle · transfer · preview
//!    │                                             docker · proot
//!    └──► baseline (crun, runc, docker: the same command, the same image)
//! ```
//!
//! Nothing here passes or fails: numbers of a shared machine prove nothing by a
//! threshold. What to expect, and how to read it, is in `docs/benchmarks.md`.

mod baseline;
mod burst;
mod docker;
mod dockerd;
mod idle;
mod latency;
mod preview;
mod proot;
mod report;
mod server;
mod statistics;
mod transfer;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};

use crate::report::Report;

#[derive(Debug, Parser)]
#[command(version, about = "Measures StacyVM beside other runtimes, in one run")]
struct Arguments {
    /// The `stacyvm` program, built for release
    #[arg(long, value_name = "FILE")]
    stacyvm: Option<PathBuf>,
    /// Docker archive to import as alpine:latest (scripts/make-test-image.sh)
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// What to measure; everything unless given (repeatable)
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
    /// Sandboxes created one after the other
    #[arg(long, default_value_t = 200)]
    creates: usize,
    /// Commands run one after the other in a live sandbox
    #[arg(long, default_value_t = 1000)]
    execs: usize,
    /// Idle sandboxes held at once; the full claim is 1000
    #[arg(long, default_value_t = 200)]
    idle: usize,
    /// Size of the file moved through the API, in MiB
    #[arg(long, default_value_t = 1024)]
    file_mib: u64,
    /// Also write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    helper: Option<Helper>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Create, first exec, exec in a live sandbox, destroy; beside other runtimes
    Latency,
    /// One hundred sandboxes asked for at once
    Burst,
    /// Memory of idle sandboxes
    Idle,
    /// A large file up and down
    Transfer,
    /// A server inside through its preview; beside the same server directly
    Preview,
    /// Sandboxes on a docker daemon; beside bare containers and `docker exec`
    Docker,
    /// Sandboxes under PRoot; beside PRoot by itself
    Proot,
}

#[derive(Debug, Subcommand)]
enum Helper {
    /// Times an OCI runtime from inside a mount namespace of its own.
    #[command(hide = true)]
    Runtime { program: PathBuf, bundle: PathBuf },
    /// Serves what previews are measured with.
    #[command(hide = true)]
    Guest { port: u16 },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match &arguments.helper {
        Some(Helper::Runtime { program, bundle }) => baseline::measure_here(program, bundle),
        Some(Helper::Guest { port }) => runtime.block_on(preview::serve(*port)),
        None => runtime.block_on(run(arguments)),
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let setup = server::Setup::prepare(arguments.stacyvm.as_deref(), arguments.image.as_deref())?;
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let mut report = Report::new(&setup);
    print!("{}", report.heading());
    if wanted(Part::Latency) {
        let mut measured = latency::measure(&setup, arguments.creates, arguments.execs).await?;
        measured.others.push(baseline::docker(&setup).await?);
        report.latency(measured);
    }
    if wanted(Part::Burst) {
        report.burst(&burst::measure(&setup).await?);
    }
    if wanted(Part::Idle) {
        report.idle(&idle::measure(&setup, arguments.idle).await?);
    }
    if wanted(Part::Transfer) {
        report.transfer(&transfer::measure(&setup, arguments.file_mib << 20).await?);
    }
    if wanted(Part::Preview) {
        report.preview(&preview::measure(&setup, arguments.file_mib << 20).await?);
    }
    if wanted(Part::Docker) {
        report.docker(docker::measure(&setup).await.map_err(|error| format!("{error:#}")));
    }
    if wanted(Part::Proot) {
        report.proot(proot::measure(&setup).await.map_err(|error| format!("{error:#}")));
    }
    if let Some(path) = arguments.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

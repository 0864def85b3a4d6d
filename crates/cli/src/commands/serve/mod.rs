//! `stacyvm serve`: the server.
//!
//! ```text
//! configuration ─► data directory (lock, secret) ─► providers ─► engine ─► listening
//!                                                                             │ SIGINT, SIGTERM
//!                        engine and providers end ◄── open requests end ◄─────┘
//! ```
//!
//! Ending the server leaves sandboxes and their commands running; the next
//! start takes them up again. `--destroy-on-exit` destroys them instead.

mod docker;
pub(crate) mod logging;
mod options;
mod port;
mod providers;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stacyvm_api::{ListQuery, SandboxState};
use stacyvm_engine::{Caller, Engine};
use stacyvm_providers::proot::Permission;
use stacyvm_server::{Server, ServerError};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::commands::Context;
use crate::commands::settings::SettingArgs;
use crate::config::{Config, Environment};
use crate::data_dir::{self, DataDirLock};
use crate::failure::Advice;
use crate::lifeline;
use crate::output::{self, Output};
pub(crate) use options::{database, image_store};
pub(crate) use port::owner as port_owner;
use providers::Examined;
pub(crate) use providers::{
    Chosen, KNOWN as KNOWN_PROVIDERS, default_kind, enabled as enabled_providers, examine_one, is_custom, is_known,
    open as open_providers, open_one,
};

/// Run the server
///
/// Listens on 127.0.0.1:7423 and needs no configuration. Settings come from
/// the file (`--config`, STACYVM_CONFIG, ./stacyvm.yaml, ~/.stacyvm/config.yaml:
/// the first there is), then from STACYVM_* variables, then from these options.
///
/// Ctrl-C or SIGTERM ends the server and leaves sandboxes running; the next
/// start takes them up again.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:
  stacyvm serve
  stacyvm serve --port 8000 --data-dir ./data --destroy-on-exit
  stacyvm key create me --scope read --scope api --scope admin --data-dir ./data && stacyvm serve --data-dir ./data --host 0.0.0.0
  stacyvm serve --config /etc/stacyvm.yaml --log-format json")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    settings: SettingArgs,
    /// Destroy every sandbox when the server ends
    #[arg(long)]
    destroy_on_exit: bool,
    /// End, and destroy every sandbox, when standard input is closed: whoever
    /// started this server for itself is gone
    #[arg(long = lifeline::OPTION, hide = true)]
    end_with_stdin: bool,
    /// Remove this directory after such an end (repeatable)
    #[arg(long, hide = true, value_name = "DIR", requires = "end_with_stdin")]
    then_remove: Vec<PathBuf>,
}

/// What happens to sandboxes when the server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtExit {
    LeaveRunning,
    Destroy,
}

pub(crate) async fn run(context: &Context, args: ServeArgs) -> anyhow::Result<()> {
    let at_exit = if args.destroy_on_exit { AtExit::Destroy } else { AtExit::LeaveRunning };
    let environment = Environment::of_this_process();
    let loaded = args.settings.load(&environment)?;
    let config = loaded.config;
    logging::start(&config.logging)?;
    if let Some(file) = &loaded.file {
        tracing::info!(file = %file.display(), "configuration read");
    }
    for warning in &loaded.warnings {
        tracing::warn!(place = %warning.place, "{}", warning.message);
    }
    raise_open_files();

    let data_dir = data_dir::resolve(config.top.data_dir.as_deref(), environment.home.as_deref())?;
    let starter_gone = CancellationToken::new();
    if args.end_with_stdin {
        lifeline::watch(starter_gone.clone());
    }
    let done = run_in(context, &config, &data_dir, &environment, &starter_gone, at_exit).await;
    if starter_gone.is_cancelled() {
        remove(&args.then_remove);
    }
    done.map_err(|error| data_dir::explain_full_disk(error, &data_dir))
}

/// The server's life in its data directory.
async fn run_in(
    context: &Context,
    config: &Config,
    data_dir: &Path,
    environment: &Environment,
    starter_gone: &CancellationToken,
    at_exit: AtExit,
) -> anyhow::Result<()> {
    data_dir::create(data_dir)?;
    let _lock = DataDirLock::take(data_dir)?;
    data_dir::keep_room(data_dir);
    let secret = data_dir::server_secret(data_dir)?;

    // From here on a signal is a request to end in order.
    let mut signals = Signals::listen()?;
    let chosen = providers::open(config, data_dir, environment, Permission::default()).await?;
    let engine_options = options::engine(config, data_dir, secret, &chosen.default);
    let engine = match Engine::start(engine_options, chosen.all.clone()).await {
        Ok(engine) => engine,
        Err(error) => {
            for provider in &chosen.all {
                provider.shutdown().await;
            }
            return Err(error).context("cannot start");
        }
    };
    let answered = async {
        let server = bind(config, data_dir, environment, &engine).await?;
        let end = async {
            tokio::select! {
                () = signals.first() => {}
                () = starter_gone.cancelled() => tracing::info!("ending: whoever started this server is gone"),
            }
        };
        answer(context.output, server, &engine, &chosen, end).await
    }
    .await;
    if answered.is_ok() {
        let at_exit = if starter_gone.is_cancelled() { AtExit::Destroy } else { at_exit };
        leave(context.output, &engine, at_exit, &mut signals).await;
    }
    engine.shutdown().await;
    answered
}

/// Answers until `end`.
async fn answer(
    output: Output,
    server: Server,
    engine: &Engine,
    chosen: &Chosen,
    end: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    if server.demands_key() {
        chosen.permit(engine).await;
    }
    let examined = chosen.examine().await;
    announce(output, &server, chosen, &examined);
    let (demands_key, demanded) = (server.demands_key(), server.key_demanded());
    let first_key = async {
        if !demands_key {
            demanded.await;
            chosen.permit(engine).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = server.serve(end) => {}
        () = first_key => {}
    }
    Ok(())
}

async fn bind(config: &Config, data_dir: &Path, environment: &Environment, engine: &Engine) -> anyhow::Result<Server> {
    match Server::bind(options::server(config, data_dir, environment), engine.clone()).await {
        Ok(server) => Ok(server),
        Err(ServerError::Bind { address, source }) if source.kind() == std::io::ErrorKind::AddrInUse => {
            let by = port::owner(address.port()).map_or_else(String::new, |owner| format!(" by {owner}"));
            let message = format!("port {} on {} is taken{by}", address.port(), address.ip());
            let another = match config.server.preview_port {
                Some(port) if port == address.port() => "set another server.preview_port",
                Some(_) | None => "pass another --port",
            };
            Err(Advice::new(message, format!("stop what uses it, or {another}")).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The first line: where it listens, what makes the sandboxes and why, and who
/// may call.
fn announce(output: Output, server: &Server, chosen: &Chosen, examined: &Examined) {
    let scheme = if server.is_secure() { "https" } else { "http" };
    let urls: Vec<_> = server.addresses().iter().map(|address| format!("{scheme}://{address}")).collect();
    let auth = server.demands_key();
    if output.is_json() {
        let line = json!({ "listening": urls, "provider": chosen.default, "reason": chosen.why, "auth": auth });
        return output::announce(&format!("{line}\n"));
    }
    let callers = if auth { "callers need a key" } else { "no key needed, only this machine may call" };
    output::announce(&format!(
        "StacyVM {} listens on {}, provider {} ({}), {callers}\n",
        env!("CARGO_PKG_VERSION"),
        urls.join(" and "),
        chosen.default,
        chosen.why
    ));
    for trouble in &examined.troubles {
        output.note(&format!("warning: {trouble}"));
    }
    if !examined.shortcomings.is_empty() {
        output.note(&format!(
            "note: sandboxes lack something here ({}); `stacyvm providers {}` says what, and how to have it",
            examined.shortcomings.join(", "),
            chosen.default
        ));
    }
}

/// Destroys what runs, or says that it goes on.
async fn leave(output: Output, engine: &Engine, at_exit: AtExit, signals: &mut Signals) {
    match at_exit {
        AtExit::Destroy => {
            tokio::select! {
                count = engine.destroy_all() => output.note(&match count {
                    1 => "destroyed 1 sandbox".to_owned(),
                    count => format!("destroyed {count} sandboxes"),
                }),
                () = signals.next() => output.note("interrupted; some sandboxes may still run"),
            }
        }
        AtExit::LeaveRunning => match still_running(engine).await {
            0 => {}
            1 => output.note(
                "1 sandbox keeps running until its time is up; `stacyvm serve` takes it up again, \
                 and then `stacyvm kill --all` destroys it",
            ),
            count => output.note(&format!(
                "{count} sandboxes keep running until their time is up; `stacyvm serve` takes them up again, \
                 and then `stacyvm kill --all` destroys them"
            )),
        },
    }
}

async fn still_running(engine: &Engine) -> usize {
    match engine.list(&Caller::default(), &ListQuery::default()).await {
        Ok(page) => page.items.iter().filter(|sandbox| sandbox.state != SandboxState::Error).count(),
        Err(_) => 0,
    }
}

fn remove(directories: &[PathBuf]) {
    for directory in directories {
        if let Err(error) = std::fs::remove_dir_all(directory) {
            tracing::warn!(directory = %directory.display(), %error, "what a server kept for its starter stays");
        }
    }
}

/// Requests to end: `SIGINT` and `SIGTERM`.
pub(crate) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    pub(crate) async fn first(&mut self) {
        self.next().await;
        tracing::info!("ending: open requests may finish");
    }
}

/// Every sandbox takes a few descriptors, and the usual limit is 1,024.
pub(crate) fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

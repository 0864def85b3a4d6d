//! The command line: what can be asked for, one file per subcommand.

mod audit;
mod backend;
mod certify;
mod completion;
mod config;
mod conformance;
mod cp;
mod create;
mod db;
mod doctor;
mod events;
mod exec;
mod extend;
mod forward;
mod health;
mod image;
mod init;
mod inspect;
mod key;
mod kill;
mod list;
mod logs;
mod man;
mod ports;
mod preview;
mod providers;
mod ps;
mod rootfs;
mod run;
pub(crate) mod serve;
mod settings;
mod shell;
mod smoke;
mod spawn;
mod stats;
mod support;
mod template;
mod upgrade;
pub(crate) mod usage;
mod version;

#[cfg(test)]
mod docs;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use stacyvm_client::{Certificates, Client, ClientOptions};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::output::{Form, Output};
pub(crate) use serve::KNOWN_PROVIDERS;

/// Where `stacyvm serve` listens unless told otherwise.
const DEFAULT_SERVER: &str = "http://127.0.0.1:7423";

/// Stand in for options that are not given. They are read here and not by clap,
/// whose help and usage would then depend on what is set.
const SERVER_VARIABLE: &str = "STACYVM_URL";
const API_KEY_VARIABLE: &str = "STACYVM_API_KEY";

/// A computer for every AI agent: sandboxes in milliseconds, from one binary.
#[derive(Debug, Parser)]
#[command(
    name = "stacyvm",
    version,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Start a server with `stacyvm serve`, then try `stacyvm run --image host -- python3 -c 'print(6*7)'`."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
pub(crate) struct GlobalArgs {
    /// Server to talk to [env: STACYVM_URL] [default: http://127.0.0.1:7423]
    #[arg(long, global = true, value_name = "URL", help_heading = "Global options")]
    server: Option<String>,
    /// The server's API key [env: STACYVM_API_KEY]
    #[arg(long, global = true, value_name = "KEY", help_heading = "Global options")]
    api_key: Option<String>,
    /// Print JSON instead of text for people
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    Run(Box<run::RunArgs>),
    Spawn(Box<spawn::SpawnArgs>),
    Exec(exec::ExecArgs),
    Shell(shell::ShellArgs),
    Cp(cp::CpArgs),
    #[command(visible_alias = "ls")]
    List(list::ListArgs),
    #[command(visible_alias = "get")]
    Inspect(inspect::InspectArgs),
    #[command(visible_alias = "rm")]
    Kill(kill::KillArgs),
    Ps(ps::PsArgs),
    Logs(logs::LogsArgs),
    Extend(extend::ExtendArgs),
    Stats(stats::StatsArgs),
    Events(events::EventsArgs),
    Ports(ports::PortsArgs),
    Preview(preview::PreviewArgs),
    Forward(forward::ForwardArgs),
    Template(template::TemplateArgs),
    Key(key::KeyArgs),
    Audit(audit::AuditArgs),
    Image(image::ImageArgs),
    Rootfs(rootfs::RootfsArgs),
    Providers(providers::ProvidersArgs),
    Backend(backend::BackendArgs),
    Smoke(smoke::SmokeArgs),
    Conformance(conformance::ConformanceArgs),
    Certify(Box<certify::CertifyArgs>),
    Init(init::InitArgs),
    Doctor(doctor::DoctorArgs),
    Config(config::ConfigArgs),
    Db(db::DbArgs),
    Upgrade(upgrade::UpgradeArgs),
    Support(support::SupportArgs),
    Health(health::HealthArgs),
    Version(version::VersionArgs),
    Completion(completion::CompletionArgs),
    Man(man::ManArgs),
}

/// What every command works with.
#[derive(Debug)]
pub(crate) struct Context {
    /// The server that somebody named.
    pub(crate) server: Option<String>,
    api_key: Option<String>,
    pub(crate) output: Output,
}

impl Context {
    fn new(global: GlobalArgs, form: Form) -> Self {
        Self {
            server: given(global.server, SERVER_VARIABLE),
            api_key: given(global.api_key, API_KEY_VARIABLE),
            output: Output::new(form),
        }
    }

    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let server = self.server.as_deref().unwrap_or(DEFAULT_SERVER);
        let options = ClientOptions { api_key: self.api_key.clone(), ..ClientOptions::new(server) };
        Ok(Client::new(&options)?)
    }

    /// A client of the server that somebody named, else of one on this machine
    /// that is known by other means than its certificate.
    pub(crate) fn client_or(&self, server: &str) -> anyhow::Result<Client> {
        if self.server.is_some() {
            return self.client();
        }
        let options = ClientOptions {
            api_key: self.api_key.clone(),
            certificates: Certificates::Any,
            ..ClientOptions::new(server)
        };
        Ok(Client::new(&options)?)
    }
}

/// An option, or the variable that stands in for it. What is set to nothing is
/// not set.
pub(crate) fn given(option: Option<String>, variable: &str) -> Option<String> {
    option.or_else(|| std::env::var(variable).ok()).filter(|text| !text.trim().is_empty())
}

impl Cli {
    /// For whom everything is written, errors included.
    pub(crate) fn form(&self) -> Form {
        if self.global.json { Form::Json } else { Form::Human }
    }

    /// Servers use every processor; a client has one thing to do.
    pub(crate) fn runtime(&self) -> std::io::Result<Runtime> {
        let mut builder = match self.command {
            Command::Serve(_)
            | Command::Backend(_)
            | Command::Certify(_)
            | Command::Conformance(_)
            | Command::Image(_)
            | Command::Rootfs(_) => Builder::new_multi_thread(),
            _ => Builder::new_current_thread(),
        };
        builder.enable_all().build()
    }

    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let form = self.form();
        let Self { global, command } = self;
        let context = Context::new(global, form);
        let done = match command {
            Command::Run(args) => return run::run(&context, *args).await,
            Command::Certify(args) => return certify::run(&context, *args).await,
            Command::Conformance(args) => return conformance::run(&context, args).await,
            Command::Exec(args) => return exec::run(&context, args).await,
            Command::Shell(args) => return shell::run(&context, args).await,
            Command::Health(args) => return health::run(&context, &args).await,
            Command::Smoke(args) => return smoke::run(&context, &args).await,
            Command::Doctor(args) => return doctor::run(&context, &args).await,
            Command::Config(args) => return config::run(&context, &args),
            Command::Db(args) => return db::run(&context, &args).await,
            Command::Upgrade(args) => return upgrade::run(&context, &args).await,
            Command::Serve(args) => serve::run(&context, *args).await,
            Command::Backend(args) => backend::run(&context, args).await,
            Command::Image(args) => image::run(&context, args).await,
            Command::Init(args) => init::run(&context, &args).await,
            Command::Rootfs(args) => rootfs::run(&context, args).await,
            Command::Spawn(args) => spawn::run(&context, *args).await,
            Command::Cp(args) => cp::run(&context, args).await,
            Command::List(args) => list::run(&context, args).await,
            Command::Inspect(args) => inspect::run(&context, args).await,
            Command::Kill(args) => kill::run(&context, args).await,
            Command::Ps(args) => ps::run(&context, args).await,
            Command::Logs(args) => logs::run(&context, args).await,
            Command::Extend(args) => extend::run(&context, args).await,
            Command::Stats(args) => stats::run(&context, args).await,
            Command::Events(args) => events::run(&context, args).await,
            Command::Ports(args) => ports::run(&context, args).await,
            Command::Preview(args) => preview::run(&context, args).await,
            Command::Forward(args) => forward::run(&context, args).await,
            Command::Template(args) => template::run(&context, args).await,
            Command::Key(args) => key::run(&context, args).await,
            Command::Audit(args) => audit::run(&context, args).await,
            Command::Providers(args) => providers::run(&context, args).await,
            Command::Support(args) => support::run(&context, &args).await,
            Command::Version(args) => version::run(&context, &args).await,
            Command::Completion(args) => completion::run(&args),
            Command::Man(args) => man::run(&args),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// `KEY=VALUE`, as `--env` and `--metadata` take it.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// The exit status of a command in a sandbox as this program's own.
pub(crate) fn exit_status(code: i32) -> ExitCode {
    // Statuses have eight bits; what does not fit is still a failure.
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// Is cancelled when this program is told to end (`SIGTERM`, or its terminal
/// going away).
pub(crate) fn stop_when_told() -> CancellationToken {
    stop_at(&[SignalKind::terminate(), SignalKind::hangup()])
}

/// [`stop_when_told`], and when the user says so (`Ctrl-C`).
pub(crate) fn stop_when_interrupted() -> CancellationToken {
    stop_at(&[SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()])
}

fn stop_at(signals: &[SignalKind]) -> CancellationToken {
    let stop = CancellationToken::new();
    for mut told in signals.iter().filter_map(|kind| signal(*kind).ok()) {
        let stop = stop.clone();
        tokio::spawn(async move {
            told.recv().await;
            stop.cancel();
        });
    }
    stop
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_with_an_example() {
        fn check(command: &mut clap::Command) {
            let nested: Vec<String> = command.get_subcommands().map(|it| it.get_name().to_owned()).collect();
            for name in nested {
                check(command.find_subcommand_mut(&name).unwrap());
            }
            if !command.has_subcommands() {
                let help = command.render_long_help().to_string();
                assert!(help.contains("Examples:\n"), "{}: {help}", command.get_name());
                assert!(command.get_about().is_some(), "{}", command.get_name());
            }
        }
        check(&mut Cli::command());
    }

    #[test]
    fn pairs_need_a_name() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(key_value("A").is_err() && key_value("=b").is_err());
    }
}

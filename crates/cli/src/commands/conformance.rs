//! `stacyvm conformance`: the contract suite against a provider or a server.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{ArgGroup, Args};
use stacyvm_client::{Client, ClientOptions};
use stacyvm_conformance::{
    Check, CheckReport, Format, Observer, ProviderTarget, RunOptions, ServerTarget, Status, Target, TargetError,
};

use stacyvm_providers::proot::Permission;
use tempfile::TempDir;

use crate::commands::serve::open_one;
use crate::commands::{Context, stop_when_interrupted};
use crate::config::{self, Environment};
use crate::data_dir::{self, DataDirLock};
use crate::failure::Advice;
use crate::lifeline;
use crate::output::{Output, Tone, print};

/// Check a runtime, or a whole server, against the contract
///
/// With --provider the runtime is driven by this program, without a server, in
/// a data directory of its own, which is gone afterwards. With --url every check
/// goes through the REST API of a running server. After Ctrl-C, too, nothing stays.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true).multiple(true))]
#[command(after_help = "Examples:
  stacyvm conformance --provider oci --image host
  stacyvm conformance --url http://127.0.0.1:7423
  stacyvm conformance --url http://127.0.0.1:7423 --provider mock --only C
  stacyvm conformance --provider oci --junit > report.xml")]
pub(crate) struct ConformanceArgs {
    /// Provider to check; with --url, the server's provider of that name
    #[arg(long, group = "target")]
    provider: Option<String>,
    /// Server to check
    #[arg(long, group = "target", value_name = "URL")]
    url: Option<String>,
    /// Image to make sandboxes from
    #[arg(long)]
    image: Option<String>,
    /// Only these checks, by id or beginning of ids (repeatable)
    #[arg(long, value_name = "ID")]
    only: Vec<String>,
    /// Form of the report: text, json, junit or markdown
    #[arg(long, value_name = "FORMAT", group = "form")]
    format: Option<Format>,
    /// The same as --format junit, for CI systems
    #[arg(long, group = "form")]
    junit: bool,
    /// The same as --format markdown
    #[arg(long, group = "form")]
    markdown: bool,
    /// Data directory for --provider, which stays; its images are found there
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file for --provider
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stop, and leave nothing, when standard input is closed
    #[arg(long = lifeline::OPTION, hide = true)]
    end_with_stdin: bool,
}

pub(crate) async fn run(context: &Context, args: ConformanceArgs) -> anyhow::Result<ExitCode> {
    let stop = stop_when_interrupted();
    if args.url.is_none() && !args.end_with_stdin {
        return lifeline::run_on_one(stop).await;
    }
    if args.end_with_stdin {
        lifeline::watch(stop.clone());
    }
    let format = args.form(context.output);
    let subject = Subject::open(context, &args).await?;
    let mut options = RunOptions { only: args.only, stop, ..RunOptions::default() };
    if let Some(image) = args.image {
        options.image = image;
    }
    let watch: &dyn Observer = if format == Format::Text { &Watch(context.output) } else { &Progress(context.output) };
    let result = stacyvm_conformance::run(subject.target.clone(), &options, watch).await;
    subject.close(context.output).await;
    let report = result?;
    if format == Format::Text {
        print(&format!("\n{}\n", report.summary_line()))?;
        for id in &report.left_behind {
            print(&format!("left behind: {id}\n"))?;
        }
    } else {
        print(&report.render(format))?;
    }
    Ok(if report.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl ConformanceArgs {
    fn form(&self, output: Output) -> Format {
        match self.format {
            Some(format) => format,
            None if self.junit => Format::Junit,
            None if self.markdown => Format::Markdown,
            None if output.is_json() => Format::Json,
            None => Format::Text,
        }
    }
}

/// What is checked, and what has to be ended afterwards.
struct Subject {
    target: Arc<dyn Target>,
    provider: Option<Driven>,
}

/// A provider of this program's own.
struct Driven {
    provider: Arc<dyn stacyvm_sandbox::Provider>,
    lock: DataDirLock,
    /// Unless somebody named one.
    directory: Option<TempDir>,
}

impl Subject {
    async fn open(context: &Context, args: &ConformanceArgs) -> anyhow::Result<Self> {
        if let Some(url) = &args.url {
            let options = ClientOptions { api_key: context.api_key.clone(), ..ClientOptions::new(url.clone()) };
            let target = ServerTarget::connect(Client::new(&options)?, args.provider.as_deref()).await;
            let target = target.map_err(|error| match error {
                TargetError::Stranger { message, hint } => Advice::new(message, hint).into(),
                other => anyhow::Error::from(other),
            })?;
            return Ok(Self { target: Arc::new(target), provider: None });
        }
        let name = args.provider.as_deref().context("name a provider or a URL")?;
        let environment = Environment::of_this_process();
        let mut config = config::load(args.config.as_deref(), &environment)?.config;
        if args.data_dir.is_some() {
            config.top.data_dir.clone_from(&args.data_dir);
        }
        let directory = match &config.top.data_dir {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("stacyvm-conformance-").tempdir()?),
        };
        let chosen = directory.as_ref().map(TempDir::path).or(config.top.data_dir.as_deref());
        let dir = data_dir::resolve(chosen, environment.home.as_deref())?;
        data_dir::create(&dir)?;
        let lock = DataDirLock::take(&dir)?;
        let provider = open_one(name, &config, &dir, &environment, &Permission::given()).await?;
        let target = Arc::new(ProviderTarget::new(provider.clone()));
        Ok(Self { target, provider: Some(Driven { provider, lock, directory }) })
    }

    async fn close(self, output: Output) {
        let Some(Driven { provider, lock, directory }) = self.provider else { return };
        provider.shutdown().await;
        drop(lock);
        if let Some(Err(error)) = directory.map(TempDir::close) {
            output.note(&format!("warning: the data directory of this run could not be removed: {error}"));
        }
    }
}

/// One line per check, as it ends.
struct Watch(Output);

impl Observer for Watch {
    fn finished(&self, _index: usize, _total: usize, result: &CheckReport) {
        let line = result.text_line();
        let tone = match result.status {
            Status::Pass => Tone::Good,
            Status::Fail => Tone::Bad,
            Status::Skip => Tone::Faint,
        };
        let word = result.status.as_str();
        let line = line.strip_prefix(word).map_or_else(|| line.clone(), |rest| self.0.paint(tone, word) + rest);
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    fn started(&self, _index: usize, _total: usize, _check: &Check) {}
}

/// One short line per check beside a report that is for programs or files.
struct Progress(Output);

impl Observer for Progress {
    fn finished(&self, index: usize, total: usize, result: &CheckReport) {
        self.0.note(&format!("{index}/{total} {} {}", result.status.as_str(), result.id));
    }
}

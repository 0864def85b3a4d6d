//! `stacyvm smoke`: does a deployment work, from the outside?
//!
//! One sandbox is made, used in every way that clients use one, and destroyed,
//! also when something failed in between. Whoever wants to know more asks
//! `stacyvm conformance`.

mod steps;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use stacyvm_api::{CreateRequest, Duration, ListQuery, ProviderHealth, SandboxId, SandboxState};
use stacyvm_client::{Client, ClientOptions, SandboxClient};
use stacyvm_conformance::{Ability, lack_of};

use crate::check::{Check, Checks, Status};
use crate::commands::{Context, given, stop_when_interrupted};
use crate::failure;
use crate::output::{print, took};

/// Marks the sandbox of one run, so that it is found again when its creation
/// was given up.
const RUN_KEY: &str = "stacyvm.smoke";

/// What ends the sandbox if this program cannot.
const SANDBOX_TTL: Duration = Duration::from_secs(10 * 60);

/// Make a sandbox on a server, use it in every way, and destroy it
///
/// Liveness, readiness, the provider, commands (buffered, without a shell,
/// streamed, with input), files as text and bytes, ports, a preview, and that
/// nothing stays. What the provider says it lacks is skipped. The sandbox is
/// destroyed also when something fails or after Ctrl-C.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm smoke
  stacyvm smoke --url https://vm.example.com --api-key \"$KEY\" --image alpine:latest
  stacyvm smoke --json | jq -r .status")]
pub(crate) struct SmokeArgs {
    /// Server to try, instead of --server [env: STACYVM_SMOKE_URL]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Image to make the sandbox from; the server's default unless given
    #[arg(long)]
    image: Option<String>,
    /// Provider to make it with; the server's default unless given
    #[arg(long)]
    provider: Option<String>,
    /// Longest time for each step
    #[arg(long, value_name = "TIME", default_value = "2m")]
    timeout: Duration,
}

pub(crate) async fn run(context: &Context, args: &SmokeArgs) -> anyhow::Result<ExitCode> {
    let client = match given(args.url.clone(), "STACYVM_SMOKE_URL") {
        Some(url) => Client::new(&ClientOptions { api_key: context.api_key.clone(), ..ClientOptions::new(url) })?,
        None => context.client()?,
    };
    let mut run = Run { context, client, args, checks: Checks::default(), mark: SandboxId::random().to_string() };
    let stop = stop_when_interrupted();
    let interrupted = tokio::select! {
        () = run.all() => false,
        () = stop.cancelled() => true,
    };
    if interrupted {
        run.end(Check::fail("smoke.run", "was interrupted", "run it again"))?;
    }
    run.destroy_what_is_left().await?;
    if context.output.is_json() {
        run.checks.show(context.output)?;
    } else {
        print(&format!("\n{}\n", run.summary()))?;
    }
    Ok(run.checks.exit_code())
}

/// One run and what it has found.
struct Run<'a> {
    context: &'a Context,
    client: Client,
    args: &'a SmokeArgs,
    checks: Checks,
    mark: String,
}

impl Run<'_> {
    async fn all(&mut self) {
        let client = self.client.clone();
        let live = async || {
            let health = client.live().await?;
            if health.status == "alive" { Ok(format!("version {}", health.version)) } else { bail!(health.status) }
        };
        if self.step("smoke.live", live()).await.is_none() {
            return;
        }
        self.step("smoke.ready", ready(&client)).await;
        let wanted = self.args.provider.clone();
        let Some(provider) = self.step_with("smoke.provider", provider(&client, wanted.as_deref())).await else {
            return;
        };
        let request = self.request(&provider.name);
        let Some(sandbox) = self.step_with("smoke.spawn", spawn(&client, &request)).await else { return };
        self.use_it(&sandbox, &provider).await;
        self.step("smoke.destroy", destroy(&sandbox)).await;
    }

    async fn use_it(&mut self, sandbox: &SandboxClient, provider: &ProviderHealth) {
        self.step("smoke.exec", steps::exec(sandbox)).await;
        self.step("smoke.argv", steps::argv(sandbox)).await;
        self.step("smoke.exit_status", steps::exit_status(sandbox)).await;
        if self.can(provider, "smoke.stdin", &[Ability::Terminal]) {
            self.step("smoke.stdin", steps::stdin(sandbox)).await;
        }
        self.step("smoke.stream", steps::stream(sandbox)).await;
        self.step("smoke.files.text", steps::text_file(sandbox)).await;
        if self.can(provider, "smoke.files.bytes", &[Ability::Bytes]) {
            self.step("smoke.files.bytes", steps::large_file(sandbox)).await;
        }
        self.step("smoke.files.list", steps::list_and_remove(sandbox)).await;
        if self.can(provider, "smoke.ports", &[Ability::Programs, Ability::Ports]) {
            self.step("smoke.ports", steps::ports(sandbox)).await;
        }
        if !self.can(provider, "smoke.preview", &[Ability::Programs, Ability::Dial]) {
            return;
        }
        if steps::has_previews(sandbox).await {
            self.step("smoke.preview", steps::preview(sandbox)).await;
        } else {
            let fix = "set server.preview_domain or server.preview_port to have previews";
            let _ = self.end(Check::warn("smoke.preview", "not tried: this server has no previews", fix));
        }
    }

    /// Whether the provider has what a step needs; otherwise the step is skipped,
    /// with what the provider lacks.
    fn can(&mut self, provider: &ProviderHealth, step: &'static str, needs: &[Ability]) -> bool {
        let lack = needs.iter().find_map(|need| lack_of(provider, *need));
        let can = lack.is_none();
        if let Some(lack) = lack {
            let _ = self.end(Check::skip(step, lack));
        }
        can
    }

    /// Takes one step within its time; says how it went.
    async fn step(&mut self, name: &'static str, work: impl Future<Output = anyhow::Result<String>>) -> Option<()> {
        let work = async { work.await.map(|said| ((), said)) };
        self.step_with(name, work).await
    }

    /// [`Self::step`], with what it made.
    async fn step_with<T>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = anyhow::Result<(T, String)>>,
    ) -> Option<T> {
        let started = Instant::now();
        let limit = self.args.timeout;
        let done = tokio::time::timeout(limit.get(), work).await;
        let done = done.unwrap_or_else(|_| Err(anyhow!("not done after {limit}")));
        let time = took(started.elapsed());
        let (made, check) = match done {
            Ok((made, said)) => (Some(made), Check::pass(name, format!("{said} ({time})"))),
            Err(error) => (None, Check::fail(name, format!("{error:#} ({time})"), fix(&error))),
        };
        // Nobody listens any more: the run goes on to clean up.
        let _ = self.end(check);
        made
    }

    /// Keeps a finding, and shows it to whoever watches.
    fn end(&mut self, check: Check) -> anyhow::Result<()> {
        let shown = if self.context.output.is_json() { Ok(()) } else { print(&check.text(self.context.output)) };
        self.checks.push(check);
        shown
    }

    fn request(&self, provider: &str) -> CreateRequest {
        CreateRequest {
            image: self.args.image.clone(),
            provider: Some(provider.to_owned()),
            ttl: Some(SANDBOX_TTL),
            metadata: Some(BTreeMap::from([(RUN_KEY.to_owned(), self.mark.clone())])),
            allow_unenforced: Some(true),
            ..CreateRequest::default()
        }
    }

    /// Nothing of this run may stay, however it went.
    async fn destroy_what_is_left(&mut self) -> anyhow::Result<()> {
        let spawned = self.checks.0.iter().any(|check| check.name == "smoke.provider" && check.status == Status::Pass);
        if !spawned {
            return Ok(());
        }
        let query = ListQuery { metadata: Some(format!("{RUN_KEY}={}", self.mark)), ..ListQuery::default() };
        let client = self.client.clone();
        let mark = self.mark.clone();
        let work = async move {
            let sandboxes = client.list_all(&query).await.context("list what is left")?;
            // A server that ignores the filter must not make us destroy others' sandboxes.
            let ours = sandboxes.into_iter().filter(|sandbox| sandbox.metadata.get(RUN_KEY) == Some(&mark));
            for sandbox in ours.filter(|sandbox| sandbox.state != SandboxState::Destroyed) {
                client.sandbox(sandbox.id).destroy().await.context("destroy what is left")?;
            }
            Ok("nothing is left".to_owned())
        };
        self.step("smoke.clean", work).await;
        Ok(())
    }

    fn summary(&self) -> String {
        let [passed, skipped, warned, failed] =
            [Status::Pass, Status::Skip, Status::Warn, Status::Fail].map(|it| self.checks.count(it));
        let server = self.client.server();
        if failed > 0 {
            return format!("{failed} failed, {} not tried, {passed} passed: {server} does not work", skipped + warned);
        }
        format!("{passed} passed, {} not tried: {server} works", skipped + warned)
    }
}

async fn ready(client: &Client) -> anyhow::Result<String> {
    let readiness = client.ready().await?;
    if readiness.status != "ready" {
        let why = readiness.providers.iter().find_map(|provider| provider.error.clone()).unwrap_or(readiness.store);
        bail!("{}: {why}", readiness.status);
    }
    Ok(format!("{} of {} providers are healthy", readiness.ready_providers, readiness.total_providers))
}

async fn provider(client: &Client, wanted: Option<&str>) -> anyhow::Result<(ProviderHealth, String)> {
    let providers = client.providers().await?;
    let is_wanted = |provider: &ProviderHealth| wanted.map_or(provider.default, |name| provider.name == name);
    let names: Vec<String> = providers.iter().map(|provider| provider.name.clone()).collect();
    let found = providers.into_iter().find(is_wanted);
    let provider = found.with_context(|| format!("it is none of {}", names.join(", ")))?;
    if !provider.healthy {
        bail!("{} is not healthy: {}", provider.name, provider.error.unwrap_or_default());
    }
    let name = provider.name.clone();
    Ok((provider, name))
}

async fn spawn(client: &Client, request: &CreateRequest) -> anyhow::Result<(SandboxClient, String)> {
    let record = client.create(request).await?;
    if record.state != SandboxState::Running {
        bail!("{} is {:?} and not running", record.id, record.state);
    }
    let said = format!("{} from {}", record.id, record.image);
    Ok((client.sandbox(record.id), said))
}

/// It is gone at once, and its id says so.
async fn destroy(sandbox: &SandboxClient) -> anyhow::Result<String> {
    sandbox.destroy().await?;
    match sandbox.get().await {
        Ok(record) if record.state == SandboxState::Destroyed => Ok(format!("{} is gone", record.id)),
        Ok(record) => bail!("{} is still {:?}", record.id, record.state),
        Err(error) if error.code() == Some(stacyvm_api::ErrorCode::NotFound) => Ok(format!("{} is gone", sandbox.id())),
        Err(error) => Err(error.into()),
    }
}

/// What the server says to do, or where to look.
fn fix(error: &anyhow::Error) -> String {
    failure::hint(error).unwrap_or_else(|| "stacyvm doctor on the server's host, and the server's log".to_owned())
}

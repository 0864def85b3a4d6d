//! `stacyvm providers`: the runtimes a server has, and what they lack.

use std::fmt::Write as _;

use clap::Args;
use stacyvm_api::{ErrorCode, Finding, FindingLevel, ProviderDetail, ProviderHealth};
use stacyvm_client::ClientError;

use crate::commands::{Context, KNOWN_PROVIDERS};
use crate::failure::Advice;
use crate::output::{Output, Tone};

/// List the server's runtimes, or show one with what was found on the host
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm providers
  stacyvm providers oci
  stacyvm providers --check")]
pub(crate) struct ProvidersArgs {
    /// Show this one in full
    name: Option<String>,
    /// Look at the host anew first
    #[arg(long)]
    check: bool,
}

pub(crate) async fn run(context: &Context, args: ProvidersArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    if args.check {
        client.test_providers().await?;
    }
    if let Some(name) = args.name {
        let provider = client.provider(&name).await.map_err(|error| not_enabled(error, &name))?;
        return context.output.show(&provider, |provider| page(context.output, provider));
    }
    let providers = client.providers().await?;
    context.output.show(&providers, |providers| table(context.output, providers))
}

/// A runtime that this program has and the server does not use.
fn not_enabled(error: ClientError, name: &str) -> anyhow::Error {
    if error.code() != Some(ErrorCode::NotFound) || !KNOWN_PROVIDERS.contains(&name) {
        return error.into();
    }
    let variable = format!("STACYVM_PROVIDERS_{}_ENABLED=true", name.to_uppercase());
    let hint = format!(
        "set providers.{name}.enabled: true in the server's configuration, or {variable}, and start it again; \
         `stacyvm doctor` says what {name} needs"
    );
    Advice::new(format!("the provider {name} is not enabled on this server"), hint).of(ErrorCode::NotFound).into()
}

fn health(output: Output, healthy: bool) -> String {
    if healthy { output.paint(Tone::Good, "healthy") } else { output.paint(Tone::Bad, "unhealthy") }
}

fn table(output: Output, providers: &[ProviderHealth]) -> String {
    let rows = providers.iter().map(|provider| {
        vec![
            provider.name.clone(),
            health(output, provider.healthy),
            if provider.default { "yes".to_owned() } else { "-".to_owned() },
            provider.runtime_count.map_or_else(|| "-".to_owned(), |count| count.to_string()),
            provider.error.clone().unwrap_or_else(|| provider.capabilities.join(", ")),
        ]
    });
    output.table(&["NAME", "HEALTH", "DEFAULT", "SANDBOXES", "CAPABILITIES"], rows.collect())
}

fn page(output: Output, provider: &ProviderDetail) -> String {
    let default = if provider.default { ", the default" } else { "" };
    let mut page = format!(
        "{}: {}{default}, {} sandboxes\n",
        output.paint(Tone::Strong, &provider.name),
        health(output, provider.healthy),
        provider.sandbox_count
    );
    for (key, value) in &provider.config {
        let _ = writeln!(page, "  {key}: {value}");
    }
    let _ = writeln!(page, "  capabilities: {}", provider.capabilities.join(", "));
    for shortfall in &provider.shortfalls {
        let meaning = meaning(shortfall).map(|meaning| format!(" ({meaning})")).unwrap_or_default();
        let _ = writeln!(page, "  {} {shortfall}{meaning}", output.paint(Tone::Warning, "lacks:"));
    }
    for finding in &provider.health.findings {
        page.push_str(&finding_lines(output, finding));
    }
    page
}

/// What a shortfall means to whoever uses sandboxes there. A server may know
/// newer ones.
fn meaning(shortfall: &str) -> Option<&'static str> {
    Some(match shortfall {
        "text_only" => "output and files are text",
        "plain_files" => "files have no owner, and no kind but file and directory",
        "no_archives" => "directories cannot be copied as a whole",
        "late_output" => "output of a command comes at its end, and is lost at its deadline",
        "one_user" => "commands have one user",
        "plain_failures" => "failures do not tell what exactly was wrong",
        "loose_limits" => "nobody says which limits hold",
        _ => return None,
    })
}

fn finding_lines(output: Output, finding: &Finding) -> String {
    let word = match finding.level {
        FindingLevel::Ok => output.paint(Tone::Good, "ok  "),
        FindingLevel::Warning => output.paint(Tone::Warning, "warn"),
        FindingLevel::Failure => output.paint(Tone::Bad, "fail"),
    };
    let fix = finding.fix.as_ref().map(|fix| format!("       fix: {fix}\n")).unwrap_or_default();
    format!("  {word} {}: {}\n{fix}", finding.name, finding.message)
}

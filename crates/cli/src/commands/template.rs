//! `stacyvm template`: named recipes for sandboxes.

use std::io::Read as _;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_api::{Duration, ErrorCode, Template, TemplateSpawnRequest};
use stacyvm_client::Client;

use crate::commands::create::SandboxArgs;
use crate::commands::spawn::{self, Told};
use crate::commands::{Context, key_value};
use crate::failure::Advice;
use crate::output::{self, Output};

/// Longest template that is read from a file.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Keep and use named recipes for sandboxes
#[derive(Debug, Args)]
pub(crate) struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "ls", after_help = "Examples:\n  stacyvm template list")]
    List,
    /// Show a template
    #[command(after_help = "Examples:\n  stacyvm template get data-science --json")]
    Get {
        name: String,
    },
    Save(Box<SaveArgs>),
    /// Delete a template; sandboxes made from it stay
    #[command(visible_alias = "rm", after_help = "Examples:\n  stacyvm template delete data-science")]
    Delete {
        name: String,
    },
    Spawn(SpawnArgs),
}

/// Store a template, or replace the one of that name
///
/// A template has 1 processor, 512 MiB of memory and a life of 5 minutes for its
/// sandboxes, unless --vcpus, --memory and --ttl say otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm template save data-science --image python:3.12 --memory 2048 --setup 'pip install pandas'
  stacyvm template get data-science --json | stacyvm template save copy --file -")]
struct SaveArgs {
    name: String,
    /// JSON file to take it from; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "setup", "description"])]
    file: Option<String>,
    /// What it is for
    #[arg(long)]
    description: Option<String>,
    /// Command to run before the sandbox counts as ready (repeatable)
    #[arg(long, value_name = "COMMAND")]
    setup: Vec<String>,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

/// Create a sandbox from a template
///
/// Prints its id on standard output, and what there is to know about it on
/// standard error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  id=$(stacyvm template spawn data-science)
  stacyvm template spawn data-science --ttl 2h --metadata job=42")]
struct SpawnArgs {
    name: String,
    /// Runtime to use instead of the template's
    #[arg(long)]
    provider: Option<String>,
    /// How long the sandbox may live; as long as the template says unless given
    #[arg(long, value_name = "TIME")]
    ttl: Option<Duration>,
    /// Note kept with the sandbox (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    metadata: Vec<(String, String)>,
    /// Say nothing beside the id
    #[arg(long, short = 'q')]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: TemplateArgs) -> anyhow::Result<()> {
    let client = context.client()?;
    match args.command {
        TemplateCommand::List => {
            let templates = client.templates().await?;
            context.output.show(&templates, |templates| table(context.output, templates))
        }
        TemplateCommand::Get { name } => {
            let template = client.template(&name).await?;
            context.output.show(&template, page)
        }
        TemplateCommand::Save(args) => {
            let saved = save(&client, &template_of(*args)?).await?;
            context
                .output
                .show(&saved, |saved| format!("saved {}, version {}\n", saved.name, saved.version.unwrap_or(1)))
        }
        TemplateCommand::Delete { name } => {
            client.delete_template(&name).await?;
            context.output.show(&json!({ "deleted": name }), |_| format!("deleted {name}\n"))
        }
        TemplateCommand::Spawn(args) => {
            let metadata = (!args.metadata.is_empty()).then(|| args.metadata.into_iter().collect());
            let request = TemplateSpawnRequest { provider: args.provider, ttl: args.ttl, metadata };
            let started = Instant::now();
            let sandbox = client.spawn_template(&args.name, &request).await?;
            let told = if args.quiet { Told::IdAlone } else { Told::All(started.elapsed()) };
            spawn::show(context.output, &sandbox, told)
        }
    }
}

async fn save(client: &Client, template: &Template) -> anyhow::Result<Template> {
    match client.update_template(template).await {
        Err(error) if error.code() == Some(ErrorCode::NotFound) => Ok(client.create_template(template).await?),
        saved => Ok(saved?),
    }
}

fn template_of(args: SaveArgs) -> anyhow::Result<Template> {
    if let Some(file) = &args.file {
        let mut template = read_template(file)?;
        template.name = args.name;
        return Ok(template);
    }
    let request = args.sandbox.request(None);
    let image = request.image.ok_or_else(|| Advice::new("a template needs an image", "pass --image or --file"))?;
    Ok(Template {
        name: args.name,
        image,
        description: args.description,
        provider: request.provider,
        setup: (!args.setup.is_empty()).then_some(args.setup),
        network: request.network,
        user: request.user,
        memory_mb: request.memory_mb,
        disk_size_mb: request.disk_size_mb,
        disk: request.disk,
        pids_limit: request.pids_limit,
        allow_unenforced: request.allow_unenforced,
        vcpus: request.vcpus,
        ttl: request.ttl,
        env: request.env,
        metadata: request.metadata,
        ..Template::default()
    })
}

fn read_template(file: &str) -> anyhow::Result<Template> {
    let mut text = String::new();
    let read = if file == "-" {
        std::io::stdin().take(MAX_FILE_BYTES).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
    };
    read.with_context(|| format!("cannot read {file}"))?;
    serde_json::from_str(&text).with_context(|| format!("{file} holds no template"))
}

fn table(output: Output, templates: &[Template]) -> String {
    if templates.is_empty() {
        return "no templates\n".to_owned();
    }
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let rows = templates.iter().map(|template| {
        vec![
            template.name.clone(),
            template.image.clone(),
            or_dash(template.memory_mb.map(|mib| output::bytes(mib << 20))),
            or_dash(template.vcpus.or(template.cpu_cores).map(|count| count.to_string())),
            or_dash(template.ttl.map(|ttl| output::span(ttl.get()))),
            or_dash(template.description.clone()),
        ]
    });
    output.table(&["NAME", "IMAGE", "MEMORY", "VCPUS", "TTL", "DESCRIPTION"], rows.collect())
}

/// Templates are written to be saved again, so people get JSON too.
fn page(template: &Template) -> String {
    serde_json::to_string_pretty(template).map(|text| text + "\n").unwrap_or_default()
}

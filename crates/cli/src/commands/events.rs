//! `stacyvm events`: what happens on the server, as it happens.

use clap::Args;
use stacyvm_api::{Event, SandboxId};
use stacyvm_client::EventsOptions;

use crate::commands::Context;
use crate::output::{Output, Tone, json_line, print};

/// Follow the server's events, until Ctrl-C
///
/// A connection that breaks is made again, and no event is missed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm events
  stacyvm events --sandbox sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm events --after evt-1042 --json")]
pub(crate) struct EventsArgs {
    /// Begin after this event instead of now
    #[arg(long, value_name = "EVENT")]
    after: Option<String>,
    /// Only events of this sandbox
    #[arg(long, value_name = "ID")]
    sandbox: Option<SandboxId>,
}

pub(crate) async fn run(context: &Context, args: EventsArgs) -> anyhow::Result<()> {
    let mut events = context.client()?.events(&EventsOptions { after: args.after }).await?;
    loop {
        let event = events.next().await?;
        if args.sandbox.is_some() && event.sandbox_id != args.sandbox {
            continue;
        }
        if context.output.is_json() {
            json_line(&event)?;
        } else {
            print(&line(context.output, &event))?;
        }
    }
}

fn line(output: Output, event: &Event) -> String {
    let kind = serde_json::to_value(event.kind).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("?");
    let sandbox = event.sandbox_id.as_ref().map_or("-", |id| id.as_str());
    let data = event.data.as_ref().map(|data| {
        data.iter()
            .map(|(key, value)| match value {
                serde_json::Value::String(text) => format!(" {key}={text}"),
                other => format!(" {key}={other}"),
            })
            .collect::<String>()
    });
    let time = output.paint(Tone::Faint, &event.timestamp.to_string());
    format!("{time} {:<10} {kind:<18} {sandbox}{}\n", event.id, data.unwrap_or_default())
}

//! `stacyvm ps`: the commands of a sandbox.

use clap::Args;
use stacyvm_api::{ProcessStatus, ProcessSummary, SandboxId};

use crate::commands::Context;
use crate::output::{self, Output, Tone};

/// Longest command shown in the table.
const COMMAND_CHARS: usize = 60;

/// List the commands that run or ran in a sandbox, newest first
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm ps sb-4f9k2m0x7c1v8b3n5q6w
  stacyvm ps --running sb-4f9k2m0x7c1v8b3n5q6w --json")]
pub(crate) struct PsArgs {
    /// The sandbox
    id: SandboxId,
    /// Only those that run
    #[arg(long)]
    running: bool,
}

pub(crate) async fn run(context: &Context, args: PsArgs) -> anyhow::Result<()> {
    let mut commands = context.client()?.sandbox(args.id).exec_log().await?;
    if args.running {
        commands.retain(|command| command.status == ProcessStatus::Running);
    }
    context.output.show(&commands, |commands| table(context.output, commands))
}

fn table(output: Output, commands: &[ProcessSummary]) -> String {
    if commands.is_empty() {
        return "no commands\n".to_owned();
    }
    let rows = commands.iter().map(|command| {
        vec![
            command.exec_id.to_string(),
            status(output, command),
            output::relative(command.started_at),
            command.duration.map_or_else(|| "-".to_owned(), |duration| output::took(duration.get())),
            shortened(&command.command),
        ]
    });
    output.table(&["ID", "STATUS", "STARTED", "TOOK", "COMMAND"], rows.collect())
}

fn status(output: Output, command: &ProcessSummary) -> String {
    match (command.status, command.exit_code) {
        (ProcessStatus::Running, _) => output.paint(Tone::Good, "running"),
        (ProcessStatus::Exited, Some(0)) => "exited 0".to_owned(),
        (ProcessStatus::Exited, code) => output.paint(Tone::Bad, &format!("exited {}", code.unwrap_or(-1))),
        (ProcessStatus::TimedOut, _) => output.paint(Tone::Warning, "timed out"),
        (ProcessStatus::Lost, _) => output.paint(Tone::Faint, "lost"),
    }
}

/// One line without control characters: commands come from anybody.
fn shortened(command: &str) -> String {
    let mut line: String = command.chars().map(|c| if c.is_control() { ' ' } else { c }).take(COMMAND_CHARS).collect();
    if command.chars().count() > COMMAND_CHARS {
        line.push('…');
    }
    line
}

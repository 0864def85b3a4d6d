//! `stacyvm upgrade rehearse`: what this version would make of the store,
//! tried on a copy.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_api::SandboxState;
use stacyvm_engine::{MigrationState, StoreFile, StoreStatistics};

use crate::check::{Check, Checks, Status, Strictness};
use crate::commands::Context;
use crate::commands::db::{StoreArgs, copy, judge, refuse_damaged};
use crate::commands::settings::PlaceArgs;
use crate::config::{self, Environment};
use crate::output::took;
use crate::private_file::Existing;

/// Try an upgrade without doing it
#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    #[command(subcommand)]
    command: UpgradeCommand,
}

#[derive(Debug, Subcommand)]
enum UpgradeCommand {
    Rehearse(Box<RehearseArgs>),
}

/// Show what this version would make of the store and the configuration
///
/// Run it with the new program before it replaces the old one, also while the
/// old server runs. The store is copied, the copy is brought up to date and
/// checked, and thrown away. Nothing else is written.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ./stacyvm-new upgrade rehearse --config /etc/stacyvm/stacyvm.yaml
  stacyvm upgrade rehearse --production --backup-output before.db")]
struct RehearseArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Keep the copy of the store, as it is before the upgrade, in this file
    #[arg(long, value_name = "PATH")]
    backup_output: Option<PathBuf>,
    /// Judge the configuration for a server that other people depend on
    #[arg(long)]
    production: bool,
}

pub(crate) async fn run(context: &Context, args: &UpgradeArgs) -> anyhow::Result<ExitCode> {
    let UpgradeCommand::Rehearse(args) = &args.command;
    let place = PlaceArgs { config: args.store.config.clone(), data_dir: args.store.data_dir.clone() };
    let loaded = place.load(&Environment::of_this_process());
    let mut checks = config::lint(&loaded, Strictness::new(args.production));
    if loaded.is_ok() {
        let place = args.store.place()?;
        args.store.refuse_missing(&place)?;
        checks.extend(rehearse(&place.file, args.backup_output.as_deref()).await?);
    }
    let went_well = checks.status() != Status::Fail;
    let steps = steps(&args.store);
    let page = json!({ "status": checks.status(), "checks": checks, "steps": steps });
    context.output.show(&page, |_| {
        let mut text = checks.text(context.output);
        if went_well {
            text.push_str("\nTo upgrade:\n");
            for (number, step) in steps.iter().enumerate() {
                let _ = writeln!(text, "  {}. {step}", number + 1);
            }
        } else {
            text.push_str("\nDo not upgrade before what failed is corrected.\n");
        }
        text
    })?;
    Ok(checks.exit_code())
}

/// What to do, once a rehearsal went well: for the same store as this one.
fn steps(store: &StoreArgs) -> [String; 6] {
    const COPY: &str = "/var/backups/stacyvm-before-upgrade.db";
    let store = store.repeated();
    [
        format!("stacyvm db backup {COPY}{store}"),
        "stop the old server (systemctl stop stacyvm): sandboxes and their commands go on".to_owned(),
        "put the new program in the place of the old one".to_owned(),
        "start the new server (systemctl start stacyvm): it takes up what runs".to_owned(),
        "stacyvm health && stacyvm smoke".to_owned(),
        format!("to go back: stop, put the old program back, stacyvm db restore {COPY} --yes{store}, start"),
    ]
}

/// The store's part, on a copy.
async fn rehearse(store: &StoreFile, keep: Option<&Path>) -> anyhow::Result<Checks> {
    let mut checks = Checks::default();
    if !store.path().is_file() {
        let message = format!("there is no store at {} yet; the first start makes it", store.path().display());
        checks.push(Check::pass("database.source", message));
        return Ok(checks);
    }
    checks.push(Check::pass("database.source", store.path().display().to_string()));
    checks.extend(judge(store).await?);
    if checks.status() == Status::Fail {
        return Ok(checks);
    }
    let scratch = tempfile::tempdir().context("cannot make a directory for the copy")?;
    let trial = StoreFile::new(scratch.path().join("rehearsal.db"));
    copy(store, trial.path(), Existing::Refuse).await?;
    if let Some(path) = keep {
        let kept = copy(store, path, Existing::Refuse).await?;
        checks.push(Check::pass("backup.output", format!("the store as it is was copied to {}", kept.display())));
    }
    checks.extend(migrate(&trial).await?);
    Ok(checks)
}

async fn migrate(trial: &StoreFile) -> anyhow::Result<Checks> {
    const NAME: &str = "rehearsal.migrate";
    let mut checks = Checks::default();
    let migrations = trial.migrations().await?;
    let pending = migrations.iter().filter(|migration| migration.state == MigrationState::Pending).count();
    let before = trial.statistics().await?;
    checks.push(sandboxes(&before));
    let started = Instant::now();
    if let Err(error) = trial.migrate().await {
        let fix = "keep the old version, and report this with `stacyvm support bundle`";
        checks.push(Check::fail(NAME, format!("{error}: {}", error.cause), fix));
        return Ok(checks);
    }
    let message = match pending {
        0 => "the tables are those of this version".to_owned(),
        count => format!("{count} steps were applied to the copy in {}", took(started.elapsed())),
    };
    checks.push(Check::pass(NAME, message));
    checks.push(match refuse_damaged(trial).await {
        Ok(()) => Check::pass("rehearsal.integrity", "the copy is whole afterwards"),
        Err(error) => Check::fail("rehearsal.integrity", error.to_string(), "keep the old version"),
    });
    checks.push(rows(&before, &trial.statistics().await?));
    Ok(checks)
}

/// What becomes of the sandboxes there are.
fn sandboxes(before: &StoreStatistics) -> Check {
    let alive = before.sandboxes.iter().filter(|(state, _)| match state {
        SandboxState::Creating | SandboxState::Running | SandboxState::Paused | SandboxState::Unhealthy => true,
        SandboxState::Destroying | SandboxState::Destroyed | SandboxState::Error => false,
    });
    let count: u64 = alive.map(|(_, count)| count).sum();
    Check::pass("rehearsal.sandboxes", format!("{count} sandboxes are taken up by the new server"))
}

/// Rows that a migration made fewer of.
fn rows(before: &StoreStatistics, after: &StoreStatistics) -> Check {
    const NAME: &str = "rehearsal.rows";
    let left = |table: &str| after.rows.iter().find(|(name, _)| name == table).map_or(0, |(_, count)| *count);
    let fewer: Vec<String> = before
        .rows
        .iter()
        .filter(|(table, count)| left(table) < *count)
        .map(|(table, count)| format!("{table}: {} of {count}", left(table)))
        .collect();
    if fewer.is_empty() {
        return Check::pass(NAME, "every row is still there");
    }
    Check::warn(NAME, format!("rows are gone ({})", fewer.join(", ")), "read the changelog: this may be meant")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_go_are_pointed_out() {
        let count = |rows: &[(&str, u64)]| StoreStatistics {
            rows: rows.iter().map(|(table, count)| ((*table).to_owned(), *count)).collect(),
            ..StoreStatistics::default()
        };
        let judge = |after| rows(&count(&[("events", 2), ("sandboxes", 1)]), &count(after)).status;
        assert_eq!(judge(&[("events", 2), ("sandboxes", 1), ("new", 0)]), Status::Pass);
        assert_eq!(judge(&[("events", 2)]), Status::Warn);
    }

    #[test]
    fn only_sandboxes_that_may_run_are_counted() {
        let sandboxes_of = vec![(SandboxState::Running, 2), (SandboxState::Destroyed, 9), (SandboxState::Creating, 1)];
        let statistics = StoreStatistics { sandboxes: sandboxes_of, ..StoreStatistics::default() };
        assert!(sandboxes(&statistics).message.starts_with("3 sandboxes"));
    }
}

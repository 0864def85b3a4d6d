//! `stacyvm db migrate`: which tables the store has, and bringing them up to
//! date without starting a server.

use clap::Args;
use serde_json::json;
use stacyvm_engine::{MigrationState, StoreMigration};

use super::{Place, backup, refuse_foreign, safety_copy_path};
use crate::commands::Context;
use crate::output::{Output, Tone};
use crate::private_file::Existing;

/// Show which versions of tables the store has; with --yes, add what is missing
///
/// A server does the same when it starts. With --yes the store is copied first,
/// and no server may use it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm db migrate
  stacyvm db migrate --yes")]
pub(super) struct MigrateArgs {
    /// Bring the tables up to date
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(context: &Context, place: &Place, args: &MigrateArgs) -> anyhow::Result<()> {
    let file = place.existing()?;
    let before = file.migrations().await?;
    let pending = before.iter().any(|migration| migration.state == MigrationState::Pending);
    if !args.yes || !pending {
        context.output.show(&json!({ "migrations": before }), |_| table(context.output, &before))?;
        if pending {
            context.output.note("pass --yes to bring the tables up to date, or start a server");
        }
        return Ok(());
    }
    refuse_foreign(&before, place.path())?;
    let _lock = place.lock()?;
    let copy = backup::copy(file, &safety_copy_path(place.path(), "migrate"), Existing::Refuse).await?;
    file.migrate().await?;
    let after = file.migrations().await?;
    context.output.note(&format!("the store as it was is kept in {}", copy.display()));
    context.output.show(&json!({ "migrations": after, "safety_copy": copy }), |_| table(context.output, &after))
}

fn table(output: Output, migrations: &[StoreMigration]) -> String {
    let rows = migrations.iter().map(|migration| {
        let (tone, word) = match migration.state {
            MigrationState::Applied => (Tone::Good, "applied"),
            MigrationState::Pending => (Tone::Warning, "pending"),
            MigrationState::Unknown => (Tone::Bad, "unknown to this version"),
            MigrationState::Changed => (Tone::Bad, "not that of this version"),
        };
        let at = migration.applied_at.map(|at| at.to_string()).unwrap_or_default();
        vec![migration.version.to_string(), migration.description.clone(), output.paint(tone, word), at]
    });
    output.table(&["VERSION", "WHAT", "STATE", "APPLIED"], rows.collect())
}

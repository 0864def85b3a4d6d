//! `stacyvm db check`: whether the store is whole and of this version.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use stacyvm_engine::{MigrationState, StoreFile, StoreMigration};

use super::Place;
use crate::check::{Check, Checks};
use crate::commands::Context;
use crate::output::bytes;

/// Look for damage in the store, and compare its tables with this version
///
/// Changes nothing, and works beside a running server.
///
/// Exit status: 0 when nothing failed, 1 otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm db check
  stacyvm db check --database /var/backups/stacyvm.db")]
pub(super) struct CheckArgs {}

pub(super) async fn run(context: &Context, place: &Place, CheckArgs {}: &CheckArgs) -> anyhow::Result<ExitCode> {
    let checks = judge(place.existing()?).await?;
    checks.show(context.output)?;
    Ok(checks.exit_code())
}

/// What there is to say about a store's file.
pub(crate) async fn judge(file: &StoreFile) -> anyhow::Result<Checks> {
    let shown = file.path().display();
    let mut checks = Checks::default();
    checks.push(integrity(file).await);
    if checks.exit_code() == ExitCode::FAILURE {
        return Ok(checks);
    }
    checks.extend(schema(file).await);
    let migrations = file.migrations().await.with_context(|| format!("cannot look at {shown}"))?;
    checks.extend(versions(&migrations));
    let statistics = file.statistics().await.with_context(|| format!("cannot look at {shown}"))?;
    let rows: Vec<String> = statistics.rows.iter().map(|(table, rows)| format!("{table} {rows}")).collect();
    let size = format!("{}, of which {} are free", bytes(statistics.size_bytes), bytes(statistics.free_bytes));
    checks.push(Check::pass("database.size", size));
    checks.push(Check::pass("database.rows", rows.join(", ")));
    Ok(checks)
}

async fn integrity(file: &StoreFile) -> Check {
    const NAME: &str = "database.integrity";
    const FIX: &str = "stacyvm db restore BACKUP --yes";
    match file.damages().await {
        Ok(damages) if damages.is_empty() => Check::pass(NAME, format!("{} is whole", file.path().display())),
        Ok(damages) => Check::fail(NAME, damages.join("; "), FIX),
        Err(error) => Check::fail(NAME, format!("{error}: {}", error.cause), FIX),
    }
}

/// Fails where somebody added to what this program made.
async fn schema(file: &StoreFile) -> Option<Check> {
    const NAME: &str = "database.schema";
    const FIX: &str = "stacyvm db restore BACKUP --yes";
    match file.strangers().await {
        Ok(strangers) if strangers.is_empty() => None,
        Ok(strangers) => Some(Check::fail(NAME, format!("no version of stacyvm made {}", strangers.join(", ")), FIX)),
        Err(error) => Some(Check::fail(NAME, format!("{error}: {}", error.cause), FIX)),
    }
}

/// One check for tables that are not as this version has them.
fn versions(migrations: &[StoreMigration]) -> Vec<Check> {
    const NAME: &str = "database.version";
    let of = |wanted: MigrationState| -> Vec<String> {
        let found = migrations.iter().filter(|migration| migration.state == wanted);
        found.map(|migration| migration.version.to_string()).collect()
    };
    let mut checks = Vec::new();
    let (unknown, changed, pending) =
        (of(MigrationState::Unknown), of(MigrationState::Changed), of(MigrationState::Pending));
    if !unknown.is_empty() {
        let message = format!("a newer version of stacyvm wrote it (tables {})", unknown.join(", "));
        checks.push(Check::fail(NAME, message, "use that version, or restore a backup of this one"));
    }
    if !changed.is_empty() {
        let message = format!("tables {} are not those of this version", changed.join(", "));
        checks.push(Check::fail(NAME, message, "use the version that wrote it"));
    }
    if !pending.is_empty() {
        let message = format!("tables {} are made by the next start", pending.join(", "));
        checks.push(Check::warn(NAME, message, "stacyvm upgrade rehearse"));
    }
    if checks.is_empty() {
        let newest = migrations.last().map_or(0, |migration| migration.version);
        checks.push(Check::pass(NAME, format!("{newest}, that of this version")));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;
    use MigrationState::{Applied, Changed, Pending, Unknown};

    #[test]
    fn versions_are_judged_by_whether_a_server_would_start() {
        let judge = |states: &[MigrationState]| -> Vec<Status> {
            let migrations: Vec<_> = states
                .iter()
                .zip(1..)
                .map(|(state, version)| StoreMigration {
                    version,
                    description: String::new(),
                    state: *state,
                    applied_at: None,
                })
                .collect();
            versions(&migrations).into_iter().map(|check| check.status).collect()
        };
        assert_eq!(judge(&[Applied]), [Status::Pass]);
        assert_eq!(judge(&[Applied, Pending]), [Status::Warn]);
        assert_eq!(judge(&[Applied, Unknown]), [Status::Fail]);
        assert_eq!(judge(&[Changed, Pending]), [Status::Fail, Status::Warn]);
    }
}

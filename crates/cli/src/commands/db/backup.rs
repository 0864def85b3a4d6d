//! `stacyvm db backup`: a whole copy of the store, also while a server runs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stacyvm_engine::StoreFile;

use super::{Place, refuse_damaged};
use crate::commands::Context;
use crate::output::bytes;
use crate::private_file::{Existing, PrivateFile};

/// Copy the store to a file, also while a server runs
///
/// The copy is of one moment, checked for damage, and readable by its owner
/// only. It holds records, commands and events; the files inside of sandboxes
/// are not in it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm db backup /var/backups/stacyvm.db
  stacyvm db backup nightly.db --force --data-dir /var/lib/stacyvm")]
pub(super) struct BackupArgs {
    /// File to write
    path: PathBuf,
    /// Replace the file where it exists
    #[arg(long)]
    force: bool,
}

pub(super) async fn run(context: &Context, place: &Place, args: &BackupArgs) -> anyhow::Result<()> {
    let path = copy(place.existing()?, &args.path, Existing::new(args.force)).await?;
    let size_bytes = path.metadata().map_or(0, |metadata| metadata.len());
    let page = json!({ "database": place.path(), "path": path, "size_bytes": size_bytes });
    context.output.show(&page, |_| {
        format!("backed up {} to {} ({}, checked)\n", place.path().display(), path.display(), bytes(size_bytes))
    })
}

/// Copies a store to a file of mode 0600 and checks the copy.
pub(crate) async fn copy(store: &StoreFile, target: &Path, existing: Existing) -> anyhow::Result<PathBuf> {
    let file = PrivateFile::begin(target, existing)?;
    store.copy_to(file.path()).await.with_context(|| format!("cannot back up {}", store.path().display()))?;
    refuse_damaged(&StoreFile::new(file.path())).await?;
    file.finish()
}

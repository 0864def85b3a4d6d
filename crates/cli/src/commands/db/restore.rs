//! `stacyvm db restore`: puts a backup in the store's place.
//!
//! ```text
//! backup is whole ─► no server holds the store ─► the store as it is, copied aside ─► the backup, copied beside it
//!                                                                                        └─ renamed over the store
//! ```
//!
//! A crash leaves either the old store or the new one, never half of one.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stacyvm_api::ApiKey;
use stacyvm_engine::{StoreFile, StoreKeys};

use super::{Place, backup, refuse_damaged, refuse_foreign, refuse_strangers, safety_copy_path};
use crate::commands::Context;
use crate::failure::Advice;
use crate::private_file::{Existing, PrivateFile};

/// What SQLite keeps beside a file while it is open, or was left open.
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];

/// Replace the store by a backup
///
/// No server may use the store. The backup is checked first, and the store as
/// it is now is kept beside it. A backup from before the first API key would open
/// the server to everybody, and needs --without-keys. Sandboxes that still run and are not in the
/// backup are taken up or destroyed by the next start, as after a crash.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm db restore /var/backups/stacyvm.db --yes
  stacyvm db restore nightly.db --yes --data-dir /var/lib/stacyvm")]
pub(super) struct RestoreArgs {
    /// The backup
    path: PathBuf,
    /// Yes, replace the store
    #[arg(long)]
    yes: bool,
    /// Also by one from before the first API key, with which the server is open
    #[arg(long)]
    without_keys: bool,
}

pub(super) async fn run(context: &Context, place: &Place, args: &RestoreArgs) -> anyhow::Result<()> {
    let store = place.path();
    let from = StoreFile::new(&args.path);
    if !args.path.is_file() {
        let message = format!("there is no backup at {}", args.path.display());
        return Err(Advice::new(message, "name a file that `stacyvm db backup` wrote").into());
    }
    refuse_damaged(&from).await?;
    refuse_foreign(&from.migrations().await?, &args.path)?;
    refuse_strangers(&from).await?;
    place.refuse_missing_directory()?;
    let keys = from.keys().await?;
    let lost = lost_keys(&place.file, &keys).await;
    if lost.all && !args.without_keys {
        let message = format!("{} is from before the first API key: the server would open again", args.path.display());
        let hint = "take a newer backup, or pass --without-keys and make a key before the next start \
                    (stacyvm key create admin --scope admin --data-dir DIR)";
        return Err(Advice::new(message, hint).into());
    }
    if !args.yes {
        let message = format!("this would replace {} by {}", store.display(), args.path.display());
        return Err(Advice::new(message, "pass --yes if that is what you want; the store is copied first").into());
    }
    let _lock = place.lock()?;
    let kept = if store.exists() { Some(set_aside(&place.file).await?) } else { None };
    let fresh = PrivateFile::begin(store, Existing::Replace)?;
    from.copy_to(fresh.path()).await.with_context(|| format!("cannot read {}", args.path.display()))?;
    // The backup may be another file by now.
    let copied = StoreFile::new(fresh.path());
    refuse_damaged(&copied).await?;
    refuse_strangers(&copied).await?;
    remove_companions(store)?;
    fresh.finish()?;
    let page = json!({
        "database": store,
        "restored_from": args.path,
        "safety_copy": kept,
        "keys_valid_again": lost.revoked_since,
    });
    if !lost.revoked_since.is_empty() {
        let names = lost.revoked_since.join(", ");
        context.output.note(&format!("warning: keys that were revoked since are valid again: {names}"));
    }
    context.output.show(&page, |_| {
        let mut text = format!("restored {} from {}\n", store.display(), args.path.display());
        if let Some(kept) = &kept {
            let _ = writeln!(text, "the store as it was is kept in {}", kept.display());
        }
        text
    })
}

/// What the store knows of keys and the backup does not.
#[derive(Debug, Default)]
struct LostKeys {
    /// There were keys, and the backup is from before the first one.
    all: bool,
    /// Names of keys that the backup has in force and the store has not.
    revoked_since: Vec<String>,
}

/// A store that cannot be read has nothing to say.
async fn lost_keys(store: &StoreFile, backup: &StoreKeys) -> LostKeys {
    if !store.path().is_file() {
        return LostKeys::default();
    }
    let Ok(now) = store.keys().await else { return LostKeys::default() };
    let is_revoked = |key: &&ApiKey| !now.in_force.iter().any(|other| other.id == key.id);
    let revoked = backup.in_force.iter().filter(is_revoked);
    LostKeys { all: now.ever_made && !backup.ever_made, revoked_since: revoked.map(|key| key.name.clone()).collect() }
}

/// Keeps the store as it is, whole or damaged.
async fn set_aside(file: &StoreFile) -> anyhow::Result<PathBuf> {
    let copy = safety_copy_path(file.path(), "restore");
    if file.damages().await.is_ok_and(|damages| damages.is_empty()) {
        // The lock keeps servers out; this finds out about everybody else.
        file.settle().await.map_err(|error| {
            let message = format!("{} is open in another program ({})", file.path().display(), error.cause);
            Advice::new(message, "end that program first")
        })?;
        return backup::copy(file, &copy, Existing::Refuse).await;
    }
    // Nothing can read it, so that its bytes are all there is to keep.
    copy_bytes(file.path(), &copy).with_context(|| format!("cannot keep a copy of {}", file.path().display()))?;
    for companion in COMPANIONS {
        let from = with_suffix(file.path(), companion);
        if from.exists() {
            let to = with_suffix(&copy, companion);
            copy_bytes(&from, &to).with_context(|| format!("cannot keep a copy of {}", from.display()))?;
        }
    }
    Ok(copy)
}

/// A log of the old store must not be applied to the new one.
fn remove_companions(store: &Path) -> anyhow::Result<()> {
    for companion in COMPANIONS {
        let path = with_suffix(store, companion);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn copy_bytes(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut copy = PrivateFile::begin(to, Existing::Refuse)?;
    copy.fill(&mut File::open(from)?)?;
    copy.finish()?;
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

//! `stacyvm db`: the store's file. No server is needed; backups and checks work
//! beside a running one.

mod backup;
mod check;
mod migrate;
mod restore;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use stacyvm_api::Timestamp;
use stacyvm_engine::{MigrationState, StoreFile, StoreMigration};

use crate::commands::Context;
use crate::commands::serve::database;
use crate::commands::settings::{PlaceArgs, announce_data_dir};
use crate::config::{Config, Environment};
use crate::data_dir::{self, DataDirLock};
use crate::failure::Advice;
pub(crate) use backup::copy;
pub(crate) use check::judge;

/// Back up, restore, check and migrate the store
///
/// Works on the file that a server with the same configuration uses. Run it as
/// the user that the server runs as.
#[derive(Debug, Args)]
pub(crate) struct DbArgs {
    #[command(subcommand)]
    command: DbCommand,
    #[command(flatten)]
    store: StoreArgs,
}

/// Which store.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// Configuration file of the server
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Data directory of the server
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// File of the store, instead of the configured one
    #[arg(long, global = true, value_name = "FILE")]
    database: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum DbCommand {
    Backup(backup::BackupArgs),
    Restore(restore::RestoreArgs),
    Check(check::CheckArgs),
    Migrate(migrate::MigrateArgs),
}

/// A store and the directory whose server may hold it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) file: StoreFile,
    owner: Owner,
    config: Config,
}

#[derive(Debug)]
enum Owner {
    /// The configured server's data directory.
    Server(PathBuf),
    /// A directory that the file happens to be in; it may be anybody's.
    Whoever(PathBuf),
}

pub(crate) async fn run(context: &Context, args: &DbArgs) -> anyhow::Result<ExitCode> {
    let place = args.store.place()?;
    if let (Owner::Server(directory), None) = (&place.owner, &args.store.database) {
        announce_data_dir(context, &place.config, directory);
    }
    match &args.command {
        DbCommand::Check(args) => return check::run(context, &place, args).await,
        DbCommand::Backup(args) => backup::run(context, &place, args).await,
        DbCommand::Restore(args) => restore::run(context, &place, args).await,
        DbCommand::Migrate(args) => migrate::run(context, &place, args).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

impl StoreArgs {
    /// The store that a server with these settings has.
    pub(crate) fn place(&self) -> anyhow::Result<Place> {
        let environment = Environment::of_this_process();
        let args = PlaceArgs { config: self.config.clone(), data_dir: self.data_dir.clone() };
        let loaded = args.load(&environment)?;
        let configured = PlaceArgs::data_dir(&loaded, &environment)?;
        let usual = database(&loaded.config, &configured);
        let Some(file) = &self.database else {
            return Ok(Place { file: StoreFile::new(usual), owner: Owner::Server(configured), config: loaded.config });
        };
        let file = std::path::absolute(file).with_context(|| format!("cannot use {}", file.display()))?;
        let owner = match file.parent() {
            Some(directory) if file != usual => Owner::Whoever(directory.to_owned()),
            _ => Owner::Server(configured),
        };
        Ok(Place { file: StoreFile::new(file), owner, config: loaded.config })
    }

    /// The options as they were given, for another line with the same store.
    pub(crate) fn repeated(&self) -> String {
        let all = [("config", &self.config), ("data-dir", &self.data_dir), ("database", &self.database)];
        let given = all.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?)));
        let options = given.map(|(name, path)| format!(" --{name} {}", shell_word(&path.display().to_string())));
        options.collect::<Vec<_>>().concat()
    }

    /// What was named has to be there; only what nobody named may yet be made.
    pub(crate) fn refuse_missing(&self, place: &Place) -> anyhow::Result<()> {
        if self.database.is_some() {
            place.existing()?;
        }
        if self.data_dir.is_some() {
            place.refuse_missing_directory()?;
        }
        Ok(())
    }
}

impl Place {
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file has to be there.
    pub(crate) fn existing(&self) -> anyhow::Result<&StoreFile> {
        if self.path().is_file() {
            return Ok(&self.file);
        }
        let message = format!("there is no store at {}", self.path().display());
        Err(Advice::new(message, "name it with --database, or the server's --data-dir or --config").into())
    }

    /// The directories it needs have to be there: one that is made for a slip of
    /// the fingers is found by nobody.
    fn refuse_missing_directory(&self) -> Result<(), Advice> {
        let of_server = match &self.owner {
            Owner::Server(directory) => Some(directory.as_path()),
            Owner::Whoever(_) => None,
        };
        match of_server.into_iter().chain(self.path().parent()).find(|directory| !directory.is_dir()) {
            Some(missing) => {
                let missing = missing.display();
                let hint = format!("correct the path, or make it for a new server: mkdir -p -m 700 {missing}");
                Err(Advice::new(format!("there is no directory {missing}"), hint))
            }
            None => Ok(()),
        }
    }

    /// Keeps servers out for as long as it is held. A directory in which no
    /// server ever was is left as it is.
    fn lock(&self) -> anyhow::Result<Option<DataDirLock>> {
        let directory = match &self.owner {
            Owner::Server(directory) => {
                data_dir::create(directory)?;
                directory
            }
            Owner::Whoever(directory) if data_dir::had_server(directory) => directory,
            Owner::Whoever(_) => return Ok(None),
        };
        let lock = DataDirLock::take(directory).context("the store cannot be changed while a server uses it")?;
        Ok(Some(lock))
    }
}

/// The text as one word of a shell.
fn shell_word(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A copy of the store beside it, such as `stacyvm.db.pre-restore-20261125T101500Z`.
fn safety_copy_path(store: &Path, before: &str) -> PathBuf {
    free_copy_path(store, &format!(".pre-{before}-{}", stamp(Timestamp::now())))
}

/// Copies of one second; a further one is refused, as the file is there.
const COPIES_MAX: u32 = 100;

/// Two copies of one second do not have one name.
fn free_copy_path(store: &Path, suffix: &str) -> PathBuf {
    let numbered = |number: u32| {
        let mut name = store.as_os_str().to_owned();
        name.push(suffix);
        if number > 1 {
            name.push(format!("-{number}"));
        }
        PathBuf::from(name)
    };
    (1..=COPIES_MAX).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| numbered(1))
}

/// `20261125T101500Z`: sorts, and is fine in file names.
pub(crate) fn stamp(at: Timestamp) -> String {
    at.to_whole_seconds().chars().filter(|character| !matches!(character, '-' | ':')).collect()
}

/// Refuses a file whose tables this program does not know.
pub(crate) fn refuse_foreign(migrations: &[StoreMigration], file: &Path) -> Result<(), Advice> {
    for migration in migrations {
        let what = match migration.state {
            MigrationState::Applied | MigrationState::Pending => continue,
            MigrationState::Unknown => "a newer version of stacyvm",
            MigrationState::Changed => "another program",
        };
        let message = format!("{} was written by {what} (version {} of its tables)", file.display(), migration.version);
        return Err(Advice::new(message, "use the version of stacyvm that wrote it, or a newer one"));
    }
    Ok(())
}

/// Refuses a file that holds more than this program puts there.
async fn refuse_strangers(file: &StoreFile) -> anyhow::Result<()> {
    let shown = file.path().display();
    let strangers = file.strangers().await.with_context(|| format!("{shown} cannot be used"))?;
    if strangers.is_empty() {
        return Ok(());
    }
    let message = format!("{shown} holds what no version of stacyvm made: {}", strangers.join(", "));
    Err(Advice::new(message, "use a file that `stacyvm db backup` wrote and nobody changed").into())
}

/// Refuses a damaged file, and says what is damaged.
pub(crate) async fn refuse_damaged(file: &StoreFile) -> anyhow::Result<()> {
    let shown = file.path().display();
    let damages = file.damages().await.with_context(|| format!("{shown} cannot be used"))?;
    if damages.is_empty() {
        return Ok(());
    }
    let message = format!("{shown} is damaged: {}", damages.join("; "));
    Err(Advice::new(message, "use another backup; `stacyvm db check --database FILE` looks for damage").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        for (text, word) in [("/a/b-1.yaml", "/a/b-1.yaml"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("", "''")] {
            assert_eq!(shell_word(text), word);
        }
    }

    #[test]
    fn copies_are_named_after_what_they_precede_and_when() {
        assert_eq!(stamp(Timestamp::from_unix_ms(1_764_065_700_250)), "20251125T101500Z");
        let path = safety_copy_path(Path::new("/data/stacyvm.db"), "restore");
        assert!(path.to_str().unwrap().starts_with("/data/stacyvm.db.pre-restore-2"), "{path:?}");
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("db");
        let next = || free_copy_path(&store, ".pre-x").file_name().unwrap().to_owned();
        for expected in ["db.pre-x", "db.pre-x-2", "db.pre-x-3"] {
            assert_eq!(next(), expected);
            std::fs::write(dir.path().join(expected), "").unwrap();
        }
    }

    #[test]
    fn tables_of_others_are_refused() {
        let migration = |state| StoreMigration { version: 7, description: "x".to_owned(), state, applied_at: None };
        let refuse = |state| refuse_foreign(&[migration(state)], Path::new("f")).map_err(|error| error.to_string());
        assert!(refuse(MigrationState::Applied).is_ok() && refuse(MigrationState::Pending).is_ok());
        assert!(refuse(MigrationState::Unknown).unwrap_err().contains("newer version"));
        assert!(refuse(MigrationState::Changed).unwrap_err().contains("version 7"));
    }
}

//! What survives a restart: SQLite through sqlx.
//!
//! All SQL of the engine is in this folder, behind methods that speak of
//! sandboxes, commands and events; another database is another folder with the
//! same methods. Everything is written by one connection, in batches
//! ([`writer`]), and read by others, which WAL lets run beside it.

mod audit;
mod catalog;
mod events;
mod execs;
mod file;
mod keys;
mod ports;
mod retention;
mod rows;
mod sandboxes;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions as _;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};

pub use file::{MigrationState, StoreFile, StoreKeys, StoreMigration, StoreStatistics};

pub(crate) use audit::{AuditFilter, AuditRow};
pub(crate) use events::{StoredEvent, event_id};
pub(crate) use keys::{KEYS_MADE, KeyHash, KeyRow};
pub(crate) use ports::PortSettings;
pub(crate) use retention::EVENTS_USED_TO;
pub(crate) use rows::{ExecRow, Idempotency, OperationRow, SandboxRow};
pub(crate) use writer::Writer;

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long a statement waits for another process that holds the database,
/// such as a backup.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const READERS_MAX: u32 = 2;

/// A failure of the database, for the log.
#[derive(Debug, thiserror::Error)]
#[error("could not {operation}")]
pub struct StoreError {
    pub operation: &'static str,
    #[source]
    pub cause: Arc<dyn std::error::Error + Send + Sync>,
}

impl StoreError {
    fn new(operation: &'static str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { operation, cause: Arc::from(cause.into()) }
    }

    /// Whether the disk that holds the file has no room for more.
    pub fn is_disk_full(&self) -> bool {
        // SQLITE_FULL, and SQLITE_IOERR_SHMSIZE for the index of the log.
        self.is_caused_by(|error| match error {
            sqlx::Error::Io(failure) => failure.kind() == std::io::ErrorKind::StorageFull,
            error => has_code(error, &["13", "4874"]),
        })
    }

    /// Whether the file is no database, or no longer a whole one.
    pub fn is_damaged(&self) -> bool {
        // SQLITE_CORRUPT and SQLITE_NOTADB.
        self.is_caused_by(|error| has_code(error, &["11", "26"]))
    }

    fn is_caused_by(&self, is_it: impl Fn(&sqlx::Error) -> bool) -> bool {
        let first: &(dyn std::error::Error + 'static) = &*self.cause;
        let mut causes = std::iter::successors(Some(first), |error| error.source());
        causes.any(|error| error.downcast_ref().is_some_and(&is_it))
    }

    /// For one failure that several callers hear of.
    fn shared(&self) -> Self {
        Self { operation: self.operation, cause: Arc::clone(&self.cause) }
    }
}

fn has_code(error: &sqlx::Error, codes: &[&str]) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| codes.contains(&&*code))
}

/// Names what was being done when a statement failed.
trait Doing<T> {
    fn doing(self, operation: &'static str) -> Result<T, StoreError>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Doing<T> for Result<T, E> {
    fn doing(self, operation: &'static str) -> Result<T, StoreError> {
        self.map_err(|cause| StoreError::new(operation, cause))
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Store {
    readers: SqlitePool,
    writer: Arc<Writer>,
}

impl Store {
    /// Opens the file, makes it when missing, and brings its tables up to date.
    pub(crate) async fn open(path: &Path) -> Result<Self, StoreError> {
        if let Some(directory) = path.parent() {
            tokio::fs::create_dir_all(directory).await.doing("make the data directory")?;
        }
        create(path).await.doing("make the database")?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let mut connection = options.connect().await.doing("open the database")?;
        verify_pragmas(&mut connection).await?;
        MIGRATIONS.run(&mut connection).await.doing("bring the tables of the database up to date")?;
        // A second connection that only reads; `connect_lazy` would report a
        // bad file much later.
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .connect_with(options.clone().read_only(true).create_if_missing(false))
            .await
            .doing("open the database for reading")?;
        Ok(Self { readers, writer: Arc::new(Writer::new(connection, options)) })
    }

    pub(crate) fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }

    /// Answers when both directions work.
    pub(crate) async fn check(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.readers).await.doing("read from the database")?;
        self.writer.check()
    }

    /// Writes what is pending and closes the file.
    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        let flushed = self.writer.flush().await;
        self.readers.close().await;
        flushed
    }
}

/// Makes the file where it is missing, for its owner alone: it may be outside the
/// data directory. What SQLite puts beside it has the same mode.
async fn create(path: &Path) -> std::io::Result<()> {
    tokio::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path).await.map(drop)
}

/// A driver that ignores a setting must not go unnoticed (control-plane R7).
async fn verify_pragmas(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    const DOING: &str = "verify the settings of the database";
    let journal: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *connection).await.doing(DOING)?;
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *connection).await.doing(DOING)?;
    let foreign_keys: i64 = sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(&mut *connection).await.doing(DOING)?;
    let busy_ms: i64 = sqlx::query_scalar("PRAGMA busy_timeout").fetch_one(&mut *connection).await.doing(DOING)?;
    // 1 is NORMAL: a power cut may lose the newest commits, never the file.
    let settings = (journal.as_str(), synchronous, foreign_keys, busy_ms);
    let wanted = ("wal", 1, 1, i64::try_from(BUSY_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
    if settings != wanted {
        return Err(StoreError::new(DOING, format!("they are {settings:?} instead of {wanted:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn settings_hold_and_a_changed_migration_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/stacyvm.db");
        let store = Store::open(&path).await.unwrap();
        store.check().await.unwrap();
        for file in std::fs::read_dir(path.parent().unwrap()).unwrap() {
            let file = file.unwrap();
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", file.path().display());
        }
        store.close().await.unwrap();
        drop(store);

        let mut connection = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
        sqlx::query("UPDATE _sqlx_migrations SET checksum = x'00'").execute(&mut connection).await.unwrap();
        drop(connection);
        let refused = Store::open(&path).await.unwrap_err();
        assert_eq!(refused.operation, "bring the tables of the database up to date");
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stacyvm.db");
        std::fs::write(&path, "this is not a database, and long enough to be looked at").unwrap();
        let refused = crate::EngineError::from(Store::open(&path).await.unwrap_err());
        assert!(refused.hint().is_some_and(|hint| hint.contains("db restore")), "{refused:?}");
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("this is not"));
    }
}

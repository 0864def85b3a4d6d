//! What an operator does with the store's file: copy it while a server writes,
//! check it, look at its version, and put another in its place.
//!
//! Nothing here starts an engine. Reading works beside a running server, which
//! WAL allows; whatever changes the file is for when none runs, and the caller
//! sees to that.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Row as _};
use stacyvm_api::{ApiKey, SandboxState, Timestamp};

use super::keys::{KEYS_MADE, KeyRow};
use super::{BUSY_TIMEOUT, Doing as _, MIGRATIONS, StoreError, rows};

/// Damages that are listed; one is enough to not use the file.
const DAMAGES_SHOWN_MAX: usize = 20;

/// The file of a store.
#[derive(Debug, Clone)]
pub struct StoreFile {
    path: PathBuf,
}

/// Whether the tables of a file are those of this program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreMigration {
    pub version: i64,
    pub description: String,
    pub state: MigrationState,
    /// When it was applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    Applied,
    /// This program has it, the file does not: it is applied when a server
    /// starts.
    Pending,
    /// The file has it, this program does not: a newer one wrote the file.
    Unknown,
    /// Both have it, and they differ: the file is of another program.
    Changed,
}

/// Numbers about a store; nothing that anybody wrote into it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StoreStatistics {
    pub size_bytes: u64,
    pub free_bytes: u64,
    /// Rows of each table.
    pub rows: Vec<(String, u64)>,
    pub sandboxes: Vec<(SandboxState, u64)>,
}

/// What a store knows of API keys; not the keys themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreKeys {
    /// A key was stored once, so that a server with this store is closed.
    pub ever_made: bool,
    /// Those that are not revoked.
    pub in_force: Vec<ApiKey>,
}

impl StoreFile {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole and consistent copy to `target`, which must be missing or
    /// an empty file. Others may go on writing meanwhile: they are not in it.
    pub async fn copy_to(&self, target: &Path) -> Result<(), StoreError> {
        const DOING: &str = "copy the database";
        let target = target.to_str().ok_or_else(|| StoreError::new(DOING, "the path is not UTF-8"))?;
        let mut connection = self.read().await?;
        sqlx::query("VACUUM INTO ?").bind(target).execute(&mut connection).await.doing(DOING)?;
        connection.close().await.doing(DOING)
    }

    /// What is damaged; nothing when the file is whole.
    pub async fn damages(&self) -> Result<Vec<String>, StoreError> {
        const DOING: &str = "check the database";
        let mut connection = self.read().await?;
        let said: Vec<String> =
            sqlx::query_scalar("PRAGMA integrity_check(20)").fetch_all(&mut connection).await.doing(DOING)?;
        let mut damages: Vec<String> = said.into_iter().filter(|line| line != "ok").collect();
        let dangling = sqlx::query("PRAGMA foreign_key_check").fetch_all(&mut connection).await.doing(DOING)?;
        for row in dangling.iter().take(DAMAGES_SHOWN_MAX) {
            let (table, parent): (String, String) = (row.try_get(0).doing(DOING)?, row.try_get(2).doing(DOING)?);
            damages.push(format!("a row of {table} refers to one of {parent} that is not there"));
        }
        damages.truncate(DAMAGES_SHOWN_MAX);
        connection.close().await.doing(DOING)?;
        Ok(damages)
    }

    /// Versions of the tables, in the file and in this program, oldest first.
    pub async fn migrations(&self) -> Result<Vec<StoreMigration>, StoreError> {
        let mut connection = self.read().await?;
        let applied = applied(&mut connection).await?;
        connection.close().await.doing("close the database")?;
        let mut migrations: Vec<StoreMigration> = MIGRATIONS
            .iter()
            .map(|known| {
                let found = applied.iter().find(|row| row.version == known.version);
                let state = match found {
                    None => MigrationState::Pending,
                    Some(row) if row.checksum == *known.checksum && row.success => MigrationState::Applied,
                    Some(_) => MigrationState::Changed,
                };
                StoreMigration {
                    version: known.version,
                    description: known.description.to_string(),
                    state,
                    applied_at: found.and_then(|row| row.applied_at),
                }
            })
            .collect();
        let unknown = applied.into_iter().filter(|row| !MIGRATIONS.version_exists(row.version));
        migrations.extend(unknown.map(|row| StoreMigration {
            version: row.version,
            description: row.description,
            state: MigrationState::Unknown,
            applied_at: row.applied_at,
        }));
        migrations.sort_by_key(|migration| migration.version);
        Ok(migrations)
    }

    /// What is in the file that this program's migrations do not make. A trigger
    /// would run whenever a server writes, and a view wherever it reads.
    pub async fn strangers(&self) -> Result<Vec<String>, StoreError> {
        const DOING: &str = "compare the tables of the database";
        let mut connection = self.read().await?;
        let versions: Vec<i64> = applied(&mut connection).await?.iter().map(|row| row.version).collect();
        let found = schema(&mut connection).await.doing(DOING)?;
        connection.close().await.doing(DOING)?;
        let same = MIGRATIONS.iter().filter(|migration| versions.contains(&migration.version)).cloned().collect();
        let mut fresh = SqliteConnectOptions::new().in_memory(true).connect().await.doing(DOING)?;
        Migrator { migrations: Cow::Owned(same), ..Migrator::DEFAULT }.run(&mut fresh).await.doing(DOING)?;
        let made = schema(&mut fresh).await.doing(DOING)?;
        let strangers = found.into_iter().filter(|object| !made.contains(object) && !object.is_bookkeeping());
        let named = |object: Object| format!("the {} {}", object.kind, object.name.escape_debug());
        Ok(strangers.map(named).take(DAMAGES_SHOWN_MAX).collect())
    }

    /// Brings the tables up to date, as a server does when it starts.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        const DOING: &str = "bring the tables of the database up to date";
        let mut connection = self.options().foreign_keys(true).connect().await.doing("open the database")?;
        MIGRATIONS.run(&mut connection).await.doing(DOING)?;
        connection.close().await.doing(DOING)
    }

    /// Makes the file hold everything by itself, without a log beside it, so
    /// that it can be moved. Fails when any other program has it open.
    pub async fn settle(&self) -> Result<(), StoreError> {
        const DOING: &str = "take the database for ourselves alone";
        let mut connection = self.options().connect().await.doing("open the database")?;
        // Leaving WAL needs everybody else to be gone.
        let mode: String =
            sqlx::query_scalar("PRAGMA journal_mode = DELETE").fetch_one(&mut connection).await.doing(DOING)?;
        connection.close().await.doing(DOING)?;
        if mode == "delete" { Ok(()) } else { Err(StoreError::new(DOING, format!("it stays in the mode {mode}"))) }
    }

    /// The API keys in force. A file from before there were keys has none.
    pub async fn keys(&self) -> Result<StoreKeys, StoreError> {
        const DOING: &str = "read the API keys";
        let mut connection = self.read().await?;
        let tables: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('api_keys', 'counters')",
        )
        .fetch_one(&mut connection)
        .await
        .doing(DOING)?;
        let keys = if tables == 2 {
            let rows = sqlx::query("SELECT * FROM api_keys WHERE revoked_at IS NULL ORDER BY created_at DESC, id DESC")
                .fetch_all(&mut connection)
                .await
                .doing(DOING)?;
            let in_force =
                rows.iter().map(|row| KeyRow::read(row).map(|row| row.about)).collect::<Result<_, _>>().doing(DOING)?;
            let made: Option<i64> = sqlx::query_scalar("SELECT value FROM counters WHERE name = ?1")
                .bind(KEYS_MADE)
                .fetch_optional(&mut connection)
                .await
                .doing(DOING)?;
            StoreKeys { ever_made: made.is_some_and(|made| made > 0), in_force }
        } else {
            StoreKeys::default()
        };
        connection.close().await.doing(DOING)?;
        Ok(keys)
    }

    pub async fn statistics(&self) -> Result<StoreStatistics, StoreError> {
        const DOING: &str = "count what is in the database";
        let mut connection = self.read().await?;
        let mut pragma = async |name: &'static str| -> Result<u64, StoreError> {
            let value: i64 = sqlx::query_scalar(name).fetch_one(&mut connection).await.doing(DOING)?;
            Ok(u64::try_from(value).unwrap_or(0))
        };
        let page = pragma("PRAGMA page_size").await?;
        let (pages, free) = (pragma("PRAGMA page_count").await?, pragma("PRAGMA freelist_count").await?);
        let rows = count_rows(&mut connection).await.doing(DOING)?;
        let sandboxes = count_sandboxes(&mut connection).await.doing(DOING)?;
        connection.close().await.doing(DOING)?;
        Ok(StoreStatistics { size_bytes: pages * page, free_bytes: free * page, rows, sandboxes })
    }

    fn options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new().filename(&self.path).busy_timeout(BUSY_TIMEOUT)
    }

    /// Opens it without being able to change it, and sees that it is ours.
    async fn read(&self) -> Result<SqliteConnection, StoreError> {
        const DOING: &str = "open the database";
        // Nothing in the file may call more than plain functions: it may be anybody's.
        let options = self.options().read_only(true).pragma("trusted_schema", "OFF");
        let mut connection = options.connect().await.doing(DOING)?;
        let ours: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('_sqlx_migrations', 'sandboxes')",
        )
        .fetch_one(&mut connection)
        .await
        .doing(DOING)?;
        if ours == 2 { Ok(connection) } else { Err(StoreError::new(DOING, "it is not a store of StacyVM")) }
    }
}

/// One row of `sqlite_schema`.
#[derive(PartialEq)]
struct Object {
    kind: String,
    name: String,
    table: String,
    sql: Option<String>,
}

impl Object {
    /// Tables that SQLite and the migrator keep for themselves, which no
    /// migration of ours words.
    fn is_bookkeeping(&self) -> bool {
        const NAMES: [&str; 4] = ["_sqlx_migrations", "sqlite_sequence", "sqlite_stat1", "sqlite_stat4"];
        self.kind == "table" && NAMES.contains(&self.name.as_str())
    }
}

async fn schema(connection: &mut SqliteConnection) -> Result<Vec<Object>, sqlx::Error> {
    let rows =
        sqlx::query("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name").fetch_all(connection).await?;
    let read = |row: &sqlx::sqlite::SqliteRow| {
        Ok(Object { kind: row.try_get(0)?, name: row.try_get(1)?, table: row.try_get(2)?, sql: row.try_get(3)? })
    };
    rows.iter().map(read).collect()
}

struct MigrationRow {
    version: i64,
    description: String,
    checksum: Vec<u8>,
    success: bool,
    applied_at: Option<Timestamp>,
}

async fn applied(connection: &mut SqliteConnection) -> Result<Vec<MigrationRow>, StoreError> {
    const DOING: &str = "read the versions of the database";
    let rows = sqlx::query(
        "SELECT version, description, checksum, success, unixepoch(installed_on) AS installed_s \
         FROM _sqlx_migrations ORDER BY version",
    )
    .fetch_all(connection)
    .await
    .doing(DOING)?;
    rows.iter()
        .map(|row| {
            let installed_s: Option<i64> = row.try_get("installed_s")?;
            Ok(MigrationRow {
                version: row.try_get("version")?,
                description: row.try_get("description")?,
                checksum: row.try_get("checksum")?,
                success: row.try_get("success")?,
                applied_at: installed_s.map(|seconds| Timestamp::from_unix_ms(seconds.saturating_mul(1000))),
            })
        })
        .collect::<Result<_, sqlx::Error>>()
        .doing(DOING)
}

async fn count_rows(connection: &mut SqliteConnection) -> Result<Vec<(String, u64)>, sqlx::Error> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' \
         AND name NOT LIKE '\\_sqlx\\_%' ESCAPE '\\' ORDER BY name",
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut rows = Vec::with_capacity(tables.len());
    for table in tables.into_iter().filter(|name| is_ours(name)) {
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!("SELECT count(*) FROM {table}")))
            .fetch_one(&mut *connection)
            .await?;
        rows.push((table, u64::try_from(count).unwrap_or(0)));
    }
    Ok(rows)
}

/// Only names that stand in this program's own migrations: what somebody else
/// put into the file is neither asked for nor shown.
fn is_ours(table: &str) -> bool {
    let statement = format!("CREATE TABLE {table} (");
    MIGRATIONS.iter().any(|migration| migration.sql.as_str().contains(&statement))
}

async fn count_sandboxes(connection: &mut SqliteConnection) -> Result<Vec<(SandboxState, u64)>, sqlx::Error> {
    let counted = sqlx::query("SELECT state, count(*) AS count FROM sandboxes GROUP BY state ORDER BY state")
        .fetch_all(connection)
        .await?;
    counted
        .iter()
        .map(|row| {
            let count: i64 = row.try_get("count")?;
            Ok((rows::word(row, "state")?, u64::try_from(count).unwrap_or(0)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    async fn store_in(directory: &Path) -> (Store, StoreFile) {
        let path = directory.join("stacyvm.db");
        (Store::open(&path).await.unwrap(), StoreFile::new(path))
    }

    async fn write_to(file: &StoreFile, sql: &'static str) {
        let mut connection = file.options().foreign_keys(false).connect().await.unwrap();
        sqlx::query(sql).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    const COUNTER: &str = "INSERT INTO counters (name, value) VALUES ('test', 7)";

    #[tokio::test]
    async fn a_copy_is_whole_while_the_store_is_open() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        write_to(&file, COUNTER).await;
        let copy = StoreFile::new(directory.path().join("copy.db"));
        file.copy_to(copy.path()).await.unwrap();
        assert_eq!(copy.damages().await.unwrap(), Vec::<String>::new());
        let statistics = copy.statistics().await.unwrap();
        assert!(statistics.rows.contains(&("counters".to_owned(), 1)), "{statistics:?}");
        assert!(file.copy_to(copy.path()).await.is_err(), "a file that is there is not overwritten");
        store.close().await.unwrap();
    }

    #[tokio::test]
    async fn nobody_settles_a_file_that_is_open_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        store.check().await.unwrap();
        let refused = file.settle().await.unwrap_err();
        assert_eq!(refused.operation, "take the database for ourselves alone");
        store.close().await.unwrap();
        drop(store);
        file.settle().await.unwrap();
        assert!(!directory.path().join("stacyvm.db-wal").exists());
        Store::open(file.path()).await.unwrap().check().await.unwrap();
    }

    #[tokio::test]
    async fn versions_that_are_missing_newer_or_different_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        store.close().await.unwrap();
        drop(store);
        let states = async || -> Vec<MigrationState> {
            file.migrations().await.unwrap().into_iter().map(|migration| migration.state).collect()
        };
        assert!(states().await.iter().all(|state| *state == MigrationState::Applied));
        assert!(file.migrations().await.unwrap()[0].applied_at.is_some());
        write_to(
            &file,
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'of tomorrow', 1, x'00', 0)",
        )
        .await;
        assert_eq!(states().await.last(), Some(&MigrationState::Unknown));
        write_to(&file, "UPDATE _sqlx_migrations SET checksum = x'00' WHERE version = 1").await;
        assert_eq!(states().await.first(), Some(&MigrationState::Changed));
        write_to(&file, "DELETE FROM _sqlx_migrations WHERE version = 1").await;
        assert_eq!(states().await.first(), Some(&MigrationState::Pending));
    }

    #[tokio::test]
    async fn only_tables_of_ours_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        store.close().await.unwrap();
        drop(store);
        write_to(&file, "CREATE TABLE planted (x)").await;
        let statistics = file.statistics().await.unwrap();
        let tables: Vec<&str> = statistics.rows.iter().map(|(table, _)| table.as_str()).collect();
        assert!(tables.contains(&"sandboxes") && tables.contains(&"counters"), "{tables:?}");
        assert!(!tables.contains(&"planted"), "{tables:?}");
    }

    #[tokio::test]
    async fn whatever_no_migration_made_is_a_stranger() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        store.close().await.unwrap();
        drop(store);
        assert_eq!(file.strangers().await.unwrap(), Vec::<String>::new());
        let statements = [
            ("CREATE TRIGGER spy AFTER INSERT ON sandboxes BEGIN DELETE FROM api_keys; END", "the trigger spy"),
            ("CREATE VIEW lies AS SELECT * FROM sandboxes", "the view lies"),
            ("CREATE TABLE planted (x)", "the table planted"),
            ("CREATE INDEX slow ON sandboxes (id, id)", "the index slow"),
            ("ALTER TABLE counters ADD COLUMN more INTEGER", "the table counters"),
        ];
        for (statement, stranger) in statements {
            let copy = StoreFile::new(directory.path().join(stranger));
            file.copy_to(copy.path()).await.unwrap();
            write_to(&copy, statement).await;
            assert_eq!(copy.strangers().await.unwrap(), [stranger]);
        }
        // A file of an earlier version has what that version made, and no more.
        let last = MIGRATIONS.iter().last().unwrap().version;
        let early = StoreFile::new(directory.path().join("early.db"));
        let migrations = MIGRATIONS.iter().filter(|migration| migration.version < last).cloned().collect();
        let mut connection = early.options().create_if_missing(true).connect().await.unwrap();
        let migrator = Migrator { migrations: Cow::Owned(migrations), ..Migrator::DEFAULT };
        migrator.run(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        assert_eq!(early.strangers().await.unwrap(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn damage_is_found_and_other_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (store, file) = store_in(directory.path()).await;
        store.close().await.unwrap();
        drop(store);
        write_to(
            &file,
            "INSERT INTO exec_log (exec_id, sandbox_id, command, status, started_at, terminal) \
             VALUES ('e', 'nobody', 'true', 'exited', 0, 0)",
        )
        .await;
        let damages = file.damages().await.unwrap();
        assert_eq!(damages, ["a row of exec_log refers to one of sandboxes that is not there"]);

        let other = StoreFile::new(directory.path().join("other.db"));
        let mut connection = other.options().create_if_missing(true).connect().await.unwrap();
        sqlx::query("CREATE TABLE t (x)").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let refused = other.damages().await.unwrap_err();
        assert_eq!(refused.cause.to_string(), "it is not a store of StacyVM");
        assert!(StoreFile::new(directory.path().join("missing.db")).damages().await.is_err());
        assert!(!directory.path().join("missing.db").exists(), "looking makes no file");
    }
}

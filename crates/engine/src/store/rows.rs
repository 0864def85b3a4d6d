//! What is stored of a sandbox, a command and an operation, and how it reads
//! back.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use stacyvm_api::{ExecId, ProcessStatus, ProcessSummary, Sandbox, SandboxId, SandboxState, Timestamp};

/// A sandbox with what only the engine knows of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SandboxRow {
    pub(crate) sandbox: Sandbox,
    pub(crate) generation: u32,
    /// Commands of a template run before it counts as running.
    pub(crate) has_setup: bool,
    pub(crate) idempotency: Option<Idempotency>,
    pub(crate) updated_at: Timestamp,
}

/// The key of a create, and a digest of what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Idempotency {
    pub(crate) key: String,
    pub(crate) request_digest: String,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ExecRow {
    pub(crate) exec_id: ExecId,
    pub(crate) sandbox_id: SandboxId,
    pub(crate) command: String,
    pub(crate) status: ProcessStatus,
    pub(crate) pid: Option<u32>,
    pub(crate) exit_code: Option<i32>,
    pub(crate) started_at: Timestamp,
    pub(crate) duration: Option<Duration>,
    pub(crate) deadline_at: Option<Timestamp>,
    pub(crate) terminal: bool,
    pub(crate) output: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OperationRow {
    pub(crate) at: Timestamp,
    pub(crate) actor: String,
    pub(crate) tenant: Option<String>,
    pub(crate) action: &'static str,
    pub(crate) sandbox_id: Option<SandboxId>,
    pub(crate) provider: String,
    pub(crate) resource: String,
    pub(crate) success: bool,
    pub(crate) detail: String,
    pub(crate) duration: Duration,
}

impl SandboxRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let sandbox = Sandbox {
            id: parsed(row, "id")?,
            state: word(row, "state")?,
            provider: row.try_get("provider")?,
            image: row.try_get("image")?,
            memory_mb: number(row, "memory_mb")?,
            vcpus: row.try_get("vcpus")?,
            disk_size_mb: optional_number(row, "disk_size_mb")?,
            owner_id: row.try_get::<Option<String>, _>("owner_id")?.and_then(|owner| owner.parse().ok()),
            tenant_id: row.try_get("tenant_id")?,
            worker_id: Some(super::super::record::WORKER_ID.to_owned()),
            created_at: time(row, "created_at")?,
            expires_at: time(row, "expires_at")?,
            metadata: json(row, "metadata")?.unwrap_or_default(),
            preview_domain: None,
            network: json(row, "network")?,
            limits: json(row, "limits")?,
            reason: row.try_get("reason")?,
        };
        let key: Option<String> = row.try_get("idempotency_key")?;
        let digest: Option<String> = row.try_get("request_digest")?;
        Ok(Self {
            sandbox,
            generation: number(row, "generation")? as u32,
            has_setup: row.try_get("has_setup")?,
            idempotency: key.zip(digest).map(|(key, request_digest)| Idempotency { key, request_digest }),
            updated_at: time(row, "updated_at")?,
        })
    }
}

impl ExecRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            exec_id: parsed(row, "exec_id")?,
            sandbox_id: parsed(row, "sandbox_id")?,
            command: row.try_get("command")?,
            status: word(row, "status")?,
            pid: row.try_get("pid")?,
            exit_code: row.try_get("exit_code")?,
            started_at: time(row, "started_at")?,
            duration: optional_number(row, "duration_us")?.map(Duration::from_micros),
            deadline_at: optional_time(row, "deadline_at")?,
            terminal: row.try_get("terminal")?,
            output: row.try_get("output")?,
        })
    }

    pub(crate) fn summary(&self) -> ProcessSummary {
        ProcessSummary {
            exec_id: self.exec_id.clone(),
            command: self.command.clone(),
            status: self.status,
            pid: self.pid,
            exit_code: self.exit_code,
            started_at: self.started_at,
            duration: self.duration.map(Into::into),
        }
    }
}

/// A unit variant as the API writes it.
pub(super) fn word_of(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(_) | Err(_) => String::new(),
    }
}

pub(super) fn state_word(state: SandboxState) -> String {
    word_of(&state)
}

/// Plain data cannot fail to become JSON.
pub(super) fn json_of(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

pub(super) fn word<T: DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, sqlx::Error> {
    let text: String = row.try_get(column)?;
    serde_json::from_value(serde_json::Value::String(text)).map_err(|error| bad(column, error))
}

pub(super) fn json<T: DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<Option<T>, sqlx::Error> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| bad(column, error))).transpose()
}

pub(super) fn time(row: &SqliteRow, column: &str) -> Result<Timestamp, sqlx::Error> {
    row.try_get(column).map(Timestamp::from_unix_ms)
}

pub(super) fn number(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    row.try_get::<i64, _>(column).map(|value| u64::try_from(value).unwrap_or(0))
}

pub(super) fn optional_time(row: &SqliteRow, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(Timestamp::from_unix_ms))
}

fn optional_number(row: &SqliteRow, column: &str) -> Result<Option<u64>, sqlx::Error> {
    let value: Option<i64> = row.try_get(column)?;
    Ok(value.and_then(|value| u64::try_from(value).ok()))
}

pub(super) fn parsed<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &SqliteRow,
    column: &str,
) -> Result<T, sqlx::Error> {
    row.try_get::<String, _>(column)?.parse().map_err(|error| bad(column, error))
}

pub(super) fn optional_parsed<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &SqliteRow,
    column: &str,
) -> Result<Option<T>, sqlx::Error> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| text.parse().map_err(|error| bad(column, error))).transpose()
}

fn bad(column: &str, error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: Box::new(error) }
}

/// SQLite's integers are signed; what is larger than they hold is clamped.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// Inserts all rows by one statement that takes them as a JSON array of arrays:
/// each call of a statement is two changes of thread, and takes longer than the
/// insert itself.
pub(super) async fn insert_all(
    connection: &mut SqliteConnection,
    statement: &'static str,
    rows: impl Iterator<Item = Value>,
) -> Result<(), sqlx::Error> {
    let rows: Vec<Value> = rows.collect();
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(statement).bind(Value::Array(rows).to_string()).execute(connection).await?;
    Ok(())
}

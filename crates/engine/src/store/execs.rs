//! The exec log and the operation log.

use serde_json::json;
use sqlx::sqlite::SqliteConnection;
use stacyvm_api::{ExecId, SandboxId, Timestamp};

use super::rows::{ExecRow, OperationRow, insert_all, micros, word_of};
use super::{Doing as _, Store, StoreError};

impl Store {
    pub(crate) async fn exec(&self, sandbox: &SandboxId, exec: &ExecId) -> Result<Option<ExecRow>, StoreError> {
        const DOING: &str = "read the exec log";
        let row = sqlx::query("SELECT * FROM exec_log WHERE exec_id = ?1 AND sandbox_id = ?2")
            .bind(exec.as_str())
            .bind(sandbox.as_str())
            .fetch_optional(&self.readers)
            .await
            .doing(DOING)?;
        row.as_ref().map(ExecRow::read).transpose().doing(DOING)
    }

    /// Commands of a sandbox before a point in the order newest first.
    pub(crate) async fn execs(
        &self,
        sandbox: &SandboxId,
        before: Option<(Timestamp, &str)>,
        limit: u32,
    ) -> Result<Vec<ExecRow>, StoreError> {
        const DOING: &str = "read the exec log";
        let (at, id) = before.unwrap_or((Timestamp::from_unix_ms(i64::MAX), ""));
        let rows = sqlx::query(
            "SELECT * FROM exec_log WHERE sandbox_id = ?1 AND (started_at, exec_id) < (?2, ?3)
             ORDER BY started_at DESC, exec_id DESC LIMIT ?4",
        )
        .bind(sandbox.as_str())
        .bind(at.unix_ms())
        .bind(id)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .doing(DOING)?;
        rows.iter().map(ExecRow::read).collect::<Result<_, _>>().doing(DOING)
    }

    /// Commands whose end nobody has seen yet.
    pub(crate) async fn running_execs(&self, sandbox: &SandboxId) -> Result<Vec<ExecRow>, StoreError> {
        const DOING: &str = "read the running commands";
        let rows = sqlx::query("SELECT * FROM exec_log WHERE sandbox_id = ?1 AND status = 'running'")
            .bind(sandbox.as_str())
            .fetch_all(&self.readers)
            .await
            .doing(DOING)?;
        rows.iter().map(ExecRow::read).collect::<Result<_, _>>().doing(DOING)
    }

    /// A server that was killed leaves commands of sandboxes that are gone.
    pub(crate) async fn lose_execs_of_destroyed(&self) -> Result<u64, StoreError> {
        let mut connection = self.writer.connection().await;
        let done = sqlx::query(
            "UPDATE exec_log SET status = 'lost' WHERE status = 'running'
             AND sandbox_id IN (SELECT id FROM sandboxes WHERE state = 'destroyed')",
        )
        .execute(&mut *connection)
        .await
        .doing("settle the exec log")?;
        Ok(done.rows_affected())
    }
}

pub(super) async fn upsert(connection: &mut SqliteConnection, row: &ExecRow) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO exec_log (exec_id, sandbox_id, command, status, pid, exit_code, started_at, duration_us,
             deadline_at, terminal, output)
         SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11
         WHERE EXISTS (SELECT 1 FROM sandboxes WHERE id = ?2)
         ON CONFLICT (exec_id) DO UPDATE SET status = ?4, exit_code = ?6, duration_us = ?8, output = ?11",
    )
    .bind(row.exec_id.as_str())
    .bind(row.sandbox_id.as_str())
    .bind(&row.command)
    .bind(word_of(&row.status))
    .bind(row.pid)
    .bind(row.exit_code)
    .bind(row.started_at.unix_ms())
    .bind(row.duration.map(micros))
    .bind(row.deadline_at.map(Timestamp::unix_ms))
    .bind(row.terminal)
    .bind(&row.output)
    .execute(connection)
    .await?;
    Ok(())
}

const INSERT_OPERATIONS: &str =
    "INSERT INTO operation_log (at, actor, tenant_id, action, sandbox_id, provider, resource,
         success, detail, duration_us)
     SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5, value->>6, value->>7, value->>8,
         value->>9
     FROM json_each(?1)";

pub(super) async fn insert_operations<'a>(
    connection: &mut SqliteConnection,
    rows: impl IntoIterator<Item = &'a OperationRow>,
) -> Result<(), sqlx::Error> {
    let rows = rows.into_iter().map(|row| {
        json!([
            row.at.unix_ms(),
            row.actor,
            row.tenant,
            row.action,
            row.sandbox_id,
            row.provider,
            row.resource,
            row.success,
            row.detail,
            micros(row.duration),
        ])
    });
    insert_all(connection, INSERT_OPERATIONS, rows).await
}

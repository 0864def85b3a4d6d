//! Sandboxes: one statement writes a record whether it is new or not.

use sqlx::sqlite::SqliteConnection;
use stacyvm_api::{SandboxId, Timestamp};

use super::rows::{SandboxRow, json_of, signed, state_word};
use super::{Doing as _, Store, StoreError};

impl Store {
    /// Everything that is not destroyed. A record that cannot be read is
    /// logged and left alone: one bad row must not stop a start.
    pub(crate) async fn live_sandboxes(&self) -> Result<Vec<SandboxRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM sandboxes WHERE state <> 'destroyed'")
            .fetch_all(&self.readers)
            .await
            .doing("read the sandboxes")?;
        Ok(rows
            .iter()
            .filter_map(|row| match SandboxRow::read(row) {
                Ok(row) => Some(row),
                Err(error) => {
                    tracing::error!(%error, "a stored sandbox cannot be read and is left alone");
                    None
                }
            })
            .collect())
    }

    pub(crate) async fn sandbox(&self, id: &SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM sandboxes WHERE id = ?1")
            .bind(id.as_str())
            .fetch_optional(&self.readers)
            .await
            .doing("read a sandbox")?;
        row.as_ref().map(SandboxRow::read).transpose().doing("read a sandbox")
    }

    /// Destroyed sandboxes before a point in the order newest first.
    pub(crate) async fn destroyed_sandboxes(
        &self,
        before: Option<(Timestamp, &str)>,
        limit: u32,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        const DOING: &str = "read the destroyed sandboxes";
        let (at, id) = before.unwrap_or((Timestamp::from_unix_ms(i64::MAX), ""));
        let rows = sqlx::query(
            "SELECT * FROM sandboxes WHERE state = 'destroyed' AND (created_at, id) < (?1, ?2)
             ORDER BY created_at DESC, id DESC LIMIT ?3",
        )
        .bind(at.unix_ms())
        .bind(id)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .doing(DOING)?;
        rows.iter().map(SandboxRow::read).collect::<Result<_, _>>().doing(DOING)
    }
}

pub(super) async fn upsert(connection: &mut SqliteConnection, row: &SandboxRow) -> Result<(), sqlx::Error> {
    let sandbox = &row.sandbox;
    sqlx::query(
        "INSERT INTO sandboxes (id, state, provider, image, memory_mb, vcpus, disk_size_mb, owner_id, tenant_id,
             created_at, expires_at, updated_at, metadata, network, limits, reason, generation, has_setup,
             idempotency_key, request_digest)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)
         ON CONFLICT (id) DO UPDATE SET state = ?2, memory_mb = ?5, disk_size_mb = ?7, expires_at = ?11,
             updated_at = ?12, limits = ?15, reason = ?16, generation = ?17, has_setup = ?18",
    )
    .bind(sandbox.id.as_str())
    .bind(state_word(sandbox.state))
    .bind(&sandbox.provider)
    .bind(&sandbox.image)
    .bind(signed(sandbox.memory_mb))
    .bind(sandbox.vcpus)
    .bind(sandbox.disk_size_mb.map(signed))
    .bind(sandbox.owner_id.as_ref().map(AsRef::as_ref))
    .bind(&sandbox.tenant_id)
    .bind(sandbox.created_at.unix_ms())
    .bind(sandbox.expires_at.unix_ms())
    .bind(row.updated_at.unix_ms())
    .bind(json_of(&sandbox.metadata))
    .bind(sandbox.network.as_ref().map(json_of))
    .bind(sandbox.limits.as_ref().map(json_of))
    .bind(&sandbox.reason)
    .bind(i64::from(row.generation))
    .bind(row.has_setup)
    .bind(row.idempotency.as_ref().map(|found| &found.key))
    .bind(row.idempotency.as_ref().map(|found| &found.request_digest))
    .execute(connection)
    .await?;
    Ok(())
}

//! API keys: few, read once at start, written as they change.

use sqlx::Connection as _;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use stacyvm_api::{ApiKey, KeyId, Timestamp};

use super::rows::{json, json_of, optional_parsed, optional_time, parsed, time};
use super::{Doing as _, Store, StoreError};

/// Bytes of a SHA-256.
pub(crate) const KEY_HASH_BYTES: usize = 32;

/// What is kept of a key instead of the key.
pub(crate) type KeyHash = [u8; KEY_HASH_BYTES];

/// Counter that is not zero once a key was stored, also when all of them are
/// deleted since.
pub(crate) const KEYS_MADE: &str = "api_keys_made";

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KeyRow {
    pub(crate) hash: KeyHash,
    pub(crate) about: ApiKey,
}

impl KeyRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let hash: Vec<u8> = row.try_get("hash")?;
        let hash = hash.try_into().map_err(|_| sqlx::Error::Decode("the hash of a key has the wrong length".into()))?;
        let about = ApiKey {
            id: parsed(row, "id")?,
            name: row.try_get("name")?,
            prefix: row.try_get("prefix")?,
            scopes: json(row, "scopes")?.unwrap_or_default(),
            owner_id: optional_parsed(row, "owner_id")?,
            created_at: time(row, "created_at")?,
            created_by: row.try_get("created_by")?,
            expires_at: optional_time(row, "expires_at")?,
            last_used_at: optional_time(row, "last_used_at")?,
            revoked_at: optional_time(row, "revoked_at")?,
        };
        Ok(Self { hash, about })
    }
}

impl Store {
    /// All keys, the newest first.
    pub(crate) async fn keys(&self) -> Result<Vec<KeyRow>, StoreError> {
        const DOING: &str = "read the API keys";
        let rows = sqlx::query("SELECT * FROM api_keys ORDER BY created_at DESC, id DESC")
            .fetch_all(&self.readers)
            .await
            .doing(DOING)?;
        rows.iter().map(KeyRow::read).collect::<Result<_, _>>().doing(DOING)
    }

    /// Together with the mark that keys were made.
    pub(crate) async fn add_key(&self, row: &KeyRow) -> Result<(), StoreError> {
        const DOING: &str = "write an API key";
        let mut connection = self.writer.connection().await;
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.doing(DOING)?;
        let about = &row.about;
        sqlx::query(
            "INSERT INTO api_keys (id, name, hash, prefix, scopes, owner_id, created_at, created_by, expires_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )
        .bind(about.id.as_str())
        .bind(&about.name)
        .bind(row.hash.as_slice())
        .bind(&about.prefix)
        .bind(json_of(&about.scopes))
        .bind(about.owner_id.as_ref().map(AsRef::as_ref))
        .bind(about.created_at.unix_ms())
        .bind(&about.created_by)
        .bind(about.expires_at.map(Timestamp::unix_ms))
        .execute(&mut *transaction)
        .await
        .doing(DOING)?;
        sqlx::query(
            "INSERT INTO counters (name, value) VALUES (?1, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1",
        )
        .bind(KEYS_MADE)
        .execute(&mut *transaction)
        .await
        .doing(DOING)?;
        transaction.commit().await.doing(DOING)?;
        // Nor must a server open again that its first key closed.
        sync(&mut connection).await.doing(DOING)
    }

    pub(crate) async fn revoke_key(&self, id: &KeyId, at: Timestamp) -> Result<(), StoreError> {
        const DOING: &str = "revoke an API key";
        let mut connection = self.writer.connection().await;
        sqlx::query("UPDATE api_keys SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL")
            .bind(id.as_str())
            .bind(at.unix_ms())
            .execute(&mut *connection)
            .await
            .doing(DOING)?;
        // A power cut must not bring a key back that somebody was told is gone.
        sync(&mut connection).await.doing(DOING)
    }
}

/// Commits are not synced one by one; this one is to be on the disk.
async fn sync(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA wal_checkpoint(FULL)").execute(connection).await?;
    Ok(())
}

pub(super) async fn save_use(connection: &mut SqliteConnection, id: &KeyId, at: Timestamp) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE api_keys SET last_used_at = MAX(COALESCE(last_used_at, 0), ?2) WHERE id = ?1")
        .bind(id.as_str())
        .bind(at.unix_ms())
        .execute(connection)
        .await?;
    Ok(())
}

//! The audit log.

use serde_json::json;
use sqlx::sqlite::{Sqlite, SqliteConnection, SqliteRow};
use sqlx::{QueryBuilder, Row as _};
use stacyvm_api::{AuditRecord, Timestamp};

use super::rows::{insert_all, number, optional_parsed, signed, time};
use super::{Doing as _, Store, StoreError};
use crate::audit::{AuditEntry, AuditKind};

/// An entry with the time at which the call was over.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AuditRow {
    pub(crate) at: Timestamp,
    pub(crate) entry: AuditEntry,
}

/// Which records are asked for; what is `None` is not looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AuditFilter<'a> {
    pub(crate) before: Option<u64>,
    pub(crate) actor: Option<&'a str>,
    pub(crate) method: Option<&'a str>,
    pub(crate) status: Option<u32>,
    pub(crate) path_part: Option<&'a str>,
}

impl Store {
    /// The newest first.
    pub(crate) async fn audit(&self, filter: AuditFilter<'_>, limit: u32) -> Result<Vec<AuditRecord>, StoreError> {
        const DOING: &str = "read the audit log";
        let rows = select(filter, limit).build().fetch_all(&self.readers).await.doing(DOING)?;
        rows.iter().map(read).collect::<Result<_, _>>().doing(DOING)
    }

    /// The newest id that is beyond the newest `keep` of a kind.
    pub(super) async fn newest_audit_to_go(&self, kind: AuditKind, keep: u32) -> Result<Option<i64>, StoreError> {
        sqlx::query_scalar("SELECT id FROM audit_log WHERE kind = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2")
            .bind(kind.word())
            .bind(keep)
            .fetch_optional(&self.readers)
            .await
            .doing("count the audit log")
    }
}

fn select(filter: AuditFilter<'_>, limit: u32) -> QueryBuilder<Sqlite> {
    let mut query = QueryBuilder::new("SELECT * FROM audit_log WHERE TRUE");
    if let Some(before) = filter.before {
        query.push(" AND id < ").push_bind(signed(before));
    }
    if let Some(actor) = filter.actor {
        query.push(" AND actor = ").push_bind(actor.to_owned());
    }
    if let Some(method) = filter.method {
        query.push(" AND method = ").push_bind(method.to_owned());
    }
    if let Some(status) = filter.status {
        query.push(" AND status = ").push_bind(status);
    }
    if let Some(part) = filter.path_part {
        query.push(" AND instr(path, ").push_bind(part.to_owned()).push(") > 0");
    }
    query.push(" ORDER BY id DESC LIMIT ").push_bind(limit);
    query
}

fn read(row: &SqliteRow) -> Result<AuditRecord, sqlx::Error> {
    let tenant: Option<String> = row.try_get("tenant_id")?;
    Ok(AuditRecord {
        id: number(row, "id")?,
        actor: row.try_get("actor")?,
        method: row.try_get("method")?,
        path: row.try_get("path")?,
        status: number(row, "status")? as u16,
        duration_ms: number(row, "duration_ms")?,
        request_id: row.try_get("request_id")?,
        remote_addr: row.try_get("remote_addr")?,
        user_agent: row.try_get("user_agent")?,
        tenant_id: tenant.unwrap_or_default(),
        created_at: time(row, "at")?,
        key_id: optional_parsed(row, "key_id")?,
        owner_id: optional_parsed(row, "owner_id")?,
    })
}

const INSERT_CALLS: &str = "INSERT INTO audit_log (at, kind, actor, key_id, owner_id, tenant_id, method, path, status,
         duration_ms, request_id, remote_addr, user_agent)
     SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5, value->>6, value->>7, value->>8,
         value->>9, value->>10, value->>11, value->>12
     FROM json_each(?1)";

pub(super) async fn insert_calls<'a>(
    connection: &mut SqliteConnection,
    calls: impl IntoIterator<Item = &'a AuditRow>,
) -> Result<(), sqlx::Error> {
    let rows = calls.into_iter().map(|AuditRow { at, entry }| {
        json!([
            at.unix_ms(),
            entry.kind.word(),
            entry.actor,
            entry.key,
            entry.owner,
            entry.tenant,
            entry.method,
            entry.path,
            entry.status,
            i64::try_from(entry.duration.as_millis()).unwrap_or(i64::MAX),
            entry.request_id,
            entry.remote_addr,
            entry.user_agent,
        ])
    });
    insert_all(connection, INSERT_CALLS, rows).await
}

//! What is deleted, and when. Each statement takes a bounded bite, so that the
//! writer is never held for long.

use std::time::Duration;

use stacyvm_api::Timestamp;

use super::rows::signed;
use super::{Doing as _, Store, StoreError};
use crate::audit::AuditKind;
use crate::options::Retention;

/// Rows deleted by one statement.
const BITE_ROWS: i64 = 2000;
/// How long a revoked key is still listed.
const REVOKED_KEYS_KEPT: Duration = Duration::from_hours(90 * 24);
/// Counter with a number up to which events exist or existed, for when all of
/// them are deleted.
pub(crate) const EVENTS_USED_TO: &str = "events_used_to";

impl Store {
    /// Deletes what is older than it has to be kept; says how many rows.
    pub(crate) async fn delete_old(
        &self,
        now: Timestamp,
        keep: &Retention,
        newest_event: u64,
    ) -> Result<u64, StoreError> {
        let before = |span| (now - span).unix_ms();
        let mut deleted = 0;
        let timed = [
            (
                "DELETE FROM exec_log WHERE rowid IN (SELECT rowid FROM exec_log
                 WHERE started_at < ?1 AND status <> 'running' LIMIT ?2)",
                before(keep.exec_log),
            ),
            (
                "DELETE FROM operation_log WHERE id IN (SELECT id FROM operation_log WHERE at < ?1 LIMIT ?2)",
                before(keep.operation_log),
            ),
            (
                "DELETE FROM sandboxes WHERE id IN (SELECT id FROM sandboxes
                 WHERE state = 'destroyed' AND updated_at < ?1 LIMIT ?2)",
                before(keep.destroyed_sandboxes),
            ),
            (
                "DELETE FROM api_keys WHERE id IN (SELECT id FROM api_keys WHERE revoked_at < ?1 LIMIT ?2)",
                before(REVOKED_KEYS_KEPT),
            ),
        ];
        for (statement, limit) in timed {
            deleted += self.delete_in_bites(statement, limit).await?;
        }
        deleted += self.delete_old_audit(keep.audit_log.map(before), keep).await?;
        let newest_to_go = newest_event.saturating_sub(keep.events);
        if newest_to_go > 0 {
            let statement = "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id <= ?1 LIMIT ?2)";
            self.set_counter(EVENTS_USED_TO, newest_to_go).await?;
            deleted += self.delete_in_bites(statement, signed(newest_to_go)).await?;
        }
        Ok(deleted)
    }

    /// Administration is bounded by age alone.
    async fn delete_old_audit(&self, before: Option<i64>, keep: &Retention) -> Result<u64, StoreError> {
        let mut deleted = 0;
        if let Some(before) = before {
            let statement = "DELETE FROM audit_log WHERE id IN (SELECT id FROM audit_log WHERE at < ?1 LIMIT ?2)";
            deleted += self.delete_in_bites(statement, before).await?;
        }
        let counted = [
            (
                AuditKind::Call,
                keep.audit_calls,
                "DELETE FROM audit_log WHERE id IN
                 (SELECT id FROM audit_log WHERE kind = 'call' AND id <= ?1 LIMIT ?2)",
            ),
            (
                AuditKind::Denied,
                keep.audit_refusals,
                "DELETE FROM audit_log WHERE id IN
                 (SELECT id FROM audit_log WHERE kind = 'denied' AND id <= ?1 LIMIT ?2)",
            ),
        ];
        for (kind, keep, statement) in counted {
            if let Some(id) = self.newest_audit_to_go(kind, keep).await? {
                deleted += self.delete_in_bites(statement, id).await?;
            }
        }
        Ok(deleted)
    }

    async fn delete_in_bites(&self, statement: &'static str, limit: i64) -> Result<u64, StoreError> {
        let mut deleted = 0;
        loop {
            let mut connection = self.writer.connection().await;
            let query = sqlx::query(statement).bind(limit).bind(BITE_ROWS);
            let rows = query.execute(&mut *connection).await.doing("delete what is old")?.rows_affected();
            drop(connection);
            deleted += rows;
            if rows < BITE_ROWS.unsigned_abs() {
                return Ok(deleted);
            }
            tokio::task::yield_now().await;
        }
    }
}

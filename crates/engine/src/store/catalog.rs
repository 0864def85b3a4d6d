//! Templates, owner quotas and counters: few, small, read once at start and
//! written as they change.

use sqlx::Row as _;
use stacyvm_api::{OwnerQuota, Template};

use super::rows::{json_of, number, signed, time};
use super::{Doing as _, Store, StoreError};

impl Store {
    pub(crate) async fn templates(&self) -> Result<Vec<Template>, StoreError> {
        let bodies: Vec<String> = sqlx::query_scalar("SELECT body FROM templates ORDER BY name")
            .fetch_all(&self.readers)
            .await
            .doing("read the templates")?;
        Ok(bodies
            .iter()
            .filter_map(|body| match serde_json::from_str(body) {
                Ok(template) => Some(template),
                Err(error) => {
                    tracing::error!(%error, "a stored template cannot be read and is left alone");
                    None
                }
            })
            .collect())
    }

    pub(crate) async fn save_template(&self, template: &Template) -> Result<(), StoreError> {
        let mut connection = self.writer.connection().await;
        sqlx::query("INSERT INTO templates (name, body) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET body = ?2")
            .bind(&template.name)
            .bind(json_of(template))
            .execute(&mut *connection)
            .await
            .doing("write a template")?;
        Ok(())
    }

    pub(crate) async fn delete_template(&self, name: &str) -> Result<(), StoreError> {
        let mut connection = self.writer.connection().await;
        let query = sqlx::query("DELETE FROM templates WHERE name = ?1").bind(name);
        query.execute(&mut *connection).await.doing("delete a template")?;
        Ok(())
    }

    pub(crate) async fn quotas(&self) -> Result<Vec<OwnerQuota>, StoreError> {
        const DOING: &str = "read the quotas";
        let rows = sqlx::query("SELECT * FROM owner_quotas").fetch_all(&self.readers).await.doing(DOING)?;
        let mut quotas = Vec::with_capacity(rows.len());
        for row in rows {
            let owner: String = row.try_get("owner_id").doing(DOING)?;
            let Ok(owner_id) = owner.parse() else {
                tracing::error!(owner, "a stored quota has no valid owner and is left alone");
                continue;
            };
            let seconds = |column| number(&row, column).map(stacyvm_api::Duration::from_secs);
            quotas.push(OwnerQuota {
                owner_id,
                max_sandboxes: number(&row, "max_sandboxes").doing(DOING)?,
                max_ttl: seconds("max_ttl_s").doing(DOING)?,
                max_exec_timeout: seconds("max_exec_timeout_s").doing(DOING)?,
                created_at: time(&row, "created_at").doing(DOING)?,
                updated_at: time(&row, "updated_at").doing(DOING)?,
            });
        }
        Ok(quotas)
    }

    pub(crate) async fn save_quota(&self, quota: &OwnerQuota) -> Result<(), StoreError> {
        let mut connection = self.writer.connection().await;
        sqlx::query(
            "INSERT INTO owner_quotas (owner_id, max_sandboxes, max_ttl_s, max_exec_timeout_s, created_at, updated_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (owner_id) DO UPDATE SET max_sandboxes = ?2, max_ttl_s = ?3, max_exec_timeout_s = ?4,
                 updated_at = ?6",
        )
        .bind(quota.owner_id.as_str())
        .bind(signed(quota.max_sandboxes))
        .bind(signed(quota.max_ttl.get().as_secs()))
        .bind(signed(quota.max_exec_timeout.get().as_secs()))
        .bind(quota.created_at.unix_ms())
        .bind(quota.updated_at.unix_ms())
        .execute(&mut *connection)
        .await
        .doing("write a quota")?;
        Ok(())
    }

    pub(crate) async fn delete_quota(&self, owner: &str) -> Result<(), StoreError> {
        let mut connection = self.writer.connection().await;
        let query = sqlx::query("DELETE FROM owner_quotas WHERE owner_id = ?1").bind(owner);
        query.execute(&mut *connection).await.doing("delete a quota")?;
        Ok(())
    }

    /// Zero when it was never written.
    pub(crate) async fn counter(&self, name: &'static str) -> Result<u64, StoreError> {
        let value: Option<i64> = sqlx::query_scalar("SELECT value FROM counters WHERE name = ?1")
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .doing("read a counter")?;
        Ok(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(0))
    }

    pub(crate) async fn set_counter(&self, name: &'static str, value: u64) -> Result<(), StoreError> {
        let mut connection = self.writer.connection().await;
        sqlx::query("INSERT INTO counters (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2")
            .bind(name)
            .bind(signed(value))
            .execute(&mut *connection)
            .await
            .doing("write a counter")?;
        Ok(())
    }
}

//! Access of ports: few, read once at start and written as they change.

use std::collections::{BTreeMap, HashMap};

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;
use stacyvm_api::{PortAccess, SandboxId};
use tokio::sync::MutexGuard;

use super::rows::{word, word_of};
use super::{Doing as _, Store, StoreError};

pub(crate) type PortSettings = BTreeMap<u16, PortAccess>;

impl Store {
    /// A setting that cannot be read is left out, which closes the port to
    /// whoever has no key where there are keys.
    pub(crate) async fn port_access(&self) -> Result<HashMap<SandboxId, PortSettings>, StoreError> {
        const DOING: &str = "read the access of ports";
        let rows = sqlx::query("SELECT * FROM port_access").fetch_all(&self.readers).await.doing(DOING)?;
        let mut settings: HashMap<SandboxId, PortSettings> = HashMap::new();
        for row in rows {
            let id: String = row.try_get("sandbox_id").doing(DOING)?;
            let port: u16 = row.try_get("port").doing(DOING)?;
            match (id.parse(), word(&row, "access")) {
                (Ok(id), Ok(access)) => drop(settings.entry(id).or_default().insert(port, access)),
                _ => {
                    tracing::error!(sandbox = id, port, "the stored access of a port cannot be read and is left alone");
                }
            }
        }
        Ok(settings)
    }

    /// Answers with the writer still held.
    pub(crate) async fn save_port_access(
        &self,
        id: &SandboxId,
        port: u16,
        access: PortAccess,
    ) -> Result<MutexGuard<'_, SqliteConnection>, StoreError> {
        let mut connection = self.writer.connection().await;
        sqlx::query(
            "INSERT INTO port_access (sandbox_id, port, access) VALUES (?1, ?2, ?3)
             ON CONFLICT (sandbox_id, port) DO UPDATE SET access = ?3",
        )
        .bind(id.as_str())
        .bind(port)
        .bind(word_of(&access))
        .execute(&mut *connection)
        .await
        .doing("write the access of a port")?;
        Ok(connection)
    }
}

//! Events, by their number.

use serde_json::json;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use stacyvm_api::Event;

use super::rows::{insert_all, json as read_json, json_of, number, signed, time, word};
use super::{Doing as _, Store, StoreError};

/// An event with what decides who may see it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StoredEvent {
    pub(crate) number: u64,
    pub(crate) tenant: Option<String>,
    pub(crate) event: Event,
}

impl StoredEvent {
    fn read(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let number = number(row, "id")?;
        let sandbox_id: Option<String> = row.try_get("sandbox_id")?;
        let event = Event {
            id: event_id(number),
            kind: word(row, "kind")?,
            sandbox_id: sandbox_id.and_then(|id| id.parse().ok()),
            timestamp: time(row, "at")?,
            data: read_json(row, "data")?,
        };
        Ok(Self { number, tenant: row.try_get("tenant_id")?, event })
    }
}

pub(crate) fn event_id(number: u64) -> String {
    format!("evt-{number}")
}

impl Store {
    /// Number of the newest stored event; zero when there is none.
    pub(crate) async fn newest_event(&self) -> Result<u64, StoreError> {
        let newest: Option<i64> = sqlx::query_scalar("SELECT MAX(id) FROM events")
            .fetch_one(&self.readers)
            .await
            .doing("read the newest event")?;
        Ok(newest.and_then(|number| u64::try_from(number).ok()).unwrap_or(0))
    }

    pub(crate) async fn events_after(&self, number: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError> {
        const DOING: &str = "read the events";
        let rows = sqlx::query("SELECT * FROM events WHERE id > ?1 ORDER BY id LIMIT ?2")
            .bind(signed(number))
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .doing(DOING)?;
        rows.iter().map(StoredEvent::read).collect::<Result<_, _>>().doing(DOING)
    }
}

const INSERT_EVENTS: &str = "INSERT OR IGNORE INTO events (id, kind, sandbox_id, tenant_id, at, data)
     SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5 FROM json_each(?1)";

pub(super) async fn insert_events<'a>(
    connection: &mut SqliteConnection,
    events: impl IntoIterator<Item = &'a StoredEvent>,
) -> Result<(), sqlx::Error> {
    let rows = events.into_iter().map(|StoredEvent { number, tenant, event }| {
        let data = event.data.as_ref().map(json_of);
        json!([signed(*number), event.kind, event.sandbox_id, tenant, event.timestamp.unix_ms(), data])
    });
    insert_all(connection, INSERT_EVENTS, rows).await
}

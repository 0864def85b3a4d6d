//! One connection writes everything, in batches.
//!
//! Callers leave what is to be written and go on; the record of a new sandbox
//! is the one thing that is waited for, and does not wait for the logs of
//! others. A newer version of the same record
//! replaces an older one that is still pending, so that what is pending is
//! bounded by the number of sandboxes and commands; logs and events are bounded
//! by number, and what does not fit is counted and dropped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};
use stacyvm_api::{ExecId, KeyId, SandboxId, Timestamp};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::audit::{self, AuditRow};
use super::events::{self, StoredEvent};
use super::rows::{ExecRow, OperationRow, SandboxRow};
use super::{Doing as _, StoreError, execs, keys, sandboxes};

/// How long a batch that nobody waits for is gathered.
const GATHER: Duration = Duration::from_millis(25);
/// Log entries that may be pending, of each kind.
const LOG_PENDING_MAX: usize = 20_000;
/// Pauses between attempts while the database fails.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Writer {
    pending: Mutex<Pending>,
    /// Something is pending; somebody waits for it.
    some: Notify,
    urgent: Notify,
    connection: tokio::sync::Mutex<SqliteConnection>,
    /// How to have another one.
    reopen: SqliteConnectOptions,
    /// Nobody writes in the background any more.
    ended: CancellationToken,
    failing: AtomicBool,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Pending {
    sandboxes: BTreeMap<SandboxId, SandboxRow>,
    execs: BTreeMap<ExecId, ExecRow>,
    operations: VecDeque<OperationRow>,
    events: VecDeque<Arc<StoredEvent>>,
    calls: VecDeque<AuditRow>,
    /// When keys were last used.
    key_uses: BTreeMap<KeyId, Timestamp>,
    /// Who waits for the records of sandboxes, and who for everything.
    for_records: Vec<Waiting>,
    for_all: Vec<Waiting>,
}

type Waiting = oneshot::Sender<Result<(), StoreError>>;

impl Pending {
    fn is_empty(&self) -> bool {
        let Self { sandboxes, execs, operations, events, calls, key_uses, for_records: _, for_all: _ } = self;
        sandboxes.is_empty()
            && execs.is_empty()
            && operations.is_empty()
            && events.is_empty()
            && calls.is_empty()
            && key_uses.is_empty()
    }

    /// The records, and the rest only where somebody waits for that too.
    fn take_urgent(&mut self) -> Self {
        if !self.for_all.is_empty() {
            return std::mem::take(self);
        }
        Self {
            sandboxes: std::mem::take(&mut self.sandboxes),
            for_records: std::mem::take(&mut self.for_records),
            ..Self::default()
        }
    }
}

impl Writer {
    pub(super) fn new(connection: SqliteConnection, reopen: SqliteConnectOptions) -> Self {
        Self {
            reopen,
            pending: Mutex::default(),
            some: Notify::new(),
            urgent: Notify::new(),
            connection: tokio::sync::Mutex::new(connection),
            ended: CancellationToken::new(),
            failing: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        }
    }

    /// The newest version of a record.
    pub(crate) fn save_sandbox(&self, row: SandboxRow) {
        self.pending().sandboxes.insert(row.sandbox.id.clone(), row);
        self.some.notify_one();
    }

    pub(crate) fn save_exec(&self, row: ExecRow) {
        let mut pending = self.pending();
        if pending.execs.len() >= LOG_PENDING_MAX && !pending.execs.contains_key(&row.exec_id) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            pending.execs.insert(row.exec_id.clone(), row);
        }
        drop(pending);
        self.some.notify_one();
    }

    pub(crate) fn log_operation(&self, row: OperationRow) {
        self.push(row, |pending| &mut pending.operations);
    }

    pub(crate) fn log_event(&self, event: Arc<StoredEvent>) {
        self.push(event, |pending| &mut pending.events);
    }

    pub(crate) fn log_call(&self, call: AuditRow) {
        self.push(call, |pending| &mut pending.calls);
    }

    /// Bounded by the number of keys.
    pub(crate) fn save_key_use(&self, id: KeyId, at: Timestamp) {
        self.pending().key_uses.insert(id, at);
        self.some.notify_one();
    }

    /// Waits until every record of a sandbox left so far is in the file.
    pub(crate) async fn recorded(&self) -> Result<(), StoreError> {
        self.written(|pending| &mut pending.for_records).await
    }

    /// Waits until everything left so far is in the file.
    pub(crate) async fn committed(&self) -> Result<(), StoreError> {
        self.written(|pending| &mut pending.for_all).await
    }

    async fn written(&self, queue: impl FnOnce(&mut Pending) -> &mut Vec<Waiting>) -> Result<(), StoreError> {
        let (sender, receiver) = oneshot::channel();
        queue(&mut self.pending()).push(sender);
        self.some.notify_one();
        self.urgent.notify_one();
        let ended = || Err(StoreError::new("write to the database", "the writer has ended"));
        tokio::select! {
            biased;
            written = receiver => written.unwrap_or_else(|_| ended()),
            () = self.ended.cancelled() => ended(),
        }
    }

    /// Entries that were dropped because the database could not keep up.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<(), StoreError> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(StoreError::new("write to the database", "the last attempt failed"));
        }
        Ok(())
    }

    /// Writes batches until the engine stops. What is pending then is left to
    /// `flush`; a crash loses it, which recovery settles.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        // Whoever waits when this future ends, or is dropped, hears so.
        let _ended = self.ended.clone().drop_guard();
        let mut pause = RETRY_FIRST;
        // Until when logs are gathered, while there are some.
        let mut gathered: Option<Instant> = None;
        loop {
            if gathered.is_none() {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.some.notified() => {}
                }
            }
            let until = *gathered.get_or_insert_with(|| Instant::now() + GATHER);
            let written = tokio::select! {
                () = stop.cancelled() => return,
                () = self.urgent.notified() => self.flush_urgent().await,
                () = tokio::time::sleep_until(until) => {
                    gathered = None;
                    self.flush().await
                }
            };
            match written {
                Ok(()) => pause = RETRY_FIRST,
                Err(error) => {
                    tracing::error!(error = ?error, "writing to the database failed and is tried again");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(RETRY_LONGEST);
                    self.some.notify_one();
                }
            }
        }
    }

    /// Writes what is pending in one transaction.
    pub(crate) async fn flush(&self) -> Result<(), StoreError> {
        self.write_batch(std::mem::take).await
    }

    /// Writes what somebody waits for.
    async fn flush_urgent(&self) -> Result<(), StoreError> {
        self.write_batch(Pending::take_urgent).await
    }

    async fn write_batch(&self, take: impl FnOnce(&mut Pending) -> Pending) -> Result<(), StoreError> {
        let mut connection = self.connection.lock().await;
        // Taken under the connection's lock, so that batches keep their order.
        let mut batch = take(&mut self.pending());
        let written = write(&mut connection, &batch).await.doing("write to the database");
        self.failing.store(written.is_err(), Ordering::Relaxed);
        for waiting in batch.for_records.drain(..).chain(batch.for_all.drain(..)) {
            let _gave_up = waiting.send(match &written {
                Ok(()) => Ok(()),
                Err(error) => Err(error.shared()),
            });
        }
        // Before others may write: what is put back is older than all they have.
        if written.is_err() {
            self.put_back(batch);
            // After some failures, a full disk among them, SQLite has ended the
            // transaction by itself, and this connection does not know.
            match self.reopen.connect().await {
                Ok(fresh) => *connection = fresh,
                Err(error) => tracing::warn!(%error, "the database cannot be opened anew"),
            }
        }
        drop(connection);
        written
    }

    /// The writing connection, for statements of their own.
    pub(super) async fn connection(&self) -> tokio::sync::MutexGuard<'_, SqliteConnection> {
        self.connection.lock().await
    }

    fn push<T>(&self, entry: T, queue: impl FnOnce(&mut Pending) -> &mut VecDeque<T>) {
        let mut pending = self.pending();
        let queue = queue(&mut pending);
        if queue.len() >= LOG_PENDING_MAX {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            queue.push_back(entry);
        }
        drop(pending);
        self.some.notify_one();
    }

    /// After a failure: what has not been replaced meanwhile is pending again.
    fn put_back(&self, batch: Pending) {
        let mut pending = self.pending();
        for (id, row) in batch.sandboxes {
            pending.sandboxes.entry(id).or_insert(row);
        }
        for (id, row) in batch.execs {
            pending.execs.entry(id).or_insert(row);
        }
        let operations = std::mem::take(&mut pending.operations);
        pending.operations = batch.operations.into_iter().chain(operations).take(LOG_PENDING_MAX).collect();
        let events = std::mem::take(&mut pending.events);
        pending.events = batch.events.into_iter().chain(events).take(LOG_PENDING_MAX).collect();
        let calls = std::mem::take(&mut pending.calls);
        pending.calls = batch.calls.into_iter().chain(calls).take(LOG_PENDING_MAX).collect();
        for (id, at) in batch.key_uses {
            pending.key_uses.entry(id).or_insert(at);
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write(connection: &mut SqliteConnection, batch: &Pending) -> Result<(), sqlx::Error> {
    if batch.is_empty() {
        return Ok(());
    }
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    for row in batch.sandboxes.values() {
        sandboxes::upsert(&mut transaction, row).await?;
    }
    for row in batch.execs.values() {
        execs::upsert(&mut transaction, row).await?;
    }
    execs::insert_operations(&mut transaction, &batch.operations).await?;
    events::insert_events(&mut transaction, batch.events.iter().map(Arc::as_ref)).await?;
    audit::insert_calls(&mut transaction, &batch.calls).await?;
    for (id, at) in &batch.key_uses {
        keys::save_use(&mut transaction, id, *at).await?;
    }
    transaction.commit().await
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    fn entry(detail: String) -> OperationRow {
        OperationRow {
            at: Timestamp::from_unix_ms(1),
            actor: "somebody".to_owned(),
            tenant: None,
            action: "test",
            sandbox_id: None,
            provider: "mock".to_owned(),
            resource: String::new(),
            success: true,
            detail,
            duration: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn a_full_disk_is_got_over_once_there_is_room() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("db")).await.unwrap();
        let writer = store.writer();
        // What a full disk is to SQLite; it counts for this connection only.
        sqlx::query("PRAGMA max_page_count = 1").execute(&mut *writer.connection().await).await.unwrap();
        writer.log_operation(entry("x".repeat(1 << 20)));
        let full = writer.flush().await.unwrap_err();
        assert!(full.is_disk_full(), "{full:?}");
        assert!(writer.check().is_err());
        writer.log_operation(entry("later".to_owned()));
        writer.flush().await.unwrap();
        writer.check().unwrap();
        let kept: i64 =
            sqlx::query_scalar("SELECT count(*) FROM operation_log").fetch_one(&store.readers).await.unwrap();
        assert_eq!(kept, 2, "nothing was lost");
    }
}

//! File operations: what the server does in a sandbox's files is counted,
//! logged and announced here; the doing is the session's.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};
use stacyvm_api::{EventKind, SandboxId};
use stacyvm_sandbox::{Session, SessionError};

use crate::shared::{Operation, Shared, failure_data};
use crate::{Caller, EngineError};

/// A file operation, for the event, the metric and the operation log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOperation {
    pub kind: FileOperationKind,
    pub path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileOperationKind {
    Write,
    Read,
    List,
    Delete,
    Move,
    Chmod,
    Stat,
    Glob,
    Archive,
    Extract,
    Watch,
    MakeDir,
}

impl FileOperationKind {
    /// Name of the metric.
    pub(crate) fn operation(self) -> &'static str {
        match self {
            Self::Write => "file_write",
            Self::Read => "file_read",
            Self::List => "file_list",
            Self::Delete => "file_delete",
            Self::Move => "file_move",
            Self::Chmod => "file_chmod",
            Self::Stat => "file_stat",
            Self::Glob => "file_glob",
            Self::Archive => "file_archive",
            Self::Extract => "file_extract",
            Self::Watch => "file_watch",
            Self::MakeDir => "file_mkdir",
        }
    }

    /// Name in the operation log.
    fn action(self) -> &'static str {
        match self {
            Self::Write => "file.write",
            Self::Read => "file.read",
            Self::List => "file.list",
            Self::Delete => "file.delete",
            Self::Move => "file.move",
            Self::Chmod => "file.chmod",
            Self::Stat => "file.stat",
            Self::Glob => "file.glob",
            Self::Archive => "file.archive",
            Self::Extract => "file.extract",
            Self::Watch => "file.watch",
            Self::MakeDir => "file.mkdir",
        }
    }

    /// The event of a success, where there is one.
    fn event(self) -> Option<EventKind> {
        match self {
            Self::Write | Self::Extract => Some(EventKind::FileWritten),
            Self::Read | Self::Archive => Some(EventKind::FileRead),
            Self::List
            | Self::Delete
            | Self::Move
            | Self::Chmod
            | Self::Stat
            | Self::Glob
            | Self::Watch
            | Self::MakeDir => None,
        }
    }
}

impl Shared {
    pub(crate) async fn file_operation<T, F, Fut>(
        &self,
        caller: &Caller,
        id: &SandboxId,
        operation: FileOperation,
        run: F,
    ) -> Result<T, EngineError>
    where
        F: FnOnce(Arc<dyn Session>) -> Fut + Send,
        Fut: Future<Output = Result<T, SessionError>> + Send,
    {
        let (kind, started) = (operation.kind, Instant::now());
        let record = self.find(caller, id).inspect_err(|error| {
            let took = started.elapsed();
            self.metrics.observe(kind.operation(), "unknown", took, Some(error.to_string()), self.now());
        })?;
        let done = async { Ok::<_, EngineError>(run(self.session(&record).await?).await?) }.await;
        let (provider, took) = (record.provider.name(), started.elapsed());
        let error = done.as_ref().err();
        self.metrics.observe(kind.operation(), provider, took, error.map(ToString::to_string), self.now());
        self.log_operation(
            caller,
            &Operation { action: kind.action(), sandbox: Some(id), provider, resource: &operation.path, error, took },
        );
        let path = || ("path".to_owned(), Value::from(crate::shared::cut(&operation.path)));
        match (error, kind.event()) {
            (None, Some(event)) => self.emit_about(&record, event, Map::from_iter([path()])),
            (None, None) => {}
            (Some(error), _) => {
                let mut data = failure_data(kind.operation(), provider, &error.to_string());
                data.extend([path()]);
                self.emit_about(&record, EventKind::OperationFailed, data);
            }
        }
        done
    }
}

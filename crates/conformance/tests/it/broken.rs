//! A suite that cannot fail proves nothing: one thing is broken at a time, and
//! exactly the checks that speak of it must fail.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _};
use stacyvm_api::{SandboxId, Timestamp};
use stacyvm_conformance::{Format, ProviderTarget, RunOptions, run};
use stacyvm_providers::mock::MockProvider;
use stacyvm_sandbox::{
    AgentIo, AttachRequest, ByteStream, Capabilities, Connection, Created, DialTarget, Ending, FileContent, FileEntry,
    HealthReport, ListedProcess, ProcessEvent, ProcessInput, ProcessSelector, ProcessStream, ProgressSink, Provider,
    ProviderError, RemoveOptions, ResourceUsage, RuntimeSandbox, SandboxSpec, Session, SessionError, StartRequest,
    TerminalSize, WatchStream, WriteOptions,
};

/// What is wrong with a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    ExitCodesAreLost,
    StderrIsLost,
    SizesAreOffByOne,
    ModesAreIgnored,
    RemovalDoesNothing,
    RangesAreIgnored,
    MissingFilesAreInternalErrors,
    ListingsAreReversed,
    DeadlinesAreNotMarked,
    DestroyDoesNothing,
    SecondDestroyFails,
    EnvironmentIsLost,
    GlobsFindTooMuch,
    HighBytesAreReplaced,
    /// Not one, if it is said: there are only so many sandboxes.
    RoomIsLittle,
    RoomIsLittleAndNotSaid,
}

/// Sandboxes at once, where there is little room.
const LITTLE_ROOM: usize = 4;

async fn failing_with(flaw: Flaw) -> Vec<String> {
    let provider = BrokenProvider { inner: MockProvider::default(), flaw };
    let target = Arc::new(ProviderTarget::new(Arc::new(provider)));
    // One flaw makes a check wait for what never comes; the longest that
    // passes takes a few seconds here.
    let options = RunOptions { deadline_max: Some(Duration::from_secs(30)), ..RunOptions::default() };
    let report = run(target, &options, &()).await.unwrap();
    let is_fine = matches!(flaw, Flaw::None | Flaw::RoomIsLittle);
    assert_eq!(is_fine, report.is_success(), "{}", report.render(Format::Text));
    assert_eq!(flaw == Flaw::DestroyDoesNothing, !report.left_behind.is_empty(), "{:?}", report.left_behind);
    report.failed_ids().into_iter().map(str::to_owned).collect()
}

async fn check(flaw: Flaw, expected: &[&str]) {
    assert_eq!(failing_with(flaw).await, expected, "{flaw:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrapper_without_a_flaw_passes() {
    check(Flaw::None, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_on_sandboxes_is_kept_to_where_it_is_said() {
    check(Flaw::RoomIsLittle, &[]).await;
    check(Flaw::RoomIsLittleAndNotSaid, &["S62"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_exit_codes() {
    check(Flaw::ExitCodesAreLost, &["C09", "S21", "S41", "S46"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_stderr() {
    check(Flaw::StderrIsLost, &["S21", "S24", "S29"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_sizes() {
    check(Flaw::SizesAreOffByOne, &["C12", "C14", "C17", "S02", "S03", "S05", "S06", "S11"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ignored_modes() {
    check(Flaw::ModesAreIgnored, &["C17", "S11"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_that_does_nothing() {
    check(Flaw::RemovalDoesNothing, &["C18", "S04", "S07", "S08", "S09", "S10", "S54"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ignored_ranges() {
    check(Flaw::RangesAreIgnored, &["S03"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn untyped_errors() {
    check(Flaw::MissingFilesAreInternalErrors, &["C16", "C18", "S07", "S10", "S71"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_out_of_order() {
    check(Flaw::ListingsAreReversed, &["S04", "S11", "S12"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unmarked_deadlines() {
    check(Flaw::DeadlinesAreNotMarked, &["S29"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_that_does_nothing() {
    check(Flaw::DestroyDoesNothing, &["C05", "C06", "S61", "S65"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_that_fails_the_second_time() {
    check(Flaw::SecondDestroyFails, &["C05", "C06", "S37", "S60", "S61", "S65"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_environment() {
    check(Flaw::EnvironmentIsLost, &["S23", "S64"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn globs_that_find_too_much() {
    check(Flaw::GlobsFindTooMuch, &["C15", "S15"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_kept() {
    check(Flaw::HighBytesAreReplaced, &["S01", "S02", "S03", "S31"]).await;
}

struct BrokenProvider {
    inner: MockProvider,
    flaw: Flaw,
}

#[async_trait]
impl Provider for BrokenProvider {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn describe(&self) -> BTreeMap<String, String> {
        let bound = (self.flaw == Flaw::RoomIsLittle).then(|| ("max_sandboxes".to_owned(), LITTLE_ROOM.to_string()));
        bound.into_iter().collect()
    }

    async fn check(&self) -> HealthReport {
        self.inner.check().await
    }

    async fn create(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        let is_bounded = matches!(self.flaw, Flaw::RoomIsLittle | Flaw::RoomIsLittleAndNotSaid);
        if is_bounded && self.inner.sandbox_ids().len() >= LITTLE_ROOM {
            return Err(ProviderError::Exhausted { message: "it is full".to_owned() });
        }
        self.inner.create(id, spec, progress).await
    }

    async fn connect(&self, id: &SandboxId) -> Result<Connection, ProviderError> {
        Ok(match self.inner.connect(id).await? {
            Connection::Native(inner) => Connection::Native(Arc::new(BrokenSession { inner, flaw: self.flaw })),
            envd @ Connection::Envd(_) => envd,
        })
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), ProviderError> {
        match self.flaw {
            Flaw::DestroyDoesNothing => Ok(()),
            Flaw::SecondDestroyFails if !self.inner.sandbox_ids().contains(id) => {
                Err(ProviderError::NotFound(id.clone()))
            }
            _ => self.inner.destroy(id).await,
        }
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        self.inner.list().await
    }

    async fn wait(&self, id: &SandboxId) -> Result<Ending, ProviderError> {
        self.inner.wait(id).await
    }

    async fn usage(&self, id: &SandboxId) -> Result<ResourceUsage, ProviderError> {
        self.inner.usage(id).await
    }
}

struct BrokenSession {
    inner: Arc<dyn Session>,
    flaw: Flaw,
}

impl BrokenSession {
    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    fn entry(&self, mut entry: FileEntry) -> FileEntry {
        if self.has(Flaw::SizesAreOffByOne) {
            entry.size += 1;
        }
        entry
    }

    fn checked<T>(&self, outcome: Result<T, SessionError>) -> Result<T, SessionError> {
        outcome.map_err(|error| match error {
            SessionError::FileNotFound(path) if self.has(Flaw::MissingFilesAreInternalErrors) => {
                SessionError::Failed { operation: "do something", cause: path.into() }
            }
            other => other,
        })
    }
}

#[async_trait]
impl Session for BrokenSession {
    async fn start(&self, mut request: StartRequest) -> Result<ProcessStream, SessionError> {
        if self.has(Flaw::EnvironmentIsLost) {
            request.env.clear();
        }
        let flaw = self.flaw;
        let stream = self.inner.start(request).await?;
        let broken = stream.map_ok(move |event| match event {
            ProcessEvent::Exited(mut exit) => {
                if flaw == Flaw::ExitCodesAreLost {
                    exit.code = exit.code.map(|_| 0);
                }
                exit.timed_out &= flaw != Flaw::DeadlinesAreNotMarked;
                ProcessEvent::Exited(exit)
            }
            ProcessEvent::Stderr(_) if flaw == Flaw::StderrIsLost => ProcessEvent::Keepalive,
            other => other,
        });
        Ok(broken.boxed())
    }

    async fn attach(&self, request: AttachRequest) -> Result<ProcessStream, SessionError> {
        self.inner.attach(request).await
    }

    async fn processes(&self) -> Result<Vec<ListedProcess>, SessionError> {
        self.inner.processes().await
    }

    async fn send_input(&self, process: &ProcessSelector, input: ProcessInput) -> Result<(), SessionError> {
        self.inner.send_input(process, input).await
    }

    async fn close_stdin(&self, process: &ProcessSelector) -> Result<(), SessionError> {
        self.inner.close_stdin(process).await
    }

    async fn resize(&self, process: &ProcessSelector, size: TerminalSize) -> Result<(), SessionError> {
        self.inner.resize(process, size).await
    }

    async fn signal(&self, process: &ProcessSelector, signal: i32) -> Result<(), SessionError> {
        self.inner.signal(process, signal).await
    }

    async fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        Ok(self.entry(self.checked(self.inner.stat(path).await)?))
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        let mut entries = self.checked(self.inner.list(path, depth).await)?;
        if self.has(Flaw::ListingsAreReversed) {
            entries.reverse();
        }
        Ok(entries.into_iter().map(|entry| self.entry(entry)).collect())
    }

    async fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<FileContent, SessionError> {
        let range = if self.has(Flaw::RangesAreIgnored) { None } else { range };
        let mut content = self.checked(self.inner.read(path, range).await)?;
        content.entry = self.entry(content.entry);
        Ok(content)
    }

    async fn write(&self, path: &str, content: ByteStream, options: WriteOptions) -> Result<FileEntry, SessionError> {
        let replace = self.has(Flaw::HighBytesAreReplaced);
        let content = content.map_ok(move |bytes| {
            if !replace || std::str::from_utf8(&bytes).is_ok() {
                return bytes;
            }
            bytes.iter().map(|byte| if byte.is_ascii() { *byte } else { b'?' }).collect()
        });
        Ok(self.entry(self.inner.write(path, content.boxed(), options).await?))
    }

    async fn make_dir(&self, path: &str) -> Result<FileEntry, SessionError> {
        self.inner.make_dir(path).await
    }

    async fn rename(&self, old_path: &str, new_path: &str) -> Result<(), SessionError> {
        self.checked(self.inner.rename(old_path, new_path).await)
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> Result<(), SessionError> {
        if self.has(Flaw::RemovalDoesNothing) {
            return Ok(());
        }
        self.checked(self.inner.remove(path, options).await)
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        if self.has(Flaw::ModesAreIgnored) {
            return self.inner.stat(path).await.map(drop);
        }
        self.checked(self.inner.chmod(path, mode).await)
    }

    async fn glob(&self, pattern: &str) -> Result<Vec<String>, SessionError> {
        let mut found = self.inner.glob(pattern).await?;
        if self.has(Flaw::GlobsFindTooMuch) {
            found.push("/etc/passwd".to_owned());
        }
        Ok(found)
    }

    async fn archive(&self, path: &str) -> Result<ByteStream, SessionError> {
        self.checked(self.inner.archive(path).await)
    }

    async fn extract(&self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        self.inner.extract(path, archive).await
    }

    async fn watch(&self, path: &str, recursive: bool) -> Result<WatchStream, SessionError> {
        self.inner.watch(path, recursive).await
    }

    async fn dial(&self, target: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        self.inner.dial(target).await
    }

    async fn ports(&self) -> Result<Vec<u16>, SessionError> {
        self.inner.ports().await
    }

    async fn set_deadline(&self, expires_at: Timestamp) -> Result<(), SessionError> {
        self.inner.set_deadline(expires_at).await
    }

    async fn console(&self, lines: usize) -> Result<Vec<String>, SessionError> {
        self.inner.console(lines).await
    }

    async fn ping(&self) -> Result<(), SessionError> {
        self.inner.ping().await
    }
}

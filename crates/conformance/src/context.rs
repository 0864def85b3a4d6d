//! What a check works with: sandboxes that are freed after it, and notes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stacyvm_api::SandboxId;
use stacyvm_sandbox::{Session, StartRequest, WriteOptions};
use tokio::time::{Instant, sleep};

use crate::output::{Output, Reader};
use crate::{Failure, Order, Target, TargetError, pattern};

/// Pause between two looks at something that changes by itself.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A sandbox and a way into it.
#[derive(Clone)]
pub struct Subject {
    pub id: SandboxId,
    pub session: Arc<dyn Session>,
}

/// Handed to one check.
pub struct Context {
    pub target: Arc<dyn Target>,
    pub image: String,
    check_id: &'static str,
    shared: Arc<SharedSandbox>,
    made: Mutex<Vec<SandboxId>>,
    evidence: Mutex<Vec<String>>,
}

/// One sandbox for all checks that leave it as they found it, so that a slow
/// runtime does not have to boot one per check.
#[derive(Default)]
pub(crate) struct SharedSandbox {
    id: tokio::sync::Mutex<Option<SandboxId>>,
}

impl Context {
    pub(crate) fn new(
        target: Arc<dyn Target>,
        image: String,
        check_id: &'static str,
        shared: Arc<SharedSandbox>,
    ) -> Self {
        Self { target, image, check_id, shared, made: Mutex::default(), evidence: Mutex::default() }
    }

    /// The sandbox that checks share. Work below [`Context::dir`].
    pub(crate) async fn sandbox(&self) -> Result<Subject, Failure> {
        let mut slot = self.shared.id.lock().await;
        let id = match &*slot {
            Some(id) => id.clone(),
            None => slot.insert(self.target.create(&self.order()).await?).clone(),
        };
        drop(slot);
        let session = self.target.session(&id).await?;
        Ok(Subject { id, session })
    }

    /// A sandbox of this check's own.
    pub(crate) async fn fresh(&self) -> Result<Subject, Failure> {
        Ok(self.create(&self.order()).await?)
    }

    /// A sandbox as ordered, or the target's error to assert on.
    pub(crate) async fn create(&self, order: &Order) -> Result<Subject, TargetError> {
        let id = self.target.create(order).await?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
        let session = self.target.session(&id).await?;
        Ok(Subject { id, session })
    }

    /// An order for the image under test.
    pub(crate) fn order(&self) -> Order {
        Order { image: self.image.clone(), ..Order::default() }
    }

    /// A directory of this check's own in the shared sandbox.
    pub(crate) fn dir(&self) -> String {
        format!("/workspace/{}", self.check_id)
    }

    /// Keeps something that was seen for the report.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner).push(text.into());
    }

    pub(crate) fn take_evidence(&self) -> Vec<String> {
        std::mem::take(&mut *self.evidence.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Destroys what this check made; says what could not be destroyed.
    pub(crate) async fn free(&self) -> Result<(), Failure> {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        let mut failed = Vec::new();
        for id in made {
            if let Err(error) = self.target.destroy(&id).await {
                failed.push(format!("{id}: {error}"));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(Failure(format!("cannot destroy {}", failed.join(", ")))) }
    }
}

impl SharedSandbox {
    /// Destroys the shared sandbox; the next check that asks gets a new one.
    pub(crate) async fn replace(&self, target: &dyn Target) -> Result<(), Failure> {
        match self.id.lock().await.take() {
            Some(id) => Ok(target.destroy(&id).await?),
            None => Ok(()),
        }
    }
}

impl Subject {
    /// Runs a shell script to its end.
    pub(crate) async fn shell(&self, script: &str) -> Result<Output, Failure> {
        self.run(shell(script)).await
    }

    pub(crate) async fn run(&self, request: StartRequest) -> Result<Output, Failure> {
        self.open(request).await?.finish().await
    }

    /// Starts a command and reads up to its `Started`.
    pub(crate) async fn open(&self, request: StartRequest) -> Result<Reader, Failure> {
        Reader::open(self.session.start(request).await?).await
    }

    pub(crate) async fn put(&self, path: &str, content: &[u8]) -> Result<(), Failure> {
        self.session.write(path, pattern::once(content.to_vec()), WriteOptions::default()).await?;
        Ok(())
    }

    /// A file's content, which must be small.
    pub(crate) async fn get(&self, path: &str) -> Result<Vec<u8>, Failure> {
        const CONTENT_BYTES_MAX: usize = 4 << 20;
        pattern::collect(self.session.read(path, None).await?.stream, CONTENT_BYTES_MAX).await
    }

    /// Names below a directory, as the listing gives them.
    pub(crate) async fn names(&self, path: &str) -> Result<Vec<String>, Failure> {
        Ok(self.session.list(path, 1).await?.into_iter().map(|entry| entry.name).collect())
    }

    /// How many processes in the sandbox have `marker` in their command line.
    pub(crate) async fn marked_processes(&self, marker: &str) -> Result<usize, Failure> {
        let (head, last) = marker.split_at(marker.len() - 1);
        // The bracket keeps the pattern from matching this very script.
        let script = format!(
            "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f 2>/dev/null; echo; done | grep -c '{head}[{last}]'; true"
        );
        let text = self.shell(&script).await?.success()?;
        text.trim().parse().map_err(|_| Failure(format!("cannot count processes from {text:?}")))
    }
}

/// `sh -c` with a script.
pub(crate) fn shell(script: &str) -> StartRequest {
    argv(["sh", "-c", script])
}

pub(crate) fn argv<const N: usize>(argv: [&str; N]) -> StartRequest {
    StartRequest { argv: argv.map(str::to_owned).to_vec(), ..StartRequest::default() }
}

/// Looks again and again until `look` gives a value. The check's own deadline
/// bounds most waits; `limit` is for those that must say what was missing.
pub(crate) async fn eventually<T, F, R>(what: &str, limit: Duration, mut look: F) -> Result<T, Failure>
where
    F: FnMut() -> R,
    R: Future<Output = Result<Option<T>, Failure>>,
{
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = look().await? {
            return Ok(value);
        }
        if Instant::now() >= end {
            return Err(Failure(format!("after {limit:?} still not: {what}")));
        }
        sleep(POLL_INTERVAL).await;
    }
}

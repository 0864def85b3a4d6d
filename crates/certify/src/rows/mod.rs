//! How each row is looked at, by what it is about.

pub(crate) mod baseline;
pub(crate) mod faults;
pub(crate) mod host;
pub(crate) mod identity;
mod language;
pub(crate) mod limits;
pub(crate) mod measure;
pub(crate) mod preview;
pub(crate) mod restart;
pub(crate) mod sandbox;

use std::collections::BTreeMap;
use std::time::Duration;

use stacyvm_api::{CreateRequest, ExecRequest, ListQuery, SandboxState};
use stacyvm_client::{Client, ClientError, SandboxClient};

use crate::run::Run;
use crate::server::chain;
use crate::{Status, Target};

/// Marks the sandboxes of one run, so that they are found again.
const RUN_KEY: &str = "stacyvm.certify";

/// What ends a sandbox if this program cannot.
const SANDBOX_TTL: stacyvm_api::Duration = stacyvm_api::Duration::from_secs(30 * 60);

const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What looking at a row gave, or what kept it from being looked at.
pub(crate) type Looked = Result<Seen, Trouble>;

/// A row as it was seen.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) status: Status,
    pub(crate) message: String,
    pub(crate) fix: Option<String>,
    pub(crate) evidence: Vec<String>,
}

/// Something that did not work: a failure of the row.
#[derive(Debug)]
pub(crate) struct Trouble {
    message: String,
    fix: Option<String>,
}

impl Seen {
    fn new(status: Status, message: impl Into<String>, fix: Option<String>) -> Self {
        Self { status, message: message.into(), fix, evidence: Vec::new() }
    }

    pub(crate) fn pass(message: impl Into<String>) -> Self {
        Self::new(Status::Pass, message, None)
    }

    pub(crate) fn warn(message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Status::Warn, message, Some(fix.into()))
    }

    pub(crate) fn fail(message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Status::Fail, message, Some(fix.into()))
    }

    pub(crate) fn unavailable(message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Status::Unavailable, message, Some(fix.into()))
    }

    pub(crate) fn with(mut self, evidence: impl Into<String>) -> Self {
        self.evidence.push(evidence.into());
        self
    }
}

impl Trouble {
    pub(crate) fn into_seen(self, fix: &str) -> Seen {
        Seen::fail(self.message, self.fix.unwrap_or_else(|| fix.to_owned()))
    }
}

impl From<String> for Trouble {
    fn from(message: String) -> Self {
        Self { message, fix: None }
    }
}

impl From<&str> for Trouble {
    fn from(message: &str) -> Self {
        message.to_owned().into()
    }
}

impl From<ClientError> for Trouble {
    fn from(error: ClientError) -> Self {
        Self { message: chain(&error), fix: error.hint().map(str::to_owned) }
    }
}

/// Two things that have to be the same.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: &T, got: &T) -> Result<(), Trouble> {
    if expected == got { Ok(()) } else { Err(format!("{what}: expected {expected:?}, got {got:?}").into()) }
}

/// A sandbox of this run.
pub(crate) async fn make(client: &Client, run: Making<'_>) -> Result<SandboxClient, Trouble> {
    make_limited(client, run, Caps::default()).await
}

/// Limits of a sandbox in MiB; the server's defaults where there are none.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Caps {
    pub(crate) memory_mib: Option<u64>,
    pub(crate) disk_mib: Option<u64>,
}

/// A sandbox of this run that holds to limits.
pub(crate) async fn make_limited(client: &Client, run: Making<'_>, caps: Caps) -> Result<SandboxClient, Trouble> {
    let request = CreateRequest {
        image: Some(run.image.to_owned()),
        provider: Some(run.target.provider().to_owned()),
        ttl: Some(SANDBOX_TTL),
        metadata: Some(BTreeMap::from([(RUN_KEY.to_owned(), run.mark.to_owned())])),
        allow_unenforced: Some(true),
        memory_mb: caps.memory_mib,
        disk_size_mb: caps.disk_mib,
        ..CreateRequest::default()
    };
    let record = client.create(&request).await?;
    if record.state != SandboxState::Running {
        return Err(format!("{} is {:?} and not running", record.id, record.state).into());
    }
    Ok(client.sandbox(record.id))
}

/// What is needed of a run to make a sandbox; free of its borrow.
#[derive(Clone, Copy)]
pub(crate) struct Making<'a> {
    target: Target,
    image: &'a str,
    mark: &'a str,
}

impl<'a> Making<'a> {
    pub(crate) fn of(target: Target, image: &'a str, mark: &'a str) -> Self {
        Self { target, image, mark }
    }
}

/// Destroys what this run made and still exists; how many there were.
pub(crate) async fn sweep(client: &Client, mark: &str) -> Result<usize, Trouble> {
    let query = ListQuery { metadata: Some(format!("{RUN_KEY}={mark}")), ..ListQuery::default() };
    let listed = client.list_all(&query).await?;
    // A server that ignores the filter must not make us destroy others' sandboxes.
    let ours = listed.into_iter().filter(|it| it.metadata.get(RUN_KEY).is_some_and(|of| of == mark));
    let mut count = 0;
    for sandbox in ours.filter(|it| it.state != SandboxState::Destroyed) {
        client.sandbox(sandbox.id).destroy().await?;
        count += 1;
    }
    Ok(count)
}

pub(crate) fn shell(command: &str) -> ExecRequest {
    ExecRequest { command: command.to_owned(), ..ExecRequest::default() }
}

/// Output of a command that has to succeed.
pub(crate) async fn output(sandbox: &SandboxClient, command: &str) -> Result<String, Trouble> {
    let result = sandbox.exec(&shell(command)).await?;
    if result.exit_code != 0 {
        return Err(format!("`{command}` ended with {}: {}", result.exit_code, result.stderr.trim()).into());
    }
    Ok(result.stdout)
}

/// Looks until there is something, for at most `limit`.
pub(crate) async fn eventually<T>(limit: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if let Some(found) = look().await {
            return Some(found);
        }
        if tokio::time::Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The daemon of a target that has one.
pub(crate) fn daemon(run: &Run<'_>) -> Option<crate::host::Daemon> {
    run.target.has_daemon().then(|| crate::host::Daemon::new(&run.options.settings.docker_socket))
}

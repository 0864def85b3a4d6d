//! Watching a directory.

use std::time::Duration;

use futures_util::StreamExt as _;
use stacyvm_api::WatchEventKind;
use stacyvm_sandbox::{RemoveOptions, WatchChange, WatchStream};
use tokio::time::timeout;

use super::check;
use crate::check::ensure;
use crate::{Check, Checked, Context, Failure};

/// How long a change may take to be reported.
const EVENT_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for the watch to be armed before touching the probe again.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("S54", "a watch reports what the API creates and removes", [Watch], api_changes),
        check!("S55", "a watch reports what commands create, write and remove", [Watch], command_changes),
        check!("S56", "a recursive watch reports changes below", [Watch], recursive),
    ]
}

/// A watch that has proved to be armed.
async fn armed(cx: &Context, subject: &crate::Subject, dir: &str, recursive: bool) -> Result<WatchStream, Failure> {
    if subject.session.stat(dir).await.is_err() {
        subject.session.make_dir(dir).await?;
    }
    let mut watch = subject.session.watch(dir, recursive).await?;
    for attempt in 0.. {
        subject.put(&format!("{dir}/probe-{attempt}"), b"probe").await?;
        match timeout(PROBE_INTERVAL, watch.next()).await {
            Ok(Some(Ok(change))) => {
                cx.note(format!("the first event was {change:?}"));
                return Ok(watch);
            }
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(None) => return Err(Failure::new("the watch ended")),
            Err(_) if attempt > 50 => break,
            Err(_) => {}
        }
    }
    Err(Failure::new("the watch reports nothing at all"))
}

async fn expect_change(watch: &mut WatchStream, name: &str, kinds: &[WatchEventKind]) -> Checked {
    let mut seen = Vec::new();
    let wait = async {
        while let Some(change) = watch.next().await {
            let change: WatchChange = change?;
            if change.name == name && kinds.contains(&change.kind) {
                return Ok(());
            }
            seen.push(change);
        }
        Err(Failure::new("the watch ended"))
    };
    let outcome = timeout(EVENT_LIMIT, wait).await;
    outcome.unwrap_or_else(|_| Err(Failure(format!("no {kinds:?} of {name:?} within {EVENT_LIMIT:?}; seen: {seen:?}"))))
}

async fn api_changes(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    let mut watch = armed(cx, &subject, &dir, false).await?;
    subject.put(&format!("{dir}/by-api"), b"x").await?;
    // A file that appears in one piece shows as created, written or renamed.
    let appeared = [WatchEventKind::Create, WatchEventKind::Write, WatchEventKind::Rename];
    expect_change(&mut watch, "by-api", &appeared).await?;
    subject.session.remove(&format!("{dir}/by-api"), RemoveOptions::default()).await?;
    expect_change(&mut watch, "by-api", &[WatchEventKind::Remove]).await
}

async fn command_changes(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    let mut watch = armed(cx, &subject, &dir, false).await?;
    subject.shell(&format!("echo one > {dir}/file")).await?.success()?;
    expect_change(&mut watch, "file", &[WatchEventKind::Create]).await?;
    expect_change(&mut watch, "file", &[WatchEventKind::Write]).await?;
    subject.shell(&format!("echo two >> {dir}/file")).await?.success()?;
    expect_change(&mut watch, "file", &[WatchEventKind::Write]).await?;
    subject.shell(&format!("rm {dir}/file")).await?.success()?;
    expect_change(&mut watch, "file", &[WatchEventKind::Remove]).await
}

async fn recursive(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    subject.session.make_dir(&format!("{dir}/there/before")).await?;
    let mut watch = armed(cx, &subject, &dir, true).await?;
    subject.shell(&format!("echo x > {dir}/there/before/file")).await?.success()?;
    expect_change(&mut watch, "there/before/file", &[WatchEventKind::Create]).await?;
    // A directory that is new must be watched as well.
    subject.shell(&format!("mkdir {dir}/new")).await?.success()?;
    expect_change(&mut watch, "new", &[WatchEventKind::Create]).await?;
    subject.shell(&format!("echo x > {dir}/new/file")).await?.success()?;
    let kinds = [WatchEventKind::Create, WatchEventKind::Write];
    let outcome = expect_change(&mut watch, "new/file", &kinds).await;
    ensure!(outcome.is_ok(), "in a directory made while watching: {}", outcome.unwrap_err());
    Ok(())
}

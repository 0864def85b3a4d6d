//! Sandboxes and limits: what one does, no other feels.

use std::time::Duration;

use stacyvm_api::Limit;
use stacyvm_sandbox::SessionError;

use super::check;
use crate::check::{ensure, expect_eq};
use crate::context::{argv, eventually, shell};
use crate::output::Reader;
use crate::{Check, Checked, Context, Failure, Order, Subject};

const LIMIT: Duration = Duration::from_secs(20);
const SMALL_PIDS: u64 = 40;
const SMALL_MEMORY_MIB: u64 = 64;

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!(
            "S70",
            "two sandboxes see neither each other's files nor processes",
            [Programs, LiveOutput, OwnProcesses],
            two_sandboxes
        ),
        check!("S71", "files of one sandbox are not in another", [], two_file_systems),
        check!(
            "S72",
            "a fork bomb hits its own limit; others work; destroy works",
            [Programs, Limits],
            fork_bomb,
            long
        ),
        check!(
            "S73",
            "a command that eats memory dies; its sandbox and others live",
            [Programs, Limits, OutlivesOom],
            memory_hog,
            long
        ),
    ]
}

async fn two_file_systems(cx: &Context) -> Checked {
    let (one, two) = (cx.fresh().await?, cx.fresh().await?);
    for path in ["/workspace/mine", "/tmp/mine"] {
        one.put(path, b"one").await?;
        super::file::not_found("in the other sandbox", two.session.stat(path).await)?;
    }
    two.put("/workspace/mine", b"two").await?;
    expect_eq("the first sandbox's file", &one.get("/workspace/mine").await?, &b"one".to_vec())
}

async fn two_sandboxes(cx: &Context) -> Checked {
    let (one, two) = (cx.fresh().await?, cx.fresh().await?);
    let marker = "stacyvm-marker-s70";
    let mut running = one.open(shell(&format!("sh -c 'echo up; sleep 300; :' {marker}"))).await?;
    running.until("it is up", |output| output.stdout == b"up\n").await?;
    ensure!(one.marked_processes(marker).await? > 0, "the sandbox does not see its own process");
    expect_eq("processes seen by the other sandbox", &two.marked_processes(marker).await?, &0)?;
    let hostnames = [one.shell("hostname").await?.success()?, two.shell("hostname").await?.success()?];
    cx.note(format!("hostnames {hostnames:?}"));
    ensure!(hostnames[0] != hostnames[1], "both have the hostname {:?}", hostnames[0]);
    Ok(())
}

/// A sandbox with a small limit, or `None` when the runtime says that it does
/// not hold that limit.
async fn limited(cx: &Context, order: Order, limit: Limit) -> Result<Option<Subject>, Failure> {
    let subject = match cx.create(&order).await {
        Ok(subject) => subject,
        Err(crate::TargetError::Refused(message)) => {
            cx.note(format!("the runtime refuses this limit: {message}"));
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let report = cx.target.view(&subject.id).await?.limits;
    if report.as_ref().is_some_and(|report| !report.enforced.contains(&limit)) {
        cx.note(format!("the record says that this limit is not enforced: {report:?}"));
        return Ok(None);
    }
    Ok(Some(subject))
}

async fn fork_bomb(cx: &Context) -> Checked {
    let bystander = cx.sandbox().await?;
    let order = Order { pids_limit: Some(SMALL_PIDS), ..cx.order() };
    let Some(subject) = limited(cx, order, Limit::Pids).await? else { return Ok(()) };
    let script = "i=0; while [ $i -lt 400 ]; do sleep 300 & i=$((i+1)); done; wait";
    let mut bomb = subject.open(shell(script)).await?;
    // The bomb's shell gives up at its first refusal and so frees a place: take
    // what is left, too.
    let refusal = eventually("no more command can be started", LIMIT, || async {
        match subject.session.start(argv(["sleep", "300"])).await {
            Ok(mut stream) => Ok(super::lifecycle::first(&mut stream).await.err()),
            Err(error) => Ok(Some(error)),
        }
    })
    .await?;
    cx.note(format!("at the limit a start gave: {refusal:?}"));
    ensure!(matches!(refusal, SessionError::PidsExhausted), "expected the error PidsExhausted, got {refusal:?}");
    expect_eq("another sandbox", bystander.shell("echo fine").await?.text().as_str(), "fine\n")?;
    cx.target.destroy(&subject.id).await?;
    // Only the end matters; its kind depends on what died first.
    while matches!(bomb.step().await, Ok(true)) {}
    Ok(())
}

async fn memory_hog(cx: &Context) -> Checked {
    let bystander = cx.sandbox().await?;
    let order = Order { memory_mib: Some(SMALL_MEMORY_MIB), ..cx.order() };
    let Some(subject) = limited(cx, order, Limit::Memory).await? else { return Ok(()) };
    // `tail` keeps a line until it ends, and this one never does.
    let outcome = match subject.session.start(shell("tail /dev/zero")).await {
        Ok(stream) => Reader::open(stream).await?.finish().await,
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(output) => {
            ensure!(output.exit.code != Some(0), "the command succeeded");
            cx.note(format!("the command ended with {:?}", output.exit));
        }
        Err(failure) => cx.note(format!("the command ended with {failure}")),
    }
    let text = eventually("the sandbox works again", LIMIT, || async {
        match subject.session.start(shell("echo alive")).await {
            Ok(stream) => Ok(Some(Reader::open(stream).await?.finish().await?.text())),
            Err(SessionError::MemoryExhausted) => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    expect_eq("the sandbox afterwards", text.as_str(), "alive\n")?;
    expect_eq("another sandbox", bystander.shell("echo fine").await?.text().as_str(), "fine\n")
}

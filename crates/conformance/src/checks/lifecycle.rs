//! Making and ending sandboxes.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use stacyvm_api::SandboxState;
use stacyvm_sandbox::{
    AttachRequest, DialTarget, ProcessInput, ProcessSelector, RemoveOptions, SessionError, TerminalSize, WriteOptions,
};

use super::check;
use crate::check::{ensure, expect_eq, expect_error};
use crate::context::{argv, shell};
use crate::{Ability, Check, Checked, Context, Order, Subject, TargetError, pattern};

/// Sandboxes that S62 makes at the same time, where so many fit, and at least.
const PARALLEL_CREATES: u64 = 10;
const PARALLEL_CREATES_MIN: u64 = 2;

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("C01", "a sandbox of the image can be made", [], c01, long),
        check!("C02", "its id is not empty and is listed", [], c02),
        check!("C03", "its status carries the same id", [], c03),
        check!("C04", "its state is running", [], c04),
        check!("C05", "it can be destroyed and is then gone from the list", [], c05),
        check!("C06", "exec after destroy fails as gone", [], c06),
        check!("S60", "destroying again, or something unknown, succeeds", [], destroy_is_idempotent),
        check!("S61", "every operation on a destroyed sandbox fails as gone", [], everything_is_gone),
        check!("S62", "sandboxes made at the same time all work and differ", [], parallel_creates, long),
        check!(
            "S63",
            "an image that cannot be had is a typed error that leaves nothing",
            [Programs, Failures],
            unknown_image
        ),
        check!("S64", "the environment given at creation reaches every command", [], creation_environment),
        check!("S65", "destroy works while a command is running and ends its stream", [LiveOutput], destroy_under_load),
        check!("S66", "a sandbox answers a ping and shows usage", [Usage], usage),
    ]
}

async fn c01(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    subject.session.ping().await?;
    Ok(())
}

async fn c02(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    ensure!(!subject.id.as_str().is_empty(), "the id is empty");
    cx.note(subject.id.to_string());
    let listed = cx.target.list().await?;
    ensure!(listed.contains(&subject.id), "{} is not among the listed sandboxes {listed:?}", subject.id);
    Ok(())
}

async fn c03(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    expect_eq("id in the status", &cx.target.view(&subject.id).await?.id, &subject.id)
}

async fn c04(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    expect_eq("state", &cx.target.view(&subject.id).await?.state, &SandboxState::Running)
}

async fn c05(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    cx.target.destroy(&subject.id).await?;
    let listed = cx.target.list().await?;
    ensure!(!listed.contains(&subject.id), "{} is still listed", subject.id);
    match cx.target.view(&subject.id).await {
        Err(TargetError::NotFound(_)) => Ok(()),
        other => Err(crate::Failure(format!("its status is {other:?}, not `not found`"))),
    }
}

async fn c06(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    cx.target.destroy(&subject.id).await?;
    let outcome = async {
        let session = reopened(cx, &subject).await?;
        let mut stream = session.start(shell("echo alive")).await?;
        first(&mut stream).await
    };
    expect_error("exec", outcome.await, "Gone", |error| matches!(error, SessionError::Gone))
}

async fn destroy_is_idempotent(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    for _ in 0..3 {
        cx.target.destroy(&subject.id).await?;
    }
    cx.target.destroy(&stacyvm_api::SandboxId::random()).await?;
    Ok(())
}

/// A session opened after the destroy; not getting one counts as gone too.
async fn reopened(
    cx: &Context,
    subject: &Subject,
) -> Result<std::sync::Arc<dyn stacyvm_sandbox::Session>, SessionError> {
    cx.target.session(&subject.id).await.map_err(|error| match error {
        TargetError::NotFound(_) => SessionError::Gone,
        other => SessionError::Unavailable(Some(Box::new(other))),
    })
}

/// The first item of a stream: some runtimes only fail there.
pub(super) async fn first<T>(
    stream: &mut (impl futures_util::Stream<Item = Result<T, SessionError>> + Unpin),
) -> Result<(), SessionError> {
    match futures_util::StreamExt::next(stream).await {
        Some(Err(error)) => Err(error),
        Some(Ok(_)) | None => Ok(()),
    }
}

async fn everything_is_gone(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    subject.put("/workspace/gone.txt", b"here for now").await?;
    cx.target.destroy(&subject.id).await?;
    let session = match reopened(cx, &subject).await {
        Ok(session) => session,
        Err(SessionError::Gone) => return old_session_is_dead(&subject).await,
        Err(error) => return Err(error.into()),
    };
    let file = "/workspace/gone.txt";
    let pid = ProcessSelector::Pid(1);
    let mut outcomes = vec![
        ("start", async { first(&mut session.start(shell("true")).await?).await }.await),
        ("processes", session.processes().await.map(drop)),
        ("stat", session.stat(file).await.map(drop)),
        ("list", session.list("/workspace", 1).await.map(drop)),
        ("read", async { first(&mut session.read(file, None).await?.stream).await }.await),
        ("write", session.write(file, pattern::once("x"), WriteOptions::default()).await.map(drop)),
        ("make_dir", session.make_dir("/workspace/d").await.map(drop)),
        ("rename", session.rename(file, "/workspace/g").await),
        ("remove", session.remove(file, RemoveOptions::default()).await),
        ("chmod", session.chmod(file, 0o600).await),
        ("glob", session.glob("/workspace/*").await.map(drop)),
        ("console", session.console(10).await.map(drop)),
        ("ping", session.ping().await),
    ];
    if cx.target.lacks(Ability::Archives).is_none() {
        outcomes.extend([
            ("archive", async { first(&mut session.archive("/workspace").await?).await }.await),
            ("extract", session.extract("/workspace", pattern::once(vec![0; 1024])).await),
        ]);
    }
    if cx.target.lacks(Ability::Terminal).is_none() {
        let attach = AttachRequest { process: pid.clone(), offset: 0 };
        let size = TerminalSize { cols: 80, rows: 24 };
        outcomes.extend([
            ("attach", async { first(&mut session.attach(attach).await?).await }.await),
            ("send_input", session.send_input(&pid, ProcessInput::Stdin("x".into())).await),
            ("close_stdin", session.close_stdin(&pid).await),
            ("resize", session.resize(&pid, size).await),
            ("signal", session.signal(&pid, 15).await),
        ]);
    }
    if cx.target.lacks(Ability::Watch).is_none() {
        outcomes.push(("watch", async { first(&mut session.watch("/workspace", false).await?).await }.await));
    }
    if cx.target.lacks(Ability::Dial).is_none() {
        outcomes.push(("dial", session.dial(DialTarget::Port(80)).await.map(drop)));
    }
    if cx.target.lacks(Ability::Ports).is_none() {
        outcomes.push(("ports", session.ports().await.map(drop)));
    }
    for (operation, outcome) in outcomes {
        expect_error(operation, outcome, "Gone", |error| matches!(error, SessionError::Gone))?;
    }
    old_session_is_dead(&subject).await
}

/// A session opened before the destroy must fail too, rather than hang.
async fn old_session_is_dead(subject: &Subject) -> Checked {
    let gone = |error: &SessionError| matches!(error, SessionError::Gone | SessionError::Unavailable(_));
    expect_error("ping over the old session", subject.session.ping().await, "Gone or Unavailable", gone)?;
    let stat = subject.session.stat("/workspace/gone.txt").await;
    expect_error("stat over the old session", stat, "Gone or Unavailable", gone)
}

async fn parallel_creates(cx: &Context) -> Checked {
    let room = cx.target.room().await?.unwrap_or(PARALLEL_CREATES);
    let count = room.min(PARALLEL_CREATES);
    cx.note(format!("{count} at the same time"));
    ensure!(
        count >= PARALLEL_CREATES_MIN,
        "this takes {PARALLEL_CREATES_MIN} sandboxes, and the target has room for {room}: end others, or raise its limit"
    );
    // The outcome of each, so that none is still being made while the others are freed.
    let made = join_all((0..count).map(|_| cx.fresh())).await;
    let subjects = made.into_iter().collect::<Result<Vec<_>, _>>()?;
    let ids: BTreeSet<_> = subjects.iter().map(|subject| subject.id.clone()).collect();
    expect_eq("different ids", &(ids.len() as u64), &count)?;
    let outputs = join_all(subjects.iter().map(|subject| async {
        subject.put("/workspace/id", subject.id.as_str().as_bytes()).await?;
        subject.run(argv(["cat", "/workspace/id"])).await?.success()
    }))
    .await;
    for (subject, output) in subjects.iter().zip(outputs) {
        expect_eq("what a sandbox reads from its own file", output?.as_str(), subject.id.as_str())?;
    }
    Ok(())
}

async fn unknown_image(cx: &Context) -> Checked {
    let before = cx.target.list().await?.len();
    for image in ["stacyvm.invalid/no-such/image:nowhere", "Not A/valid:::name", "host:latest@sha256:zz"] {
        let order = Order { image: image.to_owned(), ..Order::default() };
        match cx.create(&order).await {
            Err(TargetError::Image(message)) => cx.note(format!("{image}: {message}")),
            // The REST API refuses what cannot be a name before it asks the runtime.
            Err(TargetError::Refused(message)) if image.contains(' ') && message.contains("image") => {
                cx.note(format!("{image}: {message}"));
            }
            Err(other) => return Err(crate::Failure(format!("{image}: expected an image error, got {other:?}"))),
            Ok(_) => return Err(crate::Failure(format!("a sandbox of {image} could be made"))),
        }
    }
    expect_eq("sandboxes afterwards", &cx.target.list().await?.len(), &before)
}

async fn creation_environment(cx: &Context) -> Checked {
    let env = BTreeMap::from([
        ("STACYVM_CHECK".to_owned(), "from creation".to_owned()),
        ("STACYVM_OTHER".to_owned(), "overridden".to_owned()),
    ]);
    let subject = cx.create(&Order { env, ..cx.order() }).await?;
    let mut request = shell("echo $STACYVM_CHECK; echo $STACYVM_OTHER");
    request.env.insert("STACYVM_OTHER".to_owned(), "by the command".to_owned());
    let text = subject.run(request).await?.success()?;
    expect_eq("what the command sees", text.as_str(), "from creation\nby the command\n")
}

async fn destroy_under_load(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let mut running = subject.open(shell("echo started; sleep 300")).await?;
    running.until("it said started", |output| output.stdout.ends_with(b"started\n")).await?;
    cx.target.destroy(&subject.id).await?;
    // Either an error or an exit by signal tells the reader; silence does not.
    match running.finish().await {
        Err(failure) => cx.note(format!("the stream ended with: {failure}")),
        Ok(output) => {
            ensure!(output.exit.code != Some(0), "the command seems to have succeeded: {:?}", output.exit);
            cx.note(format!("the stream ended with {:?}", output.exit));
        }
    }
    Ok(())
}

async fn usage(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    subject.session.ping().await?;
    let (memory_bytes, pids) = cx.target.usage(&subject.id).await?;
    cx.note(format!("{memory_bytes} bytes, {pids} processes"));
    ensure!(memory_bytes > 0, "memory in use is zero");
    ensure!(pids > 0, "no process is counted");
    Ok(())
}

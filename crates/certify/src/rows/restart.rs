//! Rows R13: what a restart of the server finds. Our own server is killed, and
//! things are changed on the host while it is down.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stacyvm_api::{ErrorCode, ProcessStatus, SandboxState};
use stacyvm_client::{Client, SandboxClient};

use super::sandbox::{Remains, remains};
use super::{Looked, Making, Seen, Trouble, daemon, eventually, make, output, shell};
use crate::host::{Container, Daemon};
use crate::run::Run;
use crate::server::Subject;

/// How long the server may take to see what changed; it looks on a timer.
const NOTICE_LIMIT: Duration = Duration::from_mins(2);

const OWN_SERVER: &str = "certify on the server's host, without --stacyvm-url";

pub(crate) async fn look(run: &mut Run<'_>, subject: &mut Subject) {
    let ids = ["R13a", "R13b", "R13c", "R13d"].map(|number| run.own(number));
    if !run.has(&ids[0]) {
        return;
    }
    let (mark, image, target) = (run.mark.clone(), run.options.image.clone(), run.target);
    let making = Making::of(target, &image, &mark);
    let daemon = daemon(run);
    run.look(&ids[0], survives(subject, making)).await;
    if subject.own().is_none() {
        return run.close(&ids[1..], "not available: the server is not ours to break", OWN_SERVER);
    }
    run.look(&ids[1], ended_meanwhile(subject, daemon.as_ref(), making)).await;
    if let Some(daemon) = &daemon {
        run.look(&ids[3], destroyed_before(subject, daemon, making)).await;
    }
    run.look(&ids[2], unexplained(subject, daemon.as_ref(), making)).await;
}

/// (a) A command that began before the restart still runs after it.
async fn survives(subject: &mut Subject, making: Making<'_>) -> Looked {
    let sandbox = make(&subject.client(), making).await?;
    output(&sandbox, "echo kept > /tmp/stacyvm-certify").await?;
    let started = sandbox.exec_background(&shell("sleep 3600")).await?;
    match subject.restart().await {
        None => {
            let _ = sandbox.destroy().await;
            let fix = "pass --restart-command, or certify on the server's host without --stacyvm-url";
            return Ok(Seen::unavailable("not available: nobody said how to restart this server", fix));
        }
        Some(restarted) => restarted?,
    }
    let sandbox = subject.client().sandbox(sandbox.id().clone());
    let kept = output(&sandbox, "cat /tmp/stacyvm-certify").await?;
    super::same("a file from before", &"kept\n".to_owned(), &kept)?;
    let log = sandbox.exec_log().await?;
    let status = log.iter().find(|row| Some(&row.exec_id) == started.exec_id.as_ref()).map(|row| row.status);
    sandbox.destroy().await?;
    let how = if subject.own().is_some() { "killed and started again" } else { "restarted" };
    if making.target.is_remote() && status != Some(ProcessStatus::Running) {
        // Such a backend runs a command for as long as somebody waits for it.
        let fix = "use a backend with the feature `agent`, if commands have to outlive the server";
        return Ok(Seen::warn(
            format!("the server was {how}; the sandbox and its files went on, its command did not"),
            fix,
        ));
    }
    super::same("the command from before", &Some(ProcessStatus::Running), &status)?;
    Ok(Seen::pass(format!("the server was {how}; the sandbox, its files and its command went on")))
}

/// (b) What ended while the server was down is known to have.
async fn ended_meanwhile(subject: &mut Subject, daemon: Option<&Daemon>, making: Making<'_>) -> Looked {
    let sandbox = make(&subject.client(), making).await?;
    output(&sandbox, "true").await?;
    // Reading the log waits until it is written, and with it that it runs.
    sandbox.exec_log().await?;
    let own = subject.own().ok_or("the server is not ours")?;
    own.kill().await;
    let ended = match daemon {
        Some(daemon) => match &daemon.containers_of(sandbox.id().as_str()).await?[..] {
            [container] => daemon.remove(&container.id).await.map_err(Trouble::from),
            _ => Err("the daemon has no container of the sandbox".into()),
        },
        None => end_init(own.init_of(sandbox.id())),
    };
    own.start_again().await?;
    ended?;
    let sandbox = subject.client().sandbox(sandbox.id().clone());
    let mut seen = String::new();
    let known = eventually(NOTICE_LIMIT, async || match sandbox.get().await {
        Ok(record) if matches!(record.state, SandboxState::Error | SandboxState::Destroyed) => {
            Some(format!("{:?}: {}", record.state, record.reason.unwrap_or_default()))
        }
        Err(error) if error.code() == Some(ErrorCode::NotFound) => Some("not found".to_owned()),
        other => {
            seen = format!("{other:?}");
            None
        }
    })
    .await;
    let known = known.ok_or_else(|| format!("after {NOTICE_LIMIT:?} it is still {seen}"))?;
    let _ = sandbox.destroy().await;
    Ok(Seen::pass(format!("the record says {known}")))
}

fn end_init(pid: Option<u32>) -> Result<(), Trouble> {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    let pid = pid.ok_or("the sandbox's first process is not known")?;
    kill_process(pid, Signal::KILL).map_err(|error| format!("its first process could not be ended: {error}").into())
}

/// (c) A server that lost its records takes up or frees what it finds.
async fn unexplained(subject: &mut Subject, daemon: Option<&Daemon>, making: Making<'_>) -> Looked {
    let sandbox = make(&subject.client(), making).await?;
    let remains = remains(subject, daemon, &sandbox);
    let own = subject.own().ok_or("the server is not ours")?;
    own.kill().await;
    own.forget_records();
    own.start_again().await?;
    let client: Client = subject.client();
    let sandbox = client.sandbox(sandbox.id().clone());
    if sandbox.get().await.is_ok_and(|record| record.state == SandboxState::Running) {
        output(&sandbox, "true").await?;
        sandbox.destroy().await?;
        return Ok(Seen::pass("it was taken up, and still runs commands"));
    }
    remains.gone(NOTICE_LIMIT).await?;
    Ok(Seen::pass("no record explained it, and it was freed"))
}

/// (d) A container that says it is of a sandbox which was destroyed.
async fn destroyed_before(subject: &mut Subject, daemon: &Daemon, making: Making<'_>) -> Looked {
    let sandbox: SandboxClient = make(&subject.client(), making).await?;
    let id = sandbox.id().to_string();
    let containers = daemon.containers_of(&id).await?;
    let [container] = &containers[..] else {
        return Err(format!("the daemon has {} containers of {id}", containers.len()).into());
    };
    sandbox.destroy().await?;
    let remains = Remains::Daemon { daemon: daemon.clone(), id: id.clone() };
    remains.gone(NOTICE_LIMIT).await?;
    let own = subject.own().ok_or("the server is not ours")?;
    own.kill().await;
    let planted = plant(daemon, container).await;
    own.start_again().await?;
    let planted = planted?;
    let gone = remains.gone(NOTICE_LIMIT).await;
    if gone.is_err() {
        // Whatever the server makes of it, we do not leave it.
        daemon.remove(&planted).await?;
    }
    gone?;
    Ok(Seen::pass(format!("a container with the labels of {id} was removed at the next start")))
}

async fn plant(daemon: &Daemon, like: &Container) -> Result<String, Trouble> {
    let labels: Value = json!(like.labels);
    let name = like.names.first().map_or("stacyvm-certify", |name| name.trim_start_matches('/')).to_owned();
    Ok(daemon.plant(like, &name, &labels).await?)
}

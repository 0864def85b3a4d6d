//! Servers that are killed, and what the next one makes of what the daemon has
//! (providers 4.3, DK-R13).

use std::fs;
use std::sync::Arc;

use rustix::process::Signal;
use stacyvm_api::{ListQuery, SandboxId, SandboxState};
use stacyvm_client::ExecEvent;

use super::dockerd::{Dockerd, IMAGE};
use super::{containers, start};
use crate::restart::{COUNT, read_on};
use crate::support::{Server, Site, create, eventually, eventually_equal, output, script, small};

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_what_runs_is_taken_up_and_the_rest_is_settled() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    // Another server's, on the same daemon, in all that follows.
    let neighbour = start(&Site::new(), daemon, &[]).await;
    let of_neighbour = create(&neighbour.client(), &small()).await;

    let server = start(&site, daemon, &[]).await;
    let client = server.client();
    let (kept, removed) = (create(&client, &small()).await, create(&client, &small()).await);
    let destroyed = create(&client, &small()).await;
    let destroyed_id = destroyed.id().clone();
    let labels = daemon.docker(&["inspect", "--format", LABELS, destroyed_id.as_str()]);
    destroyed.destroy().await.expect("destroyed");
    let mut stream = kept.exec_stream(&script(COUNT)).await.expect("it starts");
    let counting = stream.exec_id().expect("an id").clone();
    let (mut seen, mut offset) = (Vec::new(), 0);
    while seen.len() < 200 {
        if let Some(ExecEvent::Output { data, offset: end, .. }) = stream.next().await.expect("an event") {
            seen.extend_from_slice(&data);
            offset = end.expect("a position");
        }
    }
    let (kept_id, removed_id) = (kept.id().clone(), removed.id().clone());
    // Reading the log waits until all is written.
    assert_eq!(kept.exec_log().await.expect("its log").len(), 1);
    let site = server.kill();

    // (b) removed, and (d) one whose record says that it was destroyed.
    daemon.docker(&["rm", "--force", removed_id.as_str()]);
    plant(daemon, &destroyed_id, &labels);
    let server = start(&site, daemon, &[("STACYVM_PROVIDERS_UNKNOWN_SANDBOXES", "adopt")]).await;
    let client = server.client();
    let gone = ListQuery { state: Some(SandboxState::Destroyed), ..ListQuery::default() };
    eventually_equal("what was removed is destroyed", &Some("its runtime no longer has it".to_owned()), async || {
        let rows = client.list_all(&gone).await.expect("listed");
        rows.into_iter().find(|row| row.id == removed_id).and_then(|row| row.reason)
    })
    .await;
    eventually_equal("what was destroyed is removed", &vec![kept_id.to_string()], async || containers(&site, daemon))
        .await;

    // (a) it runs on, and so does what runs in it, without a byte lost.
    let kept = client.sandbox(kept_id.clone());
    assert_eq!(kept.get().await.expect("its record").state, SandboxState::Running);
    output(&kept, "touch /tmp/stop").await;
    let (rest, exit) = read_on(&kept, &counting, offset).await;
    let whole = String::from_utf8([seen, rest].concat()).expect("text");
    let lines: Vec<&str> = whole.lines().collect();
    let expected: Vec<String> = (0..lines.len() - 1).map(|i| format!("line {i}")).chain(["end".to_owned()]).collect();
    assert_eq!((lines, exit), (expected.iter().map(String::as_str).collect(), 6));

    // While the server runs, its timer notices too.
    daemon.docker(&["kill", kept_id.as_str()]);
    eventually("its end is noticed", async || {
        let record = kept.get().await.expect("its record");
        (record.state == SandboxState::Error).then_some(())
    })
    .await;
    let vanishing = create(&client, &small()).await.id().clone();
    daemon.docker(&["rm", "--force", vanishing.as_str()]);
    eventually_equal("what was removed is destroyed", &Some("its runtime no longer has it".to_owned()), async || {
        let live = client.list_all(&ListQuery::default()).await.expect("listed");
        let state = live.into_iter().find(|row| row.id == vanishing).map(|row| row.state);
        assert_ne!(state, Some(SandboxState::Error), "it did not fail");
        let rows = client.list_all(&gone).await.expect("listed");
        rows.into_iter().find(|row| row.id == vanishing).and_then(|row| row.reason)
    })
    .await;
    server.run(&["kill", "--all"]).await.ok();
    assert!(server.stop(Signal::TERM).await.status.success());
    assert_eq!(containers(&site, daemon), Vec::<String>::new());

    assert_eq!(output(&of_neighbour, "echo undisturbed").await, "undisturbed");
    of_neighbour.destroy().await.expect("destroyed");
}

/// (c) as after the loss of the database.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_record_knows_is_adopted_or_removed_by_policy() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let server = start(&site, daemon, &[]).await;
    let id = create(&server.client(), &small()).await.id().clone();
    output(&server.client().sandbox(id.clone()), "echo kept > file").await;
    let site = forget(server);
    let server = start(&site, daemon, &[("STACYVM_PROVIDERS_UNKNOWN_SANDBOXES", "adopt")]).await;
    let adopted = server.client().sandbox(id.clone());
    eventually("it is adopted", async || adopted.get().await.ok().filter(|row| row.state == SandboxState::Running))
        .await;
    assert_eq!(adopted.get().await.expect("its record").image, IMAGE);
    assert_eq!(output(&adopted, "cat file").await, "kept");

    let site = forget(server);
    let server = start(&site, daemon, &[]).await;
    eventually_equal("it is removed", &Vec::new(), async || containers(&site, daemon)).await;
    adopted_is_unknown(&server, &id).await;
    assert!(server.stop(Signal::TERM).await.status.success());
}

async fn adopted_is_unknown(server: &Server, id: &SandboxId) {
    let error = server.client().sandbox(id.clone()).get().await.expect_err("there is no such sandbox");
    assert_eq!(error.code(), Some(stacyvm_api::ErrorCode::NotFound), "{error:?}");
}

/// Kills a server and takes its database away.
fn forget(server: Server) -> Arc<Site> {
    let site = server.kill();
    for file in fs::read_dir(site.data_dir()).expect("readable").flatten() {
        if file.file_name().to_string_lossy().starts_with("stacyvm.db") {
            fs::remove_file(file.path()).expect("removed");
        }
    }
    site
}

const LABELS: &str = "{{range $name, $value := .Config.Labels}}--label\n{{$name}}={{$value}}\n{{end}}";

/// A container with a sandbox's name and labels.
fn plant(daemon: &Dockerd, id: &SandboxId, labels: &str) {
    let labels: Vec<&str> = labels.lines().filter(|line| !line.is_empty()).collect();
    let begin = ["run", "--detach", "--network", "none", "--name", id.as_str()];
    daemon.docker(&[&begin, &labels[..], &[IMAGE, "sleep", "600"]].concat());
}

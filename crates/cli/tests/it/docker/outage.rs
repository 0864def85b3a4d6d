//! The daemon is killed and comes back.

use std::sync::Arc;

use serde_json::Value;
use stacyvm_api::{CreateRequest, ErrorCode, ListQuery, SandboxId, SandboxState};
use stacyvm_client::SandboxClient;

use super::dockerd::Dockerd;
use super::{containers, only_docker, start};
use crate::support::{Server, Site, create, eventually, eventually_equal, output, script, sh, small};

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_unavailable_without_their_daemon_and_recover_with_it() {
    let (daemon, near, far) = (Dockerd::start(), Site::new(), Site::new());
    let direct = start(&near, &daemon, &[("STACYVM_PROVIDERS_MOCK_ENABLED", "true")]).await;
    // Every byte of this one goes through the daemon.
    let remote = Server::start_with(&far, |serve| {
        serve.env("DOCKER_HOST", format!("tcp://127.0.0.1:{}", daemon.port())).env("DOCKER_TLS_VERIFY", "1");
        only_docker(serve).env("DOCKER_CERT_PATH", daemon.directory().join("tls"));
    })
    .await;
    let (reached, unreached) = (create(&direct.client(), &small()).await, create(&remote.client(), &small()).await);
    for sandbox in [&reached, &unreached] {
        output(sandbox, "echo kept > file").await;
    }
    let counting = unreached.exec_background(&script("while :; do date >> log; sleep 0.1; done")).await;
    counting.expect("it starts");

    let doomed = create(&direct.client(), &small()).await;

    daemon.kill();
    let error = direct.client().create(&small()).await.expect_err("there is no daemon");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    let all = || async { direct.client().list_all(&ListQuery::default()).await.expect("listed") };
    assert_eq!(all().await.len(), 2, "what was never made leaves nothing behind: {:?}", all().await);
    // Nothing is said to be gone that is not.
    let killed = direct.run(&["kill", doomed.id().as_str()]).await.failed(1);
    assert!(killed.stdout().is_empty(), "{killed}");
    killed.says("still there, in the state destroying").says("the server goes on trying");
    assert_eq!(doomed.get().await.expect("its record").state, SandboxState::Destroying);
    until(&unreached, SandboxState::Unhealthy).await;
    let reason = unreached.get().await.expect("its record").reason.unwrap_or_default();
    assert!(reason.contains("does not answer"), "{reason}");
    let error = unreached.exec(&script("true")).await.expect_err("there is no way in");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    remote.run(&["providers", "docker", "--check"]).await.says("does not answer");
    // An agent on this machine needs no daemon.
    assert_eq!(output(&reached, "cat file").await, "kept");
    assert_eq!(reached.get().await.expect("its record").state, SandboxState::Running);
    // What it uses only the daemon knows; that hides no other, and is said.
    let skipped = format!("skipped {}: ", reached.id());
    direct.run(&["stats"]).await.failed(1).says(&skipped).says("no sandbox says what it uses");
    let elsewhere = CreateRequest { provider: Some("mock".to_owned()), ..CreateRequest::default() };
    let elsewhere = create(&direct.client(), &elsewhere).await;
    let shown = direct.run(&["stats"]).await.ok().says(&skipped);
    assert!(shown.stdout().contains(elsewhere.id().as_str()), "{shown}");
    let shown = direct.run(&["stats", "--json"]).await.ok();
    let named: Value = serde_json::from_str(shown.stderr()).unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert_eq!(named["skipped"]["id"], reached.id().as_str(), "{shown}");

    daemon.restart();
    eventually("what was ordered is done", async || doomed.get().await.is_err().then_some(())).await;
    assert_eq!(direct.log().matches("could not be destroyed").count(), 1, "{}", direct.log());
    until(&unreached, SandboxState::Running).await;
    assert_eq!(sh(&unreached, "cat file; test -n \"$(find log -mmin -1)\"").await.stdout, "kept\n");
    assert_eq!(output(&reached, "cat file").await, "kept");
    let fresh = create(&direct.client(), &small()).await;
    assert_eq!(output(&fresh, "echo fresh").await, "fresh");
    for server in [&direct, &remote] {
        server.run(&["kill", "--all"]).await.ok();
    }
    assert_eq!((containers(&near, &daemon), containers(&far, &daemon)), (Vec::new(), Vec::new()));
}

/// A server that starts while its daemon is away takes its sandboxes up later.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_without_its_daemon_waits_for_it() {
    let (daemon, site) = (Dockerd::start(), Site::new());
    let server = start(&site, &daemon, &[]).await;
    let sandbox = create(&server.client(), &small()).await;
    output(&sandbox, "echo kept > file").await;
    // Reading the log waits until all is written.
    assert_eq!(sandbox.exec_log().await.expect("its log").len(), 1);
    let id = sandbox.id().clone();
    let site = server.kill();
    daemon.kill();
    let server = start(&site, &daemon, &[]).await;
    let sandbox = server.client().sandbox(id);
    until(&sandbox, SandboxState::Unhealthy).await;
    daemon.restart();
    until(&sandbox, SandboxState::Running).await;
    assert_eq!(output(&sandbox, "cat file").await, "kept");
    sandbox.destroy().await.expect("destroyed");
    assert_eq!(containers(&site, &daemon), Vec::<String>::new());
}

/// A server is killed in the middle of a creation, its daemon with it, and the
/// next server finds no daemon: what was half made goes once there is one again.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_half_made_is_removed_when_the_daemon_is_back() {
    let daemon = Dockerd::start();
    // The container that is there but does not run, and the one that does but
    // has not heard from us; neither is a sandbox that could be adopted.
    for (step, policy) in [("create", "remove"), ("start", "remove"), ("create", "adopt"), ("start", "adopt")] {
        let (site, settings) = (Site::new(), [("STACYVM_PROVIDERS_UNKNOWN_SANDBOXES", policy)]);
        let server = start(&site, &daemon, &settings).await;
        let (site, id) = kill_at(step, server, &daemon).await;

        let server = start(&site, &daemon, &settings).await;
        let client = server.client();
        let half_made = client.sandbox(id.clone());
        let record = half_made.get().await.expect("its record");
        assert!(!matches!(record.state, SandboxState::Running | SandboxState::Creating), "{step}: {record:?}");
        daemon.restart();
        let what = format!("{step}, {policy}: nothing is left");
        eventually_equal(&what, &Vec::new(), async || containers(&site, &daemon)).await;
        let gone = ListQuery { state: Some(SandboxState::Destroyed), ..ListQuery::default() };
        let reason = Some("the server ended while it was made".to_owned());
        eventually_equal(&format!("{step}, {policy}: its record is settled"), &reason, async || {
            let rows = client.list_all(&gone).await.expect("listed");
            rows.into_iter().find(|row| row.id == id).and_then(|row| row.reason)
        })
        .await;
        assert_eq!(client.list_all(&ListQuery::default()).await.expect("listed"), []);
        let fresh = create(&client, &small()).await;
        assert_eq!(output(&fresh, "echo fresh").await, "fresh");
        fresh.destroy().await.expect("destroyed");
        assert_eq!(containers(&site, &daemon), Vec::<String>::new());
    }
}

/// Kills a server as soon as its daemon reports this step of a creation, and
/// then the daemon. What was being made.
async fn kill_at(step: &str, server: Server, daemon: &Dockerd) -> (Arc<Site>, SandboxId) {
    // The daemon tells what was before, too: the follower is there once it has
    // heard of this one, and from here on a creation makes one container.
    let before = create(&server.client(), &small()).await;
    let name_before = before.id().to_string();
    before.destroy().await.expect("destroyed");
    let event = format!("event={step}");
    let names = ["events", "--since", "1h", "--format", "{{.Actor.Attributes.name}}"];
    let mut names = daemon.follow(&[&names[..], &["--filter", "type=container", "--filter", &event]].concat());
    assert!(names.any(|name| name == name_before), "the events end");
    let client = server.client();
    let creating = tokio::spawn(async move { client.create(&small()).await });
    let killed = tokio::task::spawn_blocking(move || {
        let name = names.next();
        (server.kill(), name)
    });
    let (site, name) = killed.await.expect("no panic");
    creating.await.expect("no panic").expect_err("it was not finished");
    let name = name.expect("an event");
    assert_eq!(containers(&site, daemon), std::slice::from_ref(&name), "{step}");
    daemon.kill();
    (site, name.parse().expect("the name of a sandbox"))
}

async fn until(sandbox: &SandboxClient, state: SandboxState) {
    eventually(&format!("it is {state:?}"), async || {
        sandbox.get().await.ok().filter(|record| record.state == state).map(|_| ())
    })
    .await;
}

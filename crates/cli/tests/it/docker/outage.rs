//! The daemon is killed and comes back.

use stacyvm_api::{ErrorCode, SandboxState};
use stacyvm_client::SandboxClient;

use super::dockerd::Dockerd;
use super::{containers, only_docker, start};
use crate::support::{Server, Site, create, eventually, output, script, sh, small};

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_unavailable_without_their_daemon_and_recover_with_it() {
    let (daemon, near, far) = (Dockerd::start(), Site::new(), Site::new());
    let direct = start(&near, &daemon, &[]).await;
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

    daemon.kill();
    let error = direct.client().create(&small()).await.expect_err("there is no daemon");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    until(&unreached, SandboxState::Unhealthy).await;
    let reason = unreached.get().await.expect("its record").reason.unwrap_or_default();
    assert!(reason.contains("does not answer"), "{reason}");
    let error = unreached.exec(&script("true")).await.expect_err("there is no way in");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    remote.run(&["providers", "docker", "--check"]).await.says("does not answer");
    // An agent on this machine needs no daemon.
    assert_eq!(output(&reached, "cat file").await, "kept");
    assert_eq!(reached.get().await.expect("its record").state, SandboxState::Running);

    daemon.restart();
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

async fn until(sandbox: &SandboxClient, state: SandboxState) {
    eventually(&format!("it is {state:?}"), async || {
        sandbox.get().await.ok().filter(|record| record.state == state).map(|_| ())
    })
    .await;
}

//! Sandboxes started by an OCI runtime of the host, as configured.

use std::process::Command;

use rustix::process::Signal;
use stacyvm_api::SandboxState;

use crate::support::{Server, Site, create, output, run, small};

const SETTING: &str = "STACYVM_PROVIDERS_OCI_RUNTIME";

fn with(runtime: &str) -> impl FnOnce(&mut Command) {
    move |serve| {
        serve.env(SETTING, runtime);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_runs_commands_with_crun_and_its_sandboxes_outlive_it() {
    let site = Site::with_image();
    let server = Server::start_with(&site, with("crun")).await;
    assert_eq!(server.run(&["run", "--", "echo", "by crun"]).await.ok().stdout(), "by crun\n");
    assert_eq!(server.run(&["run", "--image", "host", "--", "sh", "-c", "exit 7"]).await.status(), Some(7));
    server.run(&["providers", "oci"]).await.ok().says("sandboxes are started by crun");
    let sandbox = create(&server.client(), &small()).await;
    let id = sandbox.id().clone();
    output(&sandbox, "echo kept > file").await;

    let site = server.kill();
    let server = Server::start_with(&site, with("runc")).await;
    let sandbox = server.client().sandbox(id.clone());
    assert_eq!(sandbox.get().await.expect("it is known").state, SandboxState::Running);
    assert_eq!(output(&sandbox, "cat file").await, "kept");
    assert_eq!(server.run(&["run", "--", "echo", "by runc"]).await.ok().stdout(), "by runc\n");
    server.run(&["kill", id.as_str()]).await.ok();
    server.stop(Signal::TERM).await;
    assert_eq!(site.remains(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_cannot_serve_stops_the_server_and_says_what_to_do() {
    let site = Site::new();
    for (runtime, says) in
        [("no-such-runtime", "there is no program `no-such-runtime`"), ("true", "is not an OCI runtime")]
    {
        let mut serve = site.program();
        serve.args(["serve", "--port", "0"]).env(SETTING, runtime);
        let refused = run(serve.into(), b"").await.failed(1).says(says);
        assert!(refused.stderr().contains("providers.oci.runtime"), "{refused}");
    }
    assert_eq!(site.remains(), Vec::<String>::new());
}

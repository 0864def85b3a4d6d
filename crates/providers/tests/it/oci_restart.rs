//! A server that is gone and comes back.

use futures_util::StreamExt;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::{AttachRequest, ProcessEvent, ProcessSelector, Provider, RuntimeState, Session, StartRequest};

use crate::fixture::{Fixture, eventually, spec};
use crate::ordinary_user;

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_and_their_commands_outlive_the_server() {
    let mut fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    let session = fixture.session(&id).await;
    let request = StartRequest {
        argv: ["/bin/sh", "-c", "echo before; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo after"]
            .map(str::to_owned)
            .into(),
        tag: Some("long".into()),
        ..StartRequest::default()
    };
    let mut events = session.start(request).await.expect("started");
    assert!(matches!(events.next().await, Some(Ok(ProcessEvent::Started { .. }))));
    drop((events, session));

    fixture.restart().await;
    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!((listed.len(), &listed[0].id, listed[0].state), (1, &id, RuntimeState::Running));
    assert!(fixture.provider.sweep().await.expect("swept").is_empty(), "a running sandbox is no orphan");
    fixture.output(&id, "touch /tmp/go").await;
    let again = AttachRequest { process: ProcessSelector::Tag("long".into()), offset: 0 };
    let mut events = fixture.session(&id).await.attach(again).await.expect("attached");
    let mut output = Vec::new();
    while let Some(event) = events.next().await {
        match event.expect("an event") {
            ProcessEvent::Stdout(bytes) => output.extend_from_slice(&bytes),
            ProcessEvent::Exited(exit) => assert_eq!(exit.code, Some(0)),
            _ => {}
        }
    }
    assert_eq!(String::from_utf8_lossy(&output), "before\nafter\n");

    let second = fixture.create(&spec()).await;
    if !ordinary_user::is_staged() {
        // A new one does not take the old one's uids; ordinary users have one range.
        let map = "cat /proc/self/uid_map";
        assert_ne!(fixture.output(&id, map).await, fixture.output(&second, map).await);
    }
    for id in [id, second] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_died_while_no_server_ran_is_listed_as_dead() {
    let mut fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    // The agent ends the sandbox when its first process is told to.
    let record = fixture.oci_dir().join("sandboxes").join(id.as_str()).join("init.json");
    let identity: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).expect("readable")).expect("JSON");
    let pid = identity["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    fixture.restart().await;
    eventually("its end is seen", async || {
        fixture.provider.list().await.expect("listed").iter().all(|sandbox| sandbox.state == RuntimeState::Dead)
    })
    .await;

    // Somebody else with its pid is not taken for it.
    let mut imposter = identity.clone();
    imposter["pid"] = std::process::id().into();
    std::fs::write(&record, serde_json::to_vec(&imposter).expect("JSON")).expect("written");
    fixture.restart().await;
    assert_eq!(fixture.provider.list().await.expect("listed")[0].state, RuntimeState::Dead);
    fixture.provider.destroy(&id).await.expect("destroyed, and this process is still here");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sweep_frees_what_no_record_explains() {
    let mut fixture = Fixture::start().await;
    let kept = fixture.create(&spec()).await;
    // As if the server had died right after it made the directory ...
    let half = SandboxId::random();
    std::fs::create_dir(fixture.oci_dir().join("sandboxes").join(half.as_str())).expect("made");
    // ... and as if the record of a running sandbox had been lost.
    let lost = fixture.create(&spec()).await;
    fixture.restart().await;
    let record = fixture.oci_dir().join("sandboxes").join(lost.as_str());
    std::fs::rename(record, fixture.oci_dir().join("trash").join("lost")).expect("moved away");

    let freed = fixture.provider.sweep().await.expect("swept").join("\n");
    assert!(freed.contains(half.as_str()) && freed.contains(lost.as_str()), "{freed}");
    assert!(!freed.contains(kept.as_str()), "{freed}");
    assert!(fixture.provider.sweep().await.expect("swept").is_empty(), "nothing is freed twice");
    assert_eq!(fixture.output(&kept, "echo here").await, "here");
    fixture.provider.destroy(&kept).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_with_different_data_directories_leave_each_other_alone() {
    let (first, second) = (Fixture::start().await, Fixture::start().await);
    let (of_first, of_second) = (first.create(&spec()).await, second.create(&spec()).await);
    assert!(second.provider.sweep().await.expect("swept").is_empty());
    second.provider.destroy(&of_first).await.expect("unknown is fine");
    assert_eq!(second.provider.list().await.expect("listed").len(), 1);
    let map = "cat /proc/self/uid_map";
    if !ordinary_user::is_staged() {
        assert_ne!(first.output(&of_first, map).await, second.output(&of_second, map).await);
    }
    second.provider.destroy(&of_second).await.expect("destroyed");
    second.finish().await;
    assert_eq!(first.output(&of_first, "echo here").await, "here");
    first.provider.destroy(&of_first).await.expect("destroyed");
    first.finish().await;
}

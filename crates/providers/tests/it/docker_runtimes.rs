//! The runtime that is configured is the one a sandbox gets, or there is none.

use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{Ending, Provider as _, ProviderError, RuntimeState, SandboxSpec, Session as _};

use crate::docker_fixture::{self, DockerFixture};
use crate::fixture::{chain, eventually};
use crate::inside;

fn on(runtime: &str) -> DockerFixture {
    DockerFixture::with(|options| runtime.clone_into(&mut options.runtime))
}

/// Any runtime has it: gVisor does not count processes.
fn spec() -> SandboxSpec {
    let mut spec = docker_fixture::spec();
    spec.requested.remove(&Limit::Pids);
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_is_not_what_its_name_says_is_refused() {
    for (runtime, part) in [
        ("kata-fake", "a virtual machine is configured"),
        ("gvisor-fake", "gVisor is configured"),
        ("crun-fake", "the guest runs on gVisor's"),
    ] {
        let fixture = on(runtime);
        let error = fixture.provider.create(&SandboxId::random(), &spec(), &()).await.expect_err(runtime);
        assert!(matches!(error, ProviderError::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{runtime}: {}", chain(&error));
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unregistered_runtime_is_a_finding_before_it_is_a_failure() {
    let fixture = on("kata-runtime");
    let report = fixture.provider.check().await;
    let finding = report.findings.iter().find(|finding| finding.name == "docker.runtime").expect("a finding");
    assert!(!report.is_healthy() && finding.message.contains("knows no runtime `kata-runtime`"), "{finding:?}");
    assert!(finding.message.contains("runsc"), "it names those there are: {finding:?}");
    assert!(finding.fix.as_ref().is_some_and(|fix| fix.contains("daemon.json")), "{finding:?}");
    let error = fixture.provider.create(&SandboxId::random(), &spec(), &()).await.expect_err("unknown");
    assert!(matches!(error, ProviderError::Unavailable { hint: Some(_), .. }), "{error:?}");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_starts_nothing_is_unavailable_and_says_why() {
    let fixture = on("broken");
    let error = fixture.provider.create(&SandboxId::random(), &spec(), &()).await.expect_err("it is broken");
    let ProviderError::Unavailable { message, hint: Some(hint), .. } = &error else { panic!("{error:?}") };
    assert!(message.starts_with("its runtime `broken` did not start the container: "), "{}", chain(&error));
    assert!(!message.contains(&fixture.daemon.directory().display().to_string()), "no place of the host: {message}");
    assert!(hint.contains("--runtime broken"), "{hint}");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gvisor_is_seen_from_inside_and_from_outside() {
    let fixture = on("runsc");
    let id = fixture.create(&spec()).await;
    let runtime = fixture.daemon.docker(&["inspect", "--format", "{{.HostConfig.Runtime}}", id.as_str()]);
    assert_eq!(runtime, "runsc");
    let banner = fixture.output(&id, "dmesg | head -n 1; uname -r").await;
    assert!(banner.contains("Starting gVisor"), "{banner}");
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    assert!(!banner.contains(&host), "{banner}");
    let report = fixture.provider.check().await;
    assert!(report.is_healthy(), "{report:?}");
    let counted = fixture.provider.create(&SandboxId::random(), &docker_fixture::spec(), &()).await;
    let Err(ProviderError::LimitUnsupported { message, hint }) = counted else { panic!("{counted:?}") };
    assert!(message.contains("pids") && hint.contains("counts no processes"), "{message}: {hint}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

/// Why the contract's check of this is left out on gVisor: memory of the guest
/// is memory of the one process that is its kernel.
#[tokio::test(flavor = "multi_thread")]
async fn on_gvisor_a_command_out_of_memory_ends_its_sandbox_and_no_other() {
    let fixture = on("runsc");
    assert!(fixture.provider.capabilities().oom_ends_sandbox);
    let (hungry, bystander) = (fixture.create(&spec()).await, fixture.create(&spec()).await);
    let session = fixture.session(&hungry).await;
    // Whatever is heard of the command itself.
    let _ = session.start(inside::shell("tail /dev/zero")).await;
    let noticed = tokio::time::timeout(std::time::Duration::from_mins(1), fixture.provider.wait(&hungry)).await;
    assert_eq!(noticed.expect("its end is noticed").expect("it ended"), Ending::OutOfMemory);
    // The daemon tells of an end a moment before its list shows it.
    eventually("it is listed as dead, and only it", async || {
        let listed = fixture.provider.list().await.expect("listed");
        let state = |id: &SandboxId| listed.iter().find(|sandbox| sandbox.id == *id).map(|sandbox| sandbox.state);
        (state(&hungry), state(&bystander)) == (Some(RuntimeState::Dead), Some(RuntimeState::Running))
    })
    .await;
    let killed = fixture.daemon.docker(&["inspect", "--format", "{{.State.OOMKilled}}", hungry.as_str()]);
    assert_eq!(killed, "true", "by the host's kernel");
    assert!(matches!(fixture.provider.connect(&hungry).await, Err(ProviderError::NotFound(_))));
    assert_eq!(fixture.output(&bystander, "echo fine").await, "fine");
    for id in [&hungry, &bystander] {
        fixture.provider.destroy(id).await.expect("destroyed");
    }
    fixture.finish().await;
}

/// A runtime may keep what a sandbox writes where the daemon's archive calls do
/// not see it. Ours never leave the sandbox.
#[tokio::test(flavor = "multi_thread")]
async fn on_gvisor_files_of_the_api_and_of_commands_are_the_same_at_once() {
    let fixture = on("runsc");
    let id = fixture.create(&spec()).await;
    let session = fixture.session(&id).await;
    for round in 0..20 {
        let path = format!("/workspace/{round}");
        let text = format!("by the API, {round}");
        let content: stacyvm_sandbox::ByteStream = Box::pin(futures_util::stream::iter([Ok(text.clone().into())]));
        session.write(&path, content, stacyvm_sandbox::WriteOptions::default()).await.expect("written");
        assert_eq!(inside::output(&session, &format!("cat {path}; printf {round} > {path}")).await, text);
        assert_eq!(session.stat(&path).await.expect("there").size, round.to_string().len() as u64);
        inside::output(&session, &format!("mv {path} {path}.moved")).await;
        assert!(session.stat(&path).await.is_err());
        session.remove(&format!("{path}.moved"), stacyvm_sandbox::RemoveOptions::default()).await.expect("removed");
    }
    assert_eq!(inside::output(&session, "ls /workspace").await, "");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

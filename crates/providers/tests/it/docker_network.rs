//! What sandboxes reach, on the networks of the daemon.

use stacyvm_api::{NetworkMode, SandboxId};
use stacyvm_providers::docker::Network;
use stacyvm_sandbox::{DialTarget, NetworkPolicy, Provider as _, ProviderError, SandboxSpec, Session as _};
use tokio::io::AsyncReadExt as _;

use crate::docker_fixture::{DockerFixture, spec};
use crate::fixture::eventually;
use crate::inside::shell;

fn connected() -> SandboxSpec {
    SandboxSpec { network: NetworkPolicy { mode: NetworkMode::Bridge, allow: Vec::new() }, ..spec() }
}

fn on(network: Network) -> DockerFixture {
    DockerFixture::with(|options| options.network = network)
}

/// A server inside is reached through the agent, also where nothing else
/// reaches anything.
async fn answers(fixture: &DockerFixture, id: &SandboxId) {
    let session = fixture.session(id).await;
    let serve = shell("while :; do echo hello | nc -l -p 7000; done");
    let _running = session.start(serve).await.expect("it starts");
    eventually("it listens", async || session.ports().await.expect("ports") == [7000]).await;
    let mut stream = session.dial(DialTarget::Port(7000)).await.expect("dialed");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_network_joins_sandboxes_and_one_without_network_is_alone() {
    let name = format!("named-{}", SandboxId::random());
    let fixture = on(Network::Named(name.clone()));
    let early = fixture.provider.check().await;
    let finding = early.findings.iter().find(|finding| finding.name == "docker.network").expect("a finding");
    assert!(
        !early.is_healthy() && finding.fix.as_deref() == Some(&*format!("docker network create {name}")),
        "{early:?}"
    );
    let error = fixture.provider.create(&SandboxId::random(), &connected(), &()).await.expect_err("no such network");
    assert!(matches!(&error, ProviderError::Unavailable { hint: Some(hint), .. } if hint.contains(&name)), "{error:?}");
    assert_eq!(fixture.remains(), Vec::<String>::new(), "what could not be started is removed");

    fixture.daemon.docker(&["network", "create", "--internal", "--subnet", "100.127.127.0/28", &name]);
    assert!(fixture.provider.check().await.is_healthy());
    let (one, two) = (fixture.create(&connected()).await, fixture.create(&connected()).await);
    let alone = fixture.create(&spec()).await;
    let networks = fixture.daemon.docker(&["inspect", "--format", "{{json .NetworkSettings.Networks}}", one.as_str()]);
    assert!(networks.contains(&format!("\"{name}\"")), "{networks}");
    let address = fixture.output(&one, "hostname -i 2>/dev/null || ip -4 -o addr show eth0").await;
    let address = address.split([' ', '/']).find(|word| word.starts_with("100.127.")).expect("an address").to_owned();
    answers(&fixture, &one).await;
    assert_eq!(fixture.output(&two, &format!("nc -w 5 {address} 7000 </dev/null")).await, "hello");
    assert_eq!(fixture.output(&alone, "ls /sys/class/net").await, "lo");
    answers(&fixture, &alone).await;

    let other =
        SandboxSpec { network: NetworkPolicy { mode: NetworkMode::Named("other".into()), allow: vec![] }, ..spec() };
    let error = fixture.provider.create(&SandboxId::random(), &other, &()).await.expect_err("not this one");
    assert!(matches!(error, ProviderError::InvalidSpec { .. }), "{error:?}");
    for id in [&one, &two, &alone] {
        fixture.provider.destroy(id).await.expect("destroyed");
    }
    fixture.daemon.docker(&["network", "rm", &name]);
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_network_none_can_be_asked_for() {
    let fixture = on(Network::None);
    assert!(!fixture.provider.capabilities().network);
    let error = fixture.provider.create(&SandboxId::random(), &connected(), &()).await.expect_err("there is none");
    assert!(matches!(&error, ProviderError::InvalidSpec { message } if message.contains("no network")), "{error:?}");
    let allowed = NetworkPolicy { mode: NetworkMode::None, allow: vec!["10.0.0.0/8".into()] };
    let error = fixture.provider.create(&SandboxId::random(), &SandboxSpec { network: allowed, ..spec() }, &()).await;
    assert!(matches!(error, Err(ProviderError::InvalidSpec { .. })), "{error:?}");
    fixture.finish().await;
}

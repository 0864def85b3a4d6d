//! Making and destroying sandboxes, and that nothing stays.

use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{Ending, Provider as _, ProviderError, RuntimeState};

use crate::docker_fixture::{DockerFixture, spec};
use crate::fixture::eventually;
use crate::inside;

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_made_used_and_destroyed() {
    let fixture = DockerFixture::start();
    let id = SandboxId::random();
    let created = fixture.provider.create(&id, &spec(), &()).await.expect("created");
    assert_eq!(created.limits.enforced, [Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids]);
    assert_eq!(created.limits.unenforced, [Limit::Disk]);
    assert!(created.image_digest.is_some_and(|digest| digest.starts_with("sha256:")));

    assert_eq!(fixture.output(&id, "echo $GREETING; pwd; hostname; id -u").await, "hello\n/workspace\nbox\n0");
    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!(listed.iter().map(|sandbox| &sandbox.id).collect::<Vec<_>>(), [&id]);
    assert_eq!((listed[0].state, listed[0].image.as_deref()), (RuntimeState::Running, Some("alpine:latest")));
    assert_eq!(listed[0].metadata["test"], "yes");

    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.provider.destroy(&id).await.expect("destroyed again");
    assert!(fixture.provider.list().await.expect("listed").is_empty());
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(missing)) if missing == id));
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_used_once_at_a_time() {
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    let again = fixture.provider.create(&id, &spec(), &()).await;
    assert!(matches!(again, Err(ProviderError::InvalidSpec { .. })), "{again:?}");
    assert_eq!(fixture.output(&id, "echo still here").await, "still here");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_on_the_daemon_is_left_alone() {
    let (ours, theirs) = (DockerFixture::start(), DockerFixture::start());
    let of_theirs = theirs.create(&spec()).await;
    // A container with the name of a sandbox, and one with all labels but ours.
    let (plain, labelled) = (SandboxId::random(), SandboxId::random());
    ours.daemon.docker(&["create", "--name", plain.as_str(), "alpine:latest", "true"]);
    let label = format!("stacyvm.sandbox={labelled}");
    let other = ["create", "--name", labelled.as_str(), "--label", "stacyvm=true", "--label", &label];
    ours.daemon.docker(&[&other[..], &["alpine:latest", "true"]].concat());

    assert!(ours.provider.list().await.expect("listed").is_empty());
    assert_eq!(ours.provider.sweep().await.expect("swept"), Vec::<String>::new());
    for id in [&of_theirs, &plain, &labelled] {
        ours.provider.destroy(id).await.expect("unknown is fine");
        for missing in [
            ours.provider.connect(id).await.err(),
            ours.provider.usage(id).await.err(),
            ours.provider.pause(id).await.err(),
        ] {
            assert!(matches!(missing, Some(ProviderError::NotFound(_))), "{missing:?}");
        }
        assert_eq!(ours.provider.wait(id).await.expect("it is not there"), Ending::Removed);
        ours.daemon.docker(&["inspect", id.as_str()]);
    }
    ours.daemon.docker(&["rm", plain.as_str(), labelled.as_str()]);
    assert_eq!(theirs.output(&of_theirs, "echo alive").await, "alive");
    theirs.provider.destroy(&of_theirs).await.expect("destroyed");
    ours.finish().await;
    theirs.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_creation_says_why_and_leaves_nothing() {
    let fixture = DockerFixture::start();
    let create = async |change: fn(&mut stacyvm_sandbox::SandboxSpec)| {
        let mut wanted = spec();
        change(&mut wanted);
        fixture.provider.create(&SandboxId::random(), &wanted, &()).await.expect_err("refused")
    };
    let unknown_user = create(|spec| spec.user = Some("nobody-of-this-name".into())).await;
    assert!(
        matches!(&unknown_user, ProviderError::InvalidSpec { message } if message.contains("nobody-of-this-name")),
        "{unknown_user:?}"
    );
    let disk = create(|spec| {
        spec.disk.size_mib = Some(64);
        spec.requested.insert(Limit::Disk);
    });
    let disk = disk.await;
    assert!(matches!(disk, ProviderError::LimitUnsupported { .. }), "{disk:?}");
    let in_memory = create(|spec| spec.disk.in_memory = true).await;
    assert!(matches!(in_memory, ProviderError::InvalidSpec { .. }), "{in_memory:?}");
    let network = create(|spec| spec.network.mode = stacyvm_api::NetworkMode::Named("other".into())).await;
    assert!(matches!(&network, ProviderError::InvalidSpec { message } if message.contains("`other`")), "{network:?}");
    let malformed = create(|spec| spec.image = "NOT AN IMAGE".into()).await;
    assert!(matches!(malformed, ProviderError::Image { .. }), "{malformed:?}");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_nobody_waits_for_is_undone() {
    let fixture = DockerFixture::start();
    for delay_ms in [0, 20, 100, 250, 400] {
        let (id, wanted) = (SandboxId::random(), spec());
        let creating = fixture.provider.create(&id, &wanted, &());
        if let Ok(made) = tokio::time::timeout(std::time::Duration::from_millis(delay_ms), creating).await {
            made.expect("it was quick enough");
            fixture.provider.destroy(&id).await.expect("destroyed");
        }
    }
    eventually("what was begun is gone", async || fixture.remains().is_empty()).await;
    // Not before the last of them could have begun.
    fixture.provider.shutdown().await;
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_ends_by_itself_is_noticed_and_listed_as_dead() {
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    let waiting = tokio::spawn({
        let (provider, id) = (fixture.provider.clone(), id.clone());
        async move { provider.wait(&id).await }
    });
    fixture.daemon.docker(&["kill", id.as_str()]);
    assert_eq!(waiting.await.expect("no panic").expect("it ended"), Ending::Died);
    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!(listed[0].state, RuntimeState::Dead);
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(_))));
    assert_eq!(fixture.provider.wait(&id).await.expect("it has ended already"), Ending::Died);
    fixture.provider.destroy(&id).await.expect("destroyed");
    // One that somebody else removes has not died.
    let id = fixture.create(&spec()).await;
    let waiting = tokio::spawn({
        let (provider, id) = (fixture.provider.clone(), id.clone());
        async move { provider.wait(&id).await }
    });
    fixture.daemon.docker(&["rm", "--force", id.as_str()]);
    assert_eq!(waiting.await.expect("no panic").expect("it ended"), Ending::Removed);
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_and_pauses_follow_what_runs() {
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    let idle = fixture.provider.usage(&id).await.expect("usage");
    assert_eq!((idle.memory_limit_bytes, idle.pids_limit), (256 << 20, 64));
    fixture.output(&id, "(sleep 60 & sleep 60 & sleep 60 &) ; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done").await;
    let busy = fixture.provider.usage(&id).await.expect("usage");
    assert!(busy.pids >= idle.pids + 3, "{idle:?} {busy:?}");
    assert!(busy.cpu_usec > idle.cpu_usec && busy.memory_bytes > 0, "{idle:?} {busy:?}");

    fixture.provider.pause(&id).await.expect("paused");
    assert_eq!(fixture.provider.list().await.expect("listed")[0].state, RuntimeState::Paused);
    fixture.provider.resume(&id).await.expect("resumed");
    assert_eq!(fixture.output(&id, "echo on").await, "on");
    fixture.provider.pause(&id).await.expect("paused");
    fixture.provider.destroy(&id).await.expect("a paused one can be destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_for_want_of_memory_are_counted() {
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    assert_eq!(fixture.provider.usage(&id).await.expect("usage").oom_kills, 0);
    let ran = inside::run(&fixture.session(&id).await, inside::shell("tail /dev/zero")).await;
    assert_eq!(ran.exit.signal, Some(9), "{ran:?}");
    eventually("it is counted", async || fixture.provider.usage(&id).await.expect("usage").oom_kills > 0).await;
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

//! Making and destroying sandboxes, and that nothing stays.

use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{Provider, ProviderError, RuntimeState};

use crate::fixture::{Fixture, eventually, limits_hold, spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_made_used_and_destroyed() {
    let fixture = Fixture::start().await;
    let id = SandboxId::random();
    let created = fixture.provider.create(&id, &spec(), &()).await.expect("created");
    let of_groups = [Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids];
    let (held, not_held) = if limits_hold() { (&of_groups[..], &[][..]) } else { (&[][..], &of_groups[..]) };
    assert_eq!(created.limits.enforced, held);
    assert_eq!(created.limits.unenforced, [not_held, &[Limit::Disk]].concat());
    assert_eq!(created.limits.disk_backend.as_deref(), Some("none"));
    assert!(created.image_digest.is_some_and(|digest| digest.starts_with("host:")));

    assert_eq!(fixture.output(&id, "echo $GREETING; pwd; hostname; id -u").await, "hello\n/workspace\nbox\n0");
    assert_eq!(fixture.output(&id, "python3 -c 'print(6*7)'").await, "42");

    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!(listed.iter().map(|sandbox| &sandbox.id).collect::<Vec<_>>(), [&id]);
    assert_eq!((listed[0].state, listed[0].image.as_deref()), (RuntimeState::Running, Some("host")));
    assert_eq!(listed[0].metadata["test"], "yes");

    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.provider.destroy(&id).await.expect("destroyed again");
    assert!(fixture.provider.list().await.expect("listed").is_empty());
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(missing)) if missing == id));
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_used_once_at_a_time() {
    let fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    let again = fixture.provider.create(&id, &spec(), &()).await;
    assert!(matches!(again, Err(ProviderError::InvalidSpec { .. })), "{again:?}");
    assert_eq!(fixture.output(&id, "echo still here").await, "still here");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_ends_by_itself_is_noticed_and_listed_as_dead() {
    let fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    let waiting = tokio::spawn({
        let (provider, id) = (fixture.provider.clone(), id.clone());
        async move { provider.wait(&id).await }
    });
    kill_init(&fixture, &id);
    waiting.await.expect("no panic").expect("it ended");
    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!(listed[0].state, RuntimeState::Dead);
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(_))));
    assert!(fixture.provider.sweep().await.expect("swept").is_empty(), "what is listed is no orphan");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_creation_leaves_nothing() {
    let fixture = Fixture::start().await;
    let mut wanted = spec();
    wanted.user = Some("nobody-of-this-name".into());
    let id = SandboxId::random();
    let failed = fixture.provider.create(&id, &wanted, &()).await;
    assert!(
        matches!(&failed, Err(ProviderError::InvalidSpec { message }) if message.contains("nobody-of-this-name")),
        "{failed:?}"
    );
    assert!(fixture.provider.list().await.expect("listed").is_empty());
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_nobody_waits_for_is_undone() {
    let fixture = Fixture::start().await;
    for delay_micros in [0, 500, 1_000, 2_000, 4_000, 8_000] {
        let id = SandboxId::random();
        let wanted = spec();
        let creating = fixture.provider.create(&id, &wanted, &());
        let _ = tokio::time::timeout(std::time::Duration::from_micros(delay_micros), creating).await;
        // It may have been quick enough; then it is there and goes.
        if fixture.provider.list().await.expect("listed").iter().any(|sandbox| sandbox.id == id) {
            fixture.provider.destroy(&id).await.expect("destroyed");
        }
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_are_made_and_freed() {
    const COUNT: usize = 40;
    let fixture = Fixture::start().await;
    let mut making = tokio::task::JoinSet::new();
    for _ in 0..COUNT {
        let provider = fixture.provider.clone();
        making.spawn(async move {
            let id = SandboxId::random();
            provider.create(&id, &spec(), &()).await.map(|_| id)
        });
    }
    let ids: Vec<SandboxId> = making.join_all().await.into_iter().collect::<Result<_, _>>().expect("all are made");
    assert_eq!(fixture.provider.list().await.expect("listed").len(), COUNT);
    assert_eq!(fixture.output(&ids[COUNT - 1], "echo $GREETING").await, "hello");
    let mut ending = tokio::task::JoinSet::new();
    for id in ids {
        let provider = fixture.provider.clone();
        ending.spawn(async move { provider.destroy(&id).await });
    }
    assert!(ending.join_all().await.iter().all(Result::is_ok));
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_follows_what_runs() {
    let fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    let idle = fixture.provider.usage(&id).await.expect("usage");
    let limits = if limits_hold() { (256 << 20, 64) } else { (0, 0) };
    assert_eq!((idle.memory_limit_bytes, idle.pids_limit), limits);
    fixture.output(&id, "(sleep 60 & sleep 60 & sleep 60 &) ; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done").await;
    let busy = fixture.provider.usage(&id).await.expect("usage");
    assert!(busy.pids >= idle.pids + 3, "{idle:?} {busy:?}");
    assert!(busy.memory_bytes > 0, "{idle:?} {busy:?}");
    // Without groups, what the command used went with it.
    assert!(busy.cpu_usec > idle.cpu_usec || !limits_hold(), "{idle:?} {busy:?}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    assert!(matches!(fixture.provider.usage(&id).await, Err(ProviderError::NotFound(_))));
    fixture.finish().await;
}

/// Kills a sandbox's first process from outside.
fn kill_init(fixture: &Fixture, id: &SandboxId) {
    let identity = std::fs::read(fixture.oci_dir().join("sandboxes").join(id.as_str()).join("init.json"));
    let identity: serde_json::Value = serde_json::from_slice(&identity.expect("readable")).expect("JSON");
    let pid = i32::try_from(identity["pid"].as_i64().expect("a pid")).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_spawner_is_replaced_and_its_sandboxes_live_on() {
    let fixture = Fixture::start().await;
    let id = fixture.create(&spec()).await;
    let old = fixture.provider.spawner_pid().await.expect("a spawner");
    let pid = rustix::process::Pid::from_raw(i32::try_from(old).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    eventually("the loss is noticed", async || fixture.provider.spawner_pid().await != Some(old)).await;
    let second = fixture.create(&spec()).await;
    assert_ne!(fixture.provider.spawner_pid().await, Some(old));
    assert_eq!(fixture.output(&id, "echo first").await, "first");
    assert_eq!(fixture.output(&second, "echo second").await, "second");
    for id in [id, second] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

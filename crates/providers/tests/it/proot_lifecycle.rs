//! From creation to the last process, across restarts of the server.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use stacyvm_api::{FindingLevel, NetworkMode, SandboxId};
use stacyvm_providers::proot::{Permission, ProotOptions, ProotProvider};
use stacyvm_sandbox::{Provider as _, ProviderError, RuntimeState, SandboxSpec, Session as _, StartRequest};

use crate::fixture::{eventually, eventually_empty};
use crate::ordinary_user::{Circumstances, as_ordinary_user};
use crate::proot_fixture::{Apart, Proot, argv, traced_by};

/// What runs on whatever its parents, session and environment become.
const ESCAPEES: &str = "setsid sleep 3001 >/dev/null 2>&1 & (setsid sh -c 'sleep 3002 & sleep 3002 &' &) ; \
                        env -i /bin/setsid /bin/sh -c 'cd /proc; trap \"\" TERM HUP INT; /bin/sleep 3003 & wait' & \
                        sleep 0.3; ls /proc >/dev/null; echo started";

async fn nothing_survives(apart: Apart) {
    let fixture = Proot::start(apart).await;
    let id = fixture.create(&fixture.spec()).await;
    assert!(fixture.root(&id).join("workspace").is_dir());
    assert!(fixture.output(&id, ESCAPEES).await.ends_with("started"));
    let proot = fixture.pid(&id);
    let traced = || traced_by(proot);
    eventually("everything runs", async || traced().len() >= 6).await;
    let seen = traced();
    fixture.provider.destroy(&id).await.expect("destroyed");
    eventually_empty("every process ends", async || {
        seen.iter().filter(|pid| is_alive(**pid)).map(|pid| format!("process {pid}")).collect()
    })
    .await;
    assert!(!fixture.root(&id).exists());
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(_))));
    fixture.finish().await;
}

fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| !text.contains("State:\tZ"))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_survives_with_namespaces() {
    nothing_survives(Apart::Namespaces).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_survives_without_namespaces() {
    nothing_survives(Apart::Shared).await;
}

#[test]
fn nothing_survives_of_an_ordinary_user() {
    const NAME: &str = "proot_lifecycle::nothing_survives_of_an_ordinary_user";
    as_ordinary_user(NAME, Circumstances::ALONE, async || nothing_survives(Apart::Shared).await);
}

/// PRoot ended by somebody: its guests are found all the same.
#[test]
fn guests_without_their_proot_are_ended() {
    const NAME: &str = "proot_lifecycle::guests_without_their_proot_are_ended";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::start(Apart::Shared).await;
        let id = fixture.create(&fixture.spec()).await;
        assert!(fixture.output(&id, ESCAPEES).await.ends_with("started"));
        let proot = rustix::process::Pid::from_raw(fixture.pid(&id)).expect("a number");
        rustix::process::kill_process(proot, rustix::process::Signal::KILL).expect("killed");
        fixture.provider.wait(&id).await.expect("it ends");
        let listed = fixture.provider.list().await.expect("a list");
        assert_eq!(listed.iter().map(|found| found.state).collect::<Vec<_>>(), [RuntimeState::Dead]);
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

/// Guests are the agent's own user here. Nobody can work with a sandbox without
/// one, whoever finds it so.
#[test]
fn a_sandbox_whose_agent_was_killed_ends() {
    const NAME: &str = "proot_lifecycle::a_sandbox_whose_agent_was_killed_ends";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let mut fixture = Proot::start(Apart::Shared).await;
        for by_its_guest in [true, false] {
            let id = fixture.create(&fixture.spec()).await;
            assert!(fixture.output(&id, ESCAPEES).await.ends_with("started"));
            let proot = fixture.pid(&id);
            let children =
                || std::fs::read_to_string(format!("/proc/{proot}/task/{proot}/children")).expect("readable");
            let agent: i32 = children().trim().parse().expect("one child");
            if by_its_guest {
                let kill = argv(&["/bin/sh", "-c", &format!("kill -9 {agent}")]);
                // Its own command does not hear how it ended.
                drop(fixture.session(&id).await.start(kill).await);
            } else {
                fixture.provider.shutdown().await;
                let agent = rustix::process::Pid::from_raw(agent).expect("a number");
                rustix::process::kill_process(agent, rustix::process::Signal::KILL).expect("killed");
                eventually("PRoot has seen it", async || children().trim().is_empty()).await;
                fixture.restart().await;
            }
            eventually("it is dead", async || {
                let listed = fixture.provider.list().await.expect("a list");
                listed.iter().map(|found| found.state).collect::<Vec<_>>() == [RuntimeState::Dead]
            })
            .await;
            fixture.provider.wait(&id).await.expect("it has ended");
            fixture.provider.destroy(&id).await.expect("destroyed");
        }
        fixture.finish().await;
    });
}

#[test]
fn a_guest_cannot_end_its_proot_or_everybody() {
    const NAME: &str = "proot_lifecycle::a_guest_cannot_end_its_proot_or_everybody";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::start(Apart::Shared).await;
        let id = fixture.create(&fixture.spec()).await;
        let proot = fixture.pid(&id);
        let ran = fixture.sh(&id, &format!("kill -9 {proot}; kill -9 -{proot}; kill -9 -1; echo still here")).await;
        assert_eq!(ran.stdout, "still here\n", "{ran:?}");
        assert!(is_alive(proot));
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_taken_up_by_the_next_server() {
    for apart in [Apart::Namespaces, Apart::Shared] {
        let mut fixture = Proot::start(apart).await;
        let id = SandboxId::random();
        let created = fixture.provider.create(&id, &fixture.spec(), &()).await.expect("a sandbox");
        fixture.output(&id, "echo kept >/workspace/file; (sleep 3004 >/dev/null 2>&1 &)").await;
        let pid = fixture.pid(&id);
        fixture.restart().await;
        assert_eq!(fixture.provider.sweep().await.expect("a sweep"), Vec::<String>::new());
        let listed = fixture.provider.list().await.expect("a list");
        assert_eq!(
            listed.iter().map(|found| (&found.id, found.state)).collect::<Vec<_>>(),
            [(&id, RuntimeState::Running)]
        );
        assert_eq!(listed[0].metadata, BTreeMap::from([("test".to_owned(), "yes".to_owned())]));
        assert_eq!(listed[0].limits, Some(created.limits));
        assert_eq!(fixture.output(&id, "cat /workspace/file").await, "kept");
        assert_eq!(fixture.pid(&id), pid);
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_swept() {
    let mut fixture = Proot::start(Apart::Namespaces).await;
    // A creation that got as far as half a root.
    let half = fixture.sandboxes().join(SandboxId::random().as_str());
    std::fs::create_dir_all(half.join("root/bin")).expect("made");
    fixture.restart().await;
    let freed = fixture.provider.sweep().await.expect("a sweep");
    assert!(freed.iter().any(|line| line.contains("whose creation never finished")), "{freed:?}");
    fixture.finish().await;
}

/// P01 to P07 of the published provider, as far as the contract suite does not
/// already say it.
#[tokio::test(flavor = "multi_thread")]
async fn it_does_what_the_published_provider_did() {
    let fixture = Proot::with(Apart::Namespaces, |options| options.max_sandboxes = 1).await;
    assert_eq!(fixture.provider.name(), "proot");
    let id = fixture.create(&fixture.spec()).await;
    let command = std::fs::read(format!("/proc/{}/cmdline", fixture.pid(&id))).expect("it runs");
    let command: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    for flag in ["-0", "-r", "-b", "-w"] {
        assert!(command.iter().any(|argument| argument == flag), "{flag}: {command:?}");
    }
    assert!(!command.iter().any(|argument| argument.contains("sh")), "{command:?}");

    let another = fixture.provider.create(&SandboxId::random(), &fixture.spec(), &()).await;
    assert!(
        matches!(&another, Err(ProviderError::Exhausted { message }) if message.contains("max_sandboxes")),
        "{another:?}"
    );

    let request = StartRequest { workdir: Some("/etc".into()), ..argv(&["pwd"]) };
    assert_eq!(fixture.run(&id, request).await.stdout, "/etc\n");
    assert_eq!(fixture.output(&id, "pwd; echo $GREETING; id -u").await, "/workspace\nhello\n0");
    assert_eq!(fixture.sh(&id, "exit 42").await.exit.code, Some(42));
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.provider.destroy(&id).await.expect("again");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_proot_says_what_to_do() {
    let fixture = Proot::start(Apart::Namespaces).await;
    let mut options = fixture.options.clone();
    fixture.finish().await;
    let data = tempfile::tempdir().expect("a directory");
    options.data_dir = data.path().to_owned();
    options.program = "no-such-proot".into();
    options.rootfs = data.path().join("nothing");
    let provider = ProotProvider::open(&options).await.expect("it opens");
    let report = provider.check().await;
    let failed: Vec<_> = report.findings.iter().filter(|finding| finding.level == FindingLevel::Failure).collect();
    assert_eq!(
        failed.iter().map(|finding| finding.name.as_str()).collect::<Vec<_>>(),
        ["proot.binary", "proot.rootfs"]
    );
    assert!(failed.iter().all(|finding| finding.fix.is_some()));
    let build = failed[1].fix.as_deref().expect("a command");
    assert!(build.starts_with("stacyvm rootfs build ") && build.ends_with("/nothing"), "{build}");
    provider.shutdown().await;
}

/// A sandbox is a copy of the root, with everything below it.
#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_holds_its_own_copies_is_refused() {
    let data = tempfile::tempdir().expect("a directory");
    let link = data.path().join("link");
    std::os::unix::fs::symlink(data.path(), &link).expect("a link");
    for (rootfs, why) in [
        (Path::new("/"), "this host's own root"),
        (data.path(), "below providers.proot.rootfs_path"),
        (&link, "below providers.proot.rootfs_path"),
    ] {
        let options = ProotOptions { rootfs: rootfs.to_owned(), ..ProotOptions::new(data.path().join("data")) };
        let refused = ProotProvider::open(&options).await.err().expect("it is refused");
        let ProviderError::Unavailable { message, hint: Some(hint), .. } = &refused else { panic!("{refused:?}") };
        assert!(message.contains(why) && hint.contains("stacyvm rootfs build"), "{message} ({hint})");
    }
    // A root below the data directory is none of its copies.
    let own = data.path().join("data/rootfs");
    std::fs::create_dir_all(&own).expect("a directory");
    let launcher = Proot::launcher();
    let options = ProotOptions { rootfs: own, launcher, ..ProotOptions::new(data.path().join("data")) };
    ProotProvider::open(&options).await.expect("it opens").shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_network_needs_a_server_with_a_key() {
    let permission = Permission::default();
    let fixture = Proot::start(Apart::Shared).await;
    let mut options = fixture.options.clone();
    fixture.finish().await;
    let data = tempfile::tempdir().expect("a directory");
    options.data_dir = data.path().to_owned();
    options.workspace_base = None;
    options.shared_network = permission.clone();
    let provider = ProotProvider::open(&options).await.expect("it opens");
    let spec = |mode| SandboxSpec {
        network: stacyvm_sandbox::NetworkPolicy { mode, allow: Vec::new() },
        expires_at: stacyvm_api::Timestamp::now() + Duration::from_mins(1),
        ..plain_spec()
    };
    let refused = provider.create(&SandboxId::random(), &spec(NetworkMode::Named("host".into())), &()).await;
    assert!(
        matches!(&refused, Err(ProviderError::Unavailable { hint: Some(hint), .. }) if hint.contains("stacyvm key create")),
        "{refused:?}"
    );
    let none = provider.create(&SandboxId::random(), &spec(NetworkMode::None), &()).await;
    assert!(matches!(none, Err(ProviderError::InvalidSpec { .. })), "{none:?}");
    let failure = |report: stacyvm_sandbox::HealthReport| {
        report.findings.into_iter().find(|f| f.name == "proot.namespaces").expect("a finding").level
    };
    assert_eq!(failure(provider.check().await), FindingLevel::Failure);
    permission.give();
    assert_eq!(failure(provider.check().await), FindingLevel::Warning);
    provider.shutdown().await;
}

fn plain_spec() -> SandboxSpec {
    SandboxSpec {
        image: "rootfs".into(),
        memory_mib: 64,
        vcpus: 0.0,
        pids_limit: 16,
        disk: stacyvm_sandbox::DiskRequest { size_mib: None, in_memory: false },
        requested: [].into(),
        network: stacyvm_sandbox::NetworkPolicy { mode: NetworkMode::None, allow: Vec::new() },
        env: BTreeMap::new(),
        user: None,
        hostname: "box".into(),
        metadata: BTreeMap::new(),
        allow_unenforced: false,
        expires_at: stacyvm_api::Timestamp::now(),
        generation: 1,
        agent_token: "t".into(),
    }
}

/// A server on the host is not dialed for a sandbox that shares its network.
#[tokio::test(flavor = "multi_thread")]
async fn ports_of_the_host_are_not_reached() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let fixture = Proot::start(Apart::Shared).await;
    let id = fixture.create(&fixture.spec()).await;
    let session = fixture.session(&id).await;
    let dialed = session.dial(stacyvm_sandbox::DialTarget::Port(port)).await.map(drop);
    assert!(matches!(dialed, Err(stacyvm_sandbox::SessionError::PortClosed(_))), "{dialed:?}");
    assert_eq!(session.ports().await.expect("a list"), Vec::<u16>::new());
    drop(session);
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

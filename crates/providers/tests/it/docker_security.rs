//! What a sandbox may do, and what of it can be seen.

use std::collections::BTreeMap;

use stacyvm_providers::docker::{CapabilitySet, Network, Seccomp};
use stacyvm_sandbox::{Connection, Provider as _, SandboxSpec, Session as _, StartRequest};

use crate::docker_fixture::{DockerFixture, spec};
use crate::inside::{TOKEN, run, shell};

const SECRET: &str = "a-secret-of-the-callers";

#[tokio::test(flavor = "multi_thread")]
async fn token_and_environment_are_nowhere_to_be_seen() {
    let fixture = DockerFixture::start();
    let env = BTreeMap::from([("KEY".to_owned(), SECRET.to_owned())]);
    let id = fixture.create(&SandboxSpec { env, ..spec() }).await;
    assert_eq!(fixture.output(&id, "echo $KEY").await, SECRET, "the command has it");
    let name = id.as_str();
    let pid = fixture.daemon.docker(&["inspect", "--format", "{{.State.Pid}}", name]);
    let proc = |file: &str| {
        String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/{file}")).expect("readable")).into_owned()
    };
    let seen = [
        fixture.daemon.docker(&["inspect", name]),
        fixture.daemon.docker(&["top", name, "-ef"]),
        proc("cmdline"),
        proc("environ"),
        fixture.output(&id, "cat /proc/1/cmdline /proc/1/environ 2>&1; ls -laR /.stacyvm 2>&1").await,
    ];
    for text in seen {
        assert!(!text.contains(TOKEN) && !text.contains(SECRET), "{text}");
    }
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_have_no_capabilities_unless_they_are_added() {
    const STATUS: &str = "grep -E 'Cap(Eff|Bnd|Inh|Amb)|NoNewPrivs|Seccomp:' /proc/self/status";
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    let nothing = "CapInh:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
                   CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2";
    assert_eq!(fixture.output(&id, STATUS).await, nothing);
    // The agent can still do what it is there for.
    let request = StartRequest { user: Some("user".into()), ..shell("id -un; touch /tmp/mine") };
    let ran = run(&fixture.session(&id).await, request).await;
    assert_eq!((ran.exit.code, ran.stdout.as_str()), (Some(0), "user\n"));
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;

    let added = CapabilitySet::parse(&["ALL".into()], &["NET_RAW".into()]).expect("names");
    let fixture = DockerFixture::with(|options| options.capabilities = added);
    let id = fixture.create(&spec()).await;
    let seen = fixture.output(&id, STATUS).await;
    assert!(seen.contains("CapEff:\t0000000000002000") && seen.contains("CapBnd:\t0000000000002000"), "{seen}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_root_leaves_places_to_write() {
    let fixture = DockerFixture::with(|options| {
        options.read_only_rootfs = true;
        options.user = Some("1000:1000".into());
        options.tmpfs = BTreeMap::from([("/cache".to_owned(), "size=1m,mode=1777".to_owned())]);
    });
    let id = fixture.create(&spec()).await;
    let script = "for d in /tmp /workspace /cache / /home/user; do touch $d/x 2>/dev/null && echo $d; done; id -u";
    assert_eq!(fixture.output(&id, script).await, "/tmp\n/workspace\n/cache\n1000");
    assert_eq!(fixture.output(&id, "printf '#!/bin/sh\necho ran' > /tmp/p; chmod +x /tmp/p; /tmp/p").await, "ran");
    let session = fixture.session(&id).await;
    session.make_dir("/workspace/by-api").await.expect("the API can write there too");
    assert!(session.make_dir("/by-api").await.is_err());
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seccomp_profile_of_a_file_is_applied() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(file.path(), profile).expect("written");
    let read = Seccomp::read(file.path().to_str().expect("text")).expect("a profile");
    let fixture = DockerFixture::with(|options| options.seccomp = read);
    let id = fixture.create(&spec()).await;
    let said = fixture.output(&id, "touch /tmp/a; ln /tmp/a /tmp/b && ln -s a /tmp/c 2>&1; true").await;
    assert!(said.contains("/tmp/c") && said.contains("not permitted"), "{said}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_socket_is_out_of_a_guests_reach() {
    let fixture = DockerFixture::start();
    let id = fixture.create(&spec()).await;
    let ask =
        "printf 'GET /health HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n' | /.stacyvm/bin/agent connect /.stacyvm/run/agent.sock";
    // Root of the guest can find it, and is not answered.
    assert_eq!(fixture.output(&id, &format!("ls /.stacyvm/run; {ask}; true")).await, "agent.sock");
    let request = StartRequest { user: Some("user".into()), ..shell("ls /.stacyvm/run; true") };
    let ran = run(&fixture.session(&id).await, request).await;
    assert!(ran.stderr.contains("ermission denied"), "{ran:?}");
    assert_eq!(fixture.output(&id, "echo x > /.stacyvm/bin/agent || echo refused").await, "refused");

    // What a guest puts in its place is neither followed nor believed.
    let trap = tempfile::tempdir().expect("a directory");
    let listener = std::os::unix::net::UnixListener::bind(trap.path().join("trap.sock")).expect("a socket");
    listener.set_nonblocking(true).expect("set");
    let plant =
        format!("rm /.stacyvm/run/agent.sock && ln -s {}/trap.sock /.stacyvm/run/agent.sock", trap.path().display());
    fixture.output(&id, &plant).await;
    let Connection::Envd(channel) = fixture.provider.connect(&id).await.expect("a way") else { panic!("not ours") };
    let session = stacyvm_sandbox::EnvdSession::connect(channel, TOKEN.into()).expect("a session");
    session.ping().await.expect_err("nothing answers any more");
    assert!(listener.accept().is_err(), "a socket of the host was reached");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_hosts_network_only_own_ports_can_be_dialed() {
    use stacyvm_api::NetworkMode;
    use stacyvm_sandbox::{DialTarget, NetworkPolicy, SessionError};
    use tokio::io::AsyncReadExt as _;

    let fixture = DockerFixture::with(|options| options.network = Network::Host);
    let network = NetworkPolicy { mode: NetworkMode::Bridge, allow: Vec::new() };
    let id = fixture.create(&SandboxSpec { network, ..spec() }).await;
    let of_host = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let host_port = of_host.local_addr().expect("bound").port();
    let own_port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
        free.local_addr().expect("bound").port()
    };
    let session = fixture.session(&id).await;
    let serve = format!("while :; do echo own | nc -l -p {own_port}; done");
    let request = StartRequest { user: Some("user".into()), ..shell(&serve) };
    let _running = session.start(request).await.expect("started");
    crate::fixture::eventually("the guest listens", async || session.ports().await.expect("ports") == [own_port]).await;
    assert!(matches!(session.dial(DialTarget::Port(host_port)).await.err(), Some(SessionError::PortClosed(_))));
    let mut text = String::new();
    let mut stream = session.dial(DialTarget::Port(own_port)).await.expect("dialed");
    stream.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "own\n");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

//! Reaching what listens inside.

use stacyvm_envd::BootConfig;
use stacyvm_sandbox::{DialTarget, Session as _, SessionError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};

use crate::harness::{Agent, eventually};

/// Answers everything with itself.
async fn echo(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    let _ = stream.write_all(&bytes).await;
    let _ = stream.shutdown().await;
}

#[tokio::test]
async fn a_port_and_a_socket_carry_bytes_both_ways() {
    let agent = Agent::start();
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("loopback is there");
    let port = tcp.local_addr().expect("bound").port();
    let path = agent.path("echo.sock");
    let unix = UnixListener::bind(&path).expect("a new socket");
    tokio::spawn(async move { echo(tcp.accept().await.expect("a connection").0).await });
    tokio::spawn(async move { echo(unix.accept().await.expect("a connection").0).await });

    assert!(agent.session.ports().await.expect("ports").contains(&port));
    let sent = vec![7u8; 3 << 20];
    for target in [DialTarget::Port(port), DialTarget::Unix(path)] {
        let mut stream = agent.session.dial(target).await.expect("it listens");
        stream.write_all(&sent).await.expect("it reads");
        stream.shutdown().await.expect("one side can end before the other");
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.expect("it answers");
        assert_eq!(back, sent);
    }
}

#[tokio::test]
async fn either_side_may_leave_and_the_other_hears_of_it() {
    let agent = Agent::start();
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("loopback is there");
    let target = DialTarget::Port(tcp.local_addr().expect("bound").port());
    let mut near = agent.session.dial(target.clone()).await.expect("it listens");
    let (far, _) = tcp.accept().await.expect("a connection");
    drop(far);
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).await.expect("an end");

    let near = agent.session.dial(target.clone()).await.expect("it listens");
    let (mut far, _) = tcp.accept().await.expect("a connection");
    drop(near);
    let flood = vec![7; 1 << 20];
    let left = async { while far.write_all(&flood).await.is_ok() {} };
    tokio::time::timeout(std::time::Duration::from_secs(20), left).await.expect("nobody reads any more");
    // What was written to nobody has not harmed the agent.
    agent.session.ping().await.expect("the agent lives");
    let mut near = agent.session.dial(target).await.expect("it listens");
    let (mut far, _) = tcp.accept().await.expect("a connection");
    far.write_all(b"x").await.expect("it is read");
    assert_eq!(near.read_u8().await.expect("a byte"), b'x');
}

#[tokio::test]
async fn who_does_not_read_holds_the_other_up_and_nobody_else() {
    let agent = Agent::start();
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("loopback is there");
    let target = DialTarget::Port(tcp.local_addr().expect("bound").port());
    let mut slow = agent.session.dial(target.clone()).await.expect("it listens");
    let (mut far, _) = tcp.accept().await.expect("a connection");
    let all: Vec<u8> = (0..8u32 << 20).map(|number| (number % 251) as u8).collect();
    let sent = all.clone();
    let writer = tokio::spawn(async move {
        far.write_all(&sent).await.expect("it is read in the end");
    });
    let mut other = agent.session.dial(target).await.expect("it listens");
    let (mut far, _) = tcp.accept().await.expect("a connection");
    far.write_all(b"y").await.expect("it is read");
    assert_eq!(other.read_u8().await.expect("a byte"), b'y');
    assert!(!writer.is_finished(), "eight megabytes do not fit in between");
    let mut back = Vec::new();
    slow.read_to_end(&mut back).await.expect("everything");
    assert!(back == all, "every byte in its place");
}

#[tokio::test]
async fn a_closed_port_says_so() {
    let agent = Agent::start();
    let free = TcpListener::bind("127.0.0.1:0").await.expect("loopback is there").local_addr().expect("bound").port();
    let closed = agent.session.dial(DialTarget::Port(free)).await.err();
    assert!(matches!(&closed, Some(SessionError::PortClosed(what)) if what.contains(&free.to_string())), "{closed:?}");
    let missing = agent.session.dial(DialTarget::Unix(agent.path("none"))).await.err();
    assert!(matches!(missing, Some(SessionError::PortClosed(_))), "{missing:?}");
    let zero = agent.session.dial(DialTarget::Port(0)).await.err();
    assert!(matches!(zero, Some(SessionError::InvalidArgument(_))), "{zero:?}");
}

#[tokio::test]
async fn on_a_shared_network_only_own_listeners_are_reached() {
    let agent = Agent::start_with(BootConfig { shares_host_network: true, ..BootConfig::default() });
    let foreign = TcpListener::bind("127.0.0.1:0").await.expect("loopback is there");
    let port = foreign.local_addr().expect("bound").port();
    let refused = agent.session.dial(DialTarget::Port(port)).await.err();
    assert!(matches!(refused, Some(SessionError::PortClosed(_))), "{refused:?}");
    assert!(!agent.session.ports().await.expect("ports").contains(&port));

    let script = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); \
                  open('port','w').write(str(s.getsockname()[1])); time.sleep(1000)";
    drop(agent.session.start(crate::harness::argv(&["python3", "-c", script])).await.expect("python is there"));
    eventually("its port is written", async || {
        std::fs::read_to_string(agent.path("port")).is_ok_and(|port| !port.is_empty())
    })
    .await;
    let port = std::fs::read_to_string(agent.path("port")).expect("written").parse().expect("a number");
    assert!(agent.session.dial(DialTarget::Port(port)).await.is_ok());
    assert_eq!(agent.session.ports().await.expect("ports"), [port]);
}

#[tokio::test]
async fn a_socket_of_somebody_else_is_refused_to_the_user() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root, to have two users");
    let agent = Agent::start_with(BootConfig { default_user: Some("65534".to_owned()), ..BootConfig::default() });
    let root = agent.dir.parent().expect("below a root").to_owned();
    std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("our own");
    let path = root.join("private.sock");
    let _listener = UnixListener::bind(&path).expect("a new socket");
    let target = || DialTarget::Unix(path.to_string_lossy().into_owned());
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("our own");
    let refused = agent.session.dial(target()).await.err();
    assert!(matches!(refused, Some(SessionError::FileForbidden(_))), "{refused:?}");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("our own");
    assert!(agent.session.dial(target()).await.is_ok());
}

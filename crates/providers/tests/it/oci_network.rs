//! What a sandbox with a network reaches, and what it does not.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use stacyvm_api::{NetworkMode, SandboxId};
use stacyvm_providers::oci::BridgeOptions;
use stacyvm_sandbox::{NetworkPolicy, Provider, ProviderError, SandboxSpec};

use crate::fixture::{Fixture, eventually, spec};
use crate::internet::{Internet, METADATA, PORT};

async fn fixture(prepared: usize) -> Fixture {
    fixture_with_names(prepared, Vec::new()).await
}

async fn fixture_with_names(prepared: usize, name_servers: Vec<SocketAddr>) -> Fixture {
    Fixture::with(|options| options.bridge = Some(BridgeOptions { prepared, name_servers })).await
}

fn connected(allow: &[String]) -> SandboxSpec {
    SandboxSpec { network: NetworkPolicy { mode: NetworkMode::Bridge, allow: allow.to_vec() }, ..spec() }
}

/// What a guest reads from an address, or why it does not.
async fn visit(fixture: &Fixture, id: &SandboxId, address: Ipv4Addr, port: u16) -> String {
    let script = format!(
        "python3 -c \"
import socket
try:
    print(socket.create_connection(('{address}', {port}), 5).makefile().read())
except Exception as error:
    print('refused:', type(error).__name__, error)
\""
    );
    fixture.output(id, &script).await
}

fn refused(answer: &str) -> bool {
    answer.starts_with("refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_the_internet_but_not_what_is_near_the_host() {
    let internet = Internet::start();
    let fixture = fixture(1).await;
    let id = fixture.create(&connected(&[])).await;

    let public = visit(&fixture, &id, internet.public, PORT).await;
    assert_eq!(public, format!("hello from {}", internet.public));
    for near in [internet.private, METADATA] {
        let answer = visit(&fixture, &id, near, PORT).await;
        assert!(refused(&answer), "{near}: {answer}");
    }
    // The host's own services, by any of its addresses.
    let on_host = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a listener");
    let port = on_host.local_addr().expect("an address").port();
    let gateway = gateway(&fixture, &id).await;
    for own in [internet.host, gateway, Ipv4Addr::from(u32::from(gateway) + 1)] {
        let answer = visit(&fixture, &id, own, port).await;
        assert!(refused(&answer), "{own}: {answer}");
    }
    assert_eq!(fixture.output(&id, "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6").await, "1");
    assert_eq!(fixture.output(&id, "ls /sys/class/net").await, "eth0\nlo");

    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_drops_what_is_forwarded_still_lets_sandboxes_out() {
    let internet = Internet::start();
    let fixture = fixture(1).await;
    // What a Docker daemon does to its host.
    let _dropping = ForwardPolicy::set("DROP");
    let id = fixture.create(&connected(&[])).await;
    assert_eq!(visit(&fixture, &id, internet.public, PORT).await, format!("hello from {}", internet.public));
    assert!(refused(&visit(&fixture, &id, internet.private, PORT).await));
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_policy_names_is_allowed_and_only_for_that_sandbox() {
    let internet = Internet::start();
    let fixture = fixture(0).await;
    let allowed = fixture.create(&connected(&[internet.private.to_string(), "10.0.0.0/30".into()])).await;
    let other = fixture.create(&connected(&[])).await;
    assert_eq!(visit(&fixture, &allowed, internet.private, PORT).await, format!("hello from {}", internet.private));
    assert!(refused(&visit(&fixture, &allowed, METADATA, PORT).await));
    assert!(refused(&visit(&fixture, &other, internet.private, PORT).await));

    for (allow, complaint) in [("fd00::1", "no IPv6"), ("example.org", "not an IPv4 address")] {
        let failed = fixture.provider.create(&SandboxId::random(), &connected(&[allow.to_owned()]), &()).await;
        assert!(
            matches!(&failed, Err(ProviderError::InvalidSpec { message }) if message.contains(complaint)),
            "{failed:?}"
        );
    }
    for id in [allowed, other] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    // The next one at the same port has none of the permissions.
    let heir = fixture.create(&connected(&[])).await;
    assert!(refused(&visit(&fixture, &heir, internet.private, PORT).await));
    fixture.provider.destroy(&heir).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_reach_neither_each_other_nor_use_each_others_address() {
    let internet = Internet::start();
    let fixture = fixture(2).await;
    let (a, b) = (fixture.create(&connected(&[])).await, fixture.create(&connected(&[])).await);
    let address_of_b = own_address(&fixture, &b).await;
    fixture.output(&b, "nohup python3 -m http.server 8000 >/dev/null 2>&1 & sleep 0").await;
    eventually("the server listens", async || {
        fixture.sh(&b, "python3 -c \"import socket; socket.create_connection(('127.0.0.1', 8000))\"").await.exit.code
            == Some(0)
    })
    .await;
    let answer = visit(&fixture, &a, address_of_b, 8000).await;
    assert!(refused(&answer), "{answer}");
    // A forged source would need a raw socket or an address of its own.
    let forged = "python3 -c \"import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\"";
    assert!(fixture.sh(&a, forged).await.stderr.contains("PermissionError"));
    let readdressed = fixture.sh(&a, &format!("ip addr add {address_of_b}/32 dev eth0")).await;
    assert_ne!(readdressed.exit.code, Some(0), "{readdressed:?}");
    assert_eq!(visit(&fixture, &a, internet.public, PORT).await, format!("hello from {}", internet.public));
    for id in [a, b] {
        fixture.provider.destroy(&id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_asked_of_the_hosts_name_servers() {
    let upstream = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let server = upstream.local_addr().expect("an address");
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = upstream.recv_from(&mut query) {
            // One A record, 45.1.2.3, for whatever is asked.
            let mut answer = query[..length].to_vec();
            answer[2] |= 0x80;
            answer[6..8].copy_from_slice(&[0, 1]);
            answer[10..12].copy_from_slice(&[0, 0]);
            answer.truncate(12 + question_bytes(&query[12..length]));
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 45, 1, 2, 3]);
            let _ = upstream.send_to(&answer, from);
        }
    });
    let fixture = fixture_with_names(1, vec![server]).await;
    let id = fixture.create(&connected(&[])).await;
    let resolved = "python3 -c \"import socket; print(socket.gethostbyname('anything.example'))\"";
    assert_eq!(fixture.output(&id, resolved).await, "45.1.2.3");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_outlives_the_server_and_goes_with_the_last_sandbox() {
    let internet = Internet::start();
    let mut fixture = fixture(1).await;
    let id = fixture.create(&connected(&[internet.private.to_string()])).await;
    fixture.restart().await;
    assert_eq!(visit(&fixture, &id, internet.public, PORT).await, format!("hello from {}", internet.public));
    let second = fixture.create(&connected(&[])).await;
    assert_ne!(own_address(&fixture, &id).await, own_address(&fixture, &second).await);
    assert!(refused(&visit(&fixture, &second, internet.private, PORT).await));
    assert_eq!(visit(&fixture, &id, internet.private, PORT).await, format!("hello from {}", internet.private));
    for id in [&id, &second] {
        fixture.provider.destroy(id).await.expect("destroyed");
    }
    let device = device(&fixture);
    assert!(std::path::Path::new("/sys/class/net").join(&device).exists(), "{device}");
    fixture.finish().await;
    assert!(!std::path::Path::new("/sys/class/net").join(&device).exists(), "{device} is still there");
    let rules = std::process::Command::new("nft").args(["list", "tables"]).output().expect("nft");
    let table = device.replace("svm", "stacyvm");
    assert!(!String::from_utf8_lossy(&rules.stdout).lines().any(|line| line.ends_with(&format!(" {table}"))));
}

/// The host's policy for forwarded packets, as it was again when this goes.
struct ForwardPolicy {
    before: String,
}

impl ForwardPolicy {
    fn set(policy: &str) -> Self {
        let rules = iptables(&["-S", "FORWARD"]);
        let before = rules.lines().find_map(|line| line.strip_prefix("-P FORWARD ")).expect("a policy").to_owned();
        iptables(&["-P", "FORWARD", policy]);
        Self { before }
    }
}

impl Drop for ForwardPolicy {
    fn drop(&mut self) {
        iptables(&["-P", "FORWARD", &self.before]);
    }
}

fn iptables(args: &[&str]) -> String {
    let output = std::process::Command::new("iptables").args(["-w", "5"]).args(args).output().expect("iptables");
    assert!(output.status.success(), "iptables {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Length of the only question of a query.
fn question_bytes(question: &[u8]) -> usize {
    question.iter().position(|byte| *byte == 0).expect("the end of a name") + 5
}

/// Name of this server's uplink on the host.
fn device(fixture: &Fixture) -> String {
    let instance = fixture.instance();
    let claims = std::fs::read_dir("/run/stacyvm/subnets").expect("claims");
    let held = claims.flatten().find(|claim| {
        std::fs::read_to_string(claim.path()).is_ok_and(|owner| owner.starts_with(&format!("{instance} ")))
    });
    format!("svm{}", held.expect("a subnet").file_name().to_string_lossy())
}

async fn own_address(fixture: &Fixture, id: &SandboxId) -> Ipv4Addr {
    fixture.output(id, "hostname -I").await.trim().parse().expect("an address")
}

async fn gateway(fixture: &Fixture, id: &SandboxId) -> Ipv4Addr {
    fixture.output(id, "sed -n 's/^nameserver //p' /etc/resolv.conf").await.parse().expect("an address")
}

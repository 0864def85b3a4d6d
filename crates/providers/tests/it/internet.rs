//! An internet of our own: a network namespace with public addresses, so that
//! network tests need no network.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::thread::LinkNameSpaceType;

/// Where everything here listens.
pub(crate) const PORT: u16 = 8080;

/// Addresses of things a guest must not reach, which are really there.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Answers with `hello from ADDRESS` on [`PORT`] of each of its addresses.
pub(crate) struct Internet {
    /// A public address.
    pub(crate) public: Ipv4Addr,
    /// A private address of a machine near the host.
    pub(crate) private: Ipv4Addr,
    /// The host's own address towards this internet.
    pub(crate) host: Ipv4Addr,
    device: String,
}

static NEXT: AtomicU8 = AtomicU8::new(0);

impl Internet {
    pub(crate) fn start() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let [.., high, low] = std::process::id().to_be_bytes();
        // Names of both ends are the host's until one has moved.
        let device = format!("svmt{:x}{number}", std::process::id());
        let far_end = format!("{device}p");
        let (host, near) = (Ipv4Addr::new(44, high, low, number * 4 + 1), Ipv4Addr::new(44, high, low, number * 4 + 2));
        let (public, private) = (Ipv4Addr::new(45, high, low, number), Ipv4Addr::new(10, high, low, number));

        let namespace = std::thread::spawn(move || {
            let (namespace, listener) = apart(&[public, private, METADATA]);
            std::thread::spawn(move || answer(&listener));
            namespace
        })
        .join()
        .expect("a namespace");

        ip(&["link", "add", &device, "type", "veth", "peer", "name", &far_end]);
        move_device(&far_end, &namespace);
        ip(&["addr", "add", &format!("{host}/30"), "dev", &device]);
        ip(&["link", "set", &device, "up"]);
        let configured = namespace.as_fd().try_clone_to_owned().expect("a descriptor");
        std::thread::spawn(move || {
            enter(&configured);
            ip(&["addr", "add", &format!("{near}/30"), "dev", &far_end]);
            ip(&["link", "set", &far_end, "up"]);
            ip(&["route", "add", "default", "via", &host.to_string()]);
        })
        .join()
        .expect("configured");
        for there in [public, private] {
            ip(&["route", "add", &format!("{there}/32"), "via", &near.to_string()]);
        }
        // Several of these may run at once; whoever is first has the address.
        let _ = Command::new("ip").args(["route", "add", &format!("{METADATA}/32"), "via", &near.to_string()]).status();
        Self { public, private, host, device }
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        // Routes and the other end go with it.
        ip(&["link", "del", &self.device]);
    }
}

/// Moves the calling thread into a new network namespace with these addresses
/// and listens there.
fn apart(addresses: &[Ipv4Addr]) -> (OwnedFd, TcpListener) {
    // util-linux and iproute2 do what would need unsafe code here.
    let mut child = Command::new("unshare").args(["-n", "sleep", "60"]).spawn().expect("unshare");
    let path = format!("/proc/{}/ns/net", child.id());
    let own = std::fs::read_link("/proc/self/ns/net").expect("a link");
    while std::fs::read_link(&path).expect("a link") == own {
        std::thread::yield_now();
    }
    let namespace = OwnedFd::from(std::fs::File::open(path).expect("a namespace"));
    enter(&namespace);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    ip(&["link", "set", "lo", "up"]);
    for address in addresses {
        ip(&["addr", "add", &format!("{address}/32"), "dev", "lo"]);
    }
    (namespace, TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("a listener"))
}

fn answer(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        let Ok(own) = stream.local_addr() else { continue };
        let _ = write!(stream, "hello from {}", own.ip());
    }
}

fn enter(namespace: &OwnedFd) {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entered");
}

fn move_device(device: &str, namespace: &OwnedFd) {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    ip(&["link", "set", device, "netns", &path]);
}

pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("iproute2");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

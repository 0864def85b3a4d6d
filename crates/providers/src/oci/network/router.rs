//! The router: a network namespace of ours between sandboxes and the host.
//!
//! ```text
//!   sandbox ── eth0 ─┐ veth
//!                    ├─ v0 ┐
//!   sandbox ── eth0 ─┤     ├─ router namespace ── up ─┐ veth
//!                    └─ v1 ┘   rules, names           └─ svm0 ── host ── internet
//! ```
//!
//! A bridge would end at 1,023 ports; a route per sandbox does not. One thread
//! owns the namespace and does all work in it, one order at a time: the kernel
//! has a single lock for all of this anyway. Only what takes long, taking ports
//! away, is left to another (`remover`). The namespace is mounted on a file
//! in the run directory, so that sandboxes keep their network while the server
//! is being restarted.

use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::mount::UnmountFlags;
use rustix::thread::LinkNameSpaceType;
use tokio::sync::oneshot;

use super::addresses::{
    GUEST_DEVICE, GUEST_INDEX, PORTS_PER_BLOCK, PREFIX_LENGTH, Subnet, UPLINK, UPLINK_INDEX, guest_mac, port_device,
    port_index, router_mac,
};
use super::firewall::{self, Destination};
use super::netlink::{Netlink, VethEnd, index_of};
use super::remover::{self, Removal};
use crate::host::sys;

/// Loopback's number in every namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Where names are asked for.
const DNS_PORT: u16 = 53;

/// `statfs` type of a namespace's file (`NSFS_MAGIC`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Packet size where nothing is known of the way out.
const DEFAULT_MTU: u32 = 1500;

/// Work for the router's thread.
pub(super) enum Order {
    /// Connect a sandbox's network namespace to a port.
    Attach { port: u32, namespace: OwnedFd, done: oneshot::Sender<io::Result<()>> },
    /// Let a port reach more than the internet.
    Allow { port: u32, destinations: Vec<Destination>, done: oneshot::Sender<io::Result<()>> },
    /// Take everything away.
    Remove { done: oneshot::Sender<io::Result<()>> },
}

/// What a running router needs to be told.
pub(super) struct Setup {
    pub(super) subnet: Subnet,
    /// Where the namespace is mounted.
    pub(super) mount: PathBuf,
    /// Ports of sandboxes that an earlier process connected.
    pub(super) ports: Vec<(u32, Vec<Destination>)>,
}

/// A running router.
pub(super) struct Router {
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) removals: mpsc::Sender<Removal>,
    /// The gateway's sockets for names, made inside the router's namespace.
    pub(super) names: (UdpSocket, TcpListener),
}

/// Starts the thread and waits until the network is up.
pub(super) fn start(setup: Setup) -> io::Result<Router> {
    let (orders, inbox) = mpsc::channel();
    let (up, is_up) = mpsc::channel();
    std::thread::Builder::new().name("svm-router".into()).spawn(move || match Worker::start(setup) {
        Ok((worker, removals, names)) => {
            if up.send(Ok((removals, names))).is_ok() {
                worker.work(&inbox);
            }
        }
        Err(error) => drop(up.send(Err(error))),
    })?;
    let (removals, names) = is_up.recv().map_err(|_| io::Error::other("the router's thread ended"))??;
    Ok(Router { orders, removals, names })
}

/// Takes away what a router with this subnet left on the host, whoever ran it.
pub(super) fn remove_remains(subnet: Subnet, mount: &Path) -> io::Result<()> {
    Netlink::open()?.remove_device(0, &subnet.host_device())?;
    firewall::load(&firewall::remove_host_rules(subnet))?;
    firewall::unpass_iptables(subnet);
    unmount(mount)
}

struct Worker {
    setup: Setup,
    host: OwnedFd,
    router: OwnedFd,
    mtu: u32,
    in_host: Netlink,
    in_router: Netlink,
    /// How many blocks of ports the rules know.
    blocks: u32,
}

impl Worker {
    /// Runs on the router's thread, which from here on lives in its namespace.
    fn start(setup: Setup) -> io::Result<(Self, mpsc::Sender<Removal>, (UdpSocket, TcpListener))> {
        let host = own_namespace()?;
        let (mtu, in_host) = (way_out_mtu(), Netlink::open()?);
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(while_doing("let the host forward packets"))?;
        let (router, fresh) = enter_router(&setup.mount)?;
        let in_router = Netlink::open()?;
        let blocks = setup.ports.iter().map(|(port, _)| port / PORTS_PER_BLOCK + 1).max().unwrap_or(1);
        let mut worker = Self { setup, host, router, mtu, in_host, in_router, blocks };
        if fresh {
            worker.prepare_namespace()?;
        }
        if fresh || index_of(UPLINK).is_err() {
            worker.connect_uplink().map_err(while_doing("connect the router to the host"))?;
        }
        worker.load_rules()?;
        let removals = remover::start(worker.router.try_clone()?, Netlink::open()?)?;
        let names = worker.listen_for_names().map_err(while_doing("listen for name queries"))?;
        Ok((worker, removals, names))
    }

    fn work(mut self, inbox: &mpsc::Receiver<Order>) {
        while let Ok(order) = inbox.recv() {
            // Who asked may have given up; the work is done all the same.
            let _ = match order {
                Order::Attach { port, namespace, done } => done.send(self.attach(port, &namespace)),
                Order::Allow { port, destinations, done } => {
                    done.send(firewall::load(&firewall::change_allowed("add", port, &destinations)))
                }
                Order::Remove { done } => {
                    let _ = done.send(self.remove());
                    return;
                }
            };
        }
    }

    fn attach(&mut self, port: u32, namespace: &OwnedFd) -> io::Result<()> {
        self.admit(port)?;
        let subnet = self.setup.subnet;
        let name = port_device(port);
        let ours = VethEnd {
            name: &name,
            index: port_index(port),
            mac: Some(router_mac(port)),
            no_arp: true,
            namespace: None,
        };
        let theirs = VethEnd {
            name: GUEST_DEVICE,
            index: GUEST_INDEX,
            mac: Some(guest_mac(port)),
            no_arp: true,
            namespace: Some(namespace.as_fd()),
        };
        // Whatever an earlier sandbox left at this port goes first.
        self.in_router.remove_device(port_index(port), &name)?;
        let mut in_guest = self.inside(namespace, || {
            // IPv6 is not routed; a link-local address would only be something
            // to attack. Loopback keeps its own.
            match std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            Netlink::open()
        })?;
        self.in_router.add_veth(&ours, &theirs, self.mtu)?;
        self.in_router.add_direct_route(port_index(port), subnet.guest(port))?;
        self.in_router.add_neighbour(port_index(port), subnet.guest(port), guest_mac(port))?;
        in_guest.bring_up(GUEST_INDEX)?;
        in_guest.add_address(GUEST_INDEX, subnet.guest(port))?;
        in_guest.add_direct_route(GUEST_INDEX, subnet.gateway())?;
        in_guest.add_neighbour(GUEST_INDEX, subnet.gateway(), router_mac(port))?;
        in_guest.add_route_via(GUEST_INDEX, std::net::Ipv4Addr::UNSPECIFIED, 0, subnet.gateway())
    }

    /// Makes sure the rules know a port.
    fn admit(&mut self, port: u32) -> io::Result<()> {
        while port >= self.blocks * PORTS_PER_BLOCK {
            firewall::load(&firewall::admit_block(self.setup.subnet, self.blocks))?;
            self.blocks += 1;
        }
        Ok(())
    }

    fn prepare_namespace(&mut self) -> io::Result<()> {
        for (setting, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv4/conf/all/accept_redirects", "0"),
            ("ipv4/conf/default/accept_redirects", "0"),
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
        ] {
            match std::fs::write(format!("/proc/sys/net/{setting}"), value) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(while_doing("configure the router")(error));
                }
                _ => {}
            }
        }
        self.in_router.bring_up(LOOPBACK_INDEX)?;
        self.in_router.add_address(LOOPBACK_INDEX, self.setup.subnet.gateway())
    }

    fn connect_uplink(&mut self) -> io::Result<()> {
        let subnet = self.setup.subnet;
        let device = subnet.host_device();
        self.in_host.remove_device(0, &device)?;
        let on_host = VethEnd { name: &device, index: 0, mac: None, no_arp: false, namespace: None };
        let in_router = VethEnd {
            name: UPLINK,
            index: UPLINK_INDEX,
            mac: None,
            no_arp: false,
            namespace: Some(self.router.as_fd()),
        };
        self.in_host.add_veth(&on_host, &in_router, self.mtu)?;
        let host_index = self.inside_host(|| index_of(&device))?;
        self.in_host.add_address(host_index, subnet.host_end())?;
        self.in_host.add_direct_route(host_index, subnet.router_end())?;
        self.in_host.add_route_via(host_index, subnet.network(), PREFIX_LENGTH, subnet.router_end())?;
        self.in_router.bring_up(UPLINK_INDEX)?;
        self.in_router.add_address(UPLINK_INDEX, subnet.router_end())?;
        self.in_router.add_direct_route(UPLINK_INDEX, subnet.host_end())?;
        self.in_router.add_route_via(UPLINK_INDEX, std::net::Ipv4Addr::UNSPECIFIED, 0, subnet.host_end())
    }

    fn load_rules(&self) -> io::Result<()> {
        let subnet = self.setup.subnet;
        let allowed: Vec<_> =
            self.setup.ports.iter().filter(|(_, destinations)| !destinations.is_empty()).cloned().collect();
        firewall::load(&firewall::router_rules(subnet, self.blocks, &allowed))
            .map_err(while_doing("load the router's rules"))?;
        self.inside_host(|| {
            firewall::load(&firewall::host_rules(subnet)).map_err(while_doing("load the host's rules"))?;
            firewall::pass_iptables(subnet).map_err(while_doing("pass the host's iptables"))
        })
    }

    fn listen_for_names(&self) -> io::Result<(UdpSocket, TcpListener)> {
        let address = (self.setup.subnet.gateway(), DNS_PORT);
        Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?))
    }

    fn remove(&self) -> io::Result<()> {
        self.inside_host(|| remove_remains(self.setup.subnet, &self.setup.mount))
    }

    fn inside_host<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.inside(&self.host, work)
    }

    /// Does something in another network namespace and comes back.
    fn inside<T>(&self, namespace: &OwnedFd, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(namespace)?;
        let result = work();
        // Working on in the wrong namespace would be worse than not at all.
        enter(&self.router).map(|()| result)?
    }
}

/// The router's namespace: the mounted one, or a new one that is then mounted.
/// The calling thread is inside afterwards. True when it is new.
fn enter_router(mount: &Path) -> io::Result<(OwnedFd, bool)> {
    if let Ok(file) = File::open(mount)
        && rustix::fs::fstatfs(&file)?.f_type == NSFS_MAGIC
    {
        let router = OwnedFd::from(file);
        enter(&router).map_err(while_doing("enter the router"))?;
        return Ok((router, false));
    }
    unmount(mount)?;
    if let Some(directory) = mount.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    File::create(mount)?;
    sys::unshare(libc::CLONE_NEWNET).map_err(while_doing("make the router's namespace"))?;
    rustix::mount::mount_bind("/proc/thread-self/ns/net", mount)
        .map_err(|error| while_doing("mount the router's namespace")(error.into()))?;
    Ok((own_namespace()?, true))
}

fn unmount(mount: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(mount, UnmountFlags::DETACH) {
            Ok(()) => {}
            // No mount, or no file.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match std::fs::remove_file(mount) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn own_namespace() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

fn enter(namespace: &OwnedFd) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// The smallest packet size of the devices that default routes go through:
/// larger packets would have to be broken up or are lost.
fn way_out_mtu() -> u32 {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (device, destination) = (fields.next()?, fields.next()?);
            (destination == "00000000").then(|| format!("/sys/class/net/{device}/mtu"))
        })
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
        .min()
        .unwrap_or(DEFAULT_MTU)
}

fn while_doing(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

//! The network of sandboxes that have one.
//!
//! Brought up when it is first needed, shared by all sandboxes of this server,
//! and taken away at shutdown when none of them is left. What may pass is in
//! `firewall`, how it hangs together in `router`.

mod addresses;
mod dns;
mod firewall;
mod netlink;
mod remover;
mod router;

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

pub(super) use addresses::Subnet;
pub(super) use firewall::{Destination, nft};

use crate::host::claims::Claims;
use addresses::{PORTS, SUBNETS};
use remover::Removal;
use router::{Order, Setup};

/// Most destinations one sandbox may be allowed.
pub(super) const MAX_ALLOWED: usize = 64;

/// A sandbox's place in the network, as its record has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connected {
    pub(super) port: u32,
    pub(super) allowed: Vec<Destination>,
}

/// This server's network.
pub(super) struct Network {
    claims: Arc<Claims>,
    run_dir: PathBuf,
    name_servers: Vec<SocketAddr>,
    ports: Mutex<Ports>,
    up: tokio::sync::Mutex<Option<Arc<Up>>>,
}

#[derive(Default)]
struct Ports {
    used: BTreeSet<u32>,
    /// Of sandboxes that were there before this process.
    inherited: Vec<Connected>,
}

/// A network that runs.
struct Up {
    subnet: Subnet,
    orders: std::sync::mpsc::Sender<Order>,
    removals: std::sync::mpsc::Sender<Removal>,
    _names: AbortOnDropHandle<()>,
}

impl Network {
    /// `connected` are the sandboxes that have a port already.
    pub(super) fn new(
        claims: Claims,
        run_dir: PathBuf,
        name_servers: Vec<SocketAddr>,
        connected: Vec<Connected>,
    ) -> Self {
        let used = connected.iter().map(|sandbox| sandbox.port).collect();
        let ports = Mutex::new(Ports { used, inherited: connected });
        Self { claims: Arc::new(claims), run_dir, name_servers, ports, up: tokio::sync::Mutex::default() }
    }

    /// Serves the sandboxes of an earlier process, if there are any.
    pub(super) async fn resume(&self) -> io::Result<()> {
        let has_sandboxes = !self.lock().used.is_empty();
        if has_sandboxes { self.up().await.map(drop) } else { Ok(()) }
    }

    /// Removes the networks of servers whose data directories are gone: nobody
    /// else will.
    pub(super) async fn remove_abandoned(&self) -> io::Result<Vec<u32>> {
        let (claims, routers) = (Arc::clone(&self.claims), routers(&self.run_dir));
        let remove = move |number: u32| router::remove_remains(Subnet(number), &routers.join(number.to_string()));
        blocking(move || claims.free_abandoned(remove)).await
    }

    /// Connects a sandbox's network namespace to a free port.
    pub(super) async fn attach(self: &Arc<Self>, namespace: &OwnedFd) -> io::Result<Port> {
        let up = self.up().await?;
        let number = self.take_port().ok_or_else(|| io::Error::other("every port of the router is in use"))?;
        // From here on the port gives itself back.
        let port = Port { number, subnet: up.subnet, network: Arc::clone(self), kept: false };
        let namespace = namespace.as_fd().try_clone_to_owned()?;
        up.order(|done| Order::Attach { port: number, namespace, done }).await?;
        Ok(port)
    }

    /// Lets a sandbox reach more than the internet.
    pub(super) async fn allow(&self, port: u32, destinations: &[Destination]) -> io::Result<()> {
        if destinations.is_empty() {
            return Ok(());
        }
        let destinations = destinations.to_vec();
        self.up().await?.order(|done| Order::Allow { port, destinations, done }).await
    }

    /// Takes a port back. Its device goes with the sandbox's namespace anyway,
    /// but the kernel takes its time for that.
    pub(super) async fn detach(&self, connected: Connected) -> io::Result<()> {
        let Connected { port, allowed } = connected;
        let up = self.up.lock().await.clone();
        if let Some(up) = up {
            up.remove(port, allowed).await?;
        }
        let mut ports = self.lock();
        ports.used.remove(&port);
        ports.inherited.retain(|sandbox| sandbox.port != port);
        Ok(())
    }

    async fn give_back(&self, port: u32) {
        if let Err(error) = self.detach(Connected { port, allowed: Vec::new() }).await {
            tracing::warn!(%error, port, "a port of the router stays in use");
        }
    }

    /// Frees everything, if no sandbox is connected. Says whether there was
    /// anything.
    pub(super) async fn remove_unused(&self) -> io::Result<bool> {
        let mut slot = self.up.lock().await;
        if !self.lock().used.is_empty() {
            return Ok(false);
        }
        if let Some(up) = slot.take() {
            up.order(|done| Order::Remove { done }).await?;
        }
        let held = self.claims.held()?;
        for number in &held {
            let (subnet, mount) = (Subnet(*number), self.mount(Subnet(*number)));
            blocking(move || router::remove_remains(subnet, &mount)).await?;
            self.claims.release(*number)?;
        }
        Ok(!held.is_empty())
    }

    /// Stops serving it; sandboxes keep what the kernel does for them.
    pub(super) async fn stop(&self) {
        self.up.lock().await.take();
    }

    /// The running network; brings it up first where needed.
    async fn up(&self) -> io::Result<Arc<Up>> {
        let mut slot = self.up.lock().await;
        if let Some(up) = slot.as_ref() {
            return Ok(Arc::clone(up));
        }
        let up = Arc::new(self.bring_up().await?);
        *slot = Some(Arc::clone(&up));
        Ok(up)
    }

    async fn bring_up(&self) -> io::Result<Up> {
        let (subnet, taken_over) = self.claim()?;
        let mount = self.mount(subnet);
        let inherited = std::mem::take(&mut self.lock().inherited);
        let ports = inherited.iter().map(|sandbox| (sandbox.port, sandbox.allowed.clone())).collect();
        let router = blocking(move || {
            if taken_over {
                // Whoever had the subnet before is gone for good.
                router::remove_remains(subnet, &mount)?;
            }
            router::start(Setup { subnet, mount, ports })
        })
        .await
        .inspect_err(|_| self.lock().inherited = inherited)?;
        let servers = self.name_servers.clone();
        let names = tokio::spawn(async move {
            if let Err(error) = dns::serve(router.names, servers).await {
                tracing::error!(%error, "sandboxes cannot resolve names");
            }
        });
        tracing::info!(device = subnet.host_device(), addresses = subnet.cidr(), "network for sandboxes is up");
        Ok(Up { subnet, orders: router.orders, removals: router.removals, _names: AbortOnDropHandle::new(names) })
    }

    /// This server's subnet; true when it was not ours before.
    fn claim(&self) -> io::Result<(Subnet, bool)> {
        if let Some(number) = self.claims.held()?.first() {
            return Ok((Subnet(*number), false));
        }
        let routes = host_routes();
        let free = |number: u32| !routes.iter().any(|(network, mask)| Subnet(number).overlaps(*network, *mask));
        match self.claims.take(SUBNETS, free)? {
            Some(number) => Ok((Subnet(number), true)),
            None => Err(io::Error::other("every subnet of 198.18.0.0/15 is in use on this host")),
        }
    }

    fn mount(&self, subnet: Subnet) -> PathBuf {
        routers(&self.run_dir).join(subnet.0.to_string())
    }

    fn take_port(&self) -> Option<u32> {
        let mut ports = self.lock();
        let free = (0..PORTS).find(|port| !ports.used.contains(port))?;
        ports.used.insert(free);
        Some(free)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Up {
    async fn order(&self, order: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Order) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        let gone = || io::Error::other("the router's thread ended");
        self.orders.send(order(done)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Takes a port's devices and permissions away.
    async fn remove(&self, port: u32, destinations: Vec<Destination>) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        let gone = || io::Error::other("the router's remover ended");
        self.removals.send(Removal { port, destinations, done }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A connected port that frees itself unless it is kept.
pub(super) struct Port {
    number: u32,
    subnet: Subnet,
    network: Arc<Network>,
    kept: bool,
}

impl Port {
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        self.subnet.guest(self.number)
    }

    pub(super) fn gateway(&self) -> Ipv4Addr {
        self.subnet.gateway()
    }

    /// A sandbox's record owns it from now on; returns its number.
    pub(super) fn keep(mut self) -> u32 {
        self.kept = true;
        self.number
    }

    /// Frees it now, where dropping does so some time later.
    pub(super) async fn give_back(mut self) {
        self.kept = true;
        self.network.give_back(self.number).await;
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let (network, number) = (Arc::clone(&self.network), self.number);
        // Without a runtime the process is ending, and the devices with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { network.give_back(number).await });
        }
    }
}

/// Destinations and masks of the host's routes, without the default one and
/// without those of routers like this.
fn host_routes() -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(|number| Ipv4Addr::from(number.to_ne_bytes()));
    routes
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (network, mask) = (address(fields.get(1)?)?, address(fields.get(7)?)?);
            let is_ours = fields[0].strip_prefix("svm").is_some_and(|number| number.parse::<u32>().is_ok());
            (!mask.is_unspecified() && !is_ours).then_some((network, mask))
        })
        .collect()
}

/// Where the namespaces of routers are kept.
fn routers(run_dir: &Path) -> PathBuf {
    run_dir.join("routers")
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

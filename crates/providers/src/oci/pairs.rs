//! Ready pairs of a user namespace and a network namespace inside it.
//!
//! A network namespace must be owned by the sandbox's user namespace (or its
//! root could not bind port 80), so the two are made together, and making them
//! takes the kernel longer than all the rest of a sandbox. With them is made
//! what depends on nothing else. All of it exists only as descriptors in this
//! process: when the server dies, so does what is unused.

use crate::host::is_ordinary_user;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::error::OciError;
use super::launch::ReadyMounts;
use super::network::{Network, Port};
use super::spawner::protocol::{Done, Job};
use super::spawner::{CallError, Spawner};
use crate::host::ids::UidRanges;

/// How long nobody takes a pair before the next one is made, while there are
/// enough: making them must not slow down the sandboxes that are being made,
/// nor their first commands.
const CALM: Duration = Duration::from_millis(25);

/// One in so many of the wanted pairs is enough in this sense.
const ENOUGH: usize = 4;

/// How many sandboxes are being made.
pub(super) struct Creations(watch::Sender<usize>);

/// One of them, until it is dropped.
pub(super) struct Creation<'a>(&'a Creations);

impl Creations {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    pub(super) fn begin(&self) -> Creation<'_> {
        self.0.send_modify(|count| *count += 1);
        Creation(self)
    }

    /// Waits while they have use for every processor.
    async fn leave_room(&self) {
        let processors = available_parallelism().map_or(1, usize::from);
        // The sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|count| *count < processors).await;
    }
}

impl Drop for Creation<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// Two namespaces and the uids they stand for.
pub(super) struct Pair {
    pub(super) uids: UidRange,
    pub(super) user: OwnedFd,
    pub(super) network: OwnedFd,
    /// Of a pair that waited; others are wanted too soon.
    pub(super) mounts: Option<ReadyMounts>,
    /// Where it is connected, if it is.
    pub(super) port: Option<Port>,
    /// Process id of the spawner that made it.
    spawner: u32,
}

/// A range of uids that returns to the free ones unless it is kept.
pub(super) struct UidRange {
    base: u32,
    ranges: Arc<UidRanges>,
    kept: bool,
}

impl UidRange {
    pub(super) fn base(&self) -> u32 {
        self.base
    }

    /// A sandbox's record owns it from now on.
    pub(super) fn keep(mut self) -> u32 {
        self.kept = true;
        self.base
    }
}

impl Drop for UidRange {
    fn drop(&mut self) {
        if !self.kept {
            self.ranges.give_back(self.base);
        }
    }
}

/// Keeps a number of pairs ready.
pub(super) struct PairPool {
    spawner: Arc<Spawner>,
    ranges: Arc<UidRanges>,
    /// What pairs are connected to.
    network: Option<Arc<Network>>,
    ready: Mutex<VecDeque<Pair>>,
    wanted: usize,
    taken: Notify,
    creations: Arc<Creations>,
    /// Where mounts are made, if they are wanted.
    scratch: Option<PathBuf>,
}

impl PairPool {
    pub(super) fn new(
        spawner: Arc<Spawner>,
        ranges: Arc<UidRanges>,
        network: Option<Arc<Network>>,
        wanted: usize,
        creations: Arc<Creations>,
        scratch: Option<PathBuf>,
    ) -> Self {
        Self { spawner, ranges, network, ready: Mutex::default(), wanted, taken: Notify::new(), creations, scratch }
    }

    /// A ready pair, or a new one.
    pub(super) async fn take(&self) -> Result<Pair, OciError> {
        loop {
            let ready = self.lock().pop_front();
            self.taken.notify_one();
            match ready {
                Some(pair) if self.is_usable(&pair).await => return Ok(pair),
                Some(_) => {}
                None => return self.make(false).await,
            }
        }
    }

    /// Refills after every take until the future is dropped.
    pub(super) async fn refill(&self) {
        loop {
            while self.lock().len() < self.wanted {
                let enough = self.lock().len() >= self.wanted / ENOUGH;
                if enough && tokio::time::timeout(CALM, self.taken.notified()).await.is_ok() {
                    continue;
                }
                // Whoever finds none ready makes one for itself.
                self.creations.leave_room().await;
                match self.make(true).await {
                    Ok(pair) => self.lock().push_back(pair),
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "cannot keep namespaces ready");
                        break;
                    }
                }
            }
            self.taken.notified().await;
        }
    }

    /// How many are ready.
    pub(super) fn ready(&self) -> usize {
        self.lock().len()
    }

    /// Frees what is ready.
    pub(super) async fn clear(&self) {
        let ready: Vec<Pair> = self.lock().drain(..).collect();
        for pair in ready {
            if let Some(port) = pair.port {
                port.give_back().await;
            }
        }
    }

    async fn make(&self, spare: bool) -> Result<Pair, OciError> {
        let base = self.ranges.take().map_err(OciError::system("claim uids"))?.ok_or(OciError::NoUids)?;
        let uids = UidRange { base, ranges: Arc::clone(&self.ranges), kept: false };
        let (done, fds) = self.spawner.call(Job::Pair { uid_base: base, spare }, &[]).await?;
        let Done::Paired { spawner } = done else { return Err(CallError::Lost.into()) };
        let [user, network] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| CallError::Lost)?;
        let port = match &self.network {
            Some(to) => Some(to.attach(&network).await.map_err(OciError::system("connect a sandbox"))?),
            None => None,
        };
        let mounts = match &self.scratch {
            Some(scratch) if spare => self.make_mounts(scratch, base, &network).await,
            _ => None,
        };
        Ok(Pair { uids, user, network, mounts, port, spawner })
    }

    /// A sandbox without them mounts its own, and says what is wrong if it cannot.
    async fn make_mounts(&self, scratch: &Path, uid_base: u32, network: &OwnedFd) -> Option<ReadyMounts> {
        let job = Job::Mounts { scratch: scratch.to_owned(), uid_base };
        match self.spawner.call(job, &[network.as_fd()]).await {
            Ok((_, fds)) => {
                let [dev, sys] = <[OwnedFd; 2]>::try_from(fds).ok()?;
                Some(ReadyMounts { dev, sys })
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "cannot make mounts ahead");
                None
            }
        }
    }

    /// An ordinary user's spawner has power only over namespaces that it made.
    async fn is_usable(&self, pair: &Pair) -> bool {
        !is_ordinary_user() || self.spawner.pid().await == Some(pair.spawner)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Pair>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

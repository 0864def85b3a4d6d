//! A sandbox that runs, as this process holds it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stacyvm_api::Limit;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::state::Record;
use crate::host::process::Identity;
use crate::host::sys;

/// A sandbox whose PRoot was found alive.
pub(super) struct Live {
    pub(super) record: Record,
    pub(super) identity: Identity,
    proot: AsyncFd<OwnedFd>,
    /// The agent: when it ends, so does the sandbox.
    pub(super) agent: Option<Identity>,
    kills: Kills,
    /// Looks in a row at which it was beyond a limit.
    excesses: AtomicU64,
    /// Held while PRoot is stopped.
    stopping: Mutex<()>,
}

/// Times the watcher killed something, by the limit that was passed.
#[derive(Debug, Default)]
struct Kills {
    memory: AtomicU64,
    pids: AtomicU64,
    disk: AtomicU64,
}

impl Kills {
    /// `None` for what the watcher does not hold.
    fn of(&self, limit: Limit) -> Option<&AtomicU64> {
        match limit {
            Limit::Memory => Some(&self.memory),
            Limit::Pids => Some(&self.pids),
            Limit::Disk => Some(&self.disk),
            Limit::Swap | Limit::Cpu => None,
        }
    }
}

impl Live {
    pub(super) fn new(
        record: Record,
        identity: Identity,
        proot: OwnedFd,
        agent: Option<Identity>,
    ) -> std::io::Result<Self> {
        let proot = sys::watch(proot, Interest::READABLE)?;
        let (kills, excesses, stopping) = (Kills::default(), AtomicU64::new(0), Mutex::default());
        Ok(Self { record, identity, proot, agent, kills, excesses, stopping })
    }

    pub(super) fn with_agent(self, agent: Option<Identity>) -> Self {
        Self { agent, ..self }
    }

    pub(super) fn proot(&self) -> &AsyncFd<OwnedFd> {
        &self.proot
    }

    /// Resolves when PRoot has ended.
    pub(super) async fn ended(&self) -> std::io::Result<()> {
        self.proot.readable().await.map(drop)
    }

    /// For as long as PRoot is stopped: nobody else lets it go on meanwhile.
    pub(super) fn only_one_stops_it(&self) -> MutexGuard<'_, ()> {
        self.stopping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn kills(&self, limit: Limit) -> u64 {
        self.kills.of(limit).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// How often in a row, this time included.
    pub(super) fn count_excess(&self, exceeds: bool) -> u64 {
        if exceeds {
            return self.excesses.fetch_add(1, Ordering::Relaxed) + 1;
        }
        self.excesses.store(0, Ordering::Relaxed);
        0
    }

    /// Before it is done: whoever sees the end asks for the reason at once.
    pub(super) fn count_kill(&self, limit: Limit) {
        if let Some(count) = self.kills.of(limit) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(super) type Registry = crate::host::registry::Registry<Live>;

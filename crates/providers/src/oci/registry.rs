//! A sandbox that runs, as this process holds it.

use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::state::Record;
use crate::host::sys;

/// A sandbox whose init was found alive.
pub(super) struct Live {
    pub(super) record: Record,
    init: AsyncFd<OwnedFd>,
}

impl Live {
    pub(super) fn new(record: Record, init: OwnedFd) -> std::io::Result<Self> {
        Ok(Self { record, init: sys::watch(init, Interest::READABLE)? })
    }

    pub(super) fn init(&self) -> &AsyncFd<OwnedFd> {
        &self.init
    }

    /// Resolves when its init has ended.
    pub(super) async fn ended(&self) -> std::io::Result<()> {
        self.init.readable().await.map(drop)
    }
}

pub(super) type Registry = crate::host::registry::Registry<Live>;

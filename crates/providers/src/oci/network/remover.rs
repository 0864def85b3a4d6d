//! Takes ports of ended sandboxes away.
//!
//! The kernel waits for every processor before it lets go of a device, tens of
//! milliseconds during which sandboxes that are being made must not wait. So
//! this is a thread of its own, and ports that end meanwhile go together, with
//! one wait for all of them.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc;

use rustix::thread::LinkNameSpaceType;
use tokio::sync::oneshot;

use super::addresses::{port_device, port_index};
use super::firewall::{self, Destination};
use super::netlink::Netlink;

/// Most ports that go together.
const BATCH_MAX: usize = 256;

/// A port to take away, and who waits for it.
pub(super) struct Removal {
    pub(super) port: u32,
    /// What it was allowed to reach.
    pub(super) destinations: Vec<Destination>,
    pub(super) done: oneshot::Sender<io::Result<()>>,
}

/// Starts the thread inside the router's namespace, where `devices` was opened.
pub(super) fn start(router: OwnedFd, mut devices: Netlink) -> io::Result<mpsc::Sender<Removal>> {
    let (removals, inbox) = mpsc::channel::<Removal>();
    std::thread::Builder::new().name("svm-unplug".into()).spawn(move || {
        let entered = rustix::thread::move_into_link_name_space(router.as_fd(), Some(LinkNameSpaceType::Network));
        while let Ok(first) = inbox.recv() {
            let batch: Vec<Removal> = std::iter::once(first).chain(inbox.try_iter().take(BATCH_MAX - 1)).collect();
            let removed = match entered {
                Ok(()) => remove(&mut devices, &batch),
                // The rules of the wrong namespace must not be touched.
                Err(error) => Err(error.into()),
            };
            for removal in batch {
                // Who asked may have given up; the work is done all the same.
                let _ = removal.done.send(removed.as_ref().map(drop).map_err(again));
            }
        }
    })?;
    Ok(removals)
}

fn remove(devices: &mut Netlink, batch: &[Removal]) -> io::Result<()> {
    match batch {
        [only] => devices.remove_device(port_index(only.port), &port_device(only.port))?,
        all => devices.remove_devices(all.iter().map(|removal| port_index(removal.port)))?,
    }
    let changes: String =
        batch.iter().map(|removal| firewall::change_allowed("delete", removal.port, &removal.destinations)).collect();
    if changes.is_empty() { Ok(()) } else { firewall::load(&changes) }
}

fn again(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

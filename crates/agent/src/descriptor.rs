//! Descriptors on the runtime.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Tells when a descriptor, which must not block, is ready for what is wanted.
#[expect(unsafe_code, reason = "registering a descriptor is unsafe for types that lie about theirs")]
pub(crate) fn watch_descriptor(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for all of its life.
    unsafe { AsyncFd::register_with_interest(fd, interest).map_err(io::Error::from) }
}

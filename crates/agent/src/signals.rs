//! Signals to the agent, as something to read.
//!
//! All are blocked in every thread, and none has a handler. So nothing has to be
//! blocked around a fork, and a command has next to nothing to reset before its
//! program runs: where a tracer looks at each system call, that is what a
//! command costs.

#![expect(unsafe_code, reason = "dispositions, masks and signalfd have no safe interface")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::boot::Tracer;
use crate::descriptor::watch_descriptor;

/// `struct signalfd_siginfo`, whose first word is the signal.
const INFO_BYTES: usize = 128;

/// Before any other thread exists. What whoever started this program ignored is
/// not for commands to inherit; a tracing launcher has seen to that already.
pub(crate) fn block_all(tracer: Tracer) -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // What Rust does about its own faults goes with a command's exec.
        let of_fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS);
        if signal == libc::SIGPIPE || (tracer == Tracer::Nobody && !of_fault) {
            // SAFETY: SIG_DFL installs no handler; the kernel refuses numbers
            // that cannot be set, which is harmless.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    // SAFETY: the set is a local variable, and nothing here waits for a signal
    // in another way than by reading it.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Those among the blocked ones that somebody waits for.
pub(crate) struct Signals(AsyncFd<OwnedFd>);

impl Signals {
    pub(crate) fn of(signals: &[c_int]) -> io::Result<Self> {
        // SAFETY: the set is a local variable; the new descriptor is nobody else's.
        let fd = unsafe {
            let mut wanted: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut wanted);
            for &signal in signals {
                libc::sigaddset(&raw mut wanted, signal);
            }
            match libc::signalfd(-1, &raw const wanted, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        Ok(Self(watch_descriptor(fd, Interest::READABLE)?))
    }

    pub(crate) async fn next(&self) -> io::Result<c_int> {
        let mut info = [0; INFO_BYTES];
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut info) {
                Ok(_) => {
                    let [a, b, c, d, ..] = info;
                    return Ok(c_int::from_ne_bytes([a, b, c, d]));
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

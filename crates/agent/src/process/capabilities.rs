//! Taking from a command what the agent itself needs.
//!
//! In a container of somebody else's the agent starts, owns and kills processes
//! of any user, and needs capabilities for it that its commands shall not have.

#![expect(unsafe_code, reason = "capabilities of one process between vfork and exec have no safe interface")]

use std::ffi::c_int;

/// `_LINUX_CAPABILITY_VERSION_3`, see capget(2).
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Bounds what the next exec can give this process to `kept`, capability N as
/// bit N. Uses only async-signal-safe calls; fails with an error number.
pub(super) unsafe fn bound(kept: u64) -> Result<(), c_int> {
    // SAFETY: numbers, and pointers to structures of the kernel's layout that
    // live on this stack (version 3 takes two halves).
    unsafe {
        for capability in 0..u64::BITS {
            if kept & (1 << capability) == 0 && libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                match errno() {
                    // The kernel knows no capability of this number nor above it.
                    libc::EINVAL => break,
                    error => return Err(error),
                }
            }
        }
        // What is inheritable would pass the bound, and so would what is ambient,
        // which goes with it.
        let mut header = Header { version: VERSION, pid: 0 };
        let mut data = [Data::default(); 2];
        if libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) < 0 {
            return Err(errno());
        }
        for half in &mut data {
            half.inheritable = 0;
        }
        if libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) < 0 {
            return Err(errno());
        }
        Ok(())
    }
}

fn errno() -> c_int {
    // SAFETY: always points at this thread's number.
    unsafe { *libc::__errno_location() }
}

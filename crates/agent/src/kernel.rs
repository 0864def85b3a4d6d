//! Which kernel the sandbox runs on, as far as it makes a difference.

use std::sync::LazyLock;

use stacyvm_envd::GuestKernel;

/// `SYSLOG_ACTION_READ_ALL`, see syslog(2).
const READ_ALL: libc::c_int = 3;

/// Of the kernel's log; gVisor's has a few hundred bytes.
const LOG_BYTES: usize = 16 << 10;
const GVISOR_BANNER: &str = "Starting gVisor";

static IS_GVISOR: LazyLock<bool> = LazyLock::new(|| log().contains(GVISOR_BANNER));

static HAS_SUBREAPERS: LazyLock<bool> = LazyLock::new(|| !is_gvisor() || keeps_subreaper());

/// What is said of it to whoever made the sandbox.
pub(crate) fn seen() -> GuestKernel {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    GuestKernel { release, is_gvisor: is_gvisor() }
}

/// A kernel in user space that lacks some of what Linux does.
pub(crate) fn is_gvisor() -> bool {
    *IS_GVISOR
}

/// Whether orphans go to the nearest ancestor that wants them. gVisor accepted
/// the wish before it could grant it (gvisor#2323).
pub(crate) fn has_subreapers() -> bool {
    *HAS_SUBREAPERS
}

#[expect(unsafe_code, reason = "there is no safe interface to this flag of a process")]
fn keeps_subreaper() -> bool {
    let mut kept: libc::c_int = 0;
    // SAFETY: sets a flag of this process, and reads it into a local variable.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut kept, 0, 0, 0) == 0
            && kept == 1
    }
}

/// What the kernel lets this process read of its log; a real one nothing.
#[expect(unsafe_code, reason = "there is no safe interface to the kernel's log")]
fn log() -> String {
    let mut log = vec![0u8; LOG_BYTES];
    // SAFETY: the pointer and the length describe `log`, which the call fills.
    let length = unsafe { libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), LOG_BYTES as libc::c_int) };
    log.truncate(usize::try_from(length).unwrap_or(0));
    String::from_utf8_lossy(&log).into_owned()
}

//! The system calls that neither std nor rustix offers safely.
//!
//! Everything unsafe of this crate stands here and, for disks, in the `sys` of
//! `oci::disk`, so that the rest can be read for what it does. Each function is
//! a thin cover over one call (or one idiom made of a few) and returns the
//! kernel's error unchanged.

#![expect(unsafe_code, reason = "raw system calls: clone3, execveat, seccomp, mount_setattr, keyctl")]

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Start the child in the v2 control group given (clone3(2), Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a fork the caller is on.
pub(crate) enum Forked {
    Child,
    Parent { pid: Pid, pidfd: OwnedFd },
}

/// Forks with new namespaces (`CLONE_NEW*`), optionally straight into a cgroup
/// of the v2 hierarchy.
///
/// The child gets a copy of everything, as with `fork`, and may allocate:
/// callers are single-threaded (the spawner), so no lock can be held elsewhere.
pub(crate) fn fork_into(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args is valid; it is plain old data.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with no stack the call behaves like fork;
    // `args` and `pidfd` outlive it.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => {
            let pid = Pid::from_raw(pid as i32).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            // SAFETY: the kernel put a new descriptor there that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Forked::Parent { pid, pidfd })
        }
    }
}

/// Leaves namespaces (`CLONE_NEW*`) for new ones.
pub(crate) fn unshare(namespaces: i32) -> io::Result<()> {
    // SAFETY: only namespace flags are passed here, which touch no memory of
    // this process; CLONE_FILES is not among them.
    check(unsafe { libc::unshare(namespaces) }.into()).map(drop)
}

/// What to change on a mount (mount_setattr(2)).
#[derive(Default)]
pub(crate) struct MountAttributes<'a> {
    pub(crate) set: u64,
    pub(crate) recursive: bool,
    /// Shift owners of files by this user namespace.
    pub(crate) idmap: Option<BorrowedFd<'a>>,
}

pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, attributes: &MountAttributes<'_>) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    let mut attr = MountAttr { attr_set: attributes.set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    if let Some(user_namespace) = attributes.idmap {
        attr.attr_set |= MOUNT_ATTR_IDMAP;
        attr.userns_fd = user_namespace.as_raw_fd() as u64;
    }
    let recursive = if attributes.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` has the kernel's layout and its size is passed along.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Starts a session keyring that shares nothing with the caller's.
pub(crate) fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) }).map(drop)
}

/// Marks every descriptor from `first` on as closed by the next exec.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: only flags of descriptors change; nothing is closed here.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Puts a descriptor at a fixed number, where it survives exec.
pub(crate) fn place(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: `number` belongs to the program about to be executed; the caller
    // has moved everything it still needs above it.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}

/// Becomes the program behind `program`; returns only on failure.
pub(crate) fn execute(program: BorrowedFd<'_>, argv: &[CString], env: &[CString]) -> Result<Infallible, io::Error> {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end in null and their strings outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(io::Error::last_os_error())
}

/// Installs a filter over every later system call of this process.
pub(crate) fn install_seccomp(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `length` instructions and never writes to them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) }).map(drop)
}

/// Default action for every signal and an empty mask, as a fresh program
/// expects. std ignores SIGPIPE and the spawner SIGCHLD; both would be
/// inherited, and with SIGCHLD ignored `waitpid` finds nobody.
pub(crate) fn reset_signals() -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler. The kernel refuses SIGKILL,
        // SIGSTOP and the two that libc reserves; that is harmless.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set lives on the stack and is initialised by sigemptyset.
    check(
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
        }
        .into(),
    )
    .map(drop)
}

/// Children are reaped by the kernel: nobody in this process waits for them.
pub(crate) fn reap_children_automatically() {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Brings the loopback device of the current network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: an all-zero ifreq is valid; it is plain old data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads the name and the flags of an ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Takes the descriptor that this process was started with as its own.
///
/// Call it at most once per number, first thing in `main`.
pub(crate) fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: the program that executed this one passed the descriptor for
    // exactly this purpose, and nothing here has used it before.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Ends this process without running destructors or exit handlers, which
/// belong to the process it was forked from.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` is always allowed.
    unsafe { libc::_exit(status) }
}

/// Has tokio wait for a descriptor.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

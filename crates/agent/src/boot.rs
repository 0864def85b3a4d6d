//! From the launcher's configuration to a running server.

#![expect(unsafe_code, reason = "inherited descriptors and prctl have no safe interface")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::Resource;
use stacyvm_envd::BootConfig;
use stacyvm_envd::boot::{BOOT_FD, LISTENER_FD, MAX_BOOT_BYTES};
use tokio::net::UnixListener;

use crate::serve::Peers;
use crate::{Sandbox, heap, lifecycle, serve, signals};

/// Threads for calls that block. They count against the sandbox's process limit
/// and never end once started, so that file calls work when that is used up.
const BLOCKING_THREADS: usize = 4;
const FOREVER: Duration = Duration::from_hours(100 * 365 * 24);

/// Commands take three each, connections one.
const ENOUGH_OPEN_FILES: u64 = 16_384;

/// A uid that no image gives to anybody: the last of a sandbox's 65,536.
pub(crate) const NOBODY_ELSE: u32 = 65_535;

/// Who looks at every system call of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracer {
    Nobody,
    /// One that is no more than its user (PRoot), and pretends other users.
    Launcher,
}

/// Before anything secret is in memory: unless a tracer needs it, no core dump,
/// no `ptrace` and no reading of `/proc/PID` by the same user. Nobody else can
/// attach to what has a tracer.
pub(crate) fn harden(tracer: Tracer) {
    heap::keep_small();
    // SAFETY: prctl takes plain numbers here; umask cannot fail.
    unsafe {
        if tracer == Tracer::Nobody {
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        }
        libc::umask(0o022);
    }
}

/// Reads the configuration and serves on an inherited socket until the sandbox
/// ends.
pub(crate) fn serve(tracer: Tracer) -> io::Result<()> {
    close_other_descriptors()?;
    fill_standard_descriptors()?;
    let listener = inherited_listener()?;
    run(read_config()?, listener, Peers::Anybody, tracer)
}

/// Serves until the sandbox ends.
pub(crate) fn run(config: BootConfig, listener: StdUnixListener, peers: Peers, tracer: Tracer) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    signals::block_all(tracer)?;
    let open_files = raise_open_files();
    if tracer == Tracer::Nobody {
        stand_apart();
    }
    become_reaper();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(FOREVER)
        .build()?;
    runtime.block_on(async {
        let sandbox = Arc::new(Sandbox::new(config, open_files, tracer));
        // The first thread exists before anything can use up the limit; nobody
        // waits until it runs.
        drop(tokio::task::spawn_blocking(|| ()));
        let listener = UnixListener::from_std(listener)?;
        tokio::select! {
            result = serve::accept(listener, peers, Arc::clone(&sandbox)) => result,
            result = lifecycle::until_ended(sandbox) => result,
        }
    })
}

/// Launchers leave descriptors of their own behind (a container runtime: this
/// program's file). None is for commands to inherit.
fn close_other_descriptors() -> io::Result<()> {
    // SAFETY: nothing in this program has opened a descriptor yet.
    match unsafe { libc::syscall(libc::SYS_close_range, BOOT_FD + 1, u32::MAX, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Descriptors 0 to 2 may be closed; a file opened later must not land there.
fn fill_standard_descriptors() -> io::Result<()> {
    loop {
        let null = match rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(null) => null,
            Err(_) => rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?.0,
        };
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        let _stays_open = null.into_raw_fd();
    }
}

fn inherited_listener() -> io::Result<StdUnixListener> {
    // SAFETY: by contract the launcher passes the listener here, and nothing
    // else in this program uses the number.
    let fd = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| io::Error::other(format!("no listening socket on descriptor {LISTENER_FD}: {error}")))?;
    Ok(StdUnixListener::from(fd))
}

fn read_config() -> io::Result<BootConfig> {
    // SAFETY: as above; the descriptor is closed at the end of this function.
    let file = unsafe { File::from_raw_fd(BOOT_FD) };
    let mut json = Vec::new();
    (&file)
        .take(MAX_BOOT_BYTES as u64 + 1)
        .read_to_end(&mut json)
        .map_err(|error| io::Error::other(format!("no boot configuration on descriptor {BOOT_FD}: {error}")))?;
    // A tracer may have it open too, where a guest would find it.
    let _ = file.set_len(0);
    parse(&json)
}

pub(crate) fn parse(json: &[u8]) -> io::Result<BootConfig> {
    if json.len() > MAX_BOOT_BYTES {
        return Err(io::Error::other("the boot configuration is too long"));
    }
    let config: BootConfig = serde_json::from_slice(json)
        .map_err(|error| io::Error::other(format!("the boot configuration is not understood: {error}")))?;
    if config.token.is_empty() {
        return Err(io::Error::other("the boot configuration has no token"));
    }
    Ok(config)
}

/// Many commands and connections need many descriptors. Commands get the old
/// limit back.
fn raise_open_files() -> Option<libc::rlimit> {
    let before = rustix::process::getrlimit(Resource::Nofile);
    if before.current.is_none_or(|files| files >= ENOUGH_OPEN_FILES) {
        return None;
    }
    let raised = rustix::process::Rlimit { current: before.maximum, maximum: before.maximum };
    rustix::process::setrlimit(Resource::Nofile, raised).ok()?;
    let number = |limit: Option<u64>| limit.unwrap_or(libc::RLIM_INFINITY);
    Some(libc::rlimit { rlim_cur: number(before.current), rlim_max: number(before.maximum) })
}

/// The guest's root has the agent's uid, and could so set its resource limits:
/// with none of its descriptors left it would answer nobody. The kernel asks
/// for all three uids (`check_prlimit_permission`), else for a capability that
/// a guest does not have, so one that differs is enough. What the agent may do
/// itself is decided by the others; helpers inherit this, commands do not.
fn stand_apart() {
    if rustix::process::geteuid().is_root() {
        // SAFETY: plain numbers, and nothing else runs yet. Where there is no
        // such uid, or no right to take it, everything stays as it was.
        unsafe { libc::setresuid(u32::MAX, u32::MAX, NOBODY_ELSE) };
    }
}

/// Orphans become children of this process and the kernel reaps them: nothing
/// here waits for a child, supervisors report through their connection.
fn become_reaper() {
    // SAFETY: sets a disposition and a flag of this process.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::setsid();
    }
}

//! The two programs that run between `fork` and `exec`.
//!
//! ```text
//! agent ── fork ──► supervisor ── vfork ──► command
//!   ▲                  │ (subreaper)           └─ children, also setsid ones,
//!   └── reports ───────┘                          whose parent died: re-parented
//!                                                 to the supervisor
//! ```
//!
//! The supervisor is a subreaper, so that every descendant of the command stays
//! below it in the process tree, whatever sessions or double forks it makes: a
//! deadline finds them all there. It reaps, reports the command's end, and waits
//! until the agent closes the connection before it goes away itself, so that the
//! tree stays in one piece while it is being killed.
//!
//! Both run in a copy of a possibly multi-threaded program: they may use only
//! async-signal-safe calls and memory that was prepared before the fork.

#![expect(unsafe_code, reason = "fork, vfork and exec have no safe interface")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::mark::Mark;
use super::{capabilities, foreground};
use crate::user::Identity;

/// Length of one report on the connection.
pub(crate) const REPORT_BYTES: usize = 12;

/// The command, and only it, starts with this much more oom score than the agent.
const OOM_SCORE_RAISE: i32 = 500;
const OOM_SCORE_MAX: i32 = 1000;

/// The command's side runs on this stack from vfork to exec.
const CHILD_STACK_BYTES: usize = 32 << 10;

/// The supervisor's end of the connection to the agent.
const REPORT_FD: c_int = 3;

/// Highest descriptor closed one by one where `close_range` is not available.
const MAX_CLOSED_FD: c_int = 65_536;

/// What the supervisor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// By the command's side, right before its program runs: from then on it can
    /// kill the supervisor before that says anything.
    Starting {
        pid: i32,
    },
    Started {
        pid: i32,
    },
    /// The command was never started.
    Refused {
        step: Step,
        errno: i32,
    },
    /// Wait status of the command.
    Ended {
        status: i32,
    },
}

/// Where starting a command can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Fork,
    Session,
    Terminal,
    User,
    Workdir,
    Exec,
}

impl Report {
    pub(crate) fn decode(bytes: [u8; REPORT_BYTES]) -> Option<Self> {
        let word = |at: usize| Some(i32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (kind, first, second) = (word(0)?, word(4)?, word(8)?);
        Some(match kind {
            1 => Self::Started { pid: first },
            2 => Self::Refused { step: Step::from_code(first)?, errno: second },
            3 => Self::Ended { status: first },
            4 => Self::Starting { pid: first },
            _ => return None,
        })
    }

    pub(super) fn encode(self) -> [u8; REPORT_BYTES] {
        let (kind, first, second) = match self {
            Self::Started { pid } => (1, pid, 0),
            Self::Refused { step, errno } => (2, step as i32, errno),
            Self::Ended { status } => (3, status, 0),
            Self::Starting { pid } => (4, pid, 0),
        };
        let mut bytes = [0; REPORT_BYTES];
        bytes[..4].copy_from_slice(&i32::to_ne_bytes(kind));
        bytes[4..8].copy_from_slice(&i32::to_ne_bytes(first));
        bytes[8..].copy_from_slice(&i32::to_ne_bytes(second));
        bytes
    }
}

impl Step {
    fn from_code(code: i32) -> Option<Self> {
        [Self::Fork, Self::Session, Self::Terminal, Self::User, Self::Workdir, Self::Exec]
            .into_iter()
            .find(|step| *step as i32 == code)
    }
}

/// Everything both programs need, prepared before the fork.
pub(crate) struct Plan {
    candidates: CStrings,
    argv: CStrings,
    envp: CStrings,
    workdir: CString,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// The command runs as who the agent is; where the kernel then refuses
    /// `setgroups` (a user namespace of an ordinary user), nothing is lost.
    same_user: bool,
    terminal: bool,
    foreground_of: Option<CString>,
    oom_score: &'static [u8],
    open_files: Option<libc::rlimit>,
    capabilities: Option<u64>,
    stack: Vec<u8>,
    stdio: [OwnedFd; 3],
    reports: OwnedFd,
    /// Written by the command's side, read by the supervisor, which shares its
    /// memory until the exec.
    refusal: Option<(Step, i32)>,
}

pub(crate) struct PlanOptions {
    /// Paths to try, in order, as `execvp` would.
    pub candidates: Vec<CString>,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    pub workdir: CString,
    pub identity: Identity,
    pub terminal: bool,
    /// The command's terminal by name, where the supervisor leads its session
    /// and signals its foreground (see [`foreground`]).
    pub foreground_of: Option<CString>,
    /// What the command's processes are found by, beside their place in the tree.
    pub mark: Option<Mark>,
    pub stdio: [OwnedFd; 3],
    pub reports: OwnedFd,
    /// The limit that the command gets back, if the agent raised its own.
    pub open_files: Option<libc::rlimit>,
    /// What the command may have at most, if that is less than the agent has.
    pub capabilities: Option<u64>,
}

impl Plan {
    pub(crate) fn new(options: PlanOptions) -> Self {
        let same_user = rustix::process::geteuid().as_raw() == options.identity.uid
            && rustix::process::getegid().as_raw() == options.identity.gid;
        Self {
            candidates: CStrings::new(options.candidates),
            argv: CStrings::new(options.argv),
            envp: CStrings::new(options.env),
            workdir: options.workdir,
            uid: options.identity.uid,
            gid: options.identity.gid,
            groups: options.identity.groups.into_iter().chain(options.mark.map(Mark::group)).collect(),
            same_user,
            terminal: options.terminal,
            foreground_of: options.foreground_of,
            oom_score: command_oom_score(),
            open_files: options.open_files,
            capabilities: options.capabilities,
            stack: vec![0; CHILD_STACK_BYTES],
            stdio: options.stdio,
            reports: options.reports,
            refusal: None,
        }
    }

    /// Forks the supervisor and returns its pid.
    pub(crate) fn launch(mut self) -> io::Result<i32> {
        // SAFETY: plain system calls on valid pointers. The child half of the
        // fork runs `supervise`, which never returns and keeps to
        // async-signal-safe calls. Signals stay blocked across the fork so that
        // no handler of the agent's runtime runs in the child.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            let pid = libc::fork();
            if pid == 0 {
                supervise(&mut self);
            }
            let error = io::Error::last_os_error();
            libc::sigprocmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
            if pid < 0 { Err(error) } else { Ok(pid) }
        }
    }
}

/// The agent's own score, raised, as text for `/proc`. It does not change.
fn command_oom_score() -> &'static [u8] {
    static SCORE: OnceLock<Vec<u8>> = OnceLock::new();
    SCORE.get_or_init(|| {
        let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let own: i32 = own.trim().parse().unwrap_or(0);
        (own + OOM_SCORE_RAISE).min(OOM_SCORE_MAX).to_string().into_bytes()
    })
}

/// Null-terminated array of C strings.
struct CStrings {
    pointers: Vec<*const c_char>,
    /// Owns what the pointers point to.
    _strings: Vec<CString>,
}

impl CStrings {
    fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { pointers, _strings: strings }
    }
}

/// The supervisor. Never returns.
unsafe fn supervise(plan: &mut Plan) -> ! {
    // SAFETY: runs alone in a forked child; every pointer lives in `plan`, and
    // only async-signal-safe calls are made.
    unsafe {
        reset_signal_handlers();
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, c"stacyvm-exec".as_ptr());
        for (at, fd) in plan.stdio.iter().enumerate() {
            libc::dup2(fd.as_raw_fd(), at as c_int);
        }
        libc::dup3(plan.reports.as_raw_fd(), REPORT_FD, libc::O_CLOEXEC);
        close_from(REPORT_FD + 1);

        if plan.foreground_of.is_some() {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
        }
        let stack_top = plan.stack.as_mut_ptr().add(plan.stack.len() & !15).cast::<c_void>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let pid = libc::clone(run_command, stack_top, flags, ptr::from_mut(plan).cast::<c_void>());
        if pid < 0 {
            plan.refusal = Some((Step::Fork, *libc::__errno_location()));
        }
        for fd in 0..REPORT_FD {
            libc::close(fd);
        }
        // Read through a volatile access: the command's side wrote it behind
        // the compiler's back.
        if let Some((step, errno)) = ptr::read_volatile(&raw const plan.refusal) {
            send(Report::Refused { step, errno });
            libc::_exit(1);
        }
        if let Some(terminal) = &plan.foreground_of {
            lead_session(terminal);
        }
        send(Report::Started { pid });
        loop {
            let mut status: c_int = 0;
            let ended = libc::waitpid(-1, &raw mut status, 0);
            if ended == pid {
                send(Report::Ended { status });
                break;
            }
            if ended < 0 && *libc::__errno_location() != libc::EINTR {
                break;
            }
        }
        // The agent closes its end when nothing here is needed any more.
        let mut byte = 0u8;
        while libc::read(REPORT_FD, (&raw mut byte).cast::<c_void>(), 1) < 0 && *libc::__errno_location() == libc::EINTR
        {
        }
        libc::_exit(0)
    }
}

/// Name of the terminal whose session this supervisor leads.
static LED: AtomicPtr<c_char> = AtomicPtr::new(ptr::null_mut());

/// From now on signals of terminals go on to the foreground.
unsafe fn lead_session(terminal: &CStr) {
    LED.store(terminal.as_ptr().cast_mut(), Ordering::Relaxed);
    // SAFETY: dispositions and the mask of this process; the handler keeps to
    // async-signal-safe calls, and the name outlives this process.
    unsafe {
        let mut passed_on: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut passed_on);
        for signal in foreground::SIGNALS {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = pass_on as extern "C" fn(c_int) as usize;
            libc::sigaction(signal.as_raw(), &raw const action, ptr::null_mut());
            libc::sigaddset(&raw mut passed_on, signal.as_raw());
        }
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const passed_on, ptr::null_mut());
    }
}

extern "C" fn pass_on(signal: c_int) {
    // SAFETY: async-signal-safe calls, with a name that was stored before the
    // handler was set; what they fail with is put back.
    unsafe {
        let errno = *libc::__errno_location();
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let terminal = libc::open(LED.load(Ordering::Relaxed), flags);
        if terminal >= 0 {
            let group = libc::tcgetpgrp(terminal);
            libc::close(terminal);
            if group > 1 && group != libc::getpgrp() {
                libc::kill(-group, signal);
            }
        }
        *libc::__errno_location() = errno;
    }
}

unsafe fn send(report: Report) {
    let bytes = report.encode();
    // SAFETY: sends a local array; without SIGPIPE if the agent is gone.
    unsafe {
        libc::send(REPORT_FD, bytes.as_ptr().cast::<c_void>(), bytes.len(), libc::MSG_NOSIGNAL);
    }
}

/// The command's side between vfork and exec.
extern "C" fn run_command(plan: *mut c_void) -> c_int {
    // SAFETY: the supervisor passes its plan and is suspended until this
    // process has called exec or ended, so the access is exclusive.
    unsafe {
        let plan = &mut *plan.cast::<Plan>();
        let refusal = become_command(plan);
        ptr::write_volatile(&raw mut plan.refusal, Some(refusal));
        libc::_exit(127)
    }
}

/// Turns into the command; returns only what prevented it.
unsafe fn become_command(plan: &Plan) -> (Step, c_int) {
    // SAFETY: as `run_command`; all pointers live in `plan`.
    unsafe {
        let errno = || *libc::__errno_location();
        raise_oom_score(plan.oom_score);
        if plan.foreground_of.is_some() {
            if libc::setpgid(0, 0) < 0 || libc::tcsetpgrp(0, libc::getpid()) < 0 {
                return (Step::Terminal, errno());
            }
        } else if libc::setsid() < 0 {
            return (Step::Session, errno());
        } else if plan.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return (Step::Terminal, errno());
        }
        if let Some(limit) = &plan.open_files {
            libc::setrlimit(libc::RLIMIT_NOFILE, limit);
        }
        if let Some(kept) = plan.capabilities
            && let Err(errno) = capabilities::bound(kept)
        {
            return (Step::User, errno);
        }
        let groups = libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr());
        if (groups < 0 && !plan.same_user)
            || libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) < 0
            || libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) < 0
        {
            return (Step::User, errno());
        }
        if libc::chdir(plan.workdir.as_ptr()) < 0 {
            return (Step::Workdir, errno());
        }
        send(Report::Starting { pid: libc::getpid() });
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        let mut worst = libc::ENOENT;
        for &candidate in &plan.candidates.pointers {
            if candidate.is_null() {
                break;
            }
            libc::execve(candidate, plan.argv.pointers.as_ptr(), plan.envp.pointers.as_ptr());
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => worst = libc::EACCES,
                other => return (Step::Exec, other),
            }
        }
        (Step::Exec, worst)
    }
}

unsafe fn raise_oom_score(score: &[u8]) {
    const PATH: &CStr = c"/proc/self/oom_score_adj";
    // SAFETY: a constant path and a slice that outlives the call. Failure is
    // accepted: without the right to it, the command keeps the agent's score.
    unsafe {
        let fd = libc::open(PATH.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, score.as_ptr().cast::<c_void>(), score.len());
            libc::close(fd);
        }
    }
}

/// Ignored and handled signals would be inherited by the command.
unsafe fn reset_signal_handlers() {
    // SAFETY: resets dispositions; invalid numbers are refused by the kernel.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=libc::SIGRTMAX() {
            libc::sigaction(signal, &raw const default, ptr::null_mut());
        }
    }
}

/// The copies of the agent's connections and of other commands' pipes must not
/// live on here: their other ends would never see an end of file.
unsafe fn close_from(first: c_int) {
    // SAFETY: closing descriptors that only this forked child uses.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, c_int::MAX, 0) < 0 {
            for fd in first..MAX_CLOSED_FD {
                libc::close(fd);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_wire() {
        for report in [
            Report::Starting { pid: 42 },
            Report::Started { pid: 42 },
            Report::Refused { step: Step::Workdir, errno: libc::ENOENT },
            Report::Ended { status: 0x0b00 },
        ] {
            assert_eq!(Report::decode(report.encode()), Some(report));
        }
        assert_eq!(Report::decode([9; REPORT_BYTES]), None);
    }
}

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
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use super::mark::Mark;
use super::pid_slot::PidSlot;
use super::report::{Report, Step};
use super::{capabilities, foreground};
use crate::boot::Tracer;
use crate::user::Identity;

/// The command, and only it, starts with this much more oom score than the agent.
const OOM_SCORE_RAISE: i32 = 500;
const OOM_SCORE_MAX: i32 = 1000;
const OOM_SCORE: &CStr = c"/proc/self/oom_score_adj";

/// The command's side runs on this stack from vfork to exec.
const CHILD_STACK_BYTES: usize = 32 << 10;

/// The supervisor's end of the connection to the agent.
const REPORT_FD: c_int = 3;

const MAX_FD: c_int = c_int::MAX;

/// Highest descriptor closed one by one where `close_range` is not available.
const MAX_CLOSED_FD: c_int = 65_536;

/// Everything both programs need, prepared before the fork.
pub(crate) struct Plan {
    candidates: CStrings,
    argv: CStrings,
    envp: CStrings,
    workdir: CString,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    user: UserChange,
    terminal: bool,
    foreground_of: Option<CString>,
    oom_score: &'static [u8],
    /// Whether the agent was given more of the processor than its commands get.
    is_urgent: bool,
    open_files: Option<libc::rlimit>,
    capabilities: Option<u64>,
    stack: Vec<u8>,
    stdio: [Arc<OwnedFd>; 3],
    reports: OwnedFd,
    /// Where the kernel notes the command, if anywhere.
    pid: *mut libc::pid_t,
    /// Written by the command's side, read by the supervisor, which shares its
    /// memory until the exec.
    refusal: Option<(Step, i32)>,
}

/// What it takes to run as the command's user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UserChange {
    /// Users are the tracer's pretence, and the agent is this one already.
    Nothing,
    /// The agent's own; where the kernel then refuses `setgroups` (a user
    /// namespace of an ordinary user), nothing is lost.
    ToSame,
    ToOther,
}

impl UserChange {
    fn of(identity: &Identity, tracer: Tracer) -> Self {
        /// Never change.
        static OWN: LazyLock<(u32, u32)> =
            LazyLock::new(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
        match (*OWN == (identity.uid, identity.gid), tracer) {
            (true, Tracer::Launcher) => Self::Nothing,
            (true, Tracer::Nobody) => Self::ToSame,
            (false, _) => Self::ToOther,
        }
    }
}

pub(crate) struct PlanOptions<'a> {
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
    pub stdio: [Arc<OwnedFd>; 3],
    pub reports: OwnedFd,
    /// Kept by the caller until it has heard of the start.
    pub pid: Option<&'a PidSlot>,
    pub tracer: Tracer,
    /// The limit that the command gets back, if the agent raised its own.
    pub open_files: Option<libc::rlimit>,
    /// What the command may have at most, if that is less than the agent has.
    pub capabilities: Option<u64>,
}

impl Plan {
    pub(crate) fn new(options: PlanOptions<'_>) -> Self {
        let user = UserChange::of(&options.identity, options.tracer);
        Self {
            candidates: CStrings::new(options.candidates),
            argv: CStrings::new(options.argv),
            envp: CStrings::new(options.env),
            workdir: options.workdir,
            uid: options.identity.uid,
            gid: options.identity.gid,
            groups: options.identity.groups.into_iter().chain(options.mark.map(Mark::group)).collect(),
            user,
            terminal: options.terminal,
            foreground_of: options.foreground_of,
            oom_score: command_oom_score(),
            is_urgent: is_urgent(),
            open_files: options.open_files,
            capabilities: options.capabilities,
            stack: vec![0; CHILD_STACK_BYTES],
            stdio: options.stdio,
            reports: options.reports,
            pid: options.pid.map_or(ptr::null_mut(), PidSlot::as_ptr),
            refusal: None,
        }
    }

    /// Forks the supervisor and returns its pid.
    ///
    /// Not by the C library's `fork`, which makes several more system calls for
    /// a child that would go on as this program does. Where a tracer looks at
    /// each of them, they are what a command costs.
    pub(crate) fn launch(mut self) -> io::Result<i32> {
        // SAFETY: plain system calls on valid pointers. The child half of the
        // fork runs `supervise`, which never returns and keeps to raw system
        // calls: it does not use the C library's idea of its thread, which is
        // the agent's. All signals are blocked, in the agent and so in it.
        unsafe {
            let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t;
            if pid == 0 {
                supervise(&mut self);
            }
            if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
        }
    }
}

/// The agent's own score, raised, as text for `/proc`; nothing where the agent
/// may not write there, and a command would try in vain. It does not change.
fn command_oom_score() -> &'static [u8] {
    static SCORE: OnceLock<Vec<u8>> = OnceLock::new();
    SCORE.get_or_init(|| {
        let Ok(path) = OOM_SCORE.to_str() else { return Vec::new() };
        if std::fs::OpenOptions::new().write(true).open(path).is_err() {
            return Vec::new();
        }
        let own = std::fs::read_to_string(path).unwrap_or_default();
        let own: i32 = own.trim().parse().unwrap_or(0);
        (own + OOM_SCORE_RAISE).min(OOM_SCORE_MAX).to_string().into_bytes()
    })
}

/// Does not change either.
fn is_urgent() -> bool {
    static IS_URGENT: LazyLock<bool> =
        LazyLock::new(|| rustix::process::getpriority_process(None).is_ok_and(|priority| priority < 0));
    *IS_URGENT
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
        // Of the dispositions only this one is the agent's own.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        for (at, fd) in plan.stdio.iter().enumerate() {
            libc::dup2(fd.as_raw_fd(), at as c_int);
        }
        libc::dup3(plan.reports.as_raw_fd(), REPORT_FD, libc::O_CLOEXEC);
        close_range(REPORT_FD + 1, MAX_FD);

        if plan.foreground_of.is_some() {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
        }
        let stack_top = plan.stack.as_mut_ptr().add(plan.stack.len() & !15).cast::<c_void>();
        // Noted before the command runs: it can kill this process right away.
        let note = if plan.pid.is_null() { 0 } else { libc::CLONE_PARENT_SETTID };
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD | note;
        let pid = libc::clone(run_command, stack_top, flags, ptr::from_mut(plan).cast::<c_void>(), plan.pid);
        if pid < 0 {
            plan.refusal = Some((Step::Fork, *libc::__errno_location()));
        }
        close_range(0, REPORT_FD - 1);
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
        if plan.is_urgent {
            libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        }
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
        if plan.user != UserChange::Nothing {
            let groups = libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr());
            if (groups < 0 && plan.user == UserChange::ToOther)
                || libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) < 0
                || libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) < 0
            {
                return (Step::User, errno());
            }
        }
        if libc::chdir(plan.workdir.as_ptr()) < 0 {
            return (Step::Workdir, errno());
        }
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
    if score.is_empty() {
        return;
    }
    // SAFETY: a constant path and a slice that outlives the call. Failure is
    // accepted: the command keeps the agent's score.
    unsafe {
        let fd = libc::open(OOM_SCORE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            // The exec closes it.
            libc::write(fd, score.as_ptr().cast::<c_void>(), score.len());
        }
    }
}

/// The copies of the agent's connections and of other commands' pipes must not
/// live on here: their other ends would never see an end of file.
unsafe fn close_range(first: c_int, last: c_int) {
    // SAFETY: closing descriptors that only this forked child uses.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) < 0 {
            for fd in first..=last.min(MAX_CLOSED_FD) {
                libc::close(fd);
            }
        }
    }
}

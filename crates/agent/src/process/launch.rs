//! From what a caller asks for to a running program.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::mark::Mark;
use super::output::OutputKind;
use super::pid_slot::PidSlot;
use super::report::{Report, Reports, Step};
use super::run::Pipes;
use super::supervisor::{Plan, PlanOptions};
use super::{Process, REPORT_TIME, StartOptions, State, foreground, terminal};
use crate::boot::NOBODY_ELSE;
use crate::descriptor::watch_descriptor;
use crate::user::Identity;
use crate::{Failure, Sandbox, kernel};

/// Where programs are looked for when nobody says.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Directories of a PATH that are tried.
const MAX_PATH_DIRS: usize = 128;

pub(super) struct Launched {
    pub process: Process,
    pub pipes: Pipes,
}

/// Starts the program; fails as the caller should read it.
pub(super) async fn launch(sandbox: &Sandbox, options: &StartOptions) -> Result<Launched, Failure> {
    let program = options.argv.first().filter(|program| !program.is_empty());
    let program = program.ok_or_else(|| Failure::InvalidArgument("the command is empty".to_owned()))?;
    let identity = sandbox.identity(options.user.as_deref())?;
    if identity.uid == NOBODY_ELSE {
        return Err(Failure::InvalidArgument(format!("uid {NOBODY_ELSE} is the agent's own; name another user")));
    }
    let workdir = Workdir::of(sandbox, options.workdir.as_deref(), &identity)?;
    let env = environment(sandbox, &options.env, &identity);

    let (stdio, mut ours) = Ours::open(sandbox, options, &identity).map_err(|error| out_of("open pipes", error))?;
    let (reports, their_reports) = StdUnixStream::pair().map_err(|error| out_of("open a socket pair", error))?;

    let (mark, slot) = (Mark::next_if_needed(), PidSlot::take());
    let plan = Plan::new(PlanOptions {
        candidates: candidates(program, env.get("PATH").map_or(DEFAULT_PATH, String::as_str))?,
        argv: options.argv.iter().map(|argument| c_string(argument)).collect::<Result<_, _>>()?,
        env: env.iter().map(|(name, value)| c_string(&format!("{name}={value}"))).collect::<Result<_, _>>()?,
        workdir: c_string(&workdir.path)?,
        terminal: options.terminal.is_some(),
        foreground_of: ours.name.take(),
        mark,
        identity,
        stdio,
        reports: their_reports.into(),
        pid: slot.as_ref(),
        tracer: sandbox.tracer,
        open_files: sandbox.open_files,
        capabilities: sandbox.capabilities,
    });
    let supervisor = plan.launch().map_err(|error| out_of("start a process", error))?;
    let reports = Reports::new(reports.into()).map_err(|error| out_of("watch a socket", error))?;
    let pid = match started(&reports, supervisor, slot.as_ref()).await {
        Ok(pid) => pid.unwrap_or(supervisor),
        Err((step, errno)) => return Err(refusal(program, &workdir, step, errno)),
    };

    let watched = |fd, interest| watch_descriptor(fd, interest).map_err(|error| out_of("watch a pipe", error));
    let both = Interest::READABLE | Interest::WRITABLE;
    let terminal = ours.terminal.map(|fd| watched(fd, both)).transpose()?.map(Arc::new);
    let mut pipes = Pipes::new();
    for (kind, fd) in [(OutputKind::Stdout, ours.stdout), (OutputKind::Stderr, ours.stderr)] {
        if let Some(fd) = fd {
            pipes.push((kind, Arc::new(watched(fd, Interest::READABLE)?)));
        }
    }
    if let Some(terminal) = &terminal {
        pipes.push((OutputKind::Terminal, Arc::clone(terminal)));
    }
    let process = Process {
        pid: pid as u32,
        tag: options.tag.clone(),
        argv: options.argv.clone(),
        env: options.env.clone(),
        workdir: options.workdir.clone(),
        supervisor,
        mark,
        is_init: sandbox.is_init(),
        reports: Mutex::new(Some(Arc::new(reports))),
        stdin: tokio::sync::Mutex::new(ours.stdin.map(|fd| watched(fd, Interest::WRITABLE)).transpose()?),
        waiting_inputs: AtomicUsize::new(0),
        terminal,
        state: Mutex::new(State::default()),
        produced: Notify::new(),
        consumed: Notify::new(),
        phase_changed: Notify::new(),
    };
    Ok(Launched { process, pipes })
}

/// Waits until the program runs, or learns what prevented it.
///
/// Whoever may (`kill -9 -1`) can kill the supervisor before it says so. Then
/// the command has started if there is a process of it, and ends as one that was
/// killed; `None` if there never was.
///
/// It can also stop the supervisor before that: then it is made to go on.
async fn started(reports: &Reports, supervisor: i32, noted: Option<&PidSlot>) -> Result<Option<i32>, (Step, i32)> {
    loop {
        let Ok(report) = timeout(REPORT_TIME, reports.next()).await else {
            foreground::tell(supervisor, Signal::CONT);
            continue;
        };
        return match report {
            Some(Report::Started { pid }) => Ok(Some(pid)),
            Some(Report::Refused { step, errno }) => Err((step, errno)),
            Some(Report::Ended { .. }) | None => Ok(noted.and_then(PidSlot::pid)),
        };
    }
}

/// The agent's ends, not blocking.
#[derive(Default)]
struct Ours {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    /// Of the command's side, where the supervisor has to open it again.
    name: Option<CString>,
}

impl Ours {
    fn open(sandbox: &Sandbox, options: &StartOptions, identity: &Identity) -> io::Result<([Arc<OwnedFd>; 3], Self)> {
        if let Some(size) = options.terminal {
            let (ours, theirs) = terminal::open(size, identity)?;
            let theirs = Arc::new(theirs);
            let stdio = [Arc::clone(&theirs), Arc::clone(&theirs), theirs];
            let name = kernel::is_gvisor().then(|| rustix::pty::ptsname(&ours, Vec::new())).transpose()?;
            return Ok((stdio, Self { terminal: Some(ours), name, ..Self::default() }));
        }
        let (stdin_read, stdin) = if options.stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK)?;
            (Arc::new(read), Some(write))
        } else {
            (sandbox.empty_input()?, None)
        };
        let (stdout, stdout_write) = output_pipe()?;
        let (stderr, stderr_write) = output_pipe()?;
        let ours = Self { stdin, stdout: Some(stdout), stderr: Some(stderr), ..Self::default() };
        Ok(([stdin_read, Arc::new(stdout_write), Arc::new(stderr_write)], ours))
    }
}

fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&read, OFlags::NONBLOCK)?;
    Ok((read, write))
}

/// Where a command starts. Whether it can is found out by going there.
struct Workdir {
    path: String,
    /// The sandbox's own, which was there when it began. Running somewhere else
    /// would put files where nobody looks for them.
    is_default: bool,
}

impl Workdir {
    fn of(sandbox: &Sandbox, asked: Option<&str>, identity: &Identity) -> Result<Self, Failure> {
        if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
            let path = identity.resolve_path(asked)?.to_string_lossy().into_owned();
            return Ok(Self { path, is_default: false });
        }
        let mut path = sandbox.workdir();
        if path.is_empty() {
            let home = Some(identity.home.as_str()).filter(|home| Path::new(home).is_dir());
            home.unwrap_or("/").clone_into(&mut path);
        }
        Ok(Self { path, is_default: true })
    }

    fn refusal(&self, error: Errno) -> Failure {
        let path = &self.path;
        Failure::InvalidArgument(match error {
            Errno::ACCESS => return Failure::FileForbidden(path.clone()),
            Errno::NOENT | Errno::NOTDIR if self.is_default => format!(
                "the sandbox's working directory {path} is gone; name another one as `workdir`, such as `/`, or make \
                 it again"
            ),
            Errno::NOENT => format!("the working directory does not exist: {path}"),
            Errno::NOTDIR => format!("the working directory is not a directory: {path}"),
            error => format!("the working directory {path}: {error}"),
        })
    }
}

fn environment(sandbox: &Sandbox, asked: &BTreeMap<String, String>, identity: &Identity) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
        ("HOME".to_owned(), identity.home.clone()),
        ("USER".to_owned(), identity.name.clone()),
        ("LOGNAME".to_owned(), identity.name.clone()),
    ]);
    env.extend(sandbox.env());
    env.extend(asked.iter().map(|(name, value)| (name.clone(), value.clone())));
    // Neither can exist in an environment.
    env.retain(|name, _| !name.is_empty() && !name.contains('='));
    env
}

fn candidates(program: &str, path: &str) -> Result<Vec<CString>, Failure> {
    if program.contains('/') {
        return Ok(vec![c_string(program)?]);
    }
    path.split(':')
        .take(MAX_PATH_DIRS)
        .map(|dir| if dir.is_empty() { PathBuf::from(".") } else { PathBuf::from(dir) })
        .map(|dir| c_string(&dir.join(program).to_string_lossy()))
        .collect()
}

fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::InvalidArgument("arguments cannot contain a zero byte".to_owned()))
}

fn refusal(program: &str, workdir: &Workdir, step: Step, errno: i32) -> Failure {
    let error = Errno::from_raw_os_error(errno);
    match (step, error) {
        (Step::Fork, error) => out_of("start a process", error),
        (_, Errno::NOMEM) => Failure::MemoryExhausted,
        // setuid under the user's own process limit.
        (Step::User, Errno::AGAIN) => Failure::PidsExhausted,
        (Step::Exec, Errno::NOENT | Errno::NOTDIR) => Failure::CommandNotFound(format!("command not found: {program}")),
        (Step::Exec, Errno::ACCESS | Errno::PERM | Errno::ISDIR) => {
            Failure::CommandNotFound(format!("not executable: {program}"))
        }
        (Step::Exec, Errno::NOEXEC) => Failure::CommandNotFound(format!("not a program of this machine: {program}")),
        (Step::Exec, Errno::TOOBIG) => {
            Failure::InvalidArgument("the arguments and the environment are too long".to_owned())
        }
        (Step::Workdir, error) => workdir.refusal(error),
        // No such number in this user namespace, or (with but one) no groups.
        (Step::User, Errno::INVAL | Errno::PERM) => Failure::InvalidArgument(
            "this sandbox has too few uids for that user; the runtime's health says how to have more".to_owned(),
        ),
        (Step::User, error) => Failure::Internal(format!("become the command's user: {error}")),
        (Step::Session | Step::Terminal, error) => Failure::Internal(format!("set up the command's session: {error}")),
        (Step::Exec, error) => Failure::Internal(format!("run {program}: {error}")),
    }
}

fn out_of(what: &'static str, error: impl Into<io::Error>) -> Failure {
    let error = error.into();
    match Errno::from_io_error(&error) {
        Some(Errno::AGAIN) => Failure::PidsExhausted,
        Some(Errno::NOMEM) => Failure::MemoryExhausted,
        Some(Errno::MFILE | Errno::NFILE) => Failure::Busy("too many open files".to_owned()),
        _ => Failure::Internal(format!("{what}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        let found = candidates("ls", "/a::/b").expect("plain names");
        assert_eq!(found, [c"/a/ls".to_owned(), c"./ls".to_owned(), c"/b/ls".to_owned()]);
        assert_eq!(candidates("./x", "/a").expect("a path"), [c"./x".to_owned()]);
        assert!(matches!(candidates("a\0b", "/a"), Err(Failure::InvalidArgument(_))));
    }

    #[tokio::test]
    #[expect(unsafe_code, reason = "the kernel writes there")]
    async fn a_supervisor_that_is_killed_does_not_hide_what_started() {
        use std::io::Write as _;
        let slot = PidSlot::take().expect("a free one");
        let refused = Report::Refused { step: Step::Exec, errno: libc::ENOENT };
        for (noted, report, expected) in [
            (0, None, Ok(None)),
            (7, None, Ok(Some(7))),
            (7, Some(Report::Started { pid: 7 }), Ok(Some(7))),
            (7, Some(refused), Err((Step::Exec, libc::ENOENT))),
        ] {
            let (ours, mut theirs) = StdUnixStream::pair().expect("a pair");
            // SAFETY: a valid pointer into a page that is never unmapped.
            unsafe { slot.as_ptr().write(noted) };
            if let Some(report) = report {
                theirs.write_all(&report.encode()).expect("sent");
            }
            drop(theirs);
            let ours = Reports::new(ours.into()).expect("watched");
            assert_eq!(started(&ours, 0, Some(&slot)).await, expected, "{noted} {report:?}");
        }
    }

    #[test]
    fn refusals_say_what_is_used_up() {
        let workdir = Workdir { path: "/w".to_owned(), is_default: true };
        let refused = |step, errno: Errno| refusal("x", &workdir, step, errno.raw_os_error());
        assert_eq!(refused(Step::Fork, Errno::AGAIN), Failure::PidsExhausted);
        assert_eq!(refused(Step::Fork, Errno::NOMEM), Failure::MemoryExhausted);
        assert!(matches!(refused(Step::Exec, Errno::NOENT), Failure::CommandNotFound(_)));
        assert!(matches!(refused(Step::User, Errno::INVAL), Failure::InvalidArgument(_)));
    }
}

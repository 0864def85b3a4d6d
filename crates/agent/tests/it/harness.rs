//! Starts the agent as a launcher does and talks to it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use stacyvm_envd::boot::{BOOT_FD, LISTENER_FD};
use stacyvm_envd::{BootConfig, Role};
use stacyvm_sandbox::{
    AgentChannel, AgentIo, EnvdSession, Exit, ProcessEvent, ProcessStream, Session as _, SessionError, StartRequest,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

pub(crate) const TOKEN: &str = "test-token-0123456789";

/// Nothing here takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A running agent; killed with everything below it when dropped.
pub(crate) struct Agent {
    pub session: Arc<EnvdSession>,
    pub socket: PathBuf,
    /// An empty directory that is also the default working directory.
    pub dir: PathBuf,
    pub child: Child,
    _root: TempDir,
}

/// Opens connections to a socket.
pub(crate) struct SocketChannel(pub PathBuf);

#[async_trait]
impl AgentChannel for SocketChannel {
    async fn open(&self) -> std::io::Result<Box<dyn AgentIo>> {
        Ok(Box::new(UnixStream::connect(&self.0).await?))
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_with(BootConfig::default())
    }

    /// With the test's token, directory and an ordinary role filled in.
    pub(crate) fn start_with(config: BootConfig) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let dir = root.path().join("work");
        std::fs::create_dir(&dir).expect("a new directory");
        let socket = root.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).expect("a new socket");
        let config = BootConfig {
            token: TOKEN.to_owned(),
            role: Role::Process,
            workdir: dir.to_string_lossy().into_owned(),
            ..config
        };
        let json = serde_json::to_vec(&config).expect("a plain structure");
        let (boot, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(&json).expect("it fits into the pipe");
        drop(writer);

        let child = spawn(&listener.into(), &boot.into());
        let channel = Arc::new(SocketChannel(socket.clone()));
        let session = EnvdSession::connect(channel, TOKEN.to_owned()).expect("a valid token");
        Self { session: Arc::new(session), socket, dir, child, _root: root }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Runs a shell command to its end.
    pub(crate) async fn shell(&self, script: &str) -> Output {
        self.run(shell(script)).await.expect("the shell starts")
    }

    pub(crate) async fn run(&self, request: StartRequest) -> Result<Output, SessionError> {
        collect(self.session.start(request).await?).await
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Ends what it started; it ends by itself then.
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// What a command did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub terminal: Vec<u8>,
    pub dropped: u64,
    pub exit: Option<Exit>,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn code(&self) -> Option<i32> {
        self.exit.and_then(|exit| exit.code)
    }

    pub(crate) fn add(&mut self, event: ProcessEvent) {
        match event {
            ProcessEvent::Started { pid } => self.pid = pid,
            ProcessEvent::Stdout(bytes) => self.stdout.extend_from_slice(&bytes),
            ProcessEvent::Stderr(bytes) => self.stderr.extend_from_slice(&bytes),
            ProcessEvent::Terminal(bytes) => self.terminal.extend_from_slice(&bytes),
            ProcessEvent::Dropped { bytes } => self.dropped += bytes,
            ProcessEvent::Keepalive => {}
            ProcessEvent::Exited(exit) => self.exit = Some(exit),
        }
    }
}

pub(crate) fn argv(arguments: &[&str]) -> StartRequest {
    StartRequest { argv: arguments.iter().map(|&argument| argument.to_owned()).collect(), ..StartRequest::default() }
}

pub(crate) fn shell(script: &str) -> StartRequest {
    argv(&["sh", "-c", script])
}

pub(crate) fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Everything to the end of a command.
pub(crate) async fn collect(mut events: ProcessStream) -> Result<Output, SessionError> {
    let mut output = Output::default();
    let all = async {
        while let Some(event) = events.next().await {
            output.add(event?);
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, all).await.expect("the command ends")?;
    Ok(output)
}

/// The next event that is not a sign of life.
pub(crate) async fn next(events: &mut ProcessStream) -> Result<ProcessEvent, SessionError> {
    loop {
        let event = tokio::time::timeout(PATIENCE, events.next()).await.expect("an event").expect("not the end")?;
        if event != ProcessEvent::Keepalive {
            return Ok(event);
        }
    }
}

/// Waits for a condition.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A process that has not ended; its zombie does not count.
pub(crate) fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[expect(unsafe_code, reason = "descriptors are put in place between fork and exec")]
fn spawn(listener: &OwnedFd, boot: &OwnedFd) -> Child {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_stacyvm-agent")));
    command.arg("serve").env_clear();
    let (listener_fd, boot_fd) = (listener.as_raw_fd(), boot.as_raw_fd());
    // SAFETY: only async-signal-safe calls. Both are first moved out of the way
    // of each other's destination.
    unsafe {
        command.pre_exec(move || {
            let listener = libc::fcntl(listener_fd, libc::F_DUPFD, 10);
            let boot = libc::fcntl(boot_fd, libc::F_DUPFD, 10);
            if libc::dup2(listener, LISTENER_FD) < 0 || libc::dup2(boot, BOOT_FD) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            libc::close(listener);
            libc::close(boot);
            Ok(())
        });
    }
    command.spawn().expect("the agent starts")
}

//! The process that becomes PRoot, and the server's side of it.
//!
//! Namespaces, limits and filters have to be set up in a process with a single
//! thread, and the server has many. So each launch starts this binary again
//! with a hidden subcommand; it forks the sandbox's first process, writes down
//! who that is, and is gone.
//!
//! ```text
//! server ── socket: plan, answer ── launcher ── clone3 ── PRoot ── agent
//!           stdout: the agent's listening socket
//!           stderr: its boot configuration
//! ```

mod child;
mod filter;
mod main;
pub(super) mod protocol;
mod reach;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

pub use main::launcher_main;
pub(super) use reach::{Known, known};

use super::error::ProotError;
use protocol::{Job, MAX_MESSAGE_BYTES, Reply};

/// A launch takes milliseconds.
const LAUNCH_LIMIT: Duration = Duration::from_secs(30);

/// How the launcher is started: a program that calls
/// [`launcher_main`](super::launcher_main) with these arguments.
#[derive(Debug, Clone)]
pub struct LauncherCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

impl Default for LauncherCommand {
    /// This very binary, with its hidden subcommand.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec!["proot-launcher".into()] }
    }
}

/// The two descriptors that the agent inherits.
pub(super) struct Inherited {
    pub(super) listener: OwnedFd,
    pub(super) boot: OwnedFd,
}

impl LauncherCommand {
    /// Has one job done. Dropping the future kills the launcher, not what it
    /// has launched.
    pub(super) async fn run(&self, job: &Job, inherited: Option<Inherited>) -> Result<Reply, ProotError> {
        let failed = ProotError::system("run the launcher");
        match tokio::time::timeout(LAUNCH_LIMIT, self.exchange(job, inherited)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn exchange(&self, job: &Job, inherited: Option<Inherited>) -> io::Result<Reply> {
        let (ours, theirs) = StdUnixStream::pair()?;
        let (stdout, stderr) = match inherited {
            Some(Inherited { listener, boot }) => (Stdio::from(listener), Stdio::from(boot)),
            None => (Stdio::null(), Stdio::null()),
        };
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).env_clear().current_dir("/").kill_on_drop(true);
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(stdout).stderr(stderr);
        let mut child = command.spawn()?;
        drop(command);
        ours.set_nonblocking(true)?;
        let mut ours = UnixStream::from_std(ours)?;
        ours.write_all(&serde_json::to_vec(job)?).await?;
        ours.shutdown().await?;
        let mut answer = Vec::new();
        (&mut ours).take(MAX_MESSAGE_BYTES).read_to_end(&mut answer).await?;
        child.wait().await?;
        serde_json::from_slice(&answer).map_err(|_| io::Error::other("the launcher ended without an answer"))
    }
}

//! The operator's program that sets and removes DNS records, called as
//! `PROGRAM present|cleanup FQDN VALUE`: what lego's provider `exec` calls, so
//! that programs for it can be used here.
//!
//! It is not of ours: it gets no environment but what was listed, no input, a
//! process group of its own, and a deadline, after which the group is killed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};

use super::AcmeError;

/// Of what it says on its standard error, the last bytes go into our log.
const KEPT_BYTES: usize = 1024;

/// A program that sets DNS records.
#[derive(Clone, PartialEq, Eq)]
pub struct DnsHook {
    pub program: PathBuf,
    /// All of its environment.
    pub environment: Vec<(String, String)>,
    /// For one call.
    pub timeout: Duration,
    /// How long records take until every name server has them.
    pub settle: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Present,
    Cleanup,
}

/// Why a call of the hook did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    #[error("cannot be started: {0}")]
    Start(std::io::Error),
    /// What it said is for the log alone: programs print their tokens at times.
    #[error("ended with {status}; the server's log has what it said")]
    Failed { status: ExitStatus, said: String },
    #[error("did not end within {} s and was killed; see server.acme.dns_hook_timeout", .0.as_secs())]
    TookTooLong(Duration),
    #[error("cannot be waited for: {0}")]
    Wait(std::io::Error),
    #[error("did not end before the server")]
    Closing,
}

impl HookError {
    /// The last of its standard error.
    pub(super) fn said(&self) -> &str {
        match self {
            Self::Failed { said, .. } => said,
            Self::Start(_) | Self::TookTooLong(_) | Self::Wait(_) | Self::Closing => "",
        }
    }
}

impl Step {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Cleanup => "cleanup",
        }
    }
}

impl DnsHook {
    /// Whether it is there at all.
    pub(super) fn check(&self) -> Result<(), AcmeError> {
        let refused = |why: &str| Err(AcmeError::Hook { path: self.program.clone(), why: why.to_owned() });
        if !self.program.is_absolute() {
            return refused("its path is not absolute");
        }
        match self.program.metadata() {
            Ok(metadata) if !metadata.is_file() => refused("it is no file"),
            Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => refused("it is not executable (chmod +x)"),
            Ok(_) => Ok(()),
            Err(error) => refused(&error.to_string()),
        }
    }

    /// Runs it to its end, or to its deadline. Dropped, it is killed at once.
    pub(super) async fn call(&self, step: Step, fqdn: &str, value: &str) -> Result<(), HookError> {
        let mut child = Command::new(&self.program)
            .args([step.word(), fqdn, value])
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(HookError::Start)?;
        let mut group = Group::of(&child);
        let stderr = child.stderr.take();
        let ended = tokio::time::timeout(self.timeout, async {
            // Its children may still write when it has ended.
            tokio::join!(child.wait(), last_of(stderr))
        });
        let Ok((status, said)) = ended.await else {
            group.kill();
            child.wait().await.map_err(HookError::Wait)?;
            return Err(HookError::TookTooLong(self.timeout));
        };
        group.leave();
        let status = status.map_err(HookError::Wait)?;
        if status.success() { Ok(()) } else { Err(HookError::Failed { status, said }) }
    }
}

/// Keeps nothing of the environment, where the secrets are.
impl std::fmt::Debug for DnsHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DnsHook").field("program", &self.program).finish_non_exhaustive()
    }
}

/// The hook and all it has started. Killed when dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(leader: &Child) -> Self {
        let pid = leader.id().and_then(|id| i32::try_from(id).ok());
        Self(pid.and_then(Pid::from_raw))
    }

    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // It may have ended by itself meanwhile.
            kill_process_group(group, Signal::KILL).ok();
        }
    }

    /// It has ended in order.
    fn leave(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads to the end and keeps the last of it.
async fn last_of(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut kept, mut chunk) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..count]);
        kept.drain(..kept.len().saturating_sub(KEPT_BYTES));
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hook that is this script.
    fn script(directory: &std::path::Path, text: &str) -> DnsHook {
        let program = directory.join("hook");
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        DnsHook {
            program,
            environment: vec![("TOKEN".to_owned(), "of ours".to_owned())],
            timeout: Duration::from_secs(20),
            settle: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn it_gets_its_arguments_and_only_the_listed_environment() {
        let directory = tempfile::tempdir().unwrap();
        let seen = directory.path().join("seen");
        let hook = script(directory.path(), &format!("{{ echo \"$*\"; env; }} > {}", seen.display()));
        hook.call(Step::Present, "_acme-challenge.example.com.", "value; rm -rf x").await.unwrap();
        let seen = std::fs::read_to_string(seen).unwrap();
        let mut lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines.remove(0), "present _acme-challenge.example.com. value; rm -rf x");
        // A shell sets these two by itself.
        lines.retain(|line| !line.starts_with("PWD=") && !line.starts_with("_="));
        assert_eq!(lines, ["TOKEN=of ours"]);
    }

    #[tokio::test]
    async fn what_it_said_is_kept_apart() {
        let directory = tempfile::tempdir().unwrap();
        let hook = script(directory.path(), "echo 'no such zone' >&2; exit 3");
        let error = hook.call(Step::Cleanup, "a.", "b").await.unwrap_err();
        assert_eq!(error.to_string(), "ended with exit status: 3; the server's log has what it said");
        assert!(matches!(error, HookError::Failed { said, .. } if said == "no such zone"));
    }

    #[tokio::test]
    async fn at_its_deadline_it_is_killed_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let alive = directory.path().join("alive");
        rustix::fs::mkfifoat(rustix::fs::CWD, &alive, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        // The child holds the pipe open for writing until it is killed.
        let text = format!("sleep 1000 > {} & wait", alive.display());
        let hook = DnsHook { timeout: Duration::from_millis(300), ..script(directory.path(), &text) };
        let end = tokio::task::spawn_blocking(move || std::fs::read(alive));
        let error = hook.call(Step::Present, "a.", "b").await.unwrap_err();
        assert!(matches!(error, HookError::TookTooLong(_)), "{error}");
        let read = tokio::time::timeout(Duration::from_secs(20), end).await.expect("the child lives");
        assert_eq!(read.unwrap().unwrap(), b"");
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |hook: DnsHook| hook.check().unwrap_err().to_string();
        let hook = script(directory.path(), "");
        hook.check().unwrap();
        std::fs::set_permissions(&hook.program, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(refused(hook.clone()).contains("not executable"));
        assert!(refused(DnsHook { program: "hook".into(), ..hook.clone() }).contains("not absolute"));
        assert!(refused(DnsHook { program: directory.path().into(), ..hook.clone() }).contains("no file"));
        assert!(refused(DnsHook { program: "/no/hook".into(), ..hook }).contains("No such file"));
    }
}

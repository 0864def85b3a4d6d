//! The short way to an agent on this machine: its own socket, through the root
//! directory of its process.
//!
//! The kernel shows every process's root as `/proc/PID/root`, so that no
//! directory of the host has to be mounted into the sandbox, where a guest
//! could fill it or put things in it. What lies below that root is hostile:
//! nothing is followed that could lead elsewhere, only a socket is connected
//! to, and only the process that the daemon named may be behind it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::process::{Pid, PidfdFlags};
use tokio::net::UnixStream;

use super::container::SOCKET;

/// A container's first process, on this machine.
pub(super) struct Direct {
    pid: Pid,
    process: OwnedFd,
}

impl Direct {
    /// Takes hold of the process that the daemon named, if it is on this
    /// machine and in that container: a daemon elsewhere counts other processes.
    pub(super) fn find(pid: i64, container: &str) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_pid()))?;
        // Docker and its kin name a container's control group after its id.
        if container.is_empty() || !groups.contains(container) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let found = Self { pid, process };
        // Only now: what was compared cannot have been a later process's.
        if found.has_ended()? { Err(io::ErrorKind::NotFound.into()) } else { Ok(found) }
    }

    pub(super) fn has_ended(&self) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(rustix::event::poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&now))? > 0)
    }

    pub(super) async fn open(&self) -> io::Result<UnixStream> {
        let socket = self.find_socket()?;
        // A socket's address is a path; this one names what was looked at.
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
        if stream.peer_cred()?.pid() != Some(self.pid.as_raw_pid()) {
            let message = "something else than the agent listens on the agent's socket";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(stream)
    }

    fn find_socket(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/{}/root", self.pid.as_raw_pid());
        let root = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if self.has_ended()? {
            return Err(io::ErrorKind::NotFound.into());
        }
        let socket = rustix::fs::openat2(
            root.as_fd(),
            SOCKET.trim_start_matches('/'),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )?;
        match FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) {
            FileType::Socket => Ok(socket),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_another_container_is_not_taken() {
        let own = i64::from(std::process::id());
        assert!(Direct::find(own, &"f".repeat(64)).is_err());
        assert!(Direct::find(own, "").is_err());
        assert!(Direct::find(0, "x").is_err() && Direct::find(i64::MAX, "x").is_err());
    }

    #[tokio::test]
    async fn an_ended_process_leads_nowhere() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let direct = Direct { pid, process: rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap() };
        assert!(!direct.has_ended().unwrap());
        // Alive, but there is no socket of ours in the host's own root.
        assert_eq!(direct.open().await.unwrap_err().kind(), io::ErrorKind::NotFound);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(direct.has_ended().unwrap());
        assert_eq!(direct.open().await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

//! Telling processes apart, and ending them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use serde::{Deserialize, Serialize};

/// Who a sandbox's init is. A number alone may be somebody else's tomorrow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// Clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub(crate) start_time: u64,
    /// Inode of its pid namespace.
    pub(crate) pid_namespace: u64,
}

/// Describes a process so that it can be told from a later one with its pid.
pub(crate) fn identify(pid: Pid) -> io::Result<Identity> {
    Ok(Identity { pid: pid.as_raw_pid(), start_time: started(pid)?, pid_namespace: namespace(pid)? })
}

fn started(pid: Pid) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()))?;
    Ok(start_time(&stat).ok_or(io::ErrorKind::InvalidData)?)
}

/// Shown to whoever may trace the process, and to nobody else.
fn namespace(pid: Pid) -> io::Result<u64> {
    Ok(std::fs::metadata(format!("/proc/{}/ns/pid", pid.as_raw_pid()))?.ino())
}

/// Takes hold of a process if it is still the one that was noted.
///
/// The pidfd comes first and the comparison after: what is compared then
/// cannot be replaced by a newcomer between the two.
pub(crate) fn open(identity: &Identity) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(identity.pid) else { return Ok(None) };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // In this order: whoever has the number now may be another user's.
    let is_same = || Ok(started(pid)? == identity.start_time && namespace(pid)? == identity.pid_namespace);
    match is_same() {
        Ok(true) if !has_ended(&pidfd)? => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the process behind a pidfd has exited (it may still be a zombie).
pub(crate) fn has_ended(pidfd: impl AsFd) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now))? > 0)
}

/// The root directory of the process behind a pidfd, to look at; `None` when
/// it has ended.
pub(crate) fn root(pidfd: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = number(&pidfd)? else { return Ok(None) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(format!("/proc/{pid}/root"), flags, Mode::empty()) {
        // As long as it has not ended, the number is its own.
        Ok(root) => Ok((!has_ended(pidfd)?).then_some(root)),
        Err(error) if gone(&error.into()) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The process id behind a pidfd; `None` once the process was reaped.
pub(crate) fn number(pidfd: impl AsFd) -> io::Result<Option<i32>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    Ok(number.filter(|pid| *pid > 0))
}

/// Kills; that the process is gone already is fine.
pub(crate) fn kill(pidfd: impl AsFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A process that ends while it is looked at shows as either.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_forge_the_start_time() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 2 3";
        assert_eq!(start_time(stat), Some(4242));
    }

    #[test]
    fn a_process_is_recognised_and_an_imposter_is_not() {
        let own = identify(rustix::process::getpid()).unwrap();
        assert!(open(&own).unwrap().is_some());
        let imposter = Identity { start_time: own.start_time + 1, ..own.clone() };
        assert!(open(&imposter).unwrap().is_none());
        let elsewhere = Identity { pid_namespace: own.pid_namespace + 1, ..own };
        assert!(open(&elsewhere).unwrap().is_none());
    }

    #[test]
    fn that_another_user_has_the_number_now_is_no_error() {
        let before = Identity { pid: 1, start_time: u64::MAX, pid_namespace: 1 };
        let as_nobody = move || {
            if rustix::process::geteuid().is_root() {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            }
            assert_eq!(namespace(Pid::INIT).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            open(&before)
        };
        assert!(std::thread::spawn(as_nobody).join().unwrap().unwrap().is_none());
    }

    #[test]
    fn the_root_of_a_process_is_found_while_it_lives() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let found = rustix::fs::fstat(root(&pidfd).unwrap().unwrap()).unwrap();
        let own = rustix::fs::stat("/").unwrap();
        assert_eq!((found.st_dev, found.st_ino), (own.st_dev, own.st_ino));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(root(&pidfd).unwrap().is_none());
    }

    #[test]
    fn an_ended_process_is_not_found() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = identify(Pid::from_child(&child)).unwrap();
        let pidfd = open(&identity).unwrap().unwrap();
        kill(&pidfd).unwrap();
        child.wait().unwrap();
        assert!(has_ended(&pidfd).unwrap());
        assert!(open(&identity).unwrap().is_none());
    }
}

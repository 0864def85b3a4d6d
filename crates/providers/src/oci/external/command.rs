//! Running the runtime's program, with bounds on time and on what is believed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::hierarchies::Hierarchies;
use crate::host::sys;
use crate::oci::launch::mounts;
use crate::oci::spawner::protocol::{Failure, Step};

/// Longest one call may take. Both calls of a launch stay below what the server
/// waits for an order to the spawner.
const CALL_LIMIT: Duration = Duration::from_secs(8);

/// How much of the end of a log is looked at.
const MAX_LOG_BYTES: u64 = 8 * 1024;

/// Longest explanation passed on.
const MAX_REASON_CHARS: usize = 500;

/// Search path of the programs that a runtime runs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A sandbox as its runtime knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::oci) struct Container {
    pub(in crate::oci) program: PathBuf,
    /// The runtime's own name, for messages.
    pub(in crate::oci) name: String,
    /// Where the runtime keeps what it remembers; this sandbox's alone.
    pub(in crate::oci) state_dir: PathBuf,
    pub(in crate::oci) id: String,
}

impl Container {
    /// Runs one of the specification's operations in the current directory.
    pub(super) fn call(&self, operation: &str, options: &[&str]) -> Result<(), Failure> {
        let step = format!("have {} {operation} the container", self.name);
        let log = self.state_dir.join("log");
        let mut child = Command::new(&self.program)
            .arg("--root")
            .arg(&self.state_dir)
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json", operation])
            .args(options)
            .arg(&self.id)
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::inherit())
            .spawn()
            .step(&step)?;
        if !ends_in_time(&mut child).step(&step)? {
            return Err(Failure::system(&step, &format!("it took longer than {} s", CALL_LIMIT.as_secs())));
        }
        let status = child.wait().step(&step)?;
        if status.success() {
            return Ok(());
        }
        let reason = read_reason(&log).unwrap_or_default();
        Err(Failure::system(&step, &if reason.is_empty() { status.to_string() } else { reason }))
    }

    /// Whether the runtime remembers it.
    fn is_remembered(&self) -> bool {
        self.state_dir.join(&self.id).exists()
    }
}

/// Has the runtime delete what it remembers of a sandbox whose processes are
/// gone. Runs in a forked child of the spawner.
pub(in crate::oci) fn forget(container: &Container) -> Result<(), Failure> {
    const STEP: &str = "prepare to delete the container";
    if !container.is_remembered() {
        return Ok(());
    }
    sys::reset_signals().step(STEP)?;
    sys::unshare(libc::CLONE_NEWNS).step(STEP)?;
    mounts::separate_from_host().step(STEP)?;
    Hierarchies::find().and_then(|hierarchies| hierarchies.leave_one_kind()).step(STEP)?;
    // Standard streams of a container that is gone; nobody reads them.
    crate::oci::launch::attach_null()?;
    container.call("delete", &["--force"])
}

/// False if it had to be killed.
fn ends_in_time(child: &mut Child) -> io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: CALL_LIMIT.as_secs() as i64, tv_nsec: 0 };
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Ok(0) => break,
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}

/// The last complaint in a log, of which a line is a JSON object.
pub(super) fn read_reason(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG_BYTES).read_to_end(&mut bytes)?;
    Ok(last_complaint(&String::from_utf8_lossy(&bytes)))
}

fn last_complaint(log: &str) -> String {
    #[derive(Deserialize)]
    struct Line {
        msg: String,
    }
    let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let message = serde_json::from_str::<Line>(last).map_or_else(|_| last.to_owned(), |line| line.msg);
    message.trim().chars().take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_complaint_is_what_counts() {
        let log = "{\"level\":\"warning\",\"msg\":\"odd\"}\n{\"level\":\"error\",\"msg\":\"no such file\"}\n\n";
        assert_eq!(last_complaint(log), "no such file");
        assert_eq!(last_complaint("plain words\n"), "plain words");
        assert_eq!(last_complaint(""), "");
        assert_eq!(last_complaint(&"x".repeat(10_000)).len(), MAX_REASON_CHARS);
    }
}

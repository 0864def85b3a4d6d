//! What is looked at beside the server: the machine, its processes, a container
//! daemon.

mod daemon;
mod processes;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

pub(crate) use daemon::{Container, Daemon};
pub(crate) use processes::{memory_kib, speaking_of};

use crate::HostFacts;

/// Longest end of a program's output that is kept as evidence.
const SAID_BYTES: usize = 2000;

/// What a program did.
pub(crate) struct Ran {
    pub(crate) success: bool,
    pub(crate) output: String,
}

/// Runs a program to its end, with both of its outputs as one text.
pub(crate) async fn run(command: &mut Command, limit: Duration) -> Result<Ran, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let what = command.as_std().get_program().to_string_lossy().into_owned();
    match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(done)) => {
            let text = [done.stdout, done.stderr].concat();
            Ok(Ran { success: done.status.success(), output: String::from_utf8_lossy(&text).into_owned() })
        }
        Ok(Err(error)) => Err(format!("{what} cannot be run: {error}")),
        Err(_) => Err(format!("{what} did not end within {limit:?}")),
    }
}

/// The end of a text, for evidence.
pub(crate) fn tail(text: &str) -> String {
    let text = text.trim_end();
    let from = text.len().saturating_sub(SAID_BYTES);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text[from..].to_owned()
}

impl HostFacts {
    pub(crate) fn of_this() -> Self {
        let uname = rustix::system::uname();
        let part = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        let os = [uname.sysname(), uname.release(), uname.machine()].map(part).join(" ");
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let distribution = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        Self {
            hostname: part(uname.nodename()),
            os,
            distribution: distribution.unwrap_or("unknown distribution").trim_matches('"').to_owned(),
            processors: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mb: memory_of("MemTotal").unwrap_or(0) >> 10,
            virtualization: virtualization(),
            cgroup: cgroup().to_owned(),
        }
    }
}

/// A line of `/proc/meminfo`, in KiB.
fn memory_of(name: &str) -> Option<u64> {
    let table = fs::read_to_string("/proc/meminfo").ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

fn virtualization() -> String {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !flags.contains(" hypervisor") {
        return "none".to_owned();
    }
    let named = ["/sys/class/dmi/id/sys_vendor", "/sys/hypervisor/type"].into_iter().find_map(|path| {
        let name = fs::read_to_string(path).ok()?;
        Some(name.trim().to_owned()).filter(|name| !name.is_empty())
    });
    named.unwrap_or_else(|| "a virtual machine".to_owned())
}

fn cgroup() -> &'static str {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "v2"
    } else if Path::new("/sys/fs/cgroup/unified").exists() {
        "hybrid"
    } else {
        "v1"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn programs_are_run_and_what_they_said_is_kept() {
        let mut shell = Command::new("sh");
        let ran = run(shell.args(["-c", "echo out; echo err >&2; exit 3"]), Duration::from_secs(30)).await.unwrap();
        assert!(!ran.success);
        assert_eq!(ran.output, "out\nerr\n");
        let mut slow = Command::new("sleep");
        let late = run(slow.arg("60"), Duration::from_millis(50)).await;
        assert!(late.is_err_and(|why| why.contains("did not end")));
        let missing = run(&mut Command::new("/nowhere/program"), Duration::from_secs(1)).await;
        assert!(missing.is_err_and(|why| why.contains("cannot be run")));
    }

    #[test]
    fn a_tail_is_cut_between_characters() {
        let text = "ü".repeat(SAID_BYTES);
        assert!(tail(&text).len() <= SAID_BYTES && tail(&text).starts_with('ü'));
        assert_eq!(tail("short\n"), "short");
    }

    #[test]
    fn this_machine_is_described() {
        let facts = HostFacts::of_this();
        assert!(facts.os.starts_with("Linux ") && facts.processors > 0 && facts.memory_mb > 0, "{facts:?}");
    }
}

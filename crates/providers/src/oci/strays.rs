//! Sandboxes that run although nothing on disk speaks of them.
//!
//! Where control groups are ours they lead to whatever runs in them. An
//! ordinary user may have none, so the first process of every sandbox carries a
//! label in its environment: whose it is and which.

use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags};
use stacyvm_api::SandboxId;

/// Name of the label's variable. Commands inside never get it.
const VARIABLE: &str = "STACYVM_SANDBOX=";

/// The environment of a sandbox's first process.
pub(super) fn label(instance: &str, id: &SandboxId) -> String {
    format!("{VARIABLE}{instance}/{id}")
}

/// First processes of this server's sandboxes, found in the process table.
pub(super) fn find(instance: &str) -> Vec<(SandboxId, OwnedFd)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter_map(|pid| {
            // Held before it is looked at, so that it is no other one's later.
            let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
            let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_pid())).ok()?;
            Some((labelled(&environment, instance)?, pidfd))
        })
        .collect()
}

/// The label is all there is in such an environment: nobody else's command
/// becomes a stray by having a variable of this name.
fn labelled(environment: &[u8], instance: &str) -> Option<SandboxId> {
    let text = std::str::from_utf8(environment).ok()?.strip_suffix('\0')?;
    let (of, id) = text.strip_prefix(VARIABLE)?.split_once('/')?;
    (of == instance).then(|| id.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_label_alone_counts() {
        let id = SandboxId::random();
        let environment = format!("{}\0", label("0123abcd", &id));
        assert_eq!(labelled(environment.as_bytes(), "0123abcd"), Some(id.clone()));
        assert_eq!(labelled(environment.as_bytes(), "ffffffff"), None);
        assert_eq!(labelled(format!("HOME=/\0{environment}").as_bytes(), "0123abcd"), None);
        assert_eq!(labelled(format!("{environment}HOME=/\0").as_bytes(), "0123abcd"), None);
        assert_eq!(labelled(b"", "0123abcd"), None);
    }

    #[test]
    fn a_labelled_process_is_found() {
        let id = SandboxId::random();
        let (name, value) = (VARIABLE.trim_end_matches('='), format!("0123abcd/{id}"));
        let mut child =
            std::process::Command::new("/bin/sleep").arg("60").env_clear().env(name, value).spawn().unwrap();
        // It counts as started a moment before its environment is there to be read.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut found = find("0123abcd");
        while found.is_empty() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
            found = find("0123abcd");
        }
        assert_eq!(found.iter().map(|(found, _)| found).collect::<Vec<_>>(), [&id]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

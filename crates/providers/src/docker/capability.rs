//! Linux capabilities: what commands may have, and what our agent needs beside.
//!
//! The agent starts, owns and ends processes of any user, which takes
//! capabilities even where commands shall have none. The container gets both
//! sets; the agent bounds every command to the first before it runs.

/// In the kernel's order: capability N is bit N (`linux/capability.h`).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What Docker gives containers that ask for nothing (moby
/// `oci/caps/defaults.go`).
const DEFAULT: u64 = 0xa804_25fb;

const ALL: u64 = (1 << NAMES.len()) - 1;
const ALL_NAME: &str = "ALL";

/// Files and processes of every user of the sandbox, and bounding commands.
const AGENT: [&str; 8] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"];

/// To tell whose sockets are whose on a network that is not the sandbox's own.
const AGENT_ON_HOST_NETWORK: &str = "SYS_PTRACE";

/// What commands may have at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilitySet {
    bits: u64,
}

impl CapabilitySet {
    /// Docker's default, less what is dropped, with what is added; `ALL` is
    /// all. The error names what is not a capability.
    pub fn parse(dropped: &[String], added: &[String]) -> Result<Self, String> {
        let union = |names: &[String]| names.iter().try_fold(0, |bits, name| Ok::<u64, String>(bits | parse(name)?));
        Ok(Self { bits: (DEFAULT & !union(dropped)?) | union(added)? })
    }

    /// For the agent.
    pub(super) fn bits(self) -> u64 {
        self.bits
    }

    /// What the container is given, by Docker's names.
    pub(super) fn of_container(self, shares_host_network: bool) -> Vec<String> {
        let agent = AGENT.into_iter().chain(shares_host_network.then_some(AGENT_ON_HOST_NETWORK));
        let needed = agent.fold(self.bits, |bits, name| bits | bit(name).unwrap_or(0));
        let names = NAMES.iter().enumerate().filter(|(number, _)| needed & (1 << number) != 0);
        names.map(|(_, name)| format!("CAP_{name}")).collect()
    }
}

impl Default for CapabilitySet {
    /// None, as `dropped_caps: [ALL]` says.
    fn default() -> Self {
        Self { bits: 0 }
    }
}

fn parse(text: &str) -> Result<u64, String> {
    let name = text.trim().to_ascii_uppercase();
    let name = name.strip_prefix("CAP_").unwrap_or(&name);
    if name == ALL_NAME {
        return Ok(ALL);
    }
    bit(name).ok_or_else(|| format!("`{text}` is not a Linux capability; they look like NET_RAW, or ALL"))
}

fn bit(name: &str) -> Option<u64> {
    NAMES.iter().position(|known| *known == name).map(|number| 1 << number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(dropped: &[&str], added: &[&str]) -> Result<CapabilitySet, String> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        CapabilitySet::parse(&owned(dropped), &owned(added))
    }

    #[test]
    fn names_are_read_in_every_spelling() {
        assert_eq!(set(&["ALL"], &[]), Ok(CapabilitySet::default()));
        assert_eq!(set(&[], &[]).unwrap().bits(), DEFAULT);
        assert_eq!(set(&["cap_net_raw"], &[]).unwrap().bits(), DEFAULT & !(1 << 13));
        assert_eq!(set(&["all"], &["NET_RAW", "CAP_BPF"]).unwrap().bits(), 1 << 13 | 1 << 39);
        assert_eq!(set(&["ALL"], &["ALL"]).unwrap().bits(), (1 << 41) - 1);
        assert!(set(&["NET_ROW"], &[]).unwrap_err().contains("NET_ROW"));
    }

    #[test]
    fn a_container_without_any_still_has_the_agents() {
        let names = set(&["ALL"], &[]).unwrap().of_container(false);
        assert_eq!(names.len(), AGENT.len());
        assert!(names.contains(&"CAP_SETUID".to_owned()) && !names.contains(&"CAP_NET_RAW".to_owned()));
        assert!(set(&["ALL"], &[]).unwrap().of_container(true).contains(&"CAP_SYS_PTRACE".to_owned()));
        // Nothing that Docker would not give by default.
        assert!(AGENT.into_iter().all(|name| DEFAULT & bit(name).unwrap() != 0));
    }
}

//! What a launcher tells the agent when it starts it.
//!
//! `stacyvm-agent serve` inherits a listening unix socket as file descriptor
//! [`LISTENER_FD`] and reads a [`BootConfig`] as JSON from [`BOOT_FD`] (a pipe or
//! a memfd) up to its end.
//!
//! `stacyvm-agent init SOCKET` is for runtimes that pass on no descriptors: it
//! is the first program of a container, reads the same JSON as one line from
//! standard input, listens on SOCKET and answers with a [`BootReply`], one line
//! of JSON on standard output.
//!
//! Nothing of the configuration is ever in argv or in the environment.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The listening socket.
pub const LISTENER_FD: i32 = 3;

/// Where the boot configuration is read from.
pub const BOOT_FD: i32 = 4;

/// A boot configuration is at most this long.
pub const MAX_BOOT_BYTES: usize = 1 << 20;

/// How long after an expiry that nobody extended the agent ends the sandbox.
pub const EXPIRY_GRACE_MS: i64 = 60_000;

/// Everything the agent knows about its sandbox.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootConfig {
    /// What every request must carry in `X-Access-Token`; never empty.
    pub token: String,
    /// Counts up with fork and restore; reported by `Ping`.
    pub generation: u32,
    pub role: Role,
    /// Environment of every command: the image's, with the sandbox's own added.
    pub env: BTreeMap<String, String>,
    /// Who commands run as when nobody is named: a name or a uid, as in an
    /// image's `USER` (`name`, `uid`, `name:group`, `uid:gid`). Root otherwise.
    pub default_user: Option<String>,
    /// Where commands start when no directory is named.
    pub workdir: String,
    /// End of the sandbox in milliseconds of Unix time, until a server extends
    /// it. Zero never ends.
    pub expires_at_unix_ms: i64,
    /// The sandbox sees the host's network, so that a port may belong to
    /// somebody else: only listeners of this sandbox's processes may be dialed.
    pub shares_host_network: bool,
    /// Capabilities that commands may have at most, capability N as bit N. The
    /// agent's own otherwise.
    pub capabilities: Option<u64>,
}

/// What became of a start by `init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootReply {
    /// The agent listens, and this is the kernel it runs on.
    Ready(GuestKernel),
    Refused {
        reason: BootRefusal,
        message: String,
    },
}

/// Why there will be no sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootRefusal {
    /// The image does not know the user that commands shall run as.
    UnknownUser,
    /// The image is in the way of something every sandbox has.
    Image,
    System,
}

/// The kernel as programs in the sandbox see it. Read before any code of the
/// image has run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestKernel {
    /// `uname -r`.
    pub release: String,
    /// Its log begins with gVisor's banner.
    pub is_gvisor: bool,
}

/// What the agent is to its sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// PID 1: the sandbox ends with it, and every orphan is its child.
    Init,
    /// An ordinary process beside others.
    #[default]
    Process,
}

impl Default for BootConfig {
    fn default() -> Self {
        Self {
            token: String::new(),
            generation: 0,
            role: Role::default(),
            env: BTreeMap::new(),
            default_user: None,
            workdir: "/workspace".to_owned(),
            expires_at_unix_ms: 0,
            shares_host_network: false,
            capabilities: None,
        }
    }
}

/// Shows neither the token nor the environment, which may hold secrets.
impl fmt::Debug for BootConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootConfig")
            .field("generation", &self.generation)
            .field("role", &self.role)
            .field("default_user", &self.default_user)
            .field("workdir", &self.workdir)
            .field("expires_at_unix_ms", &self.expires_at_unix_ms)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_json_and_hides_its_secrets() {
        let config = BootConfig {
            token: "t0ken".to_owned(),
            role: Role::Init,
            env: BTreeMap::from([("KEY".to_owned(), "s3cret".to_owned())]),
            ..BootConfig::default()
        };
        let json = serde_json::to_vec(&config).expect("a plain structure");
        assert_eq!(serde_json::from_slice::<BootConfig>(&json).expect("what was written"), config);

        let shown = format!("{config:?}");
        assert!(!shown.contains("t0ken") && !shown.contains("s3cret"), "{shown}");
    }
}

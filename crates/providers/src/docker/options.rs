//! Settings of this provider, filled in by the program.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use stacyvm_sandbox::ProviderDefaults;

use super::capability::CapabilitySet;
use super::endpoint::Endpoint;

/// Words among the options of a mount in memory, as the daemon knows them.
const TMPFS_WORDS: [&str; 20] = [
    "defaults",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "sync",
    "async",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
];

/// A profile of system calls is a few kilobytes.
const MAX_PROFILE_BYTES: u64 = 1 << 20;

/// What the `docker` provider needs to know. It reads no environment itself.
#[derive(Debug, Clone)]
pub struct DockerOptions {
    /// The server's data directory; this provider's own is `docker` in it.
    pub data_dir: PathBuf,
    pub endpoint: Endpoint,
    /// Name under which the daemon knows the OCI runtime.
    pub runtime: String,
    /// What the network `bridge` of a sandbox is at the daemon.
    pub network: Network,
    pub seccomp: Seccomp,
    /// Nothing but `/tmp`, `/workspace` and `tmpfs` can be written.
    pub read_only_rootfs: bool,
    /// Who commands run as where nobody is asked for; the image's user otherwise.
    pub user: Option<String>,
    pub capabilities: CapabilitySet,
    /// Mounts in memory: path to mount options, as in `docker run --tmpfs`.
    pub tmpfs: BTreeMap<String, String>,
    /// What sandboxes get that ask for nothing.
    pub defaults: ProviderDefaults,
    /// Docker `config.json` with registry credentials.
    pub docker_config: Option<PathBuf>,
    /// Label containers for a Traefik that shows their port 3000 below this
    /// domain.
    pub traefik_domain: Option<String>,
}

impl DockerOptions {
    pub fn new(data_dir: impl Into<PathBuf>, endpoint: Endpoint) -> Self {
        Self {
            data_dir: data_dir.into(),
            endpoint,
            runtime: "runc".to_owned(),
            network: Network::Bridge,
            seccomp: Seccomp::Default,
            read_only_rootfs: false,
            user: None,
            capabilities: CapabilitySet::default(),
            tmpfs: BTreeMap::new(),
            defaults: ProviderDefaults::default(),
            docker_config: None,
            traefik_domain: None,
        }
    }
}

/// What no container could be started with, of the options of a mount in memory:
/// the daemon knows the names, and the kernel their values (tmpfs(5)).
pub fn check_tmpfs(options: &str) -> Result<(), String> {
    let is_size = |text: &str| {
        let digits = text.trim_end_matches(|last: char| "kmgtpe%".contains(last.to_ascii_lowercase()));
        text.len() - digits.len() <= 1 && digits.parse::<u64>().is_ok()
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let is_known = match option.split_once('=') {
            None => TMPFS_WORDS.contains(&option),
            Some(("size", size)) => is_size(size),
            Some(("nr_inodes" | "nr_blocks", count)) => !count.ends_with('%') && is_size(count),
            Some(("mode", mode)) => u32::from_str_radix(mode, 8).is_ok_and(|mode| mode <= 0o7777),
            Some(("uid" | "gid", id)) => id.parse::<u32>().is_ok(),
            Some(("mpol", policy)) => !policy.is_empty(),
            Some(_) => false,
        };
        if !is_known {
            return Err(format!("`{option}` is no option of a mount in memory"));
        }
    }
    Ok(())
}

/// A network of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    None,
    /// The daemon's default bridge.
    Bridge,
    /// One that was made with `docker network create`.
    Named(String),
    /// The host's own, without any isolation.
    Host,
}

impl Network {
    /// `none` (or nothing), `bridge`, `host`, or a network's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        Ok(match text.trim() {
            "" | "none" => Self::None,
            "bridge" | "default" => Self::Bridge,
            "host" => Self::Host,
            name if is_name(name) => Self::Named(name.to_owned()),
            other => return Err(format!("`{other}` is neither none, bridge, host nor the name of a network")),
        })
    }

    /// As the daemon calls it.
    pub(super) fn mode(&self) -> &str {
        match self {
            Self::None => "none",
            Self::Bridge => "bridge",
            Self::Named(name) => name,
            Self::Host => "host",
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mode())
    }
}

/// Docker's rule for names. What has a colon joins somebody else's container.
fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Which system calls a sandbox may make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seccomp {
    /// The daemon's own profile.
    Default,
    Unconfined,
    /// The profile itself, as JSON: the daemon does not read files of ours.
    Profile(String),
}

impl Seccomp {
    /// `default` (or nothing), `unconfined`, or the path of a profile.
    pub fn read(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" | "default" => Ok(Self::Default),
            "unconfined" => Ok(Self::Unconfined),
            path => Self::read_profile(Path::new(path)),
        }
    }

    fn read_profile(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let length = std::fs::metadata(path).map_err(|error| format!("cannot read {shown}: {error}"))?.len();
        if length > MAX_PROFILE_BYTES {
            return Err(format!("{shown} is longer than {MAX_PROFILE_BYTES} bytes"));
        }
        let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
        let profile: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format!("{shown} is not JSON: {error}"))?;
        if !profile.get("defaultAction").is_some_and(serde_json::Value::is_string) {
            return Err(format!("{shown} has no `defaultAction`, so that it is no seccomp profile"));
        }
        Ok(Self::Profile(profile.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_named_and_containers_cannot_be_joined() {
        assert_eq!(Network::parse(""), Ok(Network::None));
        assert_eq!(Network::parse("default"), Ok(Network::Bridge));
        assert_eq!(Network::parse("stacyvm-network"), Ok(Network::Named("stacyvm-network".into())));
        assert_eq!(Network::parse("host"), Ok(Network::Host));
        for text in ["container:abc", "-x", "a b", "a/b"] {
            assert!(Network::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mounts_in_memory_have_options_that_a_kernel_takes() {
        for text in
            ["", "size=64m", "rw,noexec,size=1G,mode=1777", "size=50%,uid=1000,gid=0", "nr_inodes=10k,mpol=local"]
        {
            assert_eq!(check_tmpfs(text), Ok(()), "{text}");
        }
        for text in ["size=lots", "size=", "size=1mm", "nr_inodes=5%", "mode=999", "uid=me", "mpol=", "sise=1m", " rw"]
        {
            assert!(check_tmpfs(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn profiles_are_read_from_files_and_checked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(Seccomp::read("default"), Ok(Seccomp::Default));
        std::fs::write(path, "{ \"defaultAction\": \"SCMP_ACT_ALLOW\" }").unwrap();
        assert_eq!(Seccomp::read(path), Ok(Seccomp::Profile("{\"defaultAction\":\"SCMP_ACT_ALLOW\"}".into())));
        for (content, part) in [("{}", "no `defaultAction`"), ("nonsense", "not JSON")] {
            std::fs::write(path, content).unwrap();
            assert!(Seccomp::read(path).unwrap_err().contains(part));
        }
        assert!(Seccomp::read("/nonexistent.json").unwrap_err().contains("/nonexistent.json"));
    }
}

//! What can be certified.

use std::fmt;
use std::str::FromStr;

/// A runtime, as operators name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Oci,
    Docker,
    Gvisor,
    Kata,
    Firecracker,
    Qemu,
    Proot,
    E2b,
    Custom,
}

/// How far a runtime keeps a sandbox from the host, in one line of the report.
const OPERATIONAL: &str = "limits are operational controls; isolation is not of the grade of a virtual machine";

impl Target {
    pub const ALL: [Self; 9] = [
        Self::Oci,
        Self::Docker,
        Self::Gvisor,
        Self::Kata,
        Self::Firecracker,
        Self::Qemu,
        Self::Proot,
        Self::E2b,
        Self::Custom,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Oci => "oci",
            Self::Docker => "docker",
            Self::Gvisor => "gvisor",
            Self::Kata => "kata",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
            Self::Proot => "proot",
            Self::E2b => "e2b",
            Self::Custom => "custom",
        }
    }

    /// The provider of the server that makes its sandboxes.
    pub fn provider(self) -> &'static str {
        match self {
            Self::Docker | Self::Gvisor | Self::Kata => "docker",
            other => other.name(),
        }
    }

    /// What its sandboxes are made from where nobody says otherwise. PRoot is
    /// certified in the root that it has, not in an image beside it.
    pub fn usual_image(self) -> &'static str {
        if self == Self::Proot { "rootfs" } else { "alpine:latest" }
    }

    /// A container daemon makes its sandboxes.
    pub(crate) fn has_daemon(self) -> bool {
        matches!(self, Self::Docker | Self::Gvisor | Self::Kata)
    }

    /// Sandboxes are somebody else's machines.
    pub(crate) fn is_remote(self) -> bool {
        matches!(self, Self::E2b | Self::Custom)
    }

    /// What begins the ids of the rows that every runtime has.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Oci => "OC",
            Self::Docker | Self::Gvisor | Self::Kata => "DK",
            Self::Firecracker => "FC",
            Self::Qemu => "QM",
            Self::Proot => "PR",
            Self::E2b | Self::Custom => "EX",
        }
    }

    /// What a reader of the report must know, whatever passed.
    pub(crate) fn caveat(self) -> Option<&'static str> {
        match self {
            Self::Oci | Self::Docker => Some("sandboxes share the host's kernel"),
            Self::Proot => Some(OPERATIONAL),
            Self::E2b | Self::Custom => Some("sandboxes run on somebody else's machines"),
            Self::Gvisor | Self::Kata | Self::Firecracker | Self::Qemu => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = Self::ALL.iter().map(|target| target.name()).collect();
        let found = Self::ALL.into_iter().find(|target| target.name() == text);
        found.ok_or_else(|| format!("the targets are {} and all", names.join(", ")))
    }
}

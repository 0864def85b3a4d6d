//! The command that installs something on this host.

use super::host::Host;

/// A package manager: its program, and how it installs.
struct Manager {
    program: &'static str,
    command: &'static str,
}

const MANAGERS: [Manager; 5] = [
    Manager { program: "apt-get", command: "apt-get install -y" },
    Manager { program: "dnf", command: "dnf install -y" },
    Manager { program: "apk", command: "apk add" },
    Manager { program: "pacman", command: "pacman -S" },
    Manager { program: "zypper", command: "zypper install -y" },
];

/// What is needed, by the names it has with each manager, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Package {
    Docker,
    Nftables,
    Proot,
    Qemu,
    UtilLinux,
}

impl Package {
    fn names(self) -> [&'static str; 5] {
        match self {
            Self::Docker => ["docker.io", "moby-engine", "docker", "docker", "docker"],
            Self::Nftables => ["nftables"; 5],
            Self::Proot => ["proot"; 5],
            Self::Qemu => ["qemu-system", "qemu-kvm", "qemu-system-x86_64", "qemu-base", "qemu"],
            Self::UtilLinux => ["util-linux"; 5],
        }
    }
}

/// The command, or the package's usual name where no manager is known.
pub(super) fn install(host: &Host, package: Package) -> String {
    let names = package.names();
    let found = MANAGERS.iter().zip(names).find(|(manager, _)| host.program(manager.program).is_some());
    match found {
        Some((manager, name)) if host.is_root => format!("{} {name}", manager.command),
        Some((manager, name)) => format!("sudo {} {name}", manager.command),
        None => format!("install {} with this system's package manager", names[0]),
    }
}

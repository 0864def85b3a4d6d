//! Virtual machines: a monitor, a kernel, and `/dev/kvm`.

use std::io::ErrorKind;

use super::super::host::Host;
use super::super::install::{Package, install};
use super::Wishes;
use crate::check::Check;

const FIRECRACKER: &str = "download firecracker from https://github.com/firecracker-microvm/firecracker/releases, and \
                           install it as";

/// What runs the virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Monitor {
    Firecracker,
    Qemu,
}

pub(super) fn check(host: &Host, wishes: &Wishes<'_>, monitor: Monitor) -> Vec<Check> {
    match monitor {
        Monitor::Firecracker => vec![firecracker(host, wishes), kvm(host, "firecracker.kvm"), kernel(host, wishes)],
        Monitor::Qemu => vec![qemu(host), kvm(host, "qemu.kvm")],
    }
}

fn firecracker(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "firecracker.binary";
    let configured = wishes.text("providers.firecracker.firecracker_path");
    match host.program(&configured).or_else(|| host.program("firecracker")) {
        Some(path) => Check::pass(NAME, format!("is {}", path.display())),
        None => Check::fail(NAME, format!("is not at {configured}"), format!("{FIRECRACKER} {configured}")),
    }
}

fn kernel(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "firecracker.kernel";
    let path = wishes.path("providers.firecracker.kernel_path");
    if host.is_file(&path) {
        return Check::pass(NAME, format!("is {}", path.display()));
    }
    let fix = format!("put an uncompressed kernel (vmlinux) at {}", path.display());
    Check::fail(NAME, format!("there is none at {}", path.display()), fix)
}

fn qemu(host: &Host) -> Check {
    const NAME: &str = "qemu.binary";
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    match host.program(&name) {
        Some(path) => Check::pass(NAME, format!("is {}", path.display())),
        None => Check::fail(NAME, format!("{name} is not installed"), install(host, Package::Qemu)),
    }
}

/// Whether the processor's virtualization can be used from here.
pub(super) fn kvm(host: &Host, name: &str) -> Check {
    const DEVICE: &str = "/dev/kvm";
    let error = match host.opens(DEVICE) {
        Ok(()) => return Check::pass(name, "/dev/kvm can be opened"),
        Err(error) => error,
    };
    let has_flag = host.read("/proc/cpuinfo").is_some_and(|text| text.contains(" vmx") || text.contains(" svm"));
    let fix = match error.kind() {
        ErrorKind::PermissionDenied => "sudo usermod -aG kvm \"$USER\", and log in again",
        _ if has_flag => "modprobe kvm_intel || modprobe kvm_amd",
        _ => "switch virtualization on in the firmware; in a virtual machine, switch nested virtualization on",
    };
    Check::fail(name, format!("/dev/kvm cannot be opened: {error}"), fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    #[test]
    fn what_is_missing_is_named_one_by_one() {
        let root = tempfile::tempdir().unwrap();
        let (host, wishes) = (Host::below(root.path()), Wishes::default());
        let failed = || -> Vec<String> {
            let checks = check(&host, &wishes, Monitor::Firecracker);
            checks.into_iter().filter(|check| check.status == Status::Fail).map(|check| check.name).collect()
        };
        assert_eq!(failed(), ["firecracker.binary", "firecracker.kvm", "firecracker.kernel"]);
        let place = |path: &str, mode: u32| {
            use std::os::unix::fs::PermissionsExt as _;
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        place("dev/kvm", 0o600);
        assert_eq!(failed(), ["firecracker.binary", "firecracker.kernel"]);
        place("usr/local/bin/firecracker", 0o755);
        place("var/lib/stacyvm/vmlinux.bin", 0o644);
        assert_eq!(failed(), [""; 0]);
    }

    #[test]
    fn the_fix_for_kvm_depends_on_the_processor() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        assert!(kvm(&host, "x").fix.unwrap().contains("firmware"));
        std::fs::create_dir(root.path().join("proc")).unwrap();
        std::fs::write(root.path().join("proc/cpuinfo"), "flags\t: fpu vmx sse\n").unwrap();
        assert!(kvm(&host, "x").fix.unwrap().contains("modprobe"));
    }
}

//! Translation of paths by PRoot: no root, no kernel features, no isolation.

use super::super::host::Host;
use super::super::install::{Package, install};
use super::Wishes;
use crate::check::Check;

pub(super) fn check(host: &Host, wishes: &Wishes<'_>) -> Vec<Check> {
    vec![binary(host, wishes), rootfs(host, wishes), workspace(host, wishes)]
}

fn binary(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "proot.binary";
    let name = wishes.text("providers.proot.proot_binary");
    match host.program(&name) {
        Some(path) => Check::pass(NAME, format!("is {}", path.display())),
        None => Check::fail(NAME, format!("{name} is not installed"), install(host, Package::Proot)),
    }
}

fn rootfs(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "proot.rootfs";
    let path = wishes.path("providers.proot.rootfs_path");
    if host.is_dir(&path) {
        return Check::pass(NAME, format!("is {}", path.display()));
    }
    let fix = format!("stacyvm rootfs build {}", path.display());
    Check::fail(NAME, format!("{} is no directory", path.display()), fix)
}

fn workspace(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "proot.workspace_base";
    let path = wishes.path("providers.proot.workspace_base");
    if path.as_os_str().is_empty() {
        return Check::pass(NAME, "is in the data directory");
    }
    if host.is_dir(&path) && host.is_writable(&path) {
        return Check::pass(NAME, format!("{} can be written to", path.display()));
    }
    Check::fail(NAME, format!("{} cannot be written to", path.display()), format!("mkdir -p {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    #[test]
    fn directories_and_the_program_are_looked_for() {
        let root = tempfile::tempdir().unwrap();
        let (host, wishes) = (Host::below(root.path()), Wishes { settings: None });
        let failed = || -> Vec<String> {
            let checks = check(&host, &wishes);
            checks.into_iter().filter(|check| check.status == Status::Fail).map(|check| check.name).collect()
        };
        assert_eq!(failed(), ["proot.binary", "proot.rootfs"]);
        std::fs::create_dir_all(root.path().join("var/lib/stacyvm/rootfs")).unwrap();
        assert_eq!(failed(), ["proot.binary"]);
    }
}

//! Containers that this program starts itself.

use stacyvm_api::FindingLevel;

use super::super::host::Host;
use super::super::install::{Package, install};
use crate::check::Check;

/// The namespaces that a sandbox has, as `unshare` calls them.
const UNSHARE: [&str; 9] =
    ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "/bin/true"];

pub(super) async fn check(host: &Host) -> Vec<Check> {
    let findings = stacyvm_providers::oci::check_host().findings;
    let mut checks: Vec<Check> = findings
        .into_iter()
        .map(|finding| {
            let fix = match finding.name.as_str() {
                "oci.nft" => install(host, Package::Nftables),
                _ => finding.fix.unwrap_or_default(),
            };
            match finding.level {
                FindingLevel::Ok => Check::pass(finding.name, finding.message),
                FindingLevel::Warning => Check::warn(finding.name, finding.message, fix),
                FindingLevel::Failure => Check::fail(finding.name, finding.message, fix),
            }
        })
        .collect();
    checks.push(user(host));
    checks.push(namespaces(host).await);
    checks
}

fn user(host: &Host) -> Check {
    const NAME: &str = "oci.user";
    if host.is_root {
        return Check::pass(NAME, "root: sandboxes can have limits and a network, as far as the host has them");
    }
    Check::warn(
        NAME,
        "an ordinary user: limits may not be enforced, and sandboxes have no network",
        "run the server as root, for example with the unit in deploy/systemd",
    )
}

/// Makes them for a program that ends at once: that is the surest way to know,
/// and nothing of it stays.
async fn namespaces(host: &Host) -> Check {
    const NAME: &str = "oci.namespaces";
    if host.program("unshare").is_none() {
        let fix = install(host, Package::UtilLinux);
        return Check::warn(NAME, "whether namespaces can be made is not known: there is no unshare", fix);
    }
    let Err(why) = host.try_run("unshare", &UNSHARE).await else {
        return Check::pass(NAME, "namespaces can be made");
    };
    Check::fail(NAME, format!("namespaces cannot be made: {why}"), fix(host))
}

/// The usual reasons, most likely first.
fn fix(host: &Host) -> String {
    let value = |path: &str| host.read(path).map(|text| text.trim().to_owned());
    if value("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") {
        return "sysctl -w user.max_user_namespaces=10000".to_owned();
    }
    if value("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") && !host.is_root {
        return "sudo sysctl -w kernel.unprivileged_userns_clone=1".to_owned();
    }
    if value("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") && !host.is_root {
        return "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned();
    }
    if host.is_root {
        return "start this container with --privileged (it needs CAP_SYS_ADMIN, and unshare allowed by seccomp)"
            .to_owned();
    }
    "sudo stacyvm doctor".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fix_follows_from_what_the_kernel_says() {
        let root = tempfile::tempdir().unwrap();
        let (host, set) = (Host::below(root.path()), |name: &str, value: &str| {
            let path = root.path().join("proc/sys").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        });
        assert!(fix(&host).contains("CAP_SYS_ADMIN"));
        set("user/max_user_namespaces", "0\n");
        assert_eq!(fix(&host), "sysctl -w user.max_user_namespaces=10000");
        set("user/max_user_namespaces", "5\n");
        set("kernel/apparmor_restrict_unprivileged_userns", "1\n");
        assert!(fix(&host).contains("CAP_SYS_ADMIN"), "it does not bind root");
        let mut ordinary = host;
        ordinary.is_root = false;
        assert_eq!(fix(&ordinary), "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0");
    }
}

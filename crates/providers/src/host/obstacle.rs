//! What on a host forbids namespaces to an ordinary user.
//!
//! The kernel says no more than "not permitted" or "no space", so after a
//! refusal the settings that can be its cause are looked at, one by one.

use std::path::Path;

/// A setting that stands in the way, and how to move it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obstacle {
    pub(crate) message: String,
    pub(crate) fix: String,
}

/// Namespaces a sandbox has, as the limits on their number are called.
const KINDS: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

impl Obstacle {
    /// Looks at this host. Call it after a refusal: a setting may be there and
    /// not matter.
    pub(crate) fn find() -> Self {
        Self::known().unwrap_or_else(|| Self {
            message: "the kernel refuses namespaces to this user, and no setting known here says why".into(),
            fix: "see the kernel's log for the security module that refused; or run the server as root".into(),
        })
    }

    pub(crate) fn known() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::among(Path::new("/proc/sys"), &status)
    }

    fn among(settings: &Path, status: &str) -> Option<Self> {
        let is = |name: &str, value: &str| {
            std::fs::read_to_string(settings.join(name)).is_ok_and(|text| text.trim() == value)
        };
        for kind in KINDS {
            if is(&format!("user/max_{kind}_namespaces"), "0") {
                let setting = format!("user.max_{kind}_namespaces");
                return Some(Self::setting(
                    &format!("{setting} is 0: nobody may make {kind} namespaces"),
                    &setting,
                    "15000",
                ));
            }
        }
        if is("kernel/unprivileged_userns_clone", "0") {
            let setting = "kernel.unprivileged_userns_clone";
            return Some(Self::setting(&format!("{setting} is 0: only root may make user namespaces"), setting, "1"));
        }
        if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
            let setting = "kernel.apparmor_restrict_unprivileged_userns";
            let mut obstacle = Self::setting(
                &format!("{setting} is 1: AppArmor takes their rights from user namespaces of ordinary users"),
                setting,
                "0",
            );
            obstacle.fix.push_str("; or give this program an AppArmor profile that allows `userns`");
            return Some(obstacle);
        }
        let filtered = status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
        filtered.then(|| Self {
            message: "a system call filter around this server, as containers have it, refuses namespaces".into(),
            fix: "allow clone, unshare, setns and mount in the container's seccomp profile, or run the server outside"
                .into(),
        })
    }

    fn setting(message: &str, setting: &str, value: &str) -> Self {
        Self {
            message: message.to_owned(),
            fix: format!(
                "as root: sysctl -w {setting}={value} (and in /etc/sysctl.d, to keep it); or run the server as root"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found with these settings.
    fn found(settings: &[(&str, &str)], status: &str) -> Option<Obstacle> {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in settings {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        Obstacle::among(root.path(), status)
    }

    #[test]
    fn the_setting_that_forbids_is_named_with_its_cure() {
        for (file, value, setting, cure) in [
            ("user/max_user_namespaces", "0", "user.max_user_namespaces", "user.max_user_namespaces=15000"),
            ("user/max_net_namespaces", "0", "user.max_net_namespaces", "user.max_net_namespaces=15000"),
            (
                "kernel/unprivileged_userns_clone",
                "0",
                "kernel.unprivileged_userns_clone",
                "kernel.unprivileged_userns_clone=1",
            ),
            (
                "kernel/apparmor_restrict_unprivileged_userns",
                "1",
                "kernel.apparmor_restrict_unprivileged_userns",
                "kernel.apparmor_restrict_unprivileged_userns=0",
            ),
        ] {
            let obstacle = found(&[(file, value)], "").unwrap();
            assert!(obstacle.message.contains(setting), "{obstacle:?}");
            assert!(obstacle.fix.contains(cure), "{obstacle:?}");
        }
    }

    #[test]
    fn settings_that_allow_are_no_obstacle() {
        let fine = [
            ("user/max_user_namespaces", "96365"),
            ("kernel/unprivileged_userns_clone", "1"),
            ("kernel/apparmor_restrict_unprivileged_userns", "0"),
        ];
        assert_eq!(found(&fine, "Name:\tx\nSeccomp:\t0\n"), None);
        let filtered = found(&fine, "Name:\tx\nSeccomp:\t2\n").unwrap();
        assert!(filtered.message.contains("system call filter"), "{filtered:?}");
    }
}

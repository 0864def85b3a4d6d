//! This very test program again, as an ordinary user.
//!
//! The user exists only in copies of the account files, shown in a mount
//! namespace of the program's own: the host's files are not touched, and tests
//! run side by side.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::fixture::eventually_empty;

/// Tells the program what it is, and where things are that it needs.
const SPAWNER: &str = "ORDINARY_USER_SPAWNER";
const IMAGE: &str = "ORDINARY_USER_IMAGE";
const CGROUP: &str = "ORDINARY_USER_CGROUP";
const BUSYBOX: &str = "ORDINARY_USER_BUSYBOX";
const DEBIAN: &str = "ORDINARY_USER_DEBIAN";

/// Uids no distribution gives out; each use of this module takes another.
const FIRST_UID: u32 = 60_000_000;
static USED_UIDS: AtomicU32 = AtomicU32::new(0);
const FIRST_SUBORDINATE: u32 = 1_500_000_000;
const SUBORDINATES: u32 = 65_536;

/// More than all of the above.
const ALL_IDS: u32 = 2_000_000_000;

/// Shows the account files, spoils what is asked, becomes the user.
const ENTER: &str = r#"
set -eu
uid=$1 accounts=$2 spoil=$3
shift 3
for file in passwd group subuid subgid; do
    [ -e "/etc/$file" ] || touch "/etc/$file"
    mount --bind "$accounts/$file" "/etc/$file"
done
mount --bind "$BUSYBOX" "$accounts/busybox"
[ -z "$DEBIAN" ] || mount --bind "$DEBIAN" "$accounts/debian"
cd "$accounts/home"
set -- setpriv --reuid "$uid" --regid "$uid" --init-groups --reset-env -- env "$@"
case $spoil in
    nothing) exec "$@" ;;
    proc)
        mount --bind /dev/null /proc/cpuinfo
        exec "$@" ;;
    namespaces)
        # The limit holds in this namespace alone.
        exec unshare --user --map-users "0,0,$ALL" --map-groups "0,0,$ALL" \
            sh -c 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"' sh "$@" ;;
esac
"#;

/// What the user has, and what stands in his way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    /// Lines in `/etc/subuid` and `/etc/subgid`.
    pub(crate) subordinate_ids: bool,
    /// Directories in the control group hierarchies.
    pub(crate) cgroups: bool,
    pub(crate) spoilt: Spoilt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spoilt {
    Nothing,
    /// Parts of `/proc` are hidden, as in a container.
    Proc,
    /// `user.max_user_namespaces` is 0.
    Namespaces,
}

impl Circumstances {
    pub(crate) const WITH_IDS: Self = Self { subordinate_ids: true, cgroups: false, spoilt: Spoilt::Nothing };
    pub(crate) const ALONE: Self = Self { subordinate_ids: false, cgroups: false, spoilt: Spoilt::Nothing };
}

/// Whether this program was started by [`run`].
pub(crate) fn is_staged() -> bool {
    std::env::var_os(SPAWNER).is_some()
}

pub(crate) fn spawner() -> Option<PathBuf> {
    std::env::var_os(SPAWNER).map(PathBuf::from)
}

pub(crate) fn image_archive() -> Option<PathBuf> {
    std::env::var_os(IMAGE).map(PathBuf::from)
}

/// Roots for PRoot, where the user can reach them.
pub(crate) fn busybox_root() -> Option<PathBuf> {
    std::env::var_os(BUSYBOX).map(PathBuf::from)
}

pub(crate) fn debian_root() -> Option<PathBuf> {
    std::env::var_os(DEBIAN).map(PathBuf::from)
}

/// Name of the directories that are the user's, where he has any.
pub(crate) fn cgroup_parent() -> Option<String> {
    std::env::var(CGROUP).ok().filter(|name| !name.is_empty())
}

/// Runs `body` as an ordinary user: in this process if it is one, else by
/// running the test of this name once more.
pub(crate) fn as_ordinary_user(test: &str, circumstances: Circumstances, body: impl AsyncFnOnce()) {
    if is_staged() {
        return tokio::runtime::Runtime::new().expect("a runtime").block_on(body());
    }
    let passed = run(&["--exact", test], circumstances);
    assert_eq!(passed, 1, "the test {test} was not found");
}

/// Runs tests of this program as an ordinary user; returns how many passed.
/// Fails when one fails, or when a process of the user is left.
pub(crate) fn run(filter: &[&str], circumstances: Circumstances) -> usize {
    assert!(rustix::process::geteuid().is_root(), "only root can become another user: run these tests as root");
    let uid = FIRST_UID + std::process::id() * 16 + USED_UIDS.fetch_add(1, Ordering::Relaxed);
    let stage = tempfile::tempdir().expect("a directory");
    let groups = if circumstances.cgroups { Groups::make(uid) } else { Groups { name: String::new() } };
    prepare(stage.path(), uid, circumstances);

    let variable = |name: &str, file: &str| format!("{name}={}", stage.path().join(file).display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]).env("ALL", ALL_IDS.to_string());
    // Only who needs it waits until it is made.
    let debian = filter.iter().any(|name| name.ends_with("_on_debian")).then(crate::proot_fixture::debian_root);
    command.env("BUSYBOX", crate::proot_fixture::busybox_root()).env("DEBIAN", debian.unwrap_or_default());
    let spoil = match circumstances.spoilt {
        Spoilt::Nothing => "nothing",
        Spoilt::Proc => "proc",
        Spoilt::Namespaces => "namespaces",
    };
    command.args(["sh", "-c", ENTER, "sh", &uid.to_string()]).arg(stage.path()).arg(spoil);
    command.args([
        variable(SPAWNER, "spawner"),
        variable(IMAGE, "image.tar"),
        variable(BUSYBOX, "busybox"),
        variable(DEBIAN, "debian"),
        format!("{CGROUP}={}", groups.name),
    ]);
    command.arg(stage.path().join("tests")).args(filter).args(["--nocapture", "--test-threads=2"]);
    let output = command.output().expect("unshare starts");
    let (text, complaints) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "as an ordinary user {circumstances:?}: {text}\n{complaints}");
    assert!(!text.contains(" ignored") || text.contains(" 0 ignored"), "{text}");

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(eventually_empty("processes of the user end", async || processes_of(uid)));
    groups.expect_empty();
    let summary = text.lines().find_map(|line| line.strip_prefix("test result: ok. ")).expect("a summary");
    summary.split(' ').next().and_then(|count| count.parse().ok()).expect("a count")
}

/// Account files, a home, and the programs where the user can reach them.
fn prepare(stage: &Path, uid: u32, circumstances: Circumstances) {
    use std::os::unix::fs::{PermissionsExt, chown};
    let append = |file: &str, line: String| {
        let old = std::fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
        std::fs::write(stage.join(file), format!("{old}{line}")).expect("written");
    };
    let home = stage.join("home");
    append("passwd", format!("ordinary:x:{uid}:{uid}::{}:/bin/sh\n", home.display()));
    append("group", format!("ordinary:x:{uid}:\n"));
    for file in ["subuid", "subgid"] {
        let line =
            if circumstances.subordinate_ids { &format!("ordinary:{FIRST_SUBORDINATE}:{SUBORDINATES}\n") } else { "" };
        append(file, format!("root:0:{ALL_IDS}\n{line}"));
    }
    for directory in [&home, &stage.join("busybox"), &stage.join("debian")] {
        std::fs::create_dir(directory).expect("a directory");
    }
    chown(&home, Some(uid), Some(uid)).expect("his own");
    std::fs::set_permissions(stage, PermissionsExt::from_mode(0o755)).expect("open to all");
    std::fs::copy(std::env::current_exe().expect("a program"), stage.join("tests")).expect("copied");
    std::fs::copy(env!("CARGO_BIN_EXE_oci-test-spawner"), stage.join("spawner")).expect("copied");
    crate::oci_conformance::make_image(&stage.join("image.tar"));
}

/// Processes that run as the user or as one of his further ids.
fn processes_of(uid: u32) -> Vec<String> {
    let subordinates = FIRST_SUBORDINATE..FIRST_SUBORDINATE + SUBORDINATES;
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").expect("readable").flatten() {
        let status = std::fs::read_to_string(process.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
        let real: Option<u32> = line.split_whitespace().next().and_then(|uid| uid.parse().ok());
        // Other tests use the same further ids at the same time, in their own
        // sandboxes; those end with these users' first processes.
        let is_orphan = |real: &u32| *real == uid || (subordinates.contains(real) && parent_is_gone(&status));
        if real.as_ref().is_some_and(is_orphan) {
            found.push(status.lines().take(3).collect::<Vec<_>>().join(" "));
        }
    }
    found
}

/// Whether a process hangs on the host's own init.
fn parent_is_gone(status: &str) -> bool {
    status.lines().any(|line| line == "PPid:\t1")
}

/// Directories in the v1 hierarchies that belong to the user, as an
/// administrator may make them.
struct Groups {
    name: String,
}

impl Groups {
    fn make(uid: u32) -> Self {
        let groups = Self { name: format!("stacyvm-user-{uid}") };
        for directory in groups.directories() {
            std::fs::create_dir(&directory).expect("a control group");
            std::os::unix::fs::chown(&directory, Some(uid), Some(uid)).expect("handed over");
        }
        groups
    }

    /// The user's server took its own directories away.
    fn expect_empty(&self) {
        if !self.name.is_empty() {
            for directory in self.directories() {
                let left: Vec<_> = std::fs::read_dir(directory).expect("readable").flatten().collect();
                assert!(left.iter().all(|entry| !entry.path().is_dir()), "{left:?}");
            }
        }
    }

    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let hierarchies = ["memory", "cpu", "cpuacct", "pids"].map(|name| Path::new("/sys/fs/cgroup").join(name));
        let mut real: Vec<PathBuf> =
            hierarchies.iter().map(|path| path.canonicalize().expect("a cgroup v1 hierarchy")).collect();
        real.dedup();
        real.into_iter().map(|path| path.join(&self.name))
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            // What a failed test left stays, to be looked at.
            self.directories().for_each(|directory| drop(std::fs::remove_dir(directory)));
        }
    }
}

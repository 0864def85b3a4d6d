//! A data directory of a test's own, and all that belongs to it on this host.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stacyvm_conformance::CensusScope;
use tempfile::TempDir;

use super::{IMAGE, Ran, in_repository, run};

/// What the servers of one host share.
const RUN_DIR: &str = "/run/stacyvm";
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How long the last clean-up may take: a server starts, destroys and ends.
const CLEAN_UP_LIMIT: Duration = Duration::from_mins(1);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Tells the groups of this process's sites apart.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Made once; every site imports it.
static ARCHIVE: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let archive = directory.path().join("image.tar");
    make_image(&archive, IMAGE);
    (directory, archive)
});

/// Writes the test image under a name.
pub(crate) fn make_image(archive: &Path, name: &str) {
    let script = in_repository("scripts/make-test-image.sh");
    let made = Command::new(script).arg(archive).arg(name).output().expect("the script starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Outlives every server that runs on it. With the last user of it, whatever
/// its servers left is destroyed; and if that was not for the site to do, the
/// test fails.
pub(crate) struct Site {
    directory: TempDir,
    cgroup_parent: String,
}

impl Site {
    /// A home without images.
    pub(crate) fn new() -> Arc<Self> {
        assert!(rustix::process::geteuid().is_root(), "these tests make sandboxes with limits: run them as root");
        let directory = tempfile::Builder::new().prefix("stacyvm-e2e-").tempdir().expect("a directory");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup_parent = format!("stacyvm-e2e-{}-{number}", std::process::id());
        Arc::new(Self { directory, cgroup_parent })
    }

    /// A home that has [`IMAGE`].
    pub(crate) fn with_image() -> Arc<Self> {
        let site = Self::new();
        let imported = site.program().args(["image", "import"]).arg(Self::archive()).output().expect("it starts");
        assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
        site
    }

    /// [`IMAGE`] as `docker save` writes it.
    pub(crate) fn archive() -> &'static Path {
        &ARCHIVE.1
    }

    /// The home directory of whoever runs commands here.
    pub(crate) fn home(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.home().join("data")
    }

    /// The directory that one sandbox has on the host.
    pub(crate) fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.data_dir().join("oci/sandboxes").join(id)
    }

    /// The program under test; nothing of this process's environment reaches it.
    pub(crate) fn program(&self) -> Command {
        self.command(env!("CARGO_BIN_EXE_stacyvm"))
    }

    /// Any program, in this home and with the configuration of its servers.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().current_dir(self.home()).stdin(Stdio::null());
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", self.home()).env("STACYVM_DATA_DIR", self.data_dir());
        command.env("STACYVM_PROVIDERS_OCI_CGROUP_PARENT", &self.cgroup_parent);
        // Made when they are needed: the tests share two processors.
        command.env("STACYVM_PROVIDERS_OCI_PREPARED", "1").env("STACYVM_PROVIDERS_OCI_PREPARED_BRIDGE", "0");
        command.env("STACYVM_DEFAULTS_NETWORK", "none");
        command
    }

    /// `stacyvm` with these arguments and no server to talk to.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, |_| ()).await
    }

    pub(crate) async fn run_with(&self, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Ran {
        let mut command = self.program();
        command.args(arguments);
        change(&mut command);
        run(command.into(), b"").await
    }

    pub(crate) fn scope(&self, server_pid: u32) -> CensusScope {
        CensusScope { server_pid, data_dir: self.data_dir(), cgroup_parent: self.cgroup_parent.clone() }
    }

    /// What this site's servers have on the host while none of them runs:
    /// processes, groups, mounts, addresses, devices.
    pub(crate) fn remains(&self) -> Vec<String> {
        let mut remains: Vec<String> = self.members().iter().map(|pid| format!("process {pid}")).collect();
        remains.extend(self.groups().iter().map(|group| group.display().to_string()));
        let data_dir = self.data_dir().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("readable");
        remains.extend(mounts.lines().filter(|line| line.contains(&data_dir)).map(str::to_owned));
        remains.extend(self.files_of_sandboxes());
        for (number, claim) in self.claims() {
            remains.push(format!("the claim {}", claim.display()));
            let device = PathBuf::from(format!("/sys/class/net/svm{number}"));
            remains.extend(device.exists().then(|| device.display().to_string()));
        }
        remains
    }

    /// What sandboxes have on the host while a server runs: groups, with all that
    /// is in them, and files.
    pub(crate) fn sandboxes_on_host(&self) -> Vec<String> {
        let of_a_sandbox =
            |group: &PathBuf| group.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"sb-"));
        let groups = self.groups().into_iter().filter(of_a_sandbox);
        let mut found: Vec<String> = groups.map(|group| group.display().to_string()).collect();
        found.extend(self.files_of_sandboxes());
        found
    }

    fn files_of_sandboxes(&self) -> Vec<String> {
        let directories = ["oci/sandboxes", "oci/trash"].map(|below| fs::read_dir(self.data_dir().join(below)));
        let entries = directories.into_iter().flatten().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect()
    }

    /// Numbers of the host's that are ours.
    fn claims(&self) -> Vec<(String, PathBuf)> {
        let owner = format!(" {}", self.data_dir().join("oci").display());
        let kinds = ["uids", "subnets"].map(|kind| fs::read_dir(Path::new(RUN_DIR).join(kind)));
        let claims = kinds.into_iter().flatten().flatten().flatten();
        let ours =
            claims.filter(|claim| fs::read_to_string(claim.path()).is_ok_and(|text| text.trim_end().ends_with(&owner)));
        ours.map(|claim| (claim.file_name().to_string_lossy().into_owned(), claim.path())).collect()
    }

    fn groups(&self) -> Vec<PathBuf> {
        control_groups(&self.cgroup_parent)
    }

    fn members(&self) -> BTreeSet<i32> {
        let listed = self.groups().into_iter().filter_map(|group| fs::read_to_string(group.join("cgroup.procs")).ok());
        listed.flat_map(|pids| pids.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// What is left of killed servers is taken up and destroyed by another.
    fn destroy_what_is_left(&self) {
        let announced = self.home().join("clean-up");
        let output = fs::File::create(&announced).expect("a file");
        let mut server = self.program();
        server.args(["serve", "--port", "0", "--destroy-on-exit", "--log-level", "error"]).stdout(output);
        let Ok(mut server) = server.spawn() else { return };
        let end = Instant::now() + CLEAN_UP_LIMIT;
        let mut told = false;
        while Instant::now() < end && !matches!(server.try_wait(), Ok(Some(_))) {
            if !told && fs::metadata(&announced).is_ok_and(|file| file.len() > 0) {
                told = kill_process(pid_of(&server), Signal::TERM).is_ok();
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let _ = server.kill();
        let _ = server.wait();
    }

    /// The last resort, where the product itself failed.
    fn free_by_force(&self) {
        let end = Instant::now() + CLEAN_UP_LIMIT;
        while !self.groups().is_empty() && Instant::now() < end {
            for pid in self.members().into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
            for group in self.groups() {
                let _ = fs::remove_dir(group);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.remains().is_empty() {
            return;
        }
        self.destroy_what_is_left();
        let remains = self.remains();
        self.free_by_force();
        if !std::thread::panicking() {
            assert!(remains.is_empty(), "a server that destroyed everything left: {remains:#?}");
        }
    }
}

/// A group and those below it in all hierarchies, the innermost first.
pub(crate) fn control_groups(name: &str) -> Vec<PathBuf> {
    let mut groups = Vec::new();
    let hierarchies = fs::read_dir(CGROUP_ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([PathBuf::from(CGROUP_ROOT)]) {
        collect_below(&hierarchy.join(name), &mut groups);
    }
    groups
}

fn collect_below(group: &Path, groups: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(group) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect_below(&entry.path(), groups);
    }
    groups.push(group.to_owned());
}

pub(crate) fn pid_of(child: &std::process::Child) -> Pid {
    Pid::from_child(child)
}

//! A provider of its own for each test, ways to look inside, and proof that
//! nothing is left of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stacyvm_api::{Limit, NetworkMode, SandboxId, Timestamp};
use stacyvm_providers::oci::{OciOptions, OciProvider, SpawnerCommand};
use stacyvm_sandbox::{DiskRequest, EnvdSession, NetworkPolicy, Provider, SandboxSpec, StartRequest};

use crate::inside::{self, Ran, TOKEN};
use crate::ordinary_user;

/// How long a condition may take to come true on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Fixture {
    pub(crate) provider: Arc<OciProvider>,
    pub(crate) options: OciOptions,
    _data: Option<tempfile::TempDir>,
}

impl Fixture {
    /// A provider without a network. Fails, rather than skips, where the host
    /// cannot run these tests.
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut OciOptions)) -> Self {
        let data = tempfile::tempdir().expect("a directory for data");
        let mut options = options(data.path());
        change(&mut options);
        Self { _data: Some(data), ..Self::open(options).await }
    }

    /// A provider over what another one left.
    pub(crate) async fn over(data_dir: &Path) -> Self {
        Self::open(options(data_dir)).await
    }

    async fn open(options: OciOptions) -> Self {
        let may = rustix::process::geteuid().is_root() || ordinary_user::is_staged();
        assert!(may, "these tests make namespaces: run them as root");
        let provider = Arc::new(OciProvider::open(options.clone()).await.expect("the provider opens"));
        Self { provider, options, _data: None }
    }

    /// As after a crash of the server: the old provider is gone, a new one
    /// takes up the same directory.
    pub(crate) async fn restart(&mut self) {
        let dead = OciOptions { data_dir: tempfile::tempdir().expect("a directory").keep(), ..self.options.clone() };
        // The provider cannot be taken out of the fixture, only replaced.
        let placeholder = Arc::new(OciProvider::open(dead.clone()).await.expect("the provider opens"));
        let old = std::mem::replace(&mut self.provider, placeholder);
        assert_eq!(Arc::strong_count(&old), 1, "a test still holds the old provider");
        drop(old);
        let fresh = OciProvider::open(self.options.clone()).await.expect("the provider opens again");
        std::mem::replace(&mut self.provider, Arc::new(fresh)).shutdown().await;
        std::fs::remove_dir_all(dead.data_dir).expect("removable");
    }

    pub(crate) async fn create(&self, spec: &SandboxSpec) -> SandboxId {
        let id = SandboxId::random();
        if let Err(error) = self.provider.create(&id, spec, &()).await {
            panic!("{}", chain(&error));
        }
        id
    }

    pub(crate) async fn session(&self, id: &SandboxId) -> EnvdSession {
        inside::session(self.provider.as_ref(), id).await
    }

    /// Runs a shell script inside.
    pub(crate) async fn sh(&self, id: &SandboxId, script: &str) -> Ran {
        self.run(id, inside::shell(script)).await
    }

    pub(crate) async fn run(&self, id: &SandboxId, request: StartRequest) -> Ran {
        inside::run(&self.session(id).await, request).await
    }

    /// The output of a script that must succeed.
    pub(crate) async fn output(&self, id: &SandboxId, script: &str) -> String {
        inside::output(&self.session(id).await, script).await
    }

    pub(crate) fn oci_dir(&self) -> PathBuf {
        self.options.data_dir.join("oci")
    }

    /// This server's own name, which is in the paths of all it makes.
    pub(crate) fn instance(&self) -> String {
        let id = std::fs::read_to_string(self.oci_dir().join("instance")).expect("a name");
        id.trim().to_owned()
    }

    /// Everything on the host that belongs to this fixture's sandboxes.
    pub(crate) fn remains(&self) -> Vec<String> {
        let mut remains = Vec::new();
        for directory in ["sandboxes", "trash"] {
            for entry in std::fs::read_dir(self.oci_dir().join(directory)).expect("readable").flatten() {
                remains.push(format!("{}", entry.path().display()));
            }
        }
        for group in groups_of(&self.instance()) {
            remains.push(format!("{}", group.display()));
        }
        let data = self.options.data_dir.to_str().expect("text").to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
        remains.extend(mounts.lines().filter(|line| line.contains(&data)).map(str::to_owned));
        // What is kept ready is no remains; it goes with the provider.
        let loops = self.loop_devices();
        if loops.len() > self.disks_ready() {
            remains.extend(loops);
        }
        for process in std::fs::read_dir("/proc").expect("readable").flatten() {
            let groups = std::fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
            let label = std::fs::read(process.path().join("environ")).unwrap_or_default();
            if groups.contains(&self.instance()) || String::from_utf8_lossy(&label).contains(&self.instance()) {
                remains.push(format!("process {}", process.file_name().to_string_lossy()));
            }
        }
        remains
    }

    /// Loop devices whose files are below this fixture's data directory.
    pub(crate) fn loop_devices(&self) -> Vec<String> {
        let data = format!("{}/", self.options.data_dir.display());
        let devices = std::fs::read_dir("/sys/block").expect("readable").flatten();
        let files = devices.filter_map(|device| std::fs::read_to_string(device.path().join("loop/backing_file")).ok());
        files.filter(|file| file.starts_with(&data)).map(|file| format!("a loop device with {file}")).collect()
    }

    pub(crate) fn disks_ready(&self) -> usize {
        self.provider.describe()["disks_ready"].parse().expect("a number")
    }

    /// Proves that nothing is left, then ends the provider.
    pub(crate) async fn finish(self) {
        eventually_empty("what sandboxes used is freed", async || self.remains()).await;
        self.provider.shutdown().await;
        let left = groups_root_of(&self.instance());
        assert!(left.is_empty(), "{left:?}");
        // One that was just being made ends a moment later.
        eventually_empty("prepared disks are freed", async || self.loop_devices()).await;
    }
}

/// A file system of a test's own, in a file.
pub(crate) struct Mounted {
    directory: tempfile::TempDir,
    _image: tempfile::NamedTempFile,
}

impl Mounted {
    /// One that `format` makes in an empty file, mounted with options; or what
    /// `mount` says.
    pub(crate) fn make(format: &[&str], options: &str) -> Result<Self, String> {
        let image = tempfile::NamedTempFile::new().expect("a file");
        image.as_file().set_len(512 << 20).expect("long enough");
        let formatted = Command::new(format[0]).args(&format[1..]).arg(image.path()).output().expect("it starts");
        assert!(formatted.status.success(), "{format:?}: {}", String::from_utf8_lossy(&formatted.stderr));
        let directory = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("loop,{options}")]).arg(image.path()).arg(directory.path());
        let mounted = mount.output().expect("mount starts");
        if mounted.status.success() {
            Ok(Self { directory, _image: image })
        } else {
            Err(String::from_utf8_lossy(&mounted.stderr).into_owned())
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        let numbers = rustix::fs::statvfs(self.path()).expect("readable");
        (numbers.f_blocks - numbers.f_bfree) * numbers.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A failed test may still have something open in it.
        let _ = rustix::mount::unmount(self.directory.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Control groups of sandboxes of one server.
fn groups_of(instance: &str) -> Vec<PathBuf> {
    groups_root_of(instance)
        .iter()
        .filter_map(|root| std::fs::read_dir(root).ok())
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Directories of one server in all hierarchies.
fn groups_root_of(instance: &str) -> Vec<PathBuf> {
    let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
    hierarchies.extend(std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()));
    hierarchies.into_iter().map(|root| root.join(cgroup_parent()).join(instance)).filter(|path| path.exists()).collect()
}

pub(crate) fn options(data_dir: &Path) -> OciOptions {
    let mut options = OciOptions::new(data_dir);
    let program = ordinary_user::spawner().unwrap_or_else(|| env!("CARGO_BIN_EXE_oci-test-spawner").into());
    options.spawner = SpawnerCommand { program, args: Vec::new() };
    options.cgroup_parent = cgroup_parent();
    options.run_dir = if ordinary_user::is_staged() { data_dir.join("run") } else { options.run_dir };
    options.prepared = 1;
    options.disk.prepared = 1;
    options.bridge = None;
    options
}

fn cgroup_parent() -> String {
    ordinary_user::cgroup_parent().unwrap_or_else(|| "stacyvm-test".into())
}

/// Whether whoever runs these tests has control groups.
pub(crate) fn limits_hold() -> bool {
    !ordinary_user::is_staged() || ordinary_user::cgroup_parent().is_some()
}

/// A small sandbox of image `host`, without network.
pub(crate) fn spec() -> SandboxSpec {
    SandboxSpec {
        image: "host".into(),
        memory_mib: 256,
        vcpus: 1.0,
        pids_limit: 64,
        disk: DiskRequest { size_mib: None, in_memory: false },
        requested: if limits_hold() { [Limit::Memory, Limit::Cpu, Limit::Pids].into() } else { BTreeSet::new() },
        network: NetworkPolicy { mode: NetworkMode::None, allow: Vec::new() },
        env: [("GREETING".to_owned(), "hello".to_owned())].into(),
        user: None,
        hostname: "box".into(),
        metadata: [("test".to_owned(), "yes".to_owned())].into(),
        allow_unenforced: false,
        expires_at: Timestamp::now() + Duration::from_mins(10),
        generation: 1,
        agent_token: TOKEN.into(),
    }
}

/// Waits for a condition; the message says what never came true.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not so after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits for a list to become empty; the message shows what stays in it.
pub(crate) async fn eventually_empty(what: &str, mut list: impl AsyncFnMut() -> Vec<String>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let rest = list().await;
        if rest.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: not so after {PATIENCE:?}: {rest:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

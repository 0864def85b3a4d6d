//! A PRoot provider of its own for each test, ways to look inside, and proof
//! that nothing is left of it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use stacyvm_api::{NetworkMode, SandboxId, Timestamp};
use stacyvm_providers::proot::{LauncherCommand, Permission, ProotOptions, ProotProvider};
use stacyvm_sandbox::{
    Connection, DiskRequest, EnvdSession, NetworkPolicy, ProcessEvent, Provider, SandboxSpec, Session as _,
    StartRequest,
};

use crate::fixture::{chain, eventually_empty};
use crate::inside::Ran;
use crate::ordinary_user;

const TOKEN: &str = "token-of-the-test";

/// One making of a root at a time; the others then find it.
static MAKING: Mutex<()> = Mutex::new(());

/// How a sandbox is kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Apart {
    /// As the kernel lets us: it does, on every machine these tests run on.
    Namespaces,
    /// As where it does not.
    Shared,
}

pub(crate) struct Proot {
    pub(crate) provider: Arc<ProotProvider>,
    pub(crate) options: ProotOptions,
    apart: Apart,
    _data: tempfile::TempDir,
}

impl Proot {
    pub(crate) async fn start(apart: Apart) -> Self {
        Self::with(apart, |_| {}).await
    }

    /// Over a root of busybox. Fails, rather than skips, without PRoot.
    pub(crate) async fn with(apart: Apart, change: impl FnOnce(&mut ProotOptions)) -> Self {
        let data = tempfile::tempdir().expect("a directory for data");
        let mut options = ProotOptions::new(data.path().join("data"));
        options.launcher = Self::launcher();
        options.rootfs = busybox_root();
        options.cgroup_parent = ordinary_user::cgroup_parent().unwrap_or_else(|| "stacyvm-test".into());
        if ordinary_user::is_staged() {
            options.run_dir = data.path().join("run");
        }
        std::fs::create_dir(&options.data_dir).expect("a data directory");
        if apart == Apart::Shared {
            options.namespaces = false;
            options.shared_network = Permission::given();
            // Sandboxes of root's run as other users, who have to get there.
            let base = data.path().join("base");
            std::fs::set_permissions(data.path(), PermissionsExt::from_mode(0o755)).expect("open to all");
            options.workspace_base = Some(base);
        }
        change(&mut options);
        let provider =
            Arc::new(ProotProvider::open(&options).await.unwrap_or_else(|error| panic!("{}", chain(&error))));
        let report = provider.check().await;
        assert!(report.is_healthy(), "{:#?}", report.findings);
        assert_eq!(provider.capabilities().shares_host, apart == Apart::Shared, "{:#?}", report.findings);
        Self { provider, options, apart, _data: data }
    }

    pub(crate) fn launcher() -> LauncherCommand {
        let program = ordinary_user::spawner().unwrap_or_else(|| env!("CARGO_BIN_EXE_oci-test-spawner").into());
        LauncherCommand { program, args: vec!["proot-launcher".into()] }
    }

    /// As after a crash of the server: a new provider takes up the directory.
    pub(crate) async fn restart(&mut self) {
        self.provider.shutdown().await;
        let dead = tempfile::tempdir().expect("a directory");
        let placeholder =
            ProotOptions { data_dir: dead.path().to_owned(), workspace_base: None, ..self.options.clone() };
        let placeholder = Arc::new(ProotProvider::open(&placeholder).await.expect("the provider opens"));
        let old = std::mem::replace(&mut self.provider, placeholder);
        assert_eq!(Arc::strong_count(&old), 1, "a test still holds the old provider");
        drop(old);
        let fresh = ProotProvider::open(&self.options).await.expect("the provider opens again");
        std::mem::replace(&mut self.provider, Arc::new(fresh)).shutdown().await;
    }

    pub(crate) fn spec(&self) -> SandboxSpec {
        let mode = match self.apart {
            Apart::Namespaces => NetworkMode::None,
            Apart::Shared => NetworkMode::Named("host".into()),
        };
        SandboxSpec {
            image: "rootfs".into(),
            memory_mib: 256,
            vcpus: 0.0,
            pids_limit: 64,
            disk: DiskRequest { size_mib: None, in_memory: false },
            requested: [].into(),
            network: NetworkPolicy { mode, allow: Vec::new() },
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

    pub(crate) async fn create(&self, spec: &SandboxSpec) -> SandboxId {
        let id = SandboxId::random();
        if let Err(error) = self.provider.create(&id, spec, &()).await {
            panic!("{}", chain(&error));
        }
        id
    }

    pub(crate) async fn session(&self, id: &SandboxId) -> EnvdSession {
        let connection = self.provider.connect(id).await.expect("a way in");
        let Connection::Envd(channel) = connection else { panic!("{connection:?}") };
        EnvdSession::connect(channel, TOKEN.into()).expect("a session")
    }

    pub(crate) async fn run(&self, id: &SandboxId, request: StartRequest) -> Ran {
        let mut events = self.session(id).await.start(request).await.expect("the command starts");
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match events.next().await.expect("an exit").expect("an event") {
                ProcessEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                ProcessEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                ProcessEvent::Exited(exit) => {
                    let text = |bytes| String::from_utf8(bytes).expect("text");
                    return Ran { exit, stdout: text(stdout), stderr: text(stderr) };
                }
                ProcessEvent::Started { .. }
                | ProcessEvent::Terminal(_)
                | ProcessEvent::Dropped { .. }
                | ProcessEvent::Keepalive => {}
            }
        }
    }

    pub(crate) async fn sh(&self, id: &SandboxId, script: &str) -> Ran {
        self.run(id, argv(&["/bin/sh", "-c", script])).await
    }

    /// The output of a script that must succeed.
    pub(crate) async fn output(&self, id: &SandboxId, script: &str) -> String {
        let ran = self.sh(id, script).await;
        assert_eq!(ran.exit.code, Some(0), "{script}: {ran:?}");
        ran.stdout.trim_end().to_owned()
    }

    pub(crate) fn sandboxes(&self) -> PathBuf {
        let own = self.options.data_dir.join("proot");
        self.options.workspace_base.as_ref().unwrap_or(&own).join("sandboxes")
    }

    /// The sandbox's root, as the host sees it.
    pub(crate) fn root(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str()).join("root")
    }

    /// Who PRoot is.
    pub(crate) fn pid(&self, id: &SandboxId) -> i32 {
        let text = std::fs::read(self.sandboxes().join(id.as_str()).join("init.json")).expect("an identity");
        let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        value["pid"].as_i64().and_then(|pid| pid.try_into().ok()).expect("a number")
    }

    /// Everything on the host that belongs to this fixture's sandboxes.
    pub(crate) fn remains(&self) -> Vec<String> {
        let base = self.sandboxes().parent().expect("a parent").to_owned();
        let mut remains = Vec::new();
        for directory in ["sandboxes", "trash"] {
            for entry in std::fs::read_dir(base.join(directory)).expect("readable").flatten() {
                remains.push(format!("{}", entry.path().display()));
            }
        }
        let base = base.to_str().expect("text").to_owned();
        for process in std::fs::read_dir("/proc").expect("readable").flatten() {
            let path = process.path();
            let read = |file: &str| std::fs::read(path.join(file)).unwrap_or_default();
            let link = |file: &str| std::fs::read_link(path.join(file)).unwrap_or_default();
            let texts = [read("cmdline"), read("maps"), read("environ")];
            let mut uses = texts.iter().any(|text| String::from_utf8_lossy(text).contains(&base));
            uses |= [link("cwd"), link("exe")].iter().any(|to| to.starts_with(&base));
            if uses && process.file_name().to_str() != Some(&std::process::id().to_string()) {
                let name = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
                remains.push(format!("process {}: {name}", process.file_name().to_string_lossy()));
            }
        }
        remains
    }

    /// Proves that nothing is left, then ends the provider.
    pub(crate) async fn finish(self) {
        eventually_empty("what sandboxes used is freed", async || self.remains()).await;
        self.provider.shutdown().await;
    }
}

/// What runs in a sandbox, by who PRoot is.
pub(crate) fn traced_by(proot: i32) -> Vec<i32> {
    let line = format!("TracerPid:\t{proot}\n");
    let entries = std::fs::read_dir("/proc").expect("readable").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| text.contains(&line)))
        .collect()
}

pub(crate) fn argv(argv: &[&str]) -> StartRequest {
    StartRequest { argv: argv.iter().map(|&text| text.to_owned()).collect(), ..StartRequest::default() }
}

/// A root made of busybox.
pub(crate) fn busybox_root() -> PathBuf {
    if let Some(staged) = ordinary_user::busybox_root() {
        return staged;
    }
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let root = cache().join("busybox");
    if !root.join("bin/sh").exists() {
        let _ = std::fs::remove_dir_all(&root);
        let fresh = tempfile::tempdir_in(cache()).expect("a directory");
        let archive = fresh.path().join("root.tar");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/make-test-image.sh");
        succeed(Command::new(script).arg("--rootfs").arg(&archive));
        let unpacked = fresh.path().join("root");
        std::fs::create_dir(&unpacked).expect("a directory");
        succeed(Command::new("tar").arg("-C").arg(&unpacked).arg("-xf").arg(&archive));
        // Another test program may have been faster.
        let _ = std::fs::rename(unpacked, &root);
    }
    root
}

/// A root made by debootstrap: real programs of a real distribution.
pub(crate) fn debian_root() -> PathBuf {
    if let Some(staged) = ordinary_user::debian_root() {
        return staged;
    }
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let root = cache().join("debian");
    if !root.join("etc/debian_version").exists() {
        let fresh = tempfile::tempdir_in(cache()).expect("a directory");
        let made = fresh.path().join("root");
        let release = std::fs::read_to_string("/etc/os-release").expect("a name of this host");
        let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).expect("its release's name");
        succeed(Command::new("debootstrap").args(["--variant=minbase", name]).arg(&made));
        // Every sandbox copies it, so that what no check needs costs time.
        for bulk in
            ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/zoneinfo", "var/cache/apt", "var/lib/apt"]
        {
            let _ = std::fs::remove_dir_all(made.join(bulk));
        }
        let _ = std::fs::rename(made, &root);
    }
    root
}

/// Kept from run to run.
fn cache() -> PathBuf {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/proot-roots");
    std::fs::create_dir_all(&cache).expect("a directory");
    cache.canonicalize().expect("it exists")
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: see scripts/test-packages.txt"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

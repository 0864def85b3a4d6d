//! A server in a directory of its own, with nothing but the target's provider.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use stacyvm_api::{ListQuery, Sandbox, SandboxId};
use stacyvm_client::{Client, ClientOptions};
use tempfile::TempDir;
use tokio::process::{Child, ChildStdin, Command};
use tokio_util::sync::CancellationToken;

use super::{Closed, START_LIMIT, chain, wait_until_ready};
use crate::host::{run, tail};
use crate::run::INTERRUPTED;
use crate::{CertifyOptions, RuntimeSettings, Target};

const STOP_LIMIT: Duration = Duration::from_mins(2);
/// Where hosts have their control groups.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Ends with the value, and its sandboxes with it.
pub(crate) struct OwnServer {
    home: TempDir,
    program: PathBuf,
    config: Option<PathBuf>,
    settings: Vec<(String, String)>,
    target: Target,
    /// Name of its control groups.
    cgroup_parent: String,
    /// Where sandboxes are instead of the data directory; ours, and removed.
    workspace: Option<PathBuf>,
    process: Option<Child>,
    /// The other end of its standard input. It ends, frees what it has and
    /// removes its directories when this is closed, be it by a `kill -9` of us.
    lifeline: Option<ChildStdin>,
    pub(crate) client: Client,
    pub(crate) url: String,
    pub(crate) api_key: String,
}

impl OwnServer {
    /// Starts it, and waits until it is ready.
    pub(crate) async fn start(
        target: Target,
        options: &CertifyOptions,
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let mut server = Self::prepare(target, options)?;
        let started = tokio::select! {
            started = server.start_with_image(options) => started,
            () = stop.cancelled() => Err(INTERRUPTED.to_owned()),
        };
        if let Err(why) = started {
            // What it has prepared for sandboxes goes with it.
            let _ = server.end().await;
            return Err(why);
        }
        Ok(server)
    }

    async fn start_with_image(&mut self, options: &CertifyOptions) -> Result<(), String> {
        if let Some(archive) = &options.image_archive {
            self.import(archive).await?;
        }
        self.start_again().await
    }

    /// Starts one whose backend is another one. It need not get ready, and knows
    /// nothing of the configuration, in which the right key may be.
    pub(crate) async fn start_with_backend(
        target: Target,
        options: &CertifyOptions,
        backend: &[(&str, &str)],
    ) -> Result<Self, String> {
        let options = CertifyOptions {
            config: None,
            settings: RuntimeSettings { variables: Vec::new(), ..options.settings.clone() },
            ..options.clone()
        };
        let mut server = Self::prepare(target, &options)?;
        let prefix = format!("STACYVM_PROVIDERS_{}_", target.provider().to_uppercase());
        server.settings.extend(backend.iter().map(|(name, value)| (format!("{prefix}{name}"), (*value).to_owned())));
        server.listen().await?;
        Ok(server)
    }

    fn prepare(target: Target, options: &CertifyOptions) -> Result<Self, String> {
        let said = |error: std::io::Error| format!("no directory for a server: {error}");
        let home = tempfile::Builder::new().prefix("stacyvm-certify-").tempdir().map_err(said)?;
        // Two ids are as hard to guess as a key has to be.
        let api_key = format!("{}{}", SandboxId::random(), SandboxId::random()).replace("sb-", "");
        let client = Client::new(&ClientOptions::new("http://127.0.0.1:1")).map_err(|error| error.to_string())?;
        let cgroup_parent = format!("stacyvm-certify-{}", std::process::id());
        let mut settings = settings(target, options, &api_key, &cgroup_parent);
        let workspace = workspace(target, options);
        if let Some(path) = &workspace {
            settings.push(("STACYVM_PROVIDERS_PROOT_WORKSPACE_BASE".to_owned(), path.display().to_string()));
        }
        Ok(Self {
            home,
            program: options.program.clone(),
            config: options.config.clone(),
            settings,
            target,
            cgroup_parent,
            workspace,
            process: None,
            lifeline: None,
            client,
            url: String::new(),
            api_key,
        })
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// Where its sandboxes' files are, if they are on this host.
    pub(crate) fn sandboxes_dir(&self) -> PathBuf {
        let kept = || self.data_dir().join(self.target.provider());
        self.workspace.clone().unwrap_or_else(kept).join("sandboxes")
    }

    /// What it has said so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.home.path().join("server.log")
    }

    /// Nothing of this process's environment reaches it but what is said there
    /// of the target's provider. Paths there are of the directory we are in.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().env("PATH", PATH).env("HOME", self.home.path());
        if let Some(config) = &self.config {
            command.env("STACYVM_CONFIG", config);
        }
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command.env("STACYVM_DATA_DIR", self.data_dir());
        command
    }

    async fn import(&self, archive: &Path) -> Result<(), String> {
        let mut command = self.command();
        let ran = run(command.args(["image", "import"]).arg(archive), START_LIMIT).await?;
        if ran.success { Ok(()) } else { Err(format!("the image cannot be imported: {}", tail(&ran.output))) }
    }

    /// Starts it in the place where it was, and waits until it is ready.
    pub(crate) async fn start_again(&mut self) -> Result<(), String> {
        self.listen().await?;
        let client = self.client.clone();
        wait_until_ready(&client, || self.ended()).await
    }

    async fn listen(&mut self) -> Result<(), String> {
        let said = |error: std::io::Error| format!("{} cannot be started: {error}", self.program.display());
        let announced = self.home.path().join("announced");
        let log = File::options().create(true).append(true).open(self.log_file()).map_err(said)?;
        let mut command = self.command();
        command.args(["serve", "--host", "127.0.0.1", "--log-level", "info", "--log-format", "json", "--port"]);
        command.arg(self.url.rsplit(':').next().filter(|port| !port.is_empty()).unwrap_or("0"));
        command.arg("--end-with-stdin").arg("--then-remove").arg(self.home.path());
        if let Some(workspace) = &self.workspace {
            command.arg("--then-remove").arg(workspace);
        }
        command.stdin(Stdio::piped()).stdout(File::create(&announced).map_err(said)?).stderr(log);
        // A terminal's Ctrl-C is for us, who end it when its sandboxes are gone.
        command.process_group(0);
        let process = self.process.insert(command.spawn().map_err(said)?);
        // Waiting for its end would close it before that.
        self.lifeline = process.stdin.take();
        self.url = self.announced_url(&announced).await?;
        let options = ClientOptions { api_key: Some(self.api_key.clone()), ..ClientOptions::new(self.url.clone()) };
        self.client = Client::new(&options).map_err(|error| error.to_string())?;
        Ok(())
    }

    async fn announced_url(&mut self, announced: &Path) -> Result<String, String> {
        let end = tokio::time::Instant::now() + START_LIMIT;
        loop {
            let text = fs::read_to_string(announced).unwrap_or_default();
            let line = text.lines().next().filter(|_| text.contains('\n'));
            if let Some(at) = line.and_then(|line| line.find("http://").map(|at| &line[at..])) {
                return Ok(at.split([',', ' ', '"']).next().unwrap_or(at).to_owned());
            }
            if let Some(ended) = self.ended() {
                return Err(ended);
            }
            if tokio::time::Instant::now() >= end {
                return Err(format!("the server does not listen after {START_LIMIT:?}"));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// What it said last, if it has ended.
    fn ended(&mut self) -> Option<String> {
        let status = self.process.as_mut()?.try_wait().ok()??;
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        Some(format!("the server ended with {status}: {}", tail(&log)))
    }

    /// As a crash.
    pub(crate) async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill().await;
        }
    }

    /// Forgets every record, as a lost database does. Only while it is down.
    pub(crate) fn forget_records(&self) {
        for file in ["stacyvm.db", "stacyvm.db-wal", "stacyvm.db-shm"] {
            let _ = fs::remove_file(self.data_dir().join(file));
        }
    }

    /// Process ids of a sandbox of ours on this host.
    pub(crate) fn init_of(&self, id: &SandboxId) -> Option<u32> {
        let record = fs::read(self.sandboxes_dir().join(id.as_str()).join("init.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())
    }

    /// All there are, as soon as it answers: the run may have been interrupted
    /// while it started again.
    async fn sandboxes(&mut self) -> Vec<Sandbox> {
        let end = tokio::time::Instant::now() + START_LIMIT;
        loop {
            match self.client.list_all(&ListQuery::default()).await {
                Ok(all) => return all,
                Err(_) if self.ended().is_none() && tokio::time::Instant::now() < end => {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
                Err(_) => return Vec::new(),
            }
        }
    }

    /// Tells it to end, and waits until it has.
    async fn end(&mut self) -> Result<(), String> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        if let Some(pid) = process.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_LIMIT, process.wait()).await.is_err() {
            let _ = process.kill().await;
            return Err(format!("the server did not end within {STOP_LIMIT:?}"));
        }
        Ok(())
    }

    /// Destroys what is left, ends it, and looks at what remains.
    pub(crate) async fn close(mut self) -> Closed {
        let mut left = Vec::new();
        if self.process.is_none() {
            // It was broken on purpose and not mended: what it had is freed by another start.
            if let Err(why) = self.start_again().await {
                left.push(format!("it could not be started once more to free what it had: {why}"));
            }
        }
        for sandbox in self.sandboxes().await {
            if let Err(error) = self.client.sandbox(sandbox.id.clone()).destroy().await {
                left.push(format!("{}: {}", sandbox.id, chain(&error)));
            }
        }
        left.extend(self.end().await.err());
        let sandboxes = fs::read_dir(self.sandboxes_dir()).into_iter().flatten().flatten();
        left.extend(sandboxes.map(|entry| entry.path().display().to_string()));
        if let Some(workspace) = &self.workspace
            && let Err(error) = fs::remove_dir_all(workspace)
        {
            left.push(format!("{}: {error}", workspace.display()));
        }
        let data_dir = self.data_dir().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&data_dir)).map(str::to_owned));
        left.extend(directories_named(&self.cgroup_parent, Path::new(CGROUP_ROOT)));
        Closed { log: fs::read_to_string(self.log_file()).ok(), left }
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // Only where somebody gave up in the middle; `close` is the way to end.
        if let Some(process) = &mut self.process {
            let _ = process.start_kill();
        }
    }
}

/// What makes it a server of the target and of nothing else: with another
/// provider beside it, readiness would say nothing about this one.
fn settings(target: Target, options: &CertifyOptions, api_key: &str, cgroup_parent: &str) -> Vec<(String, String)> {
    let on = |provider: &str| (target.provider() == provider).to_string();
    let mut settings = vec![
        ("STACYVM_PROVIDERS_DEFAULT", target.provider().to_owned()),
        ("STACYVM_AUTH_API_KEY", api_key.to_owned()),
        ("STACYVM_PROVIDERS_MOCK_ENABLED", "false".to_owned()),
        ("STACYVM_PROVIDERS_OCI_ENABLED", on("oci")),
        ("STACYVM_PROVIDERS_DOCKER_ENABLED", on("docker")),
        ("STACYVM_PROVIDERS_PROOT_ENABLED", on("proot")),
        ("STACYVM_PROVIDERS_CUSTOM_ENABLED", on("custom")),
        // The contract suite makes more at once than this admits by default.
        ("STACYVM_PROVIDERS_PROOT_MAX_SANDBOXES", "0".to_owned()),
        // We ask for it by this name, whatever callers know it as.
        ("STACYVM_PROVIDERS_CUSTOM_NAME", "custom".to_owned()),
        ("STACYVM_PROVIDERS_OCI_CGROUP_PARENT", cgroup_parent.to_owned()),
    ];
    if target.has_daemon() {
        let of = &options.settings;
        settings.push(("STACYVM_PROVIDERS_DOCKER_RUNTIME", of.runtime_for(target)));
        settings.push(("STACYVM_PROVIDERS_DOCKER_SOCKET", of.docker_socket.display().to_string()));
    }
    let ours = settings.into_iter().map(|(name, value)| (name.to_owned(), value));
    options.settings.variables.iter().cloned().chain(ours).collect()
}

/// Control groups are at the root of each hierarchy, or where an ordinary user
/// may have some.
fn directories_named(name: &str, root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        // Links stand for hierarchies that are there by another name.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name() == name {
            found.push(entry.path().display().to_string());
        } else {
            found.extend(directories_named(name, &entry.path()));
        }
    }
    found
}

/// A directory of our own in the configured base: what else is there belongs to
/// other servers.
fn workspace(target: Target, options: &CertifyOptions) -> Option<PathBuf> {
    let base = &options.settings.proot_workspace_base;
    let is_set = target == Target::Proot && !base.as_os_str().is_empty();
    is_set.then(|| base.join(SandboxId::random().to_string().replace("sb-", "certify-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_that_stay_are_found_in_every_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for path in ["pids/ours/0123", "user.slice/user-1.slice/ours", "pids/ours-too", "cpu"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        std::os::unix::fs::symlink("pids", at("alias")).unwrap();
        let mut found = directories_named("ours", root.path());
        found.sort_unstable();
        assert_eq!(found, ["pids/ours", "user.slice/user-1.slice/ours"].map(|path| at(path).display().to_string()));
    }
}

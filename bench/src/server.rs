//! A real server in a directory of its own, started and ended by us.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stacyvm_api::{CreateRequest, ExecRequest, SandboxId};
use stacyvm_client::{Client, ClientOptions};
use stacyvm_conformance::CensusScope;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// Name under which the image is imported and asked for.
pub(crate) const IMAGE: &str = "alpine:latest";

const START_LIMIT: Duration = Duration::from_mins(1);
const STOP_LIMIT: Duration = Duration::from_mins(2);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What every part needs: the program, the image, and a place to work in.
pub(crate) struct Setup {
    pub(crate) program: PathBuf,
    pub(crate) archive: PathBuf,
    pub(crate) directory: TempDir,
}

impl Setup {
    pub(crate) fn prepare(program: Option<&Path>, archive: Option<&Path>) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) => program.to_owned(),
            None => std::env::current_exe()?.with_file_name("stacyvm"),
        };
        ensure!(program.is_file(), "{} is missing; build it with: cargo build --release", program.display());
        let directory = tempfile::Builder::new().prefix("stacyvm-bench-").tempdir()?;
        let archive = match archive {
            Some(archive) => archive.to_owned(),
            None => make_image(directory.path())?,
        };
        ensure!(archive.is_file(), "{} is missing; make it with scripts/make-test-image.sh", archive.display());
        Ok(Self { program: program.canonicalize()?, archive: archive.canonicalize()?, directory })
    }
}

fn make_image(directory: &Path) -> anyhow::Result<PathBuf> {
    let archive = directory.join("image.tar");
    let script = Path::new("scripts/make-test-image.sh");
    ensure!(script.is_file(), "run this from the root of the repository, or pass --image");
    let made = std::process::Command::new(script).arg(&archive).status()?;
    ensure!(made.success(), "scripts/make-test-image.sh failed");
    Ok(archive)
}

/// How a server differs from one without configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct ServeOptions {
    /// Pairs of namespaces kept ready; the server's own default otherwise.
    pub(crate) namespace_pool: Option<usize>,
    pub(crate) runtime: Runtime,
}

/// Where sandboxes are made.
#[derive(Debug, Clone, Default)]
pub(crate) enum Runtime {
    #[default]
    Oci,
    /// By this OCI runtime.
    OciBy(PathBuf),
    /// Containers of the daemon behind this socket.
    Docker(PathBuf),
    Proot,
}

/// A running server.
pub(crate) struct Server {
    process: Child,
    pub(crate) client: Client,
    pub(crate) data_dir: PathBuf,
    port: u16,
}

impl Server {
    pub(crate) async fn start(setup: &Setup, name: &str, options: ServeOptions) -> anyhow::Result<Self> {
        let home = setup.directory.path().join(name);
        let data_dir = home.join("data");
        fs::create_dir_all(&home)?;
        let log = home.join("server.log");
        let program = |arguments: &[&str]| {
            let mut command = Command::new(&setup.program);
            command.args(arguments).arg("--data-dir").arg(&data_dir).env_clear();
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
            command.env("HOME", &home).current_dir(&home).stdin(Stdio::null()).kill_on_drop(true);
            command
        };
        let archive = setup.archive.to_str().context("the image's path is not text")?;
        let imported = program(&["image", "import", archive]).output().await?;
        ensure!(imported.status.success(), "image import: {}", String::from_utf8_lossy(&imported.stderr));
        let port = free_port()?;
        let mut serve = program(&["serve", "--host", "127.0.0.1", "--destroy-on-exit", "--log-level", "warn"]);
        serve.arg("--port").arg(port.to_string());
        // Names of its own, so that another server on this machine does not count.
        serve.env("STACYVM_PROVIDERS_OCI_CGROUP_PARENT", cgroup_parent());
        if let Some(pool) = options.namespace_pool {
            serve.env("STACYVM_PROVIDERS_OCI_PREPARED_BRIDGE", pool.to_string());
            serve.env("STACYVM_PROVIDERS_OCI_PREPARED", "0");
        }
        match options.runtime {
            Runtime::Oci => {}
            Runtime::OciBy(program) => drop(serve.env("STACYVM_PROVIDERS_OCI_RUNTIME", program)),
            Runtime::Docker(socket) => {
                serve.env("STACYVM_PROVIDERS_DEFAULT", "docker").env("STACYVM_PROVIDERS_DOCKER_SOCKET", socket);
                serve.env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
            }
            Runtime::Proot => {
                serve.env("STACYVM_PROVIDERS_DEFAULT", "proot").env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
            }
        }
        let process = serve.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).spawn()?;
        let client = Client::new(&ClientOptions::new(format!("http://127.0.0.1:{port}")))?;
        let mut server = Self { process, client, data_dir, port };
        if let Err(error) = server.wait_until_ready().await {
            bail!("{error}\n{}", fs::read_to_string(&log).unwrap_or_default());
        }
        Ok(server)
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            let answer = self.client.ready().await;
            if answer.as_ref().is_ok_and(|ready| ready.status == "ready") {
                return Ok(());
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("the server ended with {status}");
            }
            ensure!(Instant::now() < end, "the server is not ready after {START_LIMIT:?}: {answer:?}");
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until `count` pairs of namespaces are ready.
    pub(crate) async fn wait_for_pool(&self, count: usize) -> anyhow::Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            let detail = self.client.provider("oci").await?;
            let ready = detail.config.get("namespaces_ready").and_then(|text| text.parse::<usize>().ok());
            match ready {
                Some(ready) if ready >= count => return Ok(()),
                None => bail!("provider oci does not say how many namespaces are ready: {:?}", detail.config),
                Some(ready) => ensure!(Instant::now() < end, "only {ready} of {count} namespaces are ready"),
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id().unwrap_or_default()
    }

    /// What on this machine belongs to this server.
    pub(crate) fn scope(&self) -> CensusScope {
        CensusScope { server_pid: self.pid(), data_dir: self.data_dir.clone(), cgroup_parent: cgroup_parent() }
    }

    /// Ends the server in order; it destroys its sandboxes.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = self.process.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("the server has ended")?;
        kill_process(pid, Signal::TERM)?;
        let status = timeout(STOP_LIMIT, self.process.wait()).await.context("the server did not end")??;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }

    pub(crate) async fn create(&self) -> anyhow::Result<SandboxId> {
        self.create_with_memory(128).await
    }

    pub(crate) async fn create_with_memory(&self, mebibytes: u64) -> anyhow::Result<SandboxId> {
        let request = CreateRequest {
            image: Some(IMAGE.to_owned()),
            memory_mb: Some(mebibytes),
            pids_limit: Some(64),
            allow_unenforced: Some(true),
            ..CreateRequest::default()
        };
        Ok(self.client.create(&request).await?.id)
    }

    /// Runs `true` in a sandbox, without a shell.
    pub(crate) async fn exec_true(&self, id: &SandboxId) -> anyhow::Result<()> {
        let request =
            ExecRequest { command: "/bin/true".to_owned(), mode: Some("argv".to_owned()), ..ExecRequest::default() };
        let result = self.client.sandbox(id.clone()).exec(&request).await?;
        ensure!(result.exit_code == 0, "`true` exited with {}", result.exit_code);
        Ok(())
    }

    pub(crate) async fn destroy(&self, id: &SandboxId) -> anyhow::Result<()> {
        self.client.sandbox(id.clone()).destroy().await?;
        Ok(())
    }
}

fn cgroup_parent() -> String {
    format!("stacyvm-bench-{}", std::process::id())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

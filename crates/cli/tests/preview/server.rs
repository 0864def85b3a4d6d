//! A real `stacyvm serve` of its own, and a site inside one of its sandboxes.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use stacyvm_api::{CreateRequest, ExecRequest, NetworkMode, NetworkRequest};
use stacyvm_client::{Client, ClientOptions, SandboxClient, UploadOptions};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// Nothing here takes this long; what does hangs.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A port that nobody expects.
pub(crate) const PORT: u16 = 41873;

const PROGRAM: &str = env!("CARGO_BIN_EXE_stacyvm");
const SITE: &str = include_str!("site.py");

pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    within(what, async {
        loop {
            if let Some(value) = check().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

pub(crate) struct Server {
    process: Child,
    pub(crate) client: Client,
    pub(crate) port: u16,
    /// Where paths name previews.
    pub(crate) path_port: u16,
    key: Option<String>,
    home: TempDir,
}

impl Server {
    pub(crate) async fn start(key: Option<&str>) -> Self {
        Self::start_with(key, &[]).await
    }

    pub(crate) async fn start_with(key: Option<&str>, settings: &[(&str, &str)]) -> Self {
        Self::start_configured("", key, settings).await
    }

    /// A server that has no names for previews.
    pub(crate) async fn start_without_domain(key: Option<&str>) -> Self {
        // A variable that is set to nothing is not set.
        Self::start_configured("server: {preview_domain: ''}\n", key, &[]).await
    }

    async fn start_configured(yaml: &str, key: Option<&str>, settings: &[(&str, &str)]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "sandboxes of this test need root: sudo make test");
        let home = tempfile::tempdir().expect("a directory");
        std::fs::write(home.path().join("stacyvm.yaml"), yaml).expect("written");
        let path_port = free_port();
        let mut command = Self::program(home.path());
        command.args(["serve", "--json", "--port", "0", "--destroy-on-exit", "--log-level", "warn", "--data-dir"]);
        command.arg(home.path().join("data"));
        command.env("STACYVM_SERVER_PREVIEW_PORT", path_port.to_string());
        command.env("STACYVM_PROVIDERS_OCI_CGROUP_PARENT", format!("stacyvm-preview-{}", std::process::id()));
        command.envs(settings.iter().copied());
        if let Some(key) = key {
            command.env("STACYVM_AUTH_API_KEY", key);
        }
        let mut process = command.stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut line = String::new();
        let mut announced = BufReader::new(process.stdout.take().expect("piped"));
        within("it listens", announced.read_line(&mut line)).await.expect("its first line");
        let announced: serde_json::Value = serde_json::from_str(&line).expect(&line);
        let url = announced["listening"][0].as_str().expect(&line).to_owned();
        let port = url.rsplit(':').next().and_then(|port| port.parse().ok()).expect(&line);
        let options = ClientOptions { api_key: key.map(str::to_owned), ..ClientOptions::new(url) };
        let client = Client::new(&options).expect("an address");
        Self { process, client, port, path_port, key: key.map(str::to_owned), home }
    }

    fn program(home: &Path) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", home).current_dir(home).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// The program as a client of this server.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Self::program(self.home.path());
        command.args(arguments).env("STACYVM_URL", format!("http://127.0.0.1:{}", self.port));
        if let Some(key) = &self.key {
            command.env("STACYVM_API_KEY", key);
        }
        command
    }

    /// A sandbox without a network, in which nothing listens yet.
    pub(crate) async fn sandbox(&self) -> SandboxClient {
        self.sandbox_of("host").await
    }

    /// The same of an image that has Python.
    pub(crate) async fn sandbox_of(&self, image: &str) -> SandboxClient {
        let request = CreateRequest {
            image: Some(image.to_owned()),
            network: Some(NetworkRequest { mode: NetworkMode::None, allow: Vec::new() }),
            allow_unenforced: Some(true),
            ..CreateRequest::default()
        };
        let record = within("a sandbox", self.client.create(&request)).await.expect("a sandbox");
        self.client.sandbox(record.id)
    }

    pub(crate) fn host(&self, sandbox: &SandboxClient, port: u16) -> String {
        format!("{port}-{}.localhost:{}", sandbox.id(), self.port)
    }

    /// Ends in order and destroys its sandboxes.
    pub(crate) async fn stop(mut self) {
        let pid = self.process.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it runs");
        kill_process(pid, Signal::TERM).expect("it runs");
        let status = within("the server ends", self.process.wait()).await.expect("its status");
        assert!(status.success(), "{status}");
    }
}

/// Starts the site on a port inside; does not wait for it.
pub(crate) async fn start_site(sandbox: &SandboxClient, port: u16) {
    let options = UploadOptions { mode: None, size_bytes: None };
    sandbox.upload("/workspace/site.py", SITE.as_bytes(), &options).await.expect("an upload");
    let run = ExecRequest {
        command: "python3".to_owned(),
        args: Some(vec!["/workspace/site.py".to_owned(), port.to_string()]),
        mode: Some("argv".to_owned()),
        background: Some(true),
        ..ExecRequest::default()
    };
    sandbox.exec(&run).await.expect("python is there");
}

/// Starts the site and waits until it listens.
pub(crate) async fn site(sandbox: &SandboxClient, port: u16) {
    start_site(sandbox, port).await;
    eventually("the site listens", || async {
        let ports = sandbox.ports().await.expect("ports");
        ports.iter().any(|it| it.port == port).then_some(())
    })
    .await;
}

/// Status line, head and body of a plain request.
pub(crate) async fn get(port: u16, host: &str, path: &str) -> String {
    within("an answer", async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("something listens");
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it is read");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        String::from_utf8_lossy(&answer).into_owned()
    })
    .await
}

pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    listener.local_addr().expect("bound").port()
}

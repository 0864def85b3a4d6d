//! A running server: the real program, started and ended as people do.

use std::fs::{self, File};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use stacyvm_api::{CreateRequest, ExecRequest, ExecResult, SandboxId};
use stacyvm_client::{Client, ClientOptions, SandboxClient};
use tokio::sync::Mutex;

use super::site::pid_of;
use super::{PATIENCE, Ran, Site, eventually, run};

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The one that tests share which leave it as they found it.
static SHARED: Mutex<Weak<Server>> = Mutex::const_new(Weak::new());

/// A server that runs. Ends with the value, and its sandboxes with it.
pub(crate) struct Server {
    pub(crate) site: Arc<Site>,
    process: Child,
    pub(crate) url: String,
    name: String,
}

/// How a server ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Server {
    /// A server with an image, for tests that leave it as they found it.
    pub(crate) async fn shared() -> Arc<Self> {
        let mut slot = SHARED.lock().await;
        if let Some(server) = slot.upgrade() {
            return server;
        }
        let server = Arc::new(Self::start(&Site::with_image(), &["--destroy-on-exit"]).await);
        *slot = Arc::downgrade(&server);
        server
    }

    pub(crate) async fn start(site: &Arc<Site>, arguments: &[&str]) -> Self {
        Self::start_with(site, |serve| {
            serve.args(arguments);
        })
        .await
    }

    /// Starts it on a free port, unless an argument says otherwise, and waits
    /// until it answers.
    pub(crate) async fn start_with(site: &Arc<Site>, change: impl FnOnce(&mut Command)) -> Self {
        let name = format!("server-{}", SandboxId::random());
        let (out, log) = (site.home().join(format!("{name}.out")), site.home().join(format!("{name}.log")));
        let mut serve = site.program();
        serve.args(["serve", "--port", "0", "--log-format", "pretty"]);
        change(&mut serve);
        serve.stdout(File::create(&out).expect("a file")).stderr(File::create(&log).expect("a file"));
        let process = serve.spawn().expect("the program starts");
        let mut server = Self { site: Arc::clone(site), process, url: String::new(), name };
        server.url = eventually("the server listens", async || {
            if let Ok(Some(status)) = server.process.try_wait() {
                panic!("the server ended with {status}: {}", server.log());
            }
            announced_url(&fs::read_to_string(&out).expect("readable"))
        })
        .await;
        server
    }

    /// A client of this test's own: connections belong to its runtime.
    pub(crate) fn client(&self) -> Client {
        Client::new(&ClientOptions::new(self.url.clone())).expect("an address")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.site.home().join(format!("{}.log", self.name))).unwrap_or_default()
    }

    /// `stacyvm` with these arguments, talking to this server.
    pub(crate) fn program(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = self.site.program();
        command.args(arguments).env("STACYVM_URL", &self.url);
        command.into()
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with_input(arguments, b"").await
    }

    pub(crate) async fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Ran {
        run(self.program(arguments), input).await
    }

    /// As a crash, or somebody who has lost patience.
    pub(crate) fn kill(mut self) -> Arc<Site> {
        self.process.kill().expect("it can be killed");
        self.process.wait().expect("it can be waited for");
        Arc::clone(&self.site)
    }

    /// Asks it to end, as `kill` (`TERM`) or Ctrl-C (`INT`) do, and waits.
    pub(crate) async fn stop(mut self, signal: Signal) -> Ended {
        self.tell(signal);
        let status = eventually("the server ends", async || self.process.try_wait().expect("its status")).await;
        let stdout = fs::read_to_string(self.site.home().join(format!("{}.out", self.name))).unwrap_or_default();
        Ended { status, stdout, stderr: self.log() }
    }

    pub(crate) fn tell(&self, signal: Signal) {
        kill_process(pid_of(&self.process), signal).expect("it can be told");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = kill_process(pid_of(&self.process), Signal::TERM);
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end && matches!(self.process.try_wait(), Ok(None)) {
            std::thread::sleep(POLL_INTERVAL);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The address in the first line of a server, once that line is there.
fn announced_url(out: &str) -> Option<String> {
    let line = out.lines().next().filter(|_| out.contains('\n'))?;
    let url = &line[line.find("http").unwrap_or_else(|| panic!("no address in: {line}"))..];
    Some(url.split([',', ' ', '"']).next().unwrap_or(url).to_owned())
}

/// A sandbox of the test image, with limits of an ordinary command.
pub(crate) fn small() -> CreateRequest {
    CreateRequest { memory_mb: Some(128), pids_limit: Some(64), ..CreateRequest::default() }
}

/// Makes a sandbox.
pub(crate) async fn create(client: &Client, request: &CreateRequest) -> SandboxClient {
    let sandbox = client.create(request).await.unwrap_or_else(|error| panic!("{error:?}"));
    client.sandbox(sandbox.id)
}

/// A request to run a script by `sh`.
pub(crate) fn script(text: &str) -> ExecRequest {
    ExecRequest { command: text.to_owned(), ..ExecRequest::default() }
}

/// Runs a script by `sh`.
pub(crate) async fn sh(sandbox: &SandboxClient, text: &str) -> ExecResult {
    sandbox.exec(&script(text)).await.unwrap_or_else(|error| panic!("{text}: {error:?}"))
}

/// The output of a script that must succeed, without the newline at its end.
pub(crate) async fn output(sandbox: &SandboxClient, text: &str) -> String {
    let result = sh(sandbox, text).await;
    assert_eq!(result.exit_code, 0, "{text}: {result:?}");
    result.stdout.trim_end().to_owned()
}

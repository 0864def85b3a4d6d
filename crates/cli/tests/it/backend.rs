//! One machine as the runtime of another: `stacyvm backend serve`, and a server
//! whose sandboxes are there.

use std::fs::{self, File};
use std::process::Child;
use std::sync::Arc;

use rustix::process::{Signal, kill_process};
use stacyvm_api::{ErrorCode, ExecRequest, ProcessStatus};
use stacyvm_client::ClientError;

use crate::custom::answering;
use crate::support::{Server, Site, create, eventually, output, pid_of, small};

/// What the backend asks for.
pub(crate) const KEY: &str = "key-of-the-test";

/// A backend that runs, until the value is dropped.
pub(crate) struct BackendProcess {
    process: Child,
    pub(crate) url: String,
}

impl BackendProcess {
    pub(crate) async fn start(site: &Arc<Site>, arguments: &[&str]) -> Self {
        Self::listen(site, "127.0.0.1:0", arguments).await
    }

    async fn listen(site: &Arc<Site>, address: &str, arguments: &[&str]) -> Self {
        let out = site.home().join("backend.out");
        fs::write(site.home().join("backend.key"), KEY).expect("writable");
        let mut command = site.program();
        command.args(["backend", "serve", "--listen", address, "--key-file", "backend.key"]).args(arguments);
        let log = File::create(site.home().join("backend.log")).expect("a file");
        command.stdout(File::create(&out).expect("a file")).stderr(log);
        let process = command.spawn().expect("the program starts");
        let url = eventually("the backend listens", async || {
            let text = fs::read_to_string(&out).expect("readable");
            let line = text.lines().next().filter(|_| text.contains('\n'))?;
            let url = line.split_whitespace().find(|word| word.starts_with("http://")).expect("an address");
            Some(url.trim_end_matches(',').to_owned())
        })
        .await;
        Self { process, url }
    }

    /// As a crash of the other machine's program; its address is kept for the next.
    fn kill(mut self) -> String {
        self.process.kill().expect("it can be killed");
        self.process.wait().expect("it can be waited for");
        self.url.trim_start_matches("http://").to_owned()
    }
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        let _ = kill_process(pid_of(&self.process), Signal::TERM);
        let _ = self.process.wait();
    }
}

/// A server of another "machine" that has nothing but the backend.
async fn server_on(backend: &BackendProcess, key: &str) -> Server {
    let site = Site::new();
    let key_file = site.home().join("custom.key");
    fs::write(&key_file, key).expect("writable");
    let url = backend.url.clone();
    Server::start_with(&site, |serve| {
        serve
            .env("STACYVM_PROVIDERS_DEFAULT", "custom")
            .env("STACYVM_PROVIDERS_OCI_ENABLED", "false")
            .env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", url)
            .env("STACYVM_PROVIDERS_CUSTOM_API_KEY_FILE", key_file);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_machine_is_a_runtime_of_the_first_in_one_command() {
    let backend_site = Site::with_image();
    let backend = BackendProcess::start(&backend_site, &[]).await;
    let server = server_on(&backend, KEY).await;

    let ran = server.run(&["run", "--", "sh", "-c", "echo $((6 * 7)); exit 3"]).await;
    assert_eq!((ran.stdout(), ran.status()), ("42\n", Some(3)), "{ran}");

    // Binary input through both, and the sandbox is on the backend's side.
    let ran = server.run_with_input(&["run", "--", "sha256sum"], &[0, 255, 10, 0, 128]).await;
    assert!(ran.stdout().starts_with("45f46e8a9e33fa1f"), "{ran}");
    let sandbox = create(&server.client(), &small()).await;
    assert!(backend_site.sandbox_dir(sandbox.id().as_str()).exists());
    output(&sandbox, "echo kept > /workspace/file").await;

    // The first machine's server goes and comes back: the sandbox is still its own.
    let id = sandbox.id().clone();
    let site = server.kill();
    let url = backend.url.clone();
    let server = Server::start_with(&site, |serve| {
        serve
            .env("STACYVM_PROVIDERS_DEFAULT", "custom")
            .env("STACYVM_PROVIDERS_OCI_ENABLED", "false")
            .env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", url)
            .env("STACYVM_PROVIDERS_CUSTOM_API_KEY", KEY);
    })
    .await;
    let sandbox = server.client().sandbox(id.clone());
    assert_eq!(output(&sandbox, "cat /workspace/file").await, "kept");
    sandbox.destroy().await.expect("it can be destroyed");
    eventually("it is gone from the backend", async || (!backend_site.sandbox_dir(id.as_str()).exists()).then_some(()))
        .await;
    drop(server);
    drop(backend);
    assert_eq!(backend_site.remains(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_told_as_such_and_is_never_shown() {
    let backend_site = Site::new();
    let backend = BackendProcess::start(&backend_site, &["--provider", "mock"]).await;
    let server = server_on(&backend, "not-the-key").await;
    let ran = server.run(&["providers", "custom"]).await;
    let said = format!("{}{}", ran.stdout(), ran.stderr());
    assert!(said.contains("refuses the key") && said.contains("api_key_file"), "{ran}");
    let ran = server.run(&["run", "--", "true"]).await;
    assert!(ran.status() != Some(0) && ran.stderr().contains("refuses the key"), "{ran}");
    for text in [said, ran.stderr().to_owned(), server.log()] {
        assert!(!text.contains("not-the-key") && !text.contains(KEY), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_arguments_of_a_backend_are_told_with_what_is_right() {
    let site = Site::new();
    let ran = site.run(&["backend", "serve", "--listen", "localhost"]).await;
    assert_eq!(ran.says("the port is missing: write localhost:7425").status(), Some(2));
    let ran = site.run(&["backend", "serve", "--provider", "nope"]).await.failed(1);
    let ran = ran.says("there is no provider `nope`");
    assert!(ran.stderr().contains("--provider oci") && !ran.stderr().contains("custom"), "{ran}");
}

/// The suite is told where it went wrong, rather than that something is missing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_server_is_told_as_such_to_whoever_checks_it() {
    let site = Site::new();
    let backend = BackendProcess::start(&site, &["--provider", "mock"]).await;
    for key in ["", KEY] {
        let ran = site.run(&["--api-key", key, "conformance", "--url", &backend.url]).await.failed(1);
        ran.says("is a StacyVM backend, not a server").says("--provider custom");
    }
    let ran = site.run(&["conformance", "--url", &answering("", "")]).await.failed(1);
    ran.says("is not a StacyVM server").says("stacyvm serve");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_only_this_machine_is_listened_to() {
    let site = Site::new();
    let ran = site.run(&["backend", "serve", "--listen", "0.0.0.0:0", "--provider", "mock"]).await;
    assert!(ran.status() != Some(0) && ran.stderr().contains("--key-file"), "{ran}");
}

/// The sandbox and what runs in it outlive the backend: whoever waits hears
/// what to do, the command line waits itself, and the log stays right.
#[tokio::test(flavor = "multi_thread")]
async fn commands_go_on_while_the_backend_is_away() {
    const WAITS: &str = "echo begun; while [ ! -e /workspace/go ]; do sleep 0.1; done; echo finished";
    let backend_site = Site::with_image();
    let backend = BackendProcess::start(&backend_site, &[]).await;
    let server = server_on(&backend, KEY).await;
    let sandbox = create(&server.client(), &small()).await;
    let id = sandbox.id().to_string();
    let waiting = server.program(&["exec", &id, "-n", "--", "sh", "-c", WAITS]);
    let waiting = tokio::spawn(crate::support::run(waiting, b""));
    let request = ExecRequest { command: WAITS.to_owned(), ..ExecRequest::default() };
    let called = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.exec(&request).await }
    });
    eventually("both run", async || {
        let log = sandbox.exec_log().await.expect("the log");
        (log.iter().filter(|command| command.status == ProcessStatus::Running).count() == 2).then_some(())
    })
    .await;
    let address = backend.kill();

    let error = called.await.expect("it ends").expect_err("the backend is away");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    let ClientError::Api(said) = &error else { panic!("{error:?}") };
    assert!(said.hint.as_deref().is_some_and(|hint| hint.contains("stacyvm ps")), "{said:?}");

    let backend = BackendProcess::listen(&backend_site, &address, &[]).await;
    eventually("the sandbox answers", async || {
        let touch = ExecRequest { command: "touch /workspace/go".to_owned(), ..ExecRequest::default() };
        sandbox.exec(&touch).await.ok()
    })
    .await;
    let ran = waiting.await.expect("it ends").ok();
    assert_eq!(ran.stdout(), "begun\nfinished\n", "{ran}");
    eventually("the log says how both ended", async || {
        let log = sandbox.exec_log().await.expect("the log");
        let waited = log.iter().filter(|command| command.command.contains("begun"));
        let ended: Vec<_> = waited.map(|command| (command.status, command.exit_code)).collect();
        (ended == [(ProcessStatus::Exited, Some(0)); 2]).then_some(())
    })
    .await;
    drop(server);
    drop(backend);
}

/// The address that people have at hand is that of a server.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_a_backends_place_is_told_as_such() {
    const SAID: &str = "this answers like a StacyVM server's API, not a backend";
    let elsewhere = Server::start_with(&Site::new(), |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock").env("STACYVM_AUTH_API_KEY", KEY);
    })
    .await;
    for base in ["", "/api/v1"] {
        let server = Server::start_with(&Site::new(), |serve| {
            serve.env("STACYVM_PROVIDERS_DEFAULT", "custom").env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
            serve.env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", format!("{}{base}", elsewhere.url));
        })
        .await;
        let ran = server.run(&["providers", "custom"]).await.says(SAID).says("stacyvm backend serve");
        assert!(!ran.stdout().contains("404"), "{ran}");
        server.run(&["run", "--", "true"]).await.failed(125).says(SAID).says("stacyvm backend serve");
    }
}

/// The shell of somebody who uses a backend has these variables set.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_does_not_serve_a_backend() {
    let site = Site::new();
    let file = site.home().join("custom.yaml");
    fs::write(&file, "providers:\n  default: edge\n  custom: {name: edge, base_url: \"http://127.0.0.1:7425\"}\n")
        .expect("writable");
    let serve = ["backend", "serve", "--listen", "127.0.0.1:0"];
    let by_file = [&serve[..], &["--config", file.to_str().expect("text")]].concat();
    let by_name = [&serve[..], &["--provider", "custom"]].concat();
    for (arguments, default, whence) in [
        (serve.to_vec(), Some("custom"), "STACYVM_PROVIDERS_DEFAULT"),
        (by_file, None, "the default provider"),
        (by_name, None, "--provider"),
    ] {
        let ran = site.run_with(&arguments, |command| {
            command.env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", "http://127.0.0.1:7425");
            command.envs(default.map(|name| ("STACYVM_PROVIDERS_DEFAULT", name)));
        });
        let ran = ran.await.failed(1).says(whence).says("would serve itself");
        assert!(ran.stderr().contains("--provider oci"), "{ran}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_custom_without_an_address_says_where_to_write_it() {
    let site = Site::new();
    let file = site.home().join("enabled.yaml");
    fs::write(&file, "providers:\n  custom: {enabled: true}\n").expect("writable");
    let by_file = ["serve", "--config", file.to_str().expect("text")];
    for (arguments, default) in [(&["serve"][..], "custom"), (&by_file[..], "mock")] {
        let ran = site.run_with(arguments, |command| {
            command.env("STACYVM_PROVIDERS_DEFAULT", default);
        });
        let ran = ran.await;
        assert!(ran.status() != Some(0), "{ran}");
        for word in ["providers.custom.base_url", "STACYVM_PROVIDERS_CUSTOM_BASE_URL"] {
            assert!(ran.stderr().contains(word), "{ran}");
        }
    }
}

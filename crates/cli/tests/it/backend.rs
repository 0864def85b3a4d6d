//! One machine as the runtime of another: `stacyvm backend serve`, and a server
//! whose sandboxes are there.

use std::fs::{self, File};
use std::process::Child;
use std::sync::Arc;

use rustix::process::{Signal, kill_process};

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
        let out = site.home().join("backend.out");
        fs::write(site.home().join("backend.key"), KEY).expect("writable");
        let mut command = site.program();
        command.args(["backend", "serve", "--listen", "127.0.0.1:0", "--key-file", "backend.key"]).args(arguments);
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
async fn without_a_key_only_this_machine_is_listened_to() {
    let site = Site::new();
    let ran = site.run(&["backend", "serve", "--listen", "0.0.0.0:0", "--provider", "mock"]).await;
    assert!(ran.status() != Some(0) && ran.stderr().contains("--key-file"), "{ran}");
}

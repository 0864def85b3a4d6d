//! The one contract suite through the protocol of backends: over our own
//! backend, and over one that has nothing of ours.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stacyvm_backend::{Backend, BackendOptions};
use stacyvm_conformance::{Format, ProviderTarget, Report, RunOptions, run};
use stacyvm_providers::custom::{CustomOptions, CustomProvider};
use stacyvm_providers::mock::MockProvider;
use stacyvm_sandbox::Provider;
use tempfile::TempDir;

use crate::fixture::Fixture;

const KEY: &str = "key-of-the-test";

/// A backend over a runtime of this process, and the provider that uses it.
pub(crate) async fn over(provider: Arc<dyn Provider>) -> (CustomProvider, TempDir) {
    custom(&listen(provider).await).await
}

async fn listen(provider: Arc<dyn Provider>) -> String {
    let options = BackendOptions { key: Some(KEY.to_owned()), secret: [7; 32], lifetime: Duration::from_mins(10) };
    let backend = Backend::bind(([127, 0, 0, 1], 0).into(), provider, options).await.expect("it listens");
    let url = format!("http://{}", backend.address());
    tokio::spawn(backend.serve(std::future::pending()));
    url
}

pub(crate) async fn custom(url: &str) -> (CustomProvider, TempDir) {
    let state = tempfile::tempdir().expect("a directory");
    let options = CustomOptions { api_key: Some(KEY.to_owned()), ..CustomOptions::new(url, state.path()) };
    (CustomProvider::open(options).await.expect("the provider opens"), state)
}

async fn conformance(provider: CustomProvider, image: &str) -> Report {
    let target = Arc::new(ProviderTarget::new(Arc::new(provider)));
    let options = RunOptions { image: image.to_owned(), ..RunOptions::default() };
    let report = run(target, &options, &()).await.expect("everything is selected");
    assert!(report.is_success(), "{}", report.render(Format::Text));
    report
}

/// Beside the provider, which orders nothing of the kind.
#[tokio::test(flavor = "multi_thread")]
async fn our_backend_refuses_what_no_sandbox_can_be_made_from() {
    let url = listen(Arc::new(MockProvider::default())).await;
    let (_installs_tls, _state) = custom(&url).await;
    let spawn = async |body: String| {
        let call = reqwest::Client::new().post(format!("{url}/spawn")).header("x-api-key", KEY);
        call.header("content-type", "application/json").body(body).send().await
    };
    let long = format!(r#"{{"image":"{}"}}"#, "a".repeat(4096));
    for body in [
        long.as_str(),
        r#"{"image":"alpine","memory_mb":17592186044416}"#,
        r#"{"image":"alpine","vcpus":1e308}"#,
        r#"{"image":"alpine","disk_size_mb":18446744073709551615}"#,
    ] {
        let answer = spawn(body.to_owned()).await.expect("an answer");
        assert_eq!(answer.status(), 400, "{body}");
        assert!(answer.bytes().await.expect("a body").len() < 512, "{body}");
    }
    // A client that still sends may see the connection end before the answer.
    let huge = format!(r#"{{"image":"{}"}}"#, "a".repeat(1 << 20));
    if let Ok(answer) = spawn(huge).await {
        assert_eq!(answer.status(), 413);
    }
    assert_eq!(spawn(r#"{"image":"alpine"}"#.to_owned()).await.expect("an answer").status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_backend_over_a_real_runtime_lacks_nothing() {
    let fixture = Fixture::start().await;
    let (custom, _state) = over(fixture.provider.clone()).await;
    let report = conformance(custom, "host").await;
    fixture.provider.shutdown().await;
    assert_eq!(report.skipped_ids(), Vec::<&str>::new(), "{}", report.render(Format::Text));
}

#[tokio::test(flavor = "multi_thread")]
async fn our_backend_over_a_runtime_without_agent_passes_by_the_protocol_alone() {
    let mock = MockProvider::default();
    let (custom, _state) = over(Arc::new(mock.clone())).await;
    let report = conformance(custom, "alpine:latest").await;
    for check in &report.checks {
        let Some(reason) = &check.reason else { continue };
        let expected = ["running real programs", "watching files"];
        assert!(expected.iter().any(|it| reason.contains(it)), "{} was skipped: {reason}", check.id);
    }
    assert_eq!(mock.sandbox_ids(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_in_python_passes_what_it_says_it_can() {
    let backend = Example::start();
    let (custom, _state) = custom(&backend.url).await;
    let report = conformance(custom, "host").await;
    assert!(report.skipped_ids().iter().all(|id| !id.starts_with('C')), "{:?}", report.skipped_ids());
    let passed = report.checks.len() - report.skipped_ids().len();
    assert!(passed >= 35, "only {passed} checks ran: {}", report.render(Format::Text));
}

/// `examples/custom-backend.py`, until the value is dropped.
pub(crate) struct Example {
    process: Child,
    pub(crate) url: String,
}

impl Example {
    pub(crate) fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/custom-backend.py");
        let mut command = Command::new("python3");
        command.arg(script).arg("0").env("BACKEND_KEY", KEY).stdout(Stdio::piped());
        let mut process = command.spawn().expect("these tests need python3");
        let mut line = String::new();
        let out = process.stdout.take().expect("a pipe");
        BufReader::new(out).read_line(&mut line).expect("its first line");
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Self { process, url }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

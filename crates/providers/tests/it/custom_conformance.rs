//! The one contract suite through the protocol of backends: over our own
//! backend, and over one that has nothing of ours.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stacyvm_api::SandboxId;
use stacyvm_backend::{Backend, BackendOptions};
use stacyvm_conformance::{Format, ProviderTarget, Report, RunOptions, run};
use stacyvm_providers::custom::{CustomOptions, CustomProvider};
use stacyvm_providers::mock::MockProvider;
use stacyvm_sandbox::{Provider, ProviderError, SandboxSpec};
use tempfile::TempDir;

use crate::fixture::{self, Fixture};

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

/// So that a server that lost its record of them finds them again.
#[tokio::test(flavor = "multi_thread")]
async fn the_limits_of_sandboxes_are_listed() {
    let example = Example::start();
    let (ours, _state) = over(Arc::new(MockProvider::default())).await;
    let (plain, _other_state) = custom(&example.url).await;
    let spec = SandboxSpec { allow_unenforced: true, ..fixture::spec() };
    for provider in [ours, plain] {
        let id = SandboxId::random();
        let created = provider.create(&id, &spec, &()).await.expect("a sandbox");
        let listed = provider.list().await.expect("it lists");
        assert_eq!(listed[0].limits, Some(created.limits));
        provider.destroy(&id).await.expect("destroyed");
    }
}

/// Those that the HTTP library makes by itself, too.
#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_of_our_backend_is_a_failure_of_the_protocol() {
    let url = listen(Arc::new(MockProvider::default())).await;
    let (_installs_tls, _state) = custom(&url).await;
    for (method, path, kind, body, expected) in [
        ("POST", "/spawn", "text/plain", "{}", (415, "BAD_REQUEST")),
        ("POST", "/spawn", "application/json", "{", (400, "BAD_REQUEST")),
        ("POST", "/spawn", "application/json", r#"{"image":7}"#, (422, "BAD_REQUEST")),
        ("GET", "/files", "text/plain", "", (400, "BAD_REQUEST")),
        ("GET", "/sandboxes/x/logs?lines=many", "text/plain", "", (400, "BAD_REQUEST")),
        ("GET", "/sandboxes/x/terminal", "text/plain", "", (400, "BAD_REQUEST")),
        ("GET", "/no/such/route", "text/plain", "", (404, "UNSUPPORTED")),
        ("PATCH", "/spawn", "text/plain", "", (405, "UNSUPPORTED")),
        ("GET", "/status/x", "text/plain", "", (404, "NOT_FOUND")),
    ] {
        let what = format!("{method} {path} {body}");
        let method = method.parse().expect("a method");
        let call = reqwest::Client::new().request(method, format!("{url}{path}")).header("x-api-key", KEY);
        let answer = call.header("content-type", kind).body(body).send().await.expect("an answer");
        let status = answer.status().as_u16();
        let text = answer.text().await.expect("a body");
        let failure: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{what}: {text:?}"));
        assert_eq!((status, failure["code"].as_str()), (expected.0, Some(expected.1)), "{what}: {text}");
        assert!(failure["message"].as_str().is_some_and(|message| !message.is_empty()), "{what}: {text}");
    }
}

/// Whoever orders hears why the machine over there refuses.
#[tokio::test(flavor = "multi_thread")]
async fn the_reason_of_our_backend_reaches_whoever_asked() {
    let (custom, _state) = over(Arc::new(MockProvider::default())).await;
    let spec = SandboxSpec { memory_mib: 1, ..fixture::spec() };
    let error = custom.create(&SandboxId::random(), &spec, &()).await.expect_err("it is refused");
    assert!(matches!(error, ProviderError::InvalidSpec { .. }), "{error:?}");
    let told = "the backend refuses to create the sandbox: memory_mb has to be between 16 and 16777216";
    assert_eq!(error.to_string(), told);
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

/// What holds a sandbox's namespaces must not outlive a killed example.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_in_python_leaves_no_processes_behind() {
    let backend = Example::start();
    let (_installs_tls, _state) = custom(&backend.url).await;
    let call = reqwest::Client::new().post(format!("{}/spawn", backend.url)).header("x-api-key", KEY);
    let made = call.body(r#"{"image":"any"}"#).send().await.expect("an answer").text().await.expect("a body");
    let made: serde_json::Value = serde_json::from_str(&made).expect("JSON");
    let id = made["id"].as_str().expect("an id").to_owned();
    let holders = || {
        let entries = std::fs::read_dir("/proc").expect("readable").flatten();
        let has_id = |path: &Path| std::fs::read(path.join("cmdline")).is_ok_and(|text| contains(&text, id.as_bytes()));
        entries.map(|entry| entry.path()).filter(|path| has_id(path)).collect::<Vec<_>>()
    };
    let held = holders();
    assert!(!held.is_empty(), "nothing holds {id}");
    let inside: Vec<_> = held
        .iter()
        .filter_map(|path| std::fs::read_to_string(path.join("task").join(path.file_name()?).join("children")).ok())
        .flat_map(|text| text.split_whitespace().map(|pid| Path::new("/proc").join(pid)).collect::<Vec<_>>())
        .collect();
    assert!(!inside.is_empty(), "nothing runs in {id}");
    drop(backend);
    fixture::eventually("they end with it", async || holders().is_empty() && inside.iter().all(|path| !path.exists()))
        .await;
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
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

//! The command line over a backend that knows the published protocol alone: no
//! input, no terminals, no signals.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use stacyvm_api::CreateRequest;

use crate::support::{Server, Site, Terminal, create, eventually, in_repository};

const KEY: &str = "key-of-the-test";

/// `examples/custom-backend.py`, until the value is dropped.
struct Example {
    process: Child,
    url: String,
}

impl Example {
    fn start() -> Self {
        Self::saying(Stdio::inherit())
    }

    /// With its standard error there.
    fn saying(errors: Stdio) -> Self {
        let mut command = Command::new("python3");
        command.arg(in_repository("examples/custom-backend.py")).arg("0").env("BACKEND_KEY", KEY).stderr(errors);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("these tests need python3");
        let mut line = String::new();
        let out = process.stdout.take().expect("a pipe");
        BufReader::new(out).read_line(&mut line).expect("its first line");
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Self { process, url }
    }

    async fn server(&self) -> Server {
        Server::start_with(&Site::new(), |serve| {
            serve.arg("--destroy-on-exit").env("STACYVM_PROVIDERS_DEFAULT", "custom");
            serve.env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
            serve.env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", &self.url);
            serve.env("STACYVM_PROVIDERS_CUSTOM_API_KEY", KEY).env_remove("STACYVM_DEFAULTS_NETWORK");
        })
        .await
    }
}

/// A backend of the published protocol, but for what it answers to a command,
/// and what does not know of backends at all.
pub(crate) fn answering(to_spawn: &'static str, to_exec: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Whoever hangs up is none of this server's business.
            drop(answer(&stream, to_spawn, to_exec));
        }
    });
    url
}

fn answer(mut stream: &TcpStream, to_spawn: &str, to_exec: &str) -> std::io::Result<()> {
    let mut request = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    request.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        request.read_line(&mut line)?;
        match line.to_lowercase().trim_end().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().unwrap_or(0),
            Some(_) => {}
            None => break,
        }
    }
    request.read_exact(&mut vec![0; length])?;
    let ok = |body: &str| format!("200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let reply = match first.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["POST", "/spawn"] => to_spawn.to_owned(),
        ["POST", "/exec"] => to_exec.to_owned(),
        ["GET", path] if path == "/health" || path.starts_with("/status/") => ok("{}"),
        ["DELETE", _] => ok(""),
        _ => "404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(),
    };
    stream.write_all(format!("HTTP/1.1 {}", reply.replacen("\r\n", "\r\nconnection: close\r\n", 1)).as_bytes())
}

const SPAWNED: &str = "201 Created\r\ncontent-length: 14\r\n\r\n{\"id\":\"box-1\"}";

async fn server_on(url: &str) -> Server {
    Server::start_with(&Site::new(), |serve| {
        serve.arg("--destroy-on-exit").env("STACYVM_PROVIDERS_DEFAULT", "custom");
        serve.env("STACYVM_PROVIDERS_OCI_ENABLED", "false").env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", url);
        serve.env_remove("STACYVM_DEFAULTS_NETWORK");
    })
    .await
}

/// Trying again would not help: no command of this backend outlives its call.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_sense_is_not_asked_for_again() {
    for (answer, code) in [
        ("200 OK\r\ncontent-length: 2\r\n\r\n[]", "BAD_GATEWAY"),
        ("200 OK\r\ncontent-length: 9\r\n\r\n<html>...", "BAD_GATEWAY"),
        ("500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops", "UNAVAILABLE"),
        ("200 OK\r\ncontent-length: 99\r\n\r\n{", "UNAVAILABLE"),
    ] {
        let server = server_on(&answering(SPAWNED, answer)).await;
        let id = create(&server.client(), &any()).await.id().to_string();
        let ran = server.run(&["exec", &id, "-n", "--json", "--", "true"]).await.says(code);
        assert_eq!(ran.status(), Some(125), "{ran}");
        assert!(!ran.stderr().contains("reconnecting"), "{answer}: {ran}");
    }
}

/// Such as a server of files, which has no POST.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_backend_is_not_taken_for_one_that_lacks_something() {
    let server = server_on(&answering("501 Unsupported method\r\ncontent-length: 0\r\n\r\n", "")).await;
    let ran = server.run(&["run", "--image", "any", "--", "true"]).await.failed(125);
    ran.says("what answers at its address is not a backend").says("stacyvm backend serve");
}

/// The backend ignores the name.
fn any() -> CreateRequest {
    CreateRequest { image: Some("any".to_owned()), ..CreateRequest::default() }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_where_there_is_no_input() {
    const LOST: &str = "this runtime takes no input";
    let example = Example::start();
    let server = example.server().await;
    let ran = server.run(&["run", "--image", "any", "--", "echo", "hi"]).await.ok();
    assert_eq!((ran.stdout(), ran.stderr()), ("hi\n", ""), "{ran}");

    let sandbox = create(&server.client(), &any()).await;
    let id = sandbox.id().to_string();
    let ran = server.run(&["exec", &id, "-n", "--", "cat"]).await.ok();
    assert_eq!((ran.stdout(), ran.stderr()), ("", ""), "{ran}");
    let status = server.run(&["exec", &id, "--shell", "--", "echo out; exit 7"]).await;
    assert_eq!((status.status(), status.stdout(), status.stderr()), (Some(7), "out\n", ""), "{status}");

    // What would be lost is said, once.
    let ran = server.run_with_input(&["exec", &id, "--", "cat"], b"lost").await.ok();
    assert_eq!((ran.stdout(), ran.stderr().matches(LOST).count()), ("", 1), "{ran}");
    let ran = server.run_with_input(&["exec", &id, "-n", "--", "cat"], b"left alone").await.ok();
    assert_eq!(ran.stderr(), "", "{ran}");
    // A refusal for another reason stays one.
    server.run(&["exec", &id, "--user", "root", "--", "true"]).await.failed(125).says("another user");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_can_and_lacks_is_shown() {
    let example = Example::start();
    let server = example.server().await;
    let page = server.run(&["providers", "custom"]).await.ok().says("  capabilities: spawn, ");
    assert!(page.stdout().contains("lacks: text_only (output and files are text)\n"), "{page}");
    let shown: Value = server.run(&["providers", "custom", "--json"]).await.json();
    for name in ["capabilities", "shortfalls"] {
        assert_eq!(shown[name], shown["health"][name], "{shown}");
        assert!(!shown[name].as_array().expect("a list").is_empty(), "{shown}");
    }
}

/// Clients that go away are ordinary: they are no traceback.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_says_nothing_of_who_hangs_up() {
    let site = Site::new();
    let errors = site.home().join("errors");
    let example = Example::saying(std::fs::File::create(&errors).expect("a file").into());
    let address = example.url.strip_prefix("http://").expect("an address");
    let threads = || std::fs::read_dir(format!("/proc/{}/task", example.process.id())).expect("it runs").count();
    for length in [0, 100] {
        let mut stream = TcpStream::connect(address).expect("it listens");
        let head = format!("POST /spawn HTTP/1.1\r\nX-API-Key: {KEY}\r\nContent-Length: {length}\r\n");
        stream.write_all(head.as_bytes()).expect("written");
        eventually("it is being read", async || (threads() > 1).then_some(())).await;
        // Without a farewell: what it reads or writes next fails.
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).expect("set");
        drop(stream);
        eventually("it is done with", async || (threads() == 1).then_some(())).await;
    }
    assert_eq!(std::fs::read_to_string(&errors).expect("readable"), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_says_that_there_are_no_terminals() {
    let example = Example::start();
    let server = example.server().await;
    let sandbox = create(&server.client(), &any()).await;
    let id = sandbox.id().to_string();
    let mut shell = server.site.program();
    shell.args(["shell", &id]).env("STACYVM_URL", &server.url);
    let mut terminal = Terminal::start(&shell, 80, 24);
    terminal.shows("this runtime has no terminals").await;
    assert_eq!(terminal.ends().await.code(), Some(125));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_over_http_leaves_out_what_the_provider_lacks() {
    let example = Example::start();
    let server = example.server().await;
    // So does the smoke test; what does not need it is looked at.
    let smoke: Value = server.run(&["smoke", "--json", "--image", "any"]).await.json();
    let checks = smoke["checks"].as_array().expect("a list");
    let with = |status: &str| -> Vec<&Value> {
        checks.iter().filter(|check| check["status"] == status).map(|check| &check["name"]).collect()
    };
    assert_eq!(with("SKIP"), ["smoke.stdin", "smoke.files.bytes", "smoke.ports", "smoke.preview"], "{smoke:#}");
    assert!(with("PASS").len() == checks.len() - 4 && with("PASS").contains(&&"smoke.files.list".into()), "{smoke:#}");
    let ran = server.run(&["conformance", "--url", &server.url, "--image", "any", "--format", "json"]).await.ok();
    let report: Value = serde_json::from_str(ran.stdout()).expect("a report");
    let checks = report["checks"].as_array().expect("a list");
    let passed = checks.iter().filter(|check| check["status"] == "PASS").count();
    assert!(passed >= 30, "only {passed} checks ran: {ran}");
    for check in checks.iter().filter(|check| check["status"] == "SKIP") {
        let reason = check["reason"].as_str().expect("a reason");
        assert!(reason.contains(" lacks ") || reason.contains("unix socket"), "{check}");
    }
}

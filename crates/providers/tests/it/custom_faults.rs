//! A backend that does everything wrong, one thing at a time: each becomes the
//! failure that it is, in time, and nothing that the backend wrote is told on.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use stacyvm_api::{FindingLevel, SandboxId};
use stacyvm_conformance::{ProviderTarget, RunOptions};
use stacyvm_providers::custom::{CustomOptions, CustomProvider};
use stacyvm_sandbox::{
    ByteStream, Connection, Exit, ProcessEvent, Provider, ProviderError, RemoveOptions, SandboxSpec, Session,
    SessionError, StartRequest, WriteOptions,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture;

/// What the backend says that nobody may hear.
const LEAK: &str = "hunter2-of-the-backend";
/// The provider's own deadline; whatever hangs ends by it.
const DEADLINE: Duration = Duration::from_secs(2);
/// Far more than any call may need; a test that waits longer has failed.
const PATIENCE: Duration = Duration::from_mins(1);
const GIBIBYTE: usize = 1 << 30;

#[derive(Debug, Clone)]
enum Fault {
    Status(u16),
    /// A status with a code in its body.
    Coded(u16, &'static str),
    /// A status with this body.
    Body(u16, &'static str),
    /// Takes the request and never answers.
    Hang,
    /// Breaks off before it answers.
    Reset,
    /// A good beginning, and then nothing more.
    ResetMidStream,
    /// 200, and something else than was asked for.
    Garbage,
    /// What no HTTP server says.
    NotHttp,
    Redirect,
    /// One line of a gibibyte.
    EndlessLine,
}

/// A backend that is fine, except for one route.
#[derive(Clone)]
struct Faulty {
    route: &'static str,
    fault: Fault,
    features: &'static str,
    /// A route that is fine, and its answer.
    also: Option<(&'static str, &'static str)>,
    /// What it was asked for.
    seen: Arc<Mutex<Vec<String>>>,
}

impl Faulty {
    fn at(route: &'static str, fault: Fault) -> Self {
        Self { route, fault, features: "", also: None, seen: Arc::default() }
    }

    async fn start(self) -> String {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("it listens");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let faulty = self.clone();
                // Whoever breaks off is part of the test.
                tokio::spawn(async move { drop(faulty.answer(stream).await) });
            }
        });
        url
    }

    async fn answer(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let route = request(&mut stream).await?;
        self.seen.lock().expect("nobody panicked").push(route.clone());
        if let Some((_, body)) = self.also.filter(|(fine, _)| route == *fine) {
            return reply(&mut stream.into_inner(), 200, body).await;
        }
        if route.starts_with(self.route) {
            return self.misbehave(stream.into_inner()).await;
        }
        let features = self.features;
        let (status, body) = match route.as_str() {
            "GET /capabilities" => (200, format!(r#"{{"features":[{features}]}}"#)),
            "POST /spawn" => (201, r#"{"id":"box-1"}"#.to_owned()),
            "GET /files/stat" => (200, r#"{"path":"/f","size":3,"mode":"0644"}"#.to_owned()),
            route if route.starts_with("GET /status/box-1") => (200, r#"{"state":"running"}"#.to_owned()),
            route if route.starts_with("GET /status/") => (404, String::new()),
            "GET /health" => (200, String::new()),
            route if route.starts_with("GET /api/") => (404, String::new()),
            _ => (204, String::new()),
        };
        reply(&mut stream.into_inner(), status, &body).await
    }

    async fn misbehave(&self, mut stream: TcpStream) -> std::io::Result<()> {
        const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
        match &self.fault {
            Fault::Status(status) => reply(&mut stream, *status, LEAK).await,
            Fault::Coded(status, code) => {
                reply(&mut stream, *status, &format!(r#"{{"code":"{code}","message":"{LEAK}"}}"#)).await
            }
            Fault::Body(status, body) => reply(&mut stream, *status, body).await,
            Fault::Hang => {
                tokio::time::sleep(PATIENCE).await;
                drop(stream);
                Ok(())
            }
            Fault::Reset => Ok(()),
            Fault::ResetMidStream => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
                let line = "{\"stream\":\"stdout\",\"data\":\"so far\"}\n";
                stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
            }
            Fault::Garbage => reply(&mut stream, 200, &format!("<html>{LEAK}</html>")).await,
            Fault::NotHttp => stream.write_all(format!("220 {LEAK} ready\r\n\r\n").as_bytes()).await,
            Fault::Redirect => {
                let head = format!("HTTP/1.1 302 Found\r\nlocation: http://{LEAK}/\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(head.as_bytes()).await
            }
            Fault::EndlessLine => {
                stream.write_all(HEAD).await?;
                stream.write_all(br#"{"stream":"stdout","data":""#).await?;
                let piece = vec![b'a'; 1 << 20];
                for _ in 0..GIBIBYTE / piece.len() {
                    stream.write_all(&piece).await?;
                }
                Ok(())
            }
        }
    }
}

/// Reads a request and gives its method and path.
async fn request(stream: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    if let Some(length) = head.lines().find_map(|line| line.strip_prefix("content-length:")) {
        let mut body = vec![0; length.trim().parse().expect("a length")];
        stream.read_exact(&mut body).await?;
    }
    let mut words = head.split([' ', '?']);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    Ok(format!("{} {path}", method.to_uppercase()))
}

async fn reply(stream: &mut TcpStream, status: u16, body: &str) -> std::io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    stream.write_all((head + body).as_bytes()).await
}

async fn provider(faulty: Faulty) -> (CustomProvider, TempDir) {
    let state = tempfile::tempdir().expect("a directory");
    let url = faulty.start().await;
    let options = CustomOptions {
        timeout: DEADLINE,
        api_key: Some("our-key".to_owned()),
        ..CustomOptions::new(url, state.path())
    };
    (CustomProvider::open(options).await.expect("it opens"), state)
}

async fn session(provider: &CustomProvider) -> Arc<dyn Session> {
    let id = SandboxId::random();
    provider.create(&id, &spec(), &()).await.expect("a sandbox");
    match provider.connect(&id).await.expect("a way in") {
        Connection::Native(session) => session,
        Connection::Envd(_) => panic!("there is no agent"),
    }
}

async fn within<T>(what: &str, call: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, call).await.unwrap_or_else(|_| panic!("{what} never ended"))
}

/// Neither the message nor a cause says what the backend wrote.
fn tells_nothing(error: &dyn Error) {
    let mut next = Some(error);
    while let Some(error) = next {
        assert!(!error.to_string().contains(LEAK) && !format!("{error:?}").contains(LEAK), "{error:?}");
        next = error.source();
    }
}

/// What the published protocol can order.
fn spec() -> SandboxSpec {
    SandboxSpec { allow_unenforced: true, ..fixture::spec() }
}

/// A short name of a failure, so that tables can be read.
fn kind(error: &ProviderError) -> &'static str {
    match error {
        ProviderError::NotFound(_) => "not found",
        ProviderError::Unsupported { .. } => "unsupported",
        ProviderError::InvalidSpec { .. } => "invalid",
        ProviderError::LimitUnsupported { .. } => "limit",
        ProviderError::Image { .. } => "image",
        ProviderError::RegistryUnavailable { .. } => "registry",
        ProviderError::Exhausted { .. } => "exhausted",
        ProviderError::Unavailable { .. } => "unavailable",
        ProviderError::BadAnswer { .. } => "nonsense",
        ProviderError::Failed { .. } => "failed",
    }
}

fn inner_kind(error: &SessionError) -> &'static str {
    match error {
        SessionError::Gone => "gone",
        SessionError::InvalidArgument(_) => "invalid",
        SessionError::FileNotFound(_) => "no file",
        SessionError::FileConflict(_) => "conflict",
        SessionError::DeadlineExceeded => "deadline",
        SessionError::Limited(_) => "limited",
        SessionError::Unsupported(_) => "unsupported",
        SessionError::CommandNotFound(_) => "no command",
        SessionError::PidsExhausted => "pids",
        SessionError::DiskFull => "disk",
        SessionError::Unavailable(_) => "unavailable",
        SessionError::BadAnswer { .. } => "nonsense",
        SessionError::Failed { .. } => "failed",
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_to_a_spawn_is_the_failure_that_it_is() {
    for (fault, expected) in [
        (Fault::Status(400), "invalid"),
        (Fault::Status(401), "unavailable"),
        (Fault::Status(403), "unavailable"),
        (Fault::Status(404), "unavailable"),
        (Fault::Status(408), "unavailable"),
        (Fault::Status(410), "unavailable"),
        (Fault::Status(429), "exhausted"),
        (Fault::Status(500), "unavailable"),
        (Fault::Status(501), "unavailable"),
        (Fault::Status(503), "unavailable"),
        (Fault::Coded(400, "IMAGE_NOT_FOUND"), "image"),
        (Fault::Coded(503, "REGISTRY_UNAVAILABLE"), "registry"),
        (Fault::Coded(400, "LIMIT_UNSUPPORTED"), "limit"),
        (Fault::Coded(500, "SOMETHING_NEW"), "unavailable"),
        (Fault::Hang, "unavailable"),
        (Fault::Reset, "unavailable"),
        (Fault::ResetMidStream, "unavailable"),
        (Fault::Garbage, "nonsense"),
        (Fault::NotHttp, "nonsense"),
        (Fault::Redirect, "nonsense"),
        (Fault::EndlessLine, "nonsense"),
    ] {
        let what = format!("{fault:?}");
        let (provider, _state) = provider(Faulty::at("POST /spawn", fault)).await;
        let id = SandboxId::random();
        let error = within(&what, provider.create(&id, &spec(), &())).await.expect_err("it fails");
        assert_eq!(kind(&error), expected, "{what}: {error:?}");
        tells_nothing(&error);
        assert_eq!(provider.list().await.expect("it lists"), [], "{what} leaves nothing");
    }
}

/// Ids that cannot be one, and one that is not ours.
const BAD_IDS: [&str; 6] =
    [r#"{"id":".."}"#, r#"{"id":"a\u0000b"}"#, r#"{"id":7}"#, r#"{"id":""}"#, r"{}", r#"{"id":"\n"}"#];

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_without_a_usable_id_is_deleted_by_ours_or_told_of() {
    for answer in BAD_IDS {
        let (theirs, _state) = provider(Faulty::at("POST /spawn", Fault::Body(201, answer))).await;
        let error = within(answer, theirs.create(&SandboxId::random(), &spec(), &())).await.expect_err("it fails");
        assert_eq!(kind(&error), "nonsense", "{answer}");
        assert!(error.to_string().contains("may be left at the backend"), "{answer}: {error}");
    }
    for answer in BAD_IDS.into_iter().chain([r#"{"id":"box-of-somebody"}"#]) {
        let faulty = Faulty { features: r#""spec""#, ..Faulty::at("POST /spawn", Fault::Body(201, answer)) };
        let seen = Arc::clone(&faulty.seen);
        let (ours, _state) = provider(faulty).await;
        let id = SandboxId::random();
        let error = within(answer, ours.create(&id, &spec(), &())).await.expect_err("it fails");
        assert_eq!(kind(&error), "nonsense", "{answer}");
        let deleted = || {
            let seen = seen.lock().expect("nobody panicked");
            seen.iter().filter(|route| route.starts_with("DELETE")).cloned().collect::<Vec<_>>()
        };
        fixture::eventually("it is deleted", async || !deleted().is_empty()).await;
        assert_eq!(deleted(), [format!("DELETE /sandboxes/{id}").to_lowercase().replace("delete", "DELETE")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_another_sandboxes_is_refused_and_not_deleted() {
    let faulty = Faulty::at("GET /none", Fault::Hang);
    let seen = Arc::clone(&faulty.seen);
    let (provider, _state) = provider(faulty).await;
    let (first, second) = (SandboxId::random(), SandboxId::random());
    provider.create(&first, &spec(), &()).await.expect("a sandbox");
    // The backend calls every sandbox the same.
    let error = provider.create(&second, &spec(), &()).await.expect_err("it is refused");
    assert_eq!(kind(&error), "nonsense", "{error:?}");
    provider.destroy(&second).await.expect("there is none");
    assert!(!seen.lock().expect("nobody panicked").iter().any(|route| route.starts_with("DELETE")));
    let listed = provider.list().await.expect("it lists");
    assert_eq!(listed.iter().map(|sandbox| &sandbox.id).collect::<Vec<_>>(), [&first]);
}

/// The server's start waits for this.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_hangs_does_not_hold_up_the_opening() {
    let url = Faulty::at("GET /capabilities", Fault::Hang).start().await;
    let state = tempfile::tempdir().expect("a directory");
    let options = CustomOptions { timeout: PATIENCE * 10, ..CustomOptions::new(url, state.path()) };
    // As long as the backend hangs, which is as long as this waits otherwise.
    let opening = tokio::time::timeout(PATIENCE / 2, CustomProvider::open(options)).await;
    opening.expect("it does not wait for the backend").expect("it opens");
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_that_no_command_has_end_the_command() {
    const LEAST: &str = r#"{"exit_code":-2147483648}"#;
    const LEAST_LINE: &str = "{\"stream\":\"exit\",\"exit_code\":-2147483648}\n";
    const SIGNAL_LINE: &str = "{\"stream\":\"exit\",\"signal\":2147483647}\n";
    const DROPPED_LINES: &str = "{\"stream\":\"dropped\",\"bytes\":18446744073709551615}\n\
        {\"stream\":\"stdout\",\"data\":\"more\"}\n{\"stream\":\"exit\",\"exit_code\":0}\n";
    for (features, answer, expected) in [
        ("", LEAST, Some(i32::MIN)),
        (r#""exit""#, LEAST_LINE, Some(i32::MIN)),
        (r#""exit""#, SIGNAL_LINE, None),
        (r#""exit""#, DROPPED_LINES, None),
    ] {
        let faulty = Faulty { features, ..Faulty::at("POST /exec", Fault::Body(200, answer)) };
        let (provider, _state) = provider(faulty).await;
        let session = session(&provider).await;
        let request = StartRequest { argv: vec!["true".to_owned()], ..StartRequest::default() };
        let events = session.start(request).await.expect("it starts");
        let last = within(answer, events.collect::<Vec<_>>()).await.pop().expect("an end");
        match expected {
            Some(code) => {
                let exit = Exit { code: Some(code), signal: None, timed_out: false };
                assert_eq!(last.expect("an exit"), ProcessEvent::Exited(exit), "{answer}");
            }
            None => assert_eq!(inner_kind(&last.expect_err("a failure")), "nonsense", "{answer}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_that_no_file_has_is_a_failure() {
    const FILE: &str = r#"{"path":"/f","size":18446744073709551615,"mode":"0644"}"#;
    const FILES: &str = r#"[{"path":"/f","size":9223372036854775808,"mode":"0644"}]"#;
    let (one, _state) = provider(Faulty::at("GET /files/stat", Fault::Body(200, FILE))).await;
    let inside = session(&one).await;
    assert_eq!(inner_kind(&inside.stat("/f").await.expect_err("it fails")), "nonsense");
    assert_eq!(inner_kind(&inside.read("/f", None).await.err().expect("it fails")), "nonsense");
    let (other, _state) = provider(Faulty::at("GET /files/list", Fault::Body(200, FILES))).await;
    assert_eq!(inner_kind(&session(&other).await.list("/", 1).await.expect_err("it fails")), "nonsense");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_calls_of_the_provider_fail_the_same_way() {
    for (fault, destroyed, usage) in [
        (Fault::Status(401), "unavailable", "unavailable"),
        (Fault::Status(404), "fine", "not found"),
        (Fault::Status(410), "fine", "not found"),
        (Fault::Status(429), "exhausted", "exhausted"),
        (Fault::Status(500), "unavailable", "unavailable"),
        (Fault::Status(503), "unavailable", "unavailable"),
        (Fault::Hang, "unavailable", "unavailable"),
        (Fault::Reset, "unavailable", "unavailable"),
        (Fault::Garbage, "fine", "nonsense"),
    ] {
        let what = format!("{fault:?}");
        let faulty = Faulty { features: r#""stats""#, ..Faulty::at("DELETE /sandboxes", fault.clone()) };
        let (first, _state) = provider(faulty).await;
        let id = SandboxId::random();
        first.create(&id, &spec(), &()).await.expect("a sandbox");
        let outcome = within(&what, first.destroy(&id)).await;
        assert_eq!(outcome.as_ref().map_or_else(kind, |()| "fine"), destroyed, "{what}: {outcome:?}");
        // What may still exist stays on the list.
        assert_eq!(first.list().await.expect("it lists").len(), usize::from(outcome.is_err()), "{what}");

        let faulty = Faulty { features: r#""stats""#, ..Faulty::at("GET /sandboxes/box-1/stats", fault) };
        let (second, _state) = provider(faulty).await;
        second.create(&id, &spec(), &()).await.expect("a sandbox");
        let error = within(&what, second.usage(&id)).await.expect_err("it fails");
        assert_eq!(kind(&error), usage, "{what}: {error:?}");
        tells_nothing(&error);
    }
}

/// The commands of both kinds of backend.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_to_an_exec_is_the_failure_that_it_is() {
    for features in ["", r#""exit""#] {
        for (fault, expected) in [
            (Fault::Status(400), "invalid"),
            (Fault::Status(401), "unavailable"),
            (Fault::Status(403), "unavailable"),
            (Fault::Status(404), "gone"),
            (Fault::Status(408), if features.is_empty() { "killed at its deadline" } else { "deadline" }),
            (Fault::Status(410), "gone"),
            (Fault::Status(429), "limited"),
            (Fault::Status(500), "unavailable"),
            (Fault::Status(503), "unavailable"),
            (Fault::Coded(400, "COMMAND_NOT_FOUND"), "no command"),
            (Fault::Coded(409, "SANDBOX_PIDS_EXHAUSTED"), "pids"),
            (Fault::Hang, if features.is_empty() { "killed at its deadline" } else { "unavailable" }),
            (Fault::Reset, "unavailable"),
            (Fault::ResetMidStream, "unavailable"),
            (Fault::Garbage, if features.is_empty() { "nonsense" } else { "unavailable" }),
            (Fault::NotHttp, "nonsense"),
            (Fault::Redirect, "nonsense"),
            (Fault::EndlessLine, "nonsense"),
        ] {
            let what = format!("{fault:?} with [{features}]");
            let (provider, _state) = provider(Faulty { features, ..Faulty::at("POST /exec", fault) }).await;
            let session = session(&provider).await;
            let outcome = within(&what, command(&*session)).await;
            let seen = match &outcome {
                Ok(ended) => ended,
                Err(error) => inner_kind(error),
            };
            assert_eq!(seen, expected, "{what}: {outcome:?}");
            if let Err(error) = &outcome {
                tells_nothing(error);
            }
        }
    }
}

/// How a command ended that must not succeed.
async fn command(session: &dyn Session) -> Result<&'static str, SessionError> {
    let request = StartRequest { argv: vec!["true".to_owned()], deadline: Some(DEADLINE), ..StartRequest::default() };
    let mut events = session.start(request).await?;
    while let Some(event) = events.next().await {
        if let ProcessEvent::Exited(exit) = event? {
            assert!(exit.timed_out, "{exit:?}");
            return Ok("killed at its deadline");
        }
    }
    panic!("the stream ended without an end of the command");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_about_a_file_is_the_failure_that_it_is() {
    for (fault, expected) in [
        (Fault::Status(400), "invalid"),
        (Fault::Status(401), "unavailable"),
        // The sandbox is there, so it is the file that is not.
        (Fault::Status(404), "no file"),
        (Fault::Status(409), "conflict"),
        (Fault::Status(410), "gone"),
        (Fault::Status(429), "limited"),
        (Fault::Status(500), "unavailable"),
        (Fault::Status(503), "unavailable"),
        (Fault::Status(507), "disk"),
        (Fault::Coded(404, "NOT_FOUND"), "gone"),
        (Fault::Coded(404, "FILE_NOT_FOUND"), "no file"),
        (Fault::Hang, "unavailable"),
        (Fault::Reset, "unavailable"),
        (Fault::Redirect, "nonsense"),
    ] {
        for route in ["GET /files", "POST /files", "DELETE /files", "POST /files/move", "POST /files/chmod"] {
            // `GET /files` is where all reads begin; a stat comes before them.
            let what = format!("{route}: {fault:?}");
            let (provider, _state) = provider(Faulty::at(route, fault.clone())).await;
            let session = session(&provider).await;
            let outcome = within(&what, async {
                match route {
                    "GET /files" => session.stat("/f").await.map(drop),
                    "POST /files" => session.write("/f", content(), WriteOptions::default()).await.map(drop),
                    "DELETE /files" => session.remove("/f", RemoveOptions::default()).await,
                    "POST /files/move" => session.rename("/f", "/g").await,
                    _ => session.chmod("/f", 0o600).await,
                }
            })
            .await;
            let error = outcome.expect_err("it fails");
            assert_eq!(inner_kind(&error), expected, "{what}: {error:?}");
            tells_nothing(&error);
        }
    }
    // An answer to a stat that is no file.
    let (provider, _state) = provider(Faulty::at("GET /files/stat", Fault::Garbage)).await;
    let error = session(&provider).await.stat("/f").await.expect_err("it fails");
    assert_eq!(inner_kind(&error), "nonsense");
    tells_nothing(&error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_about_the_whole_sandbox_names_nothing_in_it() {
    let faulty = Faulty { features: r#""logs""#, ..Faulty::at("GET /sandboxes/box-1/logs", Fault::Status(400)) };
    let (provider, _state) = provider(faulty).await;
    let error = session(&provider).await.console(1).await.expect_err("it fails");
    assert_eq!(error.to_string(), "the backend refuses to read the console (HTTP 400)");
}

fn content() -> ByteStream {
    Box::pin(futures_util::stream::iter([Ok("new".into())]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_sandbox_is_told_from_a_missing_file() {
    let (provider, _state) = provider(Faulty::at("GET /", Fault::Status(404))).await;
    let id = SandboxId::random();
    provider.create(&id, &spec(), &()).await.expect("a sandbox");
    assert!(matches!(provider.connect(&id).await, Err(ProviderError::NotFound(_))));
    let listed = provider.list().await.expect("it lists");
    assert_eq!(listed[0].state, stacyvm_sandbox::RuntimeState::Dead, "its remains are ours to free");
    within("the end", provider.wait(&id)).await.expect("it has ended");
}

/// The first finding that is a failure, with what to do about it.
async fn finding(provider: &CustomProvider) -> (String, String) {
    let report = within("the check", provider.check()).await;
    let failure = report.findings.into_iter().find(|it| it.level == FindingLevel::Failure).expect("a failure");
    assert!(!failure.message.contains(LEAK), "{failure:?}");
    (failure.message, failure.fix.expect("what to do"))
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_a_wrong_key_from_a_dead_host_from_a_bad_answer() {
    for (route, fault, message, fix) in [
        ("GET /status", Fault::Status(401), "refuses the key", "api_key"),
        ("GET /health", Fault::Status(403), "refuses the key", "api_key"),
        ("GET /health", Fault::Status(500), "HTTP 500", "log"),
        ("GET /health", Fault::Status(404), "is not a backend: there is no GET /health", "stacyvm backend serve"),
        ("GET /health", Fault::Redirect, "redirect", "base_url"),
        ("GET /health", Fault::Hang, "did not answer within", "log"),
        ("GET /health", Fault::Reset, "broke", "log"),
        ("GET /status", Fault::Garbage, "not of its protocol", "base_url"),
        ("GET /capabilities", Fault::Garbage, "not of its protocol", "base_url"),
    ] {
        let what = format!("{route}: {fault:?}");
        let (provider, _state) = provider(Faulty::at(route, fault)).await;
        let (said, advice) = finding(&provider).await;
        assert!(said.contains(message) && advice.contains(fix), "{what}: {said} ({advice})");
    }
    let nobody = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let url = format!("http://{}", nobody.local_addr().expect("its address"));
    drop(nobody);
    for (url, message) in
        [(url.as_str(), "nobody answers at 127.0.0.1"), ("http://no-such-name.invalid", "has no address")]
    {
        let state = tempfile::tempdir().expect("a directory");
        let options = CustomOptions { timeout: DEADLINE, ..CustomOptions::new(url, state.path()) };
        let (said, advice) = finding(&CustomProvider::open(options).await.expect("it opens")).await;
        assert!(said.contains(message) && advice.contains("base_url"), "{said} ({advice})");
    }
    let (fine, _state) = provider(Faulty::at("GET /none", Fault::Hang)).await;
    assert!(fine.check().await.is_healthy(), "{:?}", fine.check().await);
}

/// A page of a web server, and a StacyVM server's API: the address that people
/// have at hand.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_backend_is_told_apart() {
    const HEALTH: &str = r#"{"status":"ok","version":"0.1.0","uptime":"5s"}"#;
    const SERVER: &str = "this answers like a StacyVM server's API, not a backend";
    let no_route = || Fault::Body(404, r#"{"code":"NOT_FOUND","message":"no such route","request_id":"r"}"#);
    let create = async |provider: &CustomProvider| {
        let error = provider.create(&SandboxId::random(), &spec(), &()).await.expect_err("it fails");
        match error {
            ProviderError::Unavailable { message, hint, .. } => (message, hint.expect("what to do")),
            other => panic!("{other:?}"),
        }
    };
    for fault in [Fault::Status(404), Fault::Status(405), Fault::Status(501), no_route()] {
        let (web, _state) = provider(Faulty::at("POST /spawn", fault)).await;
        let (said, advice) = create(&web).await;
        assert!(said.contains("is not a backend: there is no POST /spawn"), "{said}");
        assert!(advice.contains("stacyvm backend serve"), "{advice}");
    }
    for (base, health, fault) in [
        ("", "GET /api/v1/health", no_route()),
        ("/api/v1", "GET /api/v1/health", no_route()),
        ("/api/v1", "GET /api/v1/health", Fault::Status(401)),
    ] {
        let url = Faulty { also: Some((health, HEALTH)), ..Faulty::at("", fault) }.start().await;
        let state = tempfile::tempdir().expect("a directory");
        let options = CustomOptions { timeout: DEADLINE, ..CustomOptions::new(format!("{url}{base}"), state.path()) };
        let server = CustomProvider::open(options).await.expect("it opens");
        for (said, advice) in [finding(&server).await, create(&server).await] {
            assert_eq!(said, SERVER, "{base}");
            assert!(advice.contains("stacyvm backend serve") && advice.contains("base_url"), "{advice}");
        }
    }
}

/// A backend that says that its failures are for callers; control characters
/// are not.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_with_typed_failures_is_heard_in_one_line() {
    const LINE: &str = "{\"stream\":\"error\",\"code\":\"BAD_REQUEST\",\"message\":\"no such\\u0007 shell\"}\n";
    const ANSWER: &str = r#"{"code":"FILE_CONFLICT","message":"/f is a directory"}"#;
    const REFUSAL: &str = r#"{"code":"CODE","message":"vcpus has to be\u001b[2J\r\nat most 4","hint":"ask for\nless"}"#;
    let refusing = |code: &str| -> &'static str { REFUSAL.replace("CODE", code).leak() };
    for (status, code, kind_expected) in [
        (400, "BAD_REQUEST", "invalid"),
        (400, "IMAGE_NOT_FOUND", "image"),
        (400, "LIMIT_UNSUPPORTED", "limit"),
        (429, "RESOURCE_LIMIT", "exhausted"),
        (503, "UNAVAILABLE", "unavailable"),
        (500, "INTERNAL_ERROR", "unavailable"),
    ] {
        for features in [r#""errors""#, r#""bytes""#] {
            let fault = Fault::Body(status, refusing(code));
            let (theirs, _state) = provider(Faulty { features, ..Faulty::at("POST /spawn", fault) }).await;
            let error = within(code, theirs.create(&SandboxId::random(), &spec(), &())).await.expect_err("it fails");
            assert_eq!(kind(&error), kind_expected, "{code}");
            let told = error.to_string();
            assert_eq!(told.contains("vcpus has to be [2J at most 4"), features.contains("errors"), "{code}: {told}");
            let hint = match &error {
                ProviderError::Image { hint, .. } | ProviderError::Unavailable { hint, .. } => hint.clone(),
                ProviderError::LimitUnsupported { hint, .. } => Some(hint.clone()),
                _ => continue,
            };
            let heard = hint.as_deref() == Some("ask for less");
            assert_eq!(heard, features.contains("errors"), "{code}: {hint:?}");
        }
    }
    // Inside a sandbox, by answers and by streams.
    for (features, heard) in [(r#""exit","errors""#, true), (r#""exit""#, false)] {
        let faulty = Faulty { features, ..Faulty::at("POST /exec", Fault::Body(200, LINE)) };
        let (streaming, _state) = provider(faulty).await;
        let error = within(LINE, command(&*session(&streaming).await)).await.expect_err("it fails");
        assert_eq!(inner_kind(&error), "invalid");
        assert_eq!(error.to_string().contains("no such shell"), heard, "{error}");
        let faulty = Faulty { features, ..Faulty::at("DELETE /files", Fault::Body(409, ANSWER)) };
        let (answering, _state) = provider(faulty).await;
        let removed = session(&answering).await.remove("/f", RemoveOptions::default()).await;
        let error = removed.expect_err("it fails");
        assert_eq!(inner_kind(&error), "conflict");
        assert_eq!(error.to_string() == "/f is a directory", heard, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_suite_itself_fails_on_a_backend_that_lies() {
    let (provider, _state) = provider(Faulty::at("POST /exec", Fault::Garbage)).await;
    let target = Arc::new(ProviderTarget::new(Arc::new(provider)));
    let options = RunOptions { only: vec!["C07".to_owned(), "C08".to_owned()], ..RunOptions::default() };
    let report = stacyvm_conformance::run(target, &options, &()).await.expect("both exist");
    assert!(!report.is_success());
}

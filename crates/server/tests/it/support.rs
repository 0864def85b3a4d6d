//! A whole server in process on the mock runtime, and a plain HTTP/1.1 client
//! that hides nothing: what goes over the wire is what the test says.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use stacyvm_engine::{Engine, EngineOptions, ServerSecret};
use stacyvm_providers::mock::MockProvider;
use stacyvm_server::{Secret, Server, ServerOptions};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Nothing here takes this long; a test that does hangs.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) const BASE: &str = "/api/v1";

/// Fails the test instead of letting it hang.
pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("it hangs")
}

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let poll = async {
        loop {
            if let Some(value) = check().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, poll).await.unwrap_or_else(|_| panic!("{what} never happened"))
}

pub(crate) struct Fixture {
    pub(crate) address: SocketAddr,
    /// Where paths name previews.
    pub(crate) preview_address: Option<SocketAddr>,
    pub(crate) mock: MockProvider,
    pub(crate) engine: Engine,
    api_key: Option<String>,
    stop: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
    data: tempfile::TempDir,
}

/// How a fixture differs from an open server on loopback.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) server: ServerOptions,
    pub(crate) engine: Option<fn(&mut EngineOptions)>,
}

impl Fixture {
    pub(crate) async fn open() -> Self {
        Self::start(Setup::default()).await
    }

    pub(crate) async fn with_options(server: ServerOptions) -> Self {
        Self::start(Setup { server, ..Setup::default() }).await
    }

    pub(crate) async fn with_engine(configure: fn(&mut EngineOptions)) -> Self {
        Self::start(Setup { engine: Some(configure), ..Setup::default() }).await
    }

    pub(crate) async fn with_keys(api: &str, admin: &str) -> Self {
        let server = ServerOptions {
            api_key: Secret::new(api),
            admin_api_key: Secret::new(admin),
            // Tests of other things fail to authenticate more often than people.
            failures_per_minute: None,
            ..ServerOptions::default()
        };
        Self::with_options(server).await
    }

    pub(crate) async fn start(setup: Setup) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mock = MockProvider::new("mock");
        let secret = ServerSecret::new([7; 32]);
        let mut options = EngineOptions::new(data.path().join("stacyvm.db"), secret, "mock");
        if let Some(configure) = setup.engine {
            configure(&mut options);
        }
        let engine = Engine::start(options, vec![std::sync::Arc::new(mock.clone())]).await.unwrap();
        let options = ServerOptions { port: 0, ..setup.server };
        let server = Server::bind(options, engine.clone()).await.unwrap();
        let address = server.addresses()[0];
        let preview_address = server.preview_addresses().first().copied();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(server.serve(async {
            stopped.await.ok();
        }));
        Self { address, preview_address, mock, engine, api_key: None, stop: Some(stop), server: Some(server), data }
    }

    /// Another server on the same engine, in place of the first.
    pub(crate) async fn on_engine(mut self, options: ServerOptions) -> Self {
        self.stop().await;
        let server = Server::bind(options, self.engine.clone()).await.unwrap();
        self.address = server.addresses()[0];
        self.preview_address = server.preview_addresses().first().copied();
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        self.server = Some(tokio::spawn(server.serve(async {
            stopped.await.ok();
        })));
        self
    }

    /// Where the server keeps its things.
    pub(crate) fn data(&self) -> &Path {
        self.data.path()
    }

    /// Makes a key of these scopes in the store; the key itself.
    pub(crate) async fn stored_key(&self, name: &str, scopes: &[&str]) -> String {
        let request = stacyvm_api::ApiKeyRequest {
            name: name.to_owned(),
            scopes: Some(scopes.iter().map(|scope| scope.parse().unwrap()).collect()),
            ..Default::default()
        };
        self.engine.keys().create("test", request).await.unwrap().key
    }

    /// Requests carry this key from now on.
    pub(crate) fn with_key(mut self, key: &str) -> Self {
        self.api_key = Some(key.to_owned());
        self
    }

    pub(crate) fn request(&self, method: &str, target: &str) -> Request {
        let mut request = Request {
            address: self.address,
            method: method.to_owned(),
            target: target.to_owned(),
            headers: vec![("Host".to_owned(), self.address.to_string())],
            body: Vec::new(),
        };
        if let Some(key) = &self.api_key {
            request = request.header("X-API-Key", key);
        }
        request
    }

    /// A request below `/api/v1`.
    pub(crate) fn api(&self, method: &str, path: &str) -> Request {
        self.request(method, &format!("{BASE}{path}"))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.api("GET", path).send().await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.api("POST", path).json(body).send().await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.api("DELETE", path).send().await
    }

    /// Makes a sandbox; its id.
    pub(crate) async fn sandbox(&self) -> String {
        let answer = self.post("/sandboxes", &serde_json::json!({ "image": "alpine:latest" })).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    /// Asks the server to end; resolves when it has.
    pub(crate) async fn stop(&mut self) {
        self.begin_stop();
        self.ended().await;
    }

    pub(crate) fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn ended(&mut self) {
        within(self.server.take().unwrap()).await.unwrap();
    }
}

pub(crate) struct Request {
    address: SocketAddr,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    /// To another listener.
    pub(crate) fn to(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    pub(crate) fn key(self, key: &str) -> Self {
        self.header("X-API-Key", key)
    }

    /// Replaces a header of that name; an empty value removes it.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        if !value.is_empty() {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.header("Content-Type", "application/json").body(body.to_string())
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The request's head; the body is announced with its length.
    fn head(&self) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        let declared = self.headers.iter().any(|(name, _)| {
            name.eq_ignore_ascii_case("content-length") || name.eq_ignore_ascii_case("transfer-encoding")
        });
        if !declared && (!self.body.is_empty() || self.method != "GET") {
            let _ = write!(head, "Content-Length: {}\r\n", self.body.len());
        }
        head.push_str("\r\n");
        head
    }

    pub(crate) async fn send(self) -> Answer {
        within(async {
            let head_only = self.method == "HEAD";
            let mut live = self.open().await;
            if head_only {
                return Answer { status: live.status, headers: live.headers, body: Vec::new(), trailers: Vec::new() };
            }
            let body = live.rest().await;
            Answer { status: live.status, headers: live.headers, body, trailers: live.trailers }
        })
        .await
    }

    /// Sends the request and reads the answer's head; the body follows live.
    pub(crate) async fn open(self) -> Live {
        within(async {
            let mut socket = TcpStream::connect(self.address).await.unwrap();
            socket.write_all(self.head().as_bytes()).await.unwrap();
            // The server may answer and close before it has read everything.
            socket.write_all(&self.body).await.ok();
            Live::read(socket).await
        })
        .await
    }

    /// Sends everything and reads nothing: dropping the connection is a client
    /// that goes away.
    pub(crate) async fn begin_with_body(self) -> TcpStream {
        let body = self.body.clone();
        let mut socket = self.begin().await;
        socket.write_all(&body).await.unwrap();
        socket
    }

    /// Sends only the head, for tests that send the body piece by piece.
    pub(crate) async fn begin(self) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(self.head().as_bytes()).await.unwrap();
        socket
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        assert!(self.body.ends_with(b"\n"), "JSON ends in a newline: {self:?}");
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub(crate) fn trailer(&self, name: &str) -> Option<&str> {
        find(&self.trailers, name)
    }

    /// Status and code of a failure; the envelope is checked on the way.
    pub(crate) fn failure(&self) -> (u16, String) {
        let body = self.json();
        let code = body["code"].as_str().unwrap_or_else(|| panic!("no code: {self:?}"));
        let message = body["message"].as_str().unwrap_or_else(|| panic!("no message: {self:?}"));
        assert!(!message.is_empty() && !message.contains("/tmp/"), "{message}");
        assert_eq!(body["request_id"].as_str(), self.header("x-request-id"), "{self:?}");
        (self.status, code.to_owned())
    }

    pub(crate) fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }
}

/// An answer whose body is still coming.
pub(crate) struct Live<S = TcpStream> {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) trailers: Vec<(String, String)>,
    reader: BufReader<S>,
    framing: Framing,
}

enum Framing {
    Chunked,
    Length(u64),
    Ended,
}

impl Live {
    pub(crate) async fn read(socket: TcpStream) -> Self {
        Self::of(socket).await
    }
}

impl<S: AsyncRead + Unpin> Live<S> {
    pub(crate) async fn of(socket: S) -> Self {
        let mut reader = BufReader::new(socket);
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status line: {line:?}")).parse().unwrap();
        let headers = read_fields(&mut reader).await;
        let framing = if find(&headers, "transfer-encoding") == Some("chunked") {
            Framing::Chunked
        } else {
            Framing::Length(find(&headers, "content-length").map_or(0, |length| length.parse().unwrap()))
        };
        Self { status, headers, trailers: Vec::new(), reader, framing }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The next piece as the server framed it; `None` at the end. A connection
    /// that breaks before the end is a panic.
    pub(crate) async fn chunk(&mut self) -> Option<Vec<u8>> {
        within(self.next_chunk()).await
    }

    async fn next_chunk(&mut self) -> Option<Vec<u8>> {
        match self.framing {
            Framing::Ended => None,
            Framing::Length(0) => {
                self.framing = Framing::Ended;
                None
            }
            Framing::Length(left) => {
                let mut piece = vec![0; usize::try_from(left.min(1 << 20)).unwrap()];
                let count = self.reader.read(&mut piece).await.unwrap();
                assert!(count > 0, "the body broke off {left} bytes before its end");
                piece.truncate(count);
                self.framing = Framing::Length(left - count as u64);
                Some(piece)
            }
            Framing::Chunked => {
                let mut line = String::new();
                self.reader.read_line(&mut line).await.unwrap();
                let size =
                    usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("the body broke off: {line:?}"));
                if size == 0 {
                    self.trailers = read_fields(&mut self.reader).await;
                    self.framing = Framing::Ended;
                    return None;
                }
                let mut piece = vec![0; size + 2];
                self.reader.read_exact(&mut piece).await.unwrap();
                piece.truncate(size);
                Some(piece)
            }
        }
    }

    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(piece) = self.next_chunk().await {
            all.extend_from_slice(&piece);
        }
        all
    }

    /// Reads on until the server breaks the body off; a proper end is a failure.
    pub(crate) async fn breaks_off(&mut self) {
        let mut rest = Vec::new();
        // A reset is a break too.
        within(self.reader.read_to_end(&mut rest)).await.ok();
        assert!(!rest.ends_with(b"0\r\n\r\n"), "the body ended as if it were complete");
    }

    /// The next line of a stream of lines, without its newline.
    pub(crate) async fn line(&mut self) -> Option<String> {
        let chunk = self.chunk().await?;
        let text = String::from_utf8(chunk).unwrap();
        assert!(text.ends_with('\n') && text.matches('\n').count() == 1, "one line a chunk: {text:?}");
        Some(text.trim_end().to_owned())
    }
}

async fn read_fields(reader: &mut BufReader<impl AsyncRead + Unpin>) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { return fields };
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn find<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

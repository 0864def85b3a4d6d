//! Servers inside mock sandboxes, written byte by byte, and a fixture that shows
//! one of them as a preview.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stacyvm_providers::mock::MockService;
use stacyvm_server::{PreviewOptions, ServerOptions};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Fixture, Request, within};

/// The port that guests of these tests listen on.
pub(crate) const PORT: u16 = 3000;

/// A server that does what its script says on every connection.
pub(crate) struct Guest {
    pub(crate) address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Guest {
    /// `script` gets each connection and its number, from zero.
    pub(crate) async fn scripted<F, Fut>(script: F) -> Self
    where
        F: Fn(Talk, usize) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(script(Talk { stream: BufReader::new(stream) }, number));
            }
        });
        Self { address, connections }
    }

    /// Answers every request on every connection with the same bytes.
    pub(crate) async fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer: Arc<[u8]> = answer.into().into();
        Self::scripted(move |mut talk, _| {
            let answer = Arc::clone(&answer);
            async move {
                while talk.head().await.is_some() {
                    talk.write(&answer).await;
                }
            }
        })
        .await
    }

    /// Answers every request with its head.
    pub(crate) async fn echoing() -> Self {
        Self::scripted(|mut talk, _| async move {
            while let Some(head) = talk.head().await {
                talk.answer("200 OK", &head).await;
            }
        })
        .await
    }

    /// Connections that it got.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// The guest's side of a connection.
pub(crate) struct Talk {
    pub(crate) stream: BufReader<TcpStream>,
}

impl Talk {
    /// The next request's head, or `None` when the connection ended.
    pub(crate) async fn head(&mut self) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head).await.ok()? == 0 {
                return None;
            }
        }
        Some(head)
    }

    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        line
    }

    pub(crate) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        // The other side may have gone away, which is what some tests are about.
        self.stream.write_all(bytes).await.ok();
    }

    pub(crate) async fn answer(&mut self, status: &str, body: &str) {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        self.write(format!("{head}{body}").as_bytes()).await;
    }

    /// Resolves when the other side has gone.
    pub(crate) async fn ended(&mut self) {
        let mut rest = [0; 4096];
        while matches!(self.stream.read(&mut rest).await, Ok(count) if count > 0) {}
    }
}

/// A server with a sandbox in which something listens on [`PORT`].
pub(crate) struct Preview {
    pub(crate) fixture: Fixture,
    pub(crate) id: String,
}

/// Options of a server with previews.
pub(crate) fn previews() -> ServerOptions {
    let preview = PreviewOptions { domain: Some("localhost".to_owned()), ..PreviewOptions::default() };
    ServerOptions { preview, ..ServerOptions::default() }
}

impl Preview {
    pub(crate) async fn of(guest: &Guest) -> Self {
        Self::with_options(guest, previews()).await
    }

    pub(crate) async fn with_options(guest: &Guest, options: ServerOptions) -> Self {
        Self::on(guest, Fixture::with_options(options).await).await
    }

    pub(crate) async fn on(guest: &Guest, fixture: Fixture) -> Self {
        let id = fixture.sandbox().await;
        fixture.mock.listen(&id.parse().unwrap(), PORT, MockService::At(guest.address));
        Self { fixture, id }
    }

    /// `Host` of the preview of a port.
    pub(crate) fn host(&self, port: u16) -> String {
        format!("{port}-{}.localhost:{}", self.id, self.fixture.address.port())
    }

    /// A request to the guest.
    pub(crate) fn request(&self, method: &str, path: &str) -> Request {
        self.fixture.request(method, path).header("Host", &self.host(PORT))
    }

    /// The connection after a head was sent that says nothing of a body.
    pub(crate) async fn raw(&self, head: &str) -> BufReader<TcpStream> {
        within(async {
            let mut stream = TcpStream::connect(self.fixture.address).await.unwrap();
            stream.write_all(head.replace("$HOST", &self.host(PORT)).as_bytes()).await.unwrap();
            BufReader::new(stream)
        })
        .await
    }
}

/// The value of a field in a head.
pub(crate) fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

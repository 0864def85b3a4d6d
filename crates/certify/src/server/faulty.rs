//! A backend of the published protocol that does one thing wrong on demand.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Stands in everything that it says when it fails: nobody may hear it.
pub(crate) const LEAK: &str = "words-of-the-backend";

/// A request of a server is far below this.
const REQUEST_BYTES_MAX: u64 = 1 << 20;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Status(u16),
    /// Takes the request and never answers.
    Hang,
    /// Success, and something else than was asked for.
    Garbage,
}

/// Where it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Spawn,
    Exec,
    Read,
}

#[derive(Debug, Default)]
struct State {
    broken: Option<(Call, Fault)>,
    /// The fault was met: whoever asks for the sandbox now hears of it, too.
    was_met: bool,
}

/// Ends with the value.
pub(crate) struct FaultyBackend {
    url: String,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl FaultyBackend {
    pub(crate) async fn start() -> Result<Self, String> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await;
        let listener = listener.map_err(|error| format!("no port for a faulty backend: {error}"))?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let mut made = 0_u64;
            while let Ok((stream, _)) = listener.accept().await {
                made += 1;
                while connections.try_join_next().is_some() {}
                // Whoever breaks off has got what was meant for them.
                connections.spawn(answer(stream, Arc::clone(&shared), made));
            }
        });
        Ok(Self { url: format!("http://{address}"), state, task })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn break_at(&self, call: Call, fault: Fault) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) =
            State { broken: Some((call, fault)), was_met: false };
    }

    pub(crate) fn mend(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
    }
}

impl State {
    fn fault_of(&mut self, called: Option<Call>, path: &str) -> Option<Fault> {
        let (call, fault) = self.broken?;
        if called == Some(call) {
            self.was_met = true;
            return Some(fault);
        }
        // A sandbox that is gone is gone for whoever asks how it is.
        let is_gone = matches!(fault, Fault::Status(404 | 410)) && path.starts_with("/status/box-");
        (is_gone && self.was_met).then_some(fault)
    }
}

impl Drop for FaultyBackend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "HTTP {status}"),
            Self::Hang => f.write_str("no answer"),
            Self::Garbage => f.write_str("garbage"),
        }
    }
}

/// One request, one answer.
async fn answer(stream: TcpStream, state: Arc<Mutex<State>>, number: u64) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (method, path) = request(&mut stream).await?;
    let stream = &mut stream.into_inner();
    let called = match (method.as_str(), path.as_str()) {
        ("POST", "/spawn") => Some(Call::Spawn),
        ("POST", "/exec") => Some(Call::Exec),
        ("GET", "/files/list") => Some(Call::Read),
        _ => None,
    };
    let fault = state.lock().unwrap_or_else(PoisonError::into_inner).fault_of(called, &path);
    if let Some(fault) = fault {
        return misbehave(stream, fault).await;
    }
    let (status, body) = match (method.as_str(), path.as_str()) {
        ("GET", "/capabilities") => (200, r#"{"features":[]}"#.to_owned()),
        ("POST", "/spawn") => (201, format!(r#"{{"id":"box-{number}"}}"#)),
        ("GET", path) if path.starts_with("/status/box-") => (200, r#"{"state":"running"}"#.to_owned()),
        ("GET", path) if path.starts_with("/status/") => (404, String::new()),
        ("POST", "/exec") => (200, r#"{"exit_code":0}"#.to_owned()),
        ("GET", "/files/list") => (200, "[]".to_owned()),
        _ => (200, String::new()),
    };
    reply(stream, status, &body).await
}

async fn misbehave(stream: &mut TcpStream, fault: Fault) -> std::io::Result<()> {
    match fault {
        Fault::Status(status) => reply(stream, status, &format!(r#"{{"error":"{LEAK}"}}"#)).await,
        Fault::Hang => std::future::pending().await,
        Fault::Garbage => reply(stream, 200, &format!("<html>{LEAK}</html>")).await,
    }
}

/// Reads a request to its end; its method and path.
async fn request(stream: &mut BufReader<TcpStream>) -> std::io::Result<(String, String)> {
    let mut first = String::new();
    let mut stream = stream.take(REQUEST_BYTES_MAX);
    stream.read_line(&mut first).await?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 || line.trim().is_empty() {
            break;
        }
        let value = line.to_lowercase();
        if let Some(value) = value.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    tokio::io::copy(&mut (&mut stream).take(length), &mut tokio::io::sink()).await?;
    let mut words = first.split([' ', '?']);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    Ok((method.to_owned(), path.trim_end().to_owned()))
}

async fn reply(stream: &mut TcpStream, status: u16, body: &str) -> std::io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    stream.write_all((head + body).as_bytes()).await
}

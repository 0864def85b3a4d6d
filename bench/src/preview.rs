//! A server inside a sandbox without a network, through its preview and, the
//! same program on this machine, directly: bytes per second both ways, and small
//! requests per second.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::future::try_join_all;
use stacyvm_api::{CreateRequest, ExecRequest, NetworkMode, NetworkRequest, SandboxId};
use stacyvm_client::UploadOptions;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::server::{ServeOptions, Server, Setup};

/// Port of the server inside.
const PORT: u16 = 3000;

/// Where the program is put inside.
const PROGRAM: &str = "/workspace/stacyvm-bench";

/// Each number is the best of so many rounds, direct and through the preview in
/// turn.
const ROUNDS: usize = 5;

/// Connections that ask for something small at the same time, and how often.
const CLIENTS: usize = 16;
const REQUESTS_PER_CLIENT: usize = 2_000;

const BUFFER_BYTES: usize = 256 << 10;
const START_LIMIT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// One way to the server.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    /// In MB/s.
    pub(crate) down: f64,
    /// In MB/s.
    pub(crate) up: f64,
    /// Keep-alive requests per second.
    pub(crate) requests: f64,
}

pub(crate) struct Preview {
    pub(crate) direct: Rates,
    pub(crate) preview: Rates,
}

pub(crate) async fn measure(setup: &Setup, bytes: u64) -> anyhow::Result<Preview> {
    let server = Server::start(setup, "preview", ServeOptions::default()).await?;
    let id = start_inside(&server).await?;
    let (mut here, direct) = start_here().await?;
    let through = Endpoint { port: server.port(), host: format!("{PORT}-{id}.localhost") };
    wait_for(&through).await?;
    wait_for(&direct).await?;
    let mut measured = Preview { direct: Rates::default(), preview: Rates::default() };
    for _ in 0..ROUNDS {
        measured.direct.best_of(&direct.round(bytes).await?);
        measured.preview.best_of(&through.round(bytes).await?);
    }
    here.kill().await?;
    server.destroy(&id).await?;
    server.stop().await?;
    Ok(measured)
}

impl Rates {
    fn best_of(&mut self, round: &Self) {
        self.down = self.down.max(round.down);
        self.up = self.up.max(round.up);
        self.requests = self.requests.max(round.requests);
    }
}

async fn start_inside(server: &Server) -> anyhow::Result<SandboxId> {
    let request = CreateRequest {
        image: Some("host".to_owned()),
        vcpus: Some(2.0),
        network: Some(NetworkRequest { mode: NetworkMode::None, allow: Vec::new() }),
        allow_unenforced: Some(true),
        ..CreateRequest::default()
    };
    let id = server.client.create(&request).await?.id;
    let sandbox = server.client.sandbox(id.clone());
    let program = tokio::fs::File::open(std::env::current_exe()?).await?;
    let options = UploadOptions { mode: Some("0755".to_owned()), size_bytes: None };
    sandbox.upload(PROGRAM, program, &options).await?;
    let run = ExecRequest {
        command: PROGRAM.to_owned(),
        args: Some(vec!["guest".to_owned(), PORT.to_string()]),
        mode: Some("argv".to_owned()),
        background: Some(true),
        ..ExecRequest::default()
    };
    sandbox.exec(&run).await?;
    Ok(id)
}

async fn start_here() -> anyhow::Result<(Child, Endpoint)> {
    let port = TcpListener::bind(("127.0.0.1", 0)).await?.local_addr()?.port();
    let program = std::env::current_exe()?;
    let mut command = Command::new(Path::new(&program));
    command.arg("guest").arg(port.to_string()).stdin(Stdio::null()).kill_on_drop(true);
    Ok((command.spawn()?, Endpoint { port, host: "localhost".to_owned() }))
}

async fn wait_for(endpoint: &Endpoint) -> anyhow::Result<()> {
    let end = Instant::now() + START_LIMIT;
    loop {
        let answer = async {
            let mut connection = endpoint.connect().await?;
            connection.get("/small").await
        };
        match answer.await {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(Instant::now() < end, "{} does not answer: {error:#}", endpoint.host),
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Where a server is reached, and by what name.
#[derive(Debug, Clone)]
struct Endpoint {
    port: u16,
    host: String,
}

impl Endpoint {
    async fn connect(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::with_capacity(BUFFER_BYTES, stream), host: self.host.clone() })
    }

    async fn round(&self, bytes: u64) -> anyhow::Result<Rates> {
        let megabytes = bytes as f64 / 1e6;
        let mut connection = self.connect().await?;
        let start = Instant::now();
        let received = connection.get(&format!("/bytes/{bytes}")).await?;
        let down = megabytes / start.elapsed().as_secs_f64();
        ensure!(received == bytes, "{received} of {bytes} bytes came");
        let start = Instant::now();
        connection.post(bytes).await?;
        let up = megabytes / start.elapsed().as_secs_f64();
        let start = Instant::now();
        try_join_all((0..CLIENTS).map(|_| tokio::spawn(ask_often(self.clone()))))
            .await?
            .into_iter()
            .collect::<Result<Vec<()>, _>>()?;
        let requests = (CLIENTS * REQUESTS_PER_CLIENT) as f64 / start.elapsed().as_secs_f64();
        Ok(Rates { down, up, requests })
    }
}

async fn ask_often(endpoint: Endpoint) -> anyhow::Result<()> {
    let mut connection = endpoint.connect().await?;
    for _ in 0..REQUESTS_PER_CLIENT {
        connection.get("/small").await?;
    }
    Ok(())
}

/// As little of a client as HTTP/1.1 allows, so that what is measured is not
/// the client.
struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
}

impl Connection {
    /// Bytes of the answer's body.
    async fn get(&mut self, path: &str) -> anyhow::Result<u64> {
        let head = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.host);
        self.stream.write_all(head.as_bytes()).await?;
        self.answer().await
    }

    async fn post(&mut self, bytes: u64) -> anyhow::Result<()> {
        let head = format!("POST /sink HTTP/1.1\r\nHost: {}\r\nContent-Length: {bytes}\r\n\r\n", self.host);
        self.stream.write_all(head.as_bytes()).await?;
        write_bytes(self.stream.get_mut(), bytes).await?;
        self.answer().await.map(drop)
    }

    async fn answer(&mut self) -> anyhow::Result<u64> {
        let head = read_head(&mut self.stream).await?.context("the connection ended")?;
        ensure!(head.starts_with("http/1.1 200"), "{}", head.lines().next().unwrap_or_default());
        let length = content_length(&head)?;
        discard(&mut self.stream, length).await?;
        Ok(length)
    }
}

/// The server of the measurement: `GET /small`, `GET /bytes/N`, `POST /sink`.
pub(crate) async fn serve(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            // Clients go away when they have what they want.
            let _ended = talk(BufReader::with_capacity(BUFFER_BYTES, stream)).await;
        });
    }
}

async fn talk(mut stream: BufReader<TcpStream>) -> anyhow::Result<()> {
    while let Some(head) = read_head(&mut stream).await? {
        let target = head.split(' ').nth(1).unwrap_or_default();
        if let Some(count) = target.strip_prefix("/bytes/") {
            let count: u64 = count.parse()?;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {count}\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            write_bytes(stream.get_mut(), count).await?;
        } else {
            discard(&mut stream, content_length(&head)?).await?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
        }
    }
    Ok(())
}

async fn write_bytes(stream: &mut TcpStream, mut left: u64) -> anyhow::Result<()> {
    let buffer = vec![b'x'; BUFFER_BYTES];
    while left > 0 {
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&buffer[..count]).await?;
        left -= count as u64;
    }
    Ok(())
}

/// In lower case; `None` when the connection ended before it began.
async fn read_head(stream: &mut BufReader<TcpStream>) -> anyhow::Result<Option<String>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            if head.is_empty() {
                return Ok(None);
            }
            bail!("the connection ended in a head");
        }
    }
    Ok(Some(head.to_ascii_lowercase()))
}

fn content_length(head: &str) -> anyhow::Result<u64> {
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    Ok(length.map_or("0", str::trim).parse()?)
}

async fn discard(stream: &mut BufReader<TcpStream>, mut left: u64) -> anyhow::Result<()> {
    let buffered = left.min(stream.buffer().len() as u64);
    stream.consume(usize::try_from(buffered)?);
    left -= buffered;
    let mut buffer = vec![0; BUFFER_BYTES.min(usize::try_from(left)?)];
    while left > 0 {
        let limit = buffer.len().min(usize::try_from(left)?);
        let count = stream.get_mut().read(&mut buffer[..limit]).await?;
        ensure!(count > 0, "the connection ended {left} bytes early");
        left -= count as u64;
    }
    Ok(())
}

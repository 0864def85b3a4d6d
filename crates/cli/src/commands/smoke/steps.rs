//! The ways in which clients use a sandbox, each checked on its content.
//!
//! Only what the fake provider can imitate is run, except where a step says
//! otherwise.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use stacyvm_api::{ExecRequest, WriteRequest};
use stacyvm_client::{Channel, ClientError, ExecEvent, SandboxClient, UploadOptions};

use crate::commands::exec::argv as argv_request;
use crate::failure::Advice;
use crate::output::bytes;

const TEXT: &str = "smoke: one line, and ümläuts\n";
const TEXT_PATH: &str = "/workspace/stacyvm-smoke/text";
const LARGE_PATH: &str = "/workspace/stacyvm-smoke/bytes";
const LISTED_PATH: &str = "/workspace/stacyvm-smoke/listed";
const DIRECTORY: &str = "/workspace/stacyvm-smoke";

/// More than fits into one message anywhere on the way.
const LARGE_BYTES: usize = 3 << 20;

/// A port that images rarely use.
const PORT: u16 = 38_423;

/// The port that a page is served on.
const PREVIEW_PORT: u16 = 38_424;

const PREVIEW_DIRECTORY: &str = "/workspace/stacyvm-smoke-preview";

/// Between looks at what listens.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a program may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(15);

/// As much as is quoted of what a program said.
const SAID_BYTES: usize = 2000;

/// Serves HTTP with whatever the image has.
const LISTEN: &str = "python3 -m http.server 38423 || busybox httpd -f -p 38423 || httpd -f -p 38423 || \
                      nc -lk -p 38423";

fn shell(command: &str) -> ExecRequest {
    ExecRequest { command: command.to_owned(), ..ExecRequest::default() }
}

async fn output(sandbox: &SandboxClient, request: &ExecRequest) -> anyhow::Result<String> {
    let result = sandbox.exec(request).await?;
    ensure!(result.exit_code == 0, "`{}` ended with {}: {}", request.command, result.exit_code, result.stderr.trim());
    Ok(result.stdout)
}

fn same(expected: &str, got: &str) -> anyhow::Result<()> {
    ensure!(expected == got, "expected {expected:?}, got {got:?}");
    Ok(())
}

pub(super) async fn exec(sandbox: &SandboxClient) -> anyhow::Result<String> {
    same("stacyvm-smoke\n", &output(sandbox, &shell("echo stacyvm-smoke")).await?)?;
    Ok("a command ran".to_owned())
}

/// Without a shell, words stay as they are.
pub(super) async fn argv(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let words = ["echo", "a  b", "$HOME", "'"].map(str::to_owned);
    same("a  b $HOME '\n", &output(sandbox, &argv_request(&words, ExecRequest::default())).await?)?;
    Ok("arguments arrive as they are".to_owned())
}

pub(super) async fn exit_status(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let result = sandbox.exec(&shell("echo oops >&2; exit 42")).await?;
    ensure!(result.exit_code == 42, "expected status 42, got {}", result.exit_code);
    same("oops\n", &result.stderr)?;
    Ok("status and errors come back".to_owned())
}

pub(super) async fn stdin(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let request = ExecRequest { stdin: Some(TEXT.to_owned()), ..shell("cat") };
    same(TEXT, &output(sandbox, &request).await?)?;
    Ok("input reaches the command".to_owned())
}

pub(super) async fn stream(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let mut stream = sandbox.exec_stream(&shell("echo one; echo two >&2; echo three")).await?;
    let (mut stdout, mut stderr, mut exit) = (Vec::new(), Vec::new(), None);
    while let Some(event) = stream.next().await? {
        match event {
            ExecEvent::Output { channel: Channel::Stdout, data, .. } => stdout.extend_from_slice(&data),
            ExecEvent::Output { channel: Channel::Stderr, data, .. } => stderr.extend_from_slice(&data),
            ExecEvent::Started { .. } => {}
            ExecEvent::Dropped { bytes } => bail!("{bytes} bytes of output were lost"),
            ExecEvent::Exit(ended) => exit = Some(ended.code),
        }
    }
    same("one\nthree\n", &String::from_utf8_lossy(&stdout))?;
    same("two\n", &String::from_utf8_lossy(&stderr))?;
    ensure!(exit == Some(0), "the stream ended without the command's end: {exit:?}");
    Ok("output comes as a stream, and its end".to_owned())
}

pub(super) async fn text_file(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let request = WriteRequest { path: TEXT_PATH.to_owned(), content: TEXT.to_owned(), ..WriteRequest::default() };
    sandbox.write_file(&request).await.context("write")?;
    let read = sandbox.read_file(TEXT_PATH).await.context("read")?;
    same(TEXT, &String::from_utf8_lossy(&read))?;
    // The command sees what the API wrote.
    same(TEXT, &output(sandbox, &shell(&format!("cat {TEXT_PATH}"))).await?)?;
    Ok("text is the same for the API and for commands".to_owned())
}

pub(super) async fn large_file(sandbox: &SandboxClient) -> anyhow::Result<String> {
    // Every byte value, and no period that a buffer's size is a multiple of.
    let content: Vec<u8> = (0..LARGE_BYTES).map(|index| (index % 251) as u8).collect();
    let options = UploadOptions { size_bytes: Some(content.len() as u64), ..UploadOptions::default() };
    sandbox.upload(LARGE_PATH, std::io::Cursor::new(content.clone()), &options).await.context("upload")?;
    let read = sandbox.download(LARGE_PATH, None).await.context("download")?.bytes().await.context("download")?;
    ensure!(read == content, "the file came back with {} bytes, or other ones", read.len());
    Ok(format!("{} there and back", bytes(content.len() as u64)))
}

pub(super) async fn list_and_remove(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let request = WriteRequest { path: LISTED_PATH.to_owned(), content: TEXT.to_owned(), ..WriteRequest::default() };
    sandbox.write_file(&request).await.context("write")?;
    let listed = sandbox.list_files(DIRECTORY).await.context("list")?;
    let paths: Vec<&str> = listed.iter().map(|file| file.path.as_str()).collect();
    ensure!(paths.iter().any(|path| path.ends_with("/listed")), "the directory shows only {paths:?}");
    sandbox.remove_all(DIRECTORY).await.context("remove")?;
    ensure!(sandbox.stat(DIRECTORY).await.is_err(), "the directory is still there");
    Ok("files are listed and removed".to_owned())
}

/// Needs real programs: something listens, and the server sees it.
pub(super) async fn ports(sandbox: &SandboxClient) -> anyhow::Result<String> {
    let seen = async {
        while !sandbox.ports().await?.iter().any(|port| port.port == PORT) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        anyhow::Ok(())
    };
    Box::pin(while_serving(sandbox, LISTEN, seen)).await?;
    Ok(format!("a program that listens on {PORT} is seen"))
}

/// A page that a program serves inside, opened at its public address.
pub(super) async fn preview(sandbox: &SandboxClient) -> anyhow::Result<String> {
    // Nobody else's page says this.
    let page = format!("preview of {}\n", sandbox.id());
    let path = format!("{PREVIEW_DIRECTORY}/index.html");
    let request = WriteRequest { path, content: page.clone(), ..WriteRequest::default() };
    sandbox.write_file(&request).await.context("write the page")?;
    let url = sandbox.port(PREVIEW_PORT).await?.url.unwrap_or_default();
    let serve = format!(
        "cd {PREVIEW_DIRECTORY} && {{ python3 -m http.server {PREVIEW_PORT} || busybox httpd -f -p {PREVIEW_PORT} || \
         httpd -f -p {PREVIEW_PORT}; }}"
    );
    let opened = async {
        loop {
            let answer = match sandbox.open_preview(PREVIEW_PORT, "/index.html").await {
                Ok(answer) => answer,
                Err(error) => return Err(unopened(error, &url).await),
            };
            if answer.status == 200 {
                return Ok(answer.body);
            }
            // Until something listens the server says 502.
            ensure!(answer.status == 502, "the preview answered {}", answer.status);
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    let body = Box::pin(while_serving(sandbox, &serve, opened)).await?;
    same(&page, &String::from_utf8_lossy(&body))?;
    Ok(format!("{url} shows the page"))
}

/// A preview's name may be unknown where the server itself is found.
async fn unopened(error: ClientError, url: &str) -> anyhow::Error {
    let host = url.split("://").nth(1).and_then(|rest| rest.split(['/', ':']).next()).unwrap_or_default();
    if !matches!(error, ClientError::Connect { .. }) || tokio::net::lookup_host((host, 0)).await.is_ok() {
        return error.into();
    }
    let domain = host.split_once('.').map_or(host, |(_, domain)| domain);
    let fix =
        format!("make a DNS record *.{domain} that leads to the server: server.preview_domain needs the wildcard");
    Advice::new(format!("the preview's name {host} is not found"), fix).into()
}

/// Does something while a command serves inside, which ends with that.
async fn while_serving<T>(
    sandbox: &SandboxClient,
    command: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let mut stream = sandbox.exec_stream(&shell(command)).await?;
    let mut exec_id = None;
    let mut said = Vec::new();
    let ended = async {
        while let Some(event) = stream.next().await? {
            match event {
                ExecEvent::Started { exec_id: id, .. } => exec_id = Some(id),
                ExecEvent::Output { data, .. } => said.extend(data.into_iter().take(SAID_BYTES)),
                ExecEvent::Dropped { .. } => {}
                ExecEvent::Exit(_) => break,
            }
        }
        anyhow::Ok(())
    };
    let done = tokio::select! {
        done = tokio::time::timeout(LISTEN_LIMIT, work) => Some(done),
        ended = ended => ended.map(|()| None)?,
    };
    let Some(done) = done else { return Err(serves_nothing(sandbox, &String::from_utf8_lossy(&said)).await) };
    if let Some(exec_id) = exec_id {
        sandbox.signal(&exec_id, "KILL").await.ok();
    }
    done.with_context(|| format!("nothing listened within {LISTEN_LIMIT:?}"))?
}

/// What can serve is not there, or it is and cannot.
async fn serves_nothing(sandbox: &SandboxClient, said: &str) -> anyhow::Error {
    let look = "for program in python3 busybox httpd nc; do command -v $program; done; true";
    let found = output(sandbox, &shell(look)).await.unwrap_or_default();
    if found.is_empty() {
        let fix = "pass an --image that has one of them";
        return Advice::new("nothing listened: the image has no python3, busybox, httpd or nc", fix).into();
    }
    let (found, said): (Vec<&str>, Vec<&str>) = (found.lines().collect(), said.lines().collect());
    let message = format!("nothing listened: the image has {}, which said: {}", found.join(", "), said.join("; "));
    Advice::new(
        message,
        "pass an --image whose python3 is whole (python3-minimal has no http.server), or that has busybox",
    )
    .into()
}

/// Whether this server shows ports at addresses of their own.
pub(super) async fn has_previews(sandbox: &SandboxClient) -> bool {
    sandbox.port(PREVIEW_PORT).await.is_ok_and(|port| port.url.is_some())
}

//! A container daemon, asked over the very socket that the server uses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;

/// How long one answer may take; making a container may take seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Oldest version of the API that has what is asked here.
const API: &str = "/v1.41";

#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    socket: PathBuf,
}

/// A container as `GET /containers/json` lists it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Container {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) names: Vec<String>,
    #[serde(default)]
    pub(crate) image: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) labels: BTreeMap<String, String>,
}

/// A daemon writes no labels as `null`.
fn null_is_empty<'de, D: serde::Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Container {
    /// Whether a sandbox is in it: its name or a label says so.
    pub(crate) fn is_of(&self, sandbox: &str) -> bool {
        self.names.iter().any(|name| name.contains(sandbox)) || self.labels.values().any(|value| value == sandbox)
    }
}

impl Daemon {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub(crate) async fn ping(&self) -> Result<(), String> {
        self.call(Method::GET, "/_ping", None).await.map(drop)
    }

    /// Names of the runtimes that are registered.
    pub(crate) async fn runtimes(&self) -> Result<Vec<String>, String> {
        let info = self.json(Method::GET, &format!("{API}/info"), None).await?;
        Ok(info["Runtimes"].as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default())
    }

    pub(crate) async fn has_network(&self, name: &str) -> Result<bool, String> {
        match self.call(Method::GET, &format!("{API}/networks/{name}"), None).await {
            Ok(_) => Ok(true),
            Err(why) if why.starts_with("404") => Ok(false),
            Err(why) => Err(why),
        }
    }

    /// The containers of a sandbox, running or not.
    pub(crate) async fn containers_of(&self, sandbox: &str) -> Result<Vec<Container>, String> {
        let listed = self.json(Method::GET, &format!("{API}/containers/json?all=1"), None).await?;
        let listed: Vec<Container> = serde_json::from_value(listed).map_err(|error| error.to_string())?;
        Ok(listed.into_iter().filter(|container| container.is_of(sandbox)).collect())
    }

    /// The runtime that a container was made with.
    pub(crate) async fn runtime_of(&self, id: &str) -> Result<String, String> {
        let inspected = self.json(Method::GET, &format!("{API}/containers/{id}/json"), None).await?;
        let runtime = inspected["HostConfig"]["Runtime"].as_str();
        runtime.map(str::to_owned).ok_or_else(|| "the daemon does not say which runtime".to_owned())
    }

    pub(crate) async fn remove(&self, id: &str) -> Result<(), String> {
        self.call(Method::DELETE, &format!("{API}/containers/{id}?force=1"), None).await.map(drop)
    }

    /// Makes and starts a container that idles, with the labels of another one.
    pub(crate) async fn plant(&self, like: &Container, name: &str, labels: &Value) -> Result<String, String> {
        let body = json!({ "Image": like.image, "Entrypoint": ["sleep", "3600"], "Cmd": [], "Labels": labels });
        let made = self.json(Method::POST, &format!("{API}/containers/create?name={name}"), Some(&body)).await?;
        let id = made["Id"].as_str().ok_or("the daemon made a container without an id")?.to_owned();
        self.call(Method::POST, &format!("{API}/containers/{id}/start"), None).await?;
        Ok(id)
    }

    async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let answer = self.call(method, path, body).await?;
        serde_json::from_slice(&answer).map_err(|error| format!("what answers is no container daemon: {error}"))
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, String> {
        let work = self.exchange(method, path, body);
        let late = |_| format!("no answer at {} within {ANSWER_LIMIT:?}", self.socket.display());
        tokio::time::timeout(ANSWER_LIMIT, work).await.map_err(late)?
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, String> {
        let said = |error: &dyn std::fmt::Display| format!("{}: {error}", self.socket.display());
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| said(&error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| said(&error))?;
        let connection = tokio::spawn(connection);
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "docker")
            .header("content-type", "application/json")
            .body(Full::new(bytes))
            .map_err(|error| said(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| said(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
        connection.abort();
        let body = body.map_err(|error| said(&error))?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let message = serde_json::from_slice::<Value>(&body).ok();
        let message = message.and_then(|value| Some(value["message"].as_str()?.to_owned())).unwrap_or_default();
        Err(format!("{} {message}", status.as_u16()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    /// Answers as a daemon does, and keeps what it was asked.
    fn fake(directory: &Path) -> (Daemon, Arc<Mutex<Vec<String>>>) {
        let socket = directory.join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 8192];
                let length = stream.read(&mut request).await.unwrap();
                let text = String::from_utf8_lossy(&request[..length]).into_owned();
                let line = text.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1").to_owned();
                let (status, body) = answer(&line);
                kept.lock().unwrap().push(line);
                let head = format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            }
        });
        (Daemon::new(&socket), asked)
    }

    fn answer(line: &str) -> (u16, &'static str) {
        match line {
            "GET /_ping" => (200, "OK"),
            "GET /v1.41/info" => (200, r#"{"Runtimes":{"runc":{},"runsc":{}}}"#),
            "GET /v1.41/networks/ours" => (200, "{}"),
            "GET /v1.41/networks/other" => (404, r#"{"message":"network other not found"}"#),
            "GET /v1.41/containers/json?all=1" => (
                200,
                r#"[{"Id":"c1","Names":["/stacyvm-sb-1"],"Image":"i","Labels":{"stacyvm.sandbox":"sb-1"},"State":"running"},
                    {"Id":"c2","Names":["/other"],"Image":"i","Labels":null}]"#,
            ),
            "GET /v1.41/containers/c1/json" => (200, r#"{"HostConfig":{"Runtime":"runsc"}}"#),
            "POST /v1.41/containers/create?name=again" => (201, r#"{"Id":"c3"}"#),
            "POST /v1.41/containers/c3/start" | "DELETE /v1.41/containers/c3?force=1" => (204, ""),
            _ => (500, r#"{"message":"it broke"}"#),
        }
    }

    #[tokio::test]
    async fn it_is_asked_over_its_socket() {
        let directory = tempfile::tempdir().unwrap();
        let (daemon, asked) = fake(directory.path());
        daemon.ping().await.unwrap();
        assert_eq!(daemon.runtimes().await.unwrap(), ["runc", "runsc"]);
        assert_eq!((daemon.has_network("ours").await, daemon.has_network("other").await), (Ok(true), Ok(false)));
        assert_eq!(daemon.has_network("broken").await, Err("500 it broke".to_owned()));
        let found = daemon.containers_of("sb-1").await.unwrap();
        assert_eq!(found.iter().map(|container| container.id.as_str()).collect::<Vec<_>>(), ["c1"]);
        assert_eq!(daemon.runtime_of("c1").await.unwrap(), "runsc");
        let planted = daemon.plant(&found[0], "again", &json!(found[0].labels)).await.unwrap();
        daemon.remove(&planted).await.unwrap();
        assert_eq!(asked.lock().unwrap().last().unwrap(), "DELETE /v1.41/containers/c3?force=1");
        let nobody = Daemon::new(&directory.path().join("missing.sock"));
        assert!(nobody.ping().await.unwrap_err().contains("missing.sock"));
    }
}

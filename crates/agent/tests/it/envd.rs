//! The wire as E2B's SDKs speak it: JSON over HTTP/1.1.

use std::path::PathBuf;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::harness::{Agent, PATIENCE, TOKEN};

/// Speaks HTTP by hand, one request for each connection.
pub(crate) struct Client {
    socket: PathBuf,
    token: String,
}

#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("JSON: {:?}", self.text()))
    }

    /// The JSON messages of a stream, each with its flag.
    pub(crate) fn frames(&self) -> Vec<(u8, serde_json::Value)> {
        let mut frames = Vec::new();
        let mut rest = self.body.as_slice();
        while let [flag, a, b, c, d, after @ ..] = rest {
            let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
            frames.push((*flag, serde_json::from_slice(&after[..length]).expect("JSON")));
            rest = &after[length..];
        }
        frames
    }
}

impl Client {
    pub(crate) fn new(agent: &Agent) -> Self {
        Self::with_token(agent, TOKEN)
    }

    pub(crate) fn with_token(agent: &Agent, token: &str) -> Self {
        Self { socket: agent.socket.clone(), token: token.to_owned() }
    }

    pub(crate) async fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = format!(
            "{method} {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\nx-access-token: {}\r\n\
             content-length: {}\r\n",
            self.token,
            body.len()
        );
        for (name, value) in headers {
            request.extend([*name, ": ", *value, "\r\n"]);
        }
        request.push_str("\r\n");
        let mut stream = UnixStream::connect(&self.socket).await.expect("the agent listens");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        // Who is refused early may find the door closed before all is said.
        let _ = stream.write_all(body).await;
        let mut bytes = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("an answer").expect("an answer");
        parse(&bytes)
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.send("GET", target, &[], b"").await
    }

    /// A unary call.
    pub(crate) async fn call(&self, method: &str, json: &str) -> Answer {
        let headers = [("content-type", "application/json"), ("connect-protocol-version", "1")];
        self.send("POST", &format!("/{method}"), &headers, json.as_bytes()).await
    }

    /// A call that answers with a stream.
    pub(crate) async fn stream(&self, method: &str, json: &str, headers: &[(&str, &str)]) -> Answer {
        let mut all = vec![("content-type", "application/connect+json"), ("connect-protocol-version", "1")];
        all.extend_from_slice(headers);
        let body = [&[0][..], &(json.len() as u32).to_be_bytes(), json.as_bytes()].concat();
        self.send("POST", &format!("/{method}"), &all, &body).await
    }
}

fn parse(bytes: &[u8]) -> Answer {
    let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole head");
    let head = String::from_utf8_lossy(&bytes[..split]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    let mut rest = &bytes[split + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return Answer { status, head, body: rest.to_vec() };
    }
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n").expect("a chunk size");
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).expect("text"), 16).expect("a size");
        if size == 0 {
            return Answer { status, head, body };
        }
        body.extend_from_slice(&rest[line + 2..line + 2 + size]);
        rest = &rest[line + 2 + size + 2..];
    }
}

#[tokio::test]
async fn a_command_runs_as_the_sdk_asks() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    let request = r#"{"process":{"cmd":"/bin/sh","args":["-c","printf hi; exit 3"],"envs":{"A":"b"}},"stdin":false}"#;
    let frames = client.stream("process.Process/Start", request, &[]).await.frames();
    assert!(frames[0].1["event"]["start"]["pid"].as_u64().is_some_and(|pid| pid > 1), "{frames:?}");
    assert_eq!(frames[1].1["event"]["data"]["stdout"], "aGk=");
    let end = &frames[2].1["event"]["end"];
    assert_eq!((&end["exitCode"], &end["exited"], &end["status"]), (&3.into(), &true.into(), &"exit status 3".into()));
    assert_eq!(frames[3], (2, serde_json::json!({})));
}

#[tokio::test]
async fn a_timeout_ends_the_process_and_the_stream() {
    let agent = Agent::start();
    let request = r#"{"process":{"cmd":"sh","args":["-c","echo partial; sleep 1000"]}}"#;
    let timeout = [("connect-timeout-ms", "400")];
    let frames = Client::new(&agent).stream("process.Process/Start", request, &timeout).await.frames();
    assert_eq!(frames[1].1["event"]["data"]["stdout"], "cGFydGlhbAo=");
    let (flag, last) = frames.last().expect("an end");
    assert_eq!((*flag, &last["error"]["code"]), (2, &"deadline_exceeded".into()));
}

#[tokio::test]
async fn processes_are_listed_fed_and_killed() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    let start = r#"{"process":{"cmd":"cat"},"tag":"c","stdin":true}"#;
    let cat = tokio::spawn({
        let client = Client::new(&agent);
        async move { client.stream("process.Process/Start", start, &[("keepalive-ping-interval", "1")]).await }
    });
    crate::harness::eventually("it is listed", async || {
        client.call("process.Process/List", "{}").await.text().contains(r#""tag":"c""#)
    })
    .await;
    let input = r#"{"process":{"tag":"c"},"input":{"stdin":"YQ=="}}"#;
    assert_eq!(client.call("process.Process/SendInput", input).await.text(), "{}");
    let stream: Vec<u8> =
        [r#"{"start":{"process":{"tag":"c"}}}"#, r#"{"data":{"input":{"stdin":"Yg=="}}}"#, r#"{"keepalive":{}}"#]
            .iter()
            .flat_map(|message| [&[0][..], &(message.len() as u32).to_be_bytes(), message.as_bytes()].concat())
            .collect();
    let headers = [("content-type", "application/connect+json")];
    let streamed = client.send("POST", "/process.Process/StreamInput", &headers, &stream).await;
    assert_eq!(streamed.frames(), [(0, serde_json::json!({})), (2, serde_json::json!({}))]);
    assert_eq!(client.call("process.Process/CloseStdin", r#"{"process":{"tag":"c"}}"#).await.status, 200);
    let frames = cat.await.expect("no panic").frames();
    let text: String = frames.iter().filter_map(|(_, frame)| frame["event"]["data"]["stdout"].as_str()).collect();
    assert!(["YQ==Yg==", "YWI="].contains(&text.as_str()), "{frames:?}");

    let unknown = client.call("process.Process/SendSignal", r#"{"process":{"pid":1},"signal":"SIGNAL_SIGKILL"}"#).await;
    assert_eq!((unknown.status, &unknown.json()["code"]), (404, &"not_found".into()));
}

#[tokio::test]
async fn an_ended_process_can_still_be_connected_to() {
    let agent = Agent::start();
    let output = agent.shell("kill -9 $$").await;
    let selector = format!(r#"{{"process":{{"pid":{}}}}}"#, output.pid);
    let frames = Client::new(&agent).stream("process.Process/Connect", &selector, &[]).await.frames();
    let end = &frames[1].1["event"]["end"];
    assert_eq!((&end["exitCode"], &end["status"]), (&(-1).into(), &"signal: killed".into()));
}

#[tokio::test]
async fn files_are_uploaded_in_both_forms() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    let (one, two) = (agent.path("one"), agent.path("dir/two"));
    let part = |name: &str, content: &str| {
        format!(
            "--B\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             content-type: application/octet-stream\r\n\r\n{content}\r\n"
        )
    };
    let body = format!("{}{}--B--\r\n", part(&one, "1"), part(&two, "22"));
    let multipart = [("content-type", "multipart/form-data; boundary=B")];
    let answer = client.send("POST", "/files", &multipart, body.as_bytes()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(
        answer.json(),
        serde_json::json!([
            {"path": one, "name": "one", "type": "file"},
            {"path": two, "name": "two", "type": "file"},
        ])
    );
    assert_eq!(std::fs::read_to_string(&two).expect("written"), "22");

    let octets = [("content-type", "application/octet-stream")];
    let answer = client.send("POST", &format!("/files?path={one}"), &octets, b"new").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(client.get(&format!("/files?path={one}")).await.body, b"new");
    let range = client.send("GET", &format!("/files?path={one}"), &[("range", "bytes=1-")], b"").await;
    assert_eq!((range.status, range.body.as_slice()), (206, &b"ew"[..]));
    assert!(range.head.contains("content-range: bytes 1-2/3"), "{}", range.head);
    assert_eq!(client.get(&format!("/files?path={one}.none")).await.status, 404);
    assert_eq!(client.get(&format!("/files?path={}", agent.path("dir"))).await.status, 400);
    assert_eq!(client.get("/files?path=/x&username=no-such").await.status, 401);
}

#[tokio::test]
async fn directories_answer_with_the_codes_sdks_match() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    let path = agent.path("d");
    let request = format!(r#"{{"path":"{path}"}}"#);
    let made = client.call("filesystem.Filesystem/MakeDir", &request).await;
    assert_eq!((made.status, &made.json()["entry"]["type"]), (200, &"FILE_TYPE_DIRECTORY".into()));
    let again = client.call("filesystem.Filesystem/MakeDir", &request).await;
    assert_eq!((again.status, &again.json()["code"]), (409, &"already_exists".into()));
    let entry = client.call("filesystem.Filesystem/Stat", &request).await.json()["entry"].clone();
    assert_eq!((&entry["permissions"], &entry["mode"]), (&"drwxr-xr-x".into(), &0o755.into()));
    assert!(entry["modifiedTime"].as_str().is_some_and(|time| time.ends_with('Z')), "{entry}");
    for _ in 0..2 {
        assert_eq!(client.call("filesystem.Filesystem/Remove", &request).await.text(), "{}");
    }
    let missing = client.call("filesystem.Filesystem/Stat", &request).await;
    assert_eq!((missing.status, &missing.json()["code"]), (404, &"not_found".into()));
    let unknown = client.call("filesystem.Filesystem/NoSuch", "{}").await;
    assert_eq!(unknown.json()["code"], "unimplemented");
}

#[tokio::test]
async fn what_is_not_a_service_answers_too() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    assert_eq!(client.get("/health").await.status, 204);
    let metrics = client.get("/metrics").await.json();
    assert!(metrics["mem_total"].as_u64().is_some_and(|bytes| bytes > 0), "{metrics}");
    let init = client.send("POST", "/init", &[], br#"{"envVars":{"LATE":"yes"},"accessToken":"second"}"#).await;
    assert_eq!(init.status, 204);
    assert_eq!(client.get("/envs").await.status, 401, "the old token has stopped working");
    let envs = Client::with_token(&agent, "second").get("/envs").await.json();
    assert_eq!(envs["LATE"], "yes");
}

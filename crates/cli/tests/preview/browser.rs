//! Chromium without a window, driven by the DevTools protocol over a pipe: one
//! JSON message after the other, each ended by a zero byte, on descriptors 3
//! and 4.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{Mutex, oneshot};

use crate::server::{eventually, within};

/// Names that do not exist lead to this machine, as rebound names do.
const RESOLVER: &str = "--host-resolver-rules=MAP evil.example 127.0.0.1";

type Waiting = Arc<std::sync::Mutex<HashMap<u64, oneshot::Sender<Value>>>>;

pub(crate) struct Browser {
    process: Child,
    commands: Arc<Mutex<ChildStdin>>,
    waiting: Waiting,
    next_id: Arc<AtomicU64>,
    _profile: TempDir,
}

/// A tab.
pub(crate) struct Page<'a> {
    browser: &'a Browser,
    session: String,
}

impl Browser {
    pub(crate) fn start() -> Self {
        let profile = tempfile::tempdir().expect("a directory");
        let program = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].into_iter().find(|it| Path::new(it).exists());
        let program = program.expect("Chromium is missing: apt-get install chromium");
        // The shell only moves the pipes to where Chromium looks for them.
        let mut process = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", program])
            .args(["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"])
            .args(["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"])
            // Frames have cookies only where they are partitioned.
            .args(["--test-third-party-cookie-phaseout", "--window-size=800,720", RESOLVER])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("a shell");
        let commands = Arc::new(Mutex::new(process.stdin.take().expect("piped")));
        let waiting = Waiting::default();
        tokio::spawn(read(process.stdout.take().expect("piped"), Arc::clone(&waiting)));
        Self { process, commands, waiting, next_id: Arc::default(), _profile: profile }
    }

    pub(crate) async fn open(&self, url: &str) -> Page<'_> {
        let target = self.call(None, "Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call(None, "Target.attachToTarget", attach).await;
        let session = attached["sessionId"].as_str().expect("a session").to_owned();
        let page = Page { browser: self, session };
        page.go(url).await;
        page
    }

    pub(crate) async fn close(mut self) {
        self.send(&json!({ "id": 0, "method": "Browser.close" })).await;
        within("Chromium ends", self.process.wait()).await.expect("its status");
    }

    async fn call(&self, session: Option<&str>, method: &str, parameters: Value) -> Value {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed) + 1;
        let (tell, told) = oneshot::channel();
        self.waiting.lock().expect("not poisoned").insert(id, tell);
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = json!(session);
        }
        self.send(&message).await;
        let answer = within(method, told).await.expect("Chromium has ended");
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    async fn send(&self, message: &Value) {
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.commands.lock().await.write_all(&bytes).await.expect("Chromium has ended");
    }
}

impl Page<'_> {
    pub(crate) async fn go(&self, url: &str) {
        self.browser.call(Some(&self.session), "Page.navigate", json!({ "url": url })).await;
    }

    /// What a script on the page comes to.
    pub(crate) async fn evaluate(&self, script: &str) -> Result<Value, String> {
        let parameters = json!({ "expression": script, "awaitPromise": true, "returnByValue": true });
        let result = self.browser.call(Some(&self.session), "Runtime.evaluate", parameters).await;
        match result.get("exceptionDetails") {
            None => Ok(result["result"]["value"].clone()),
            Some(details) => Err(details["exception"]["description"].as_str().unwrap_or("an exception").to_owned()),
        }
    }

    /// Waits until a script on the page comes to this.
    pub(crate) async fn until(&self, script: &str, wanted: &Value) {
        let seen = std::sync::Mutex::new(Value::Null);
        let wait = eventually(script, || async {
            // A page that is just being replaced has no answer.
            let value = self.evaluate(script).await.unwrap_or_default();
            let found = value == *wanted;
            *seen.lock().expect("not poisoned") = value;
            found.then_some(())
        });
        if tokio::time::timeout(crate::server::PATIENCE / 2, wait).await.is_err() {
            let page = self.evaluate("document.documentElement.outerHTML").await;
            panic!("`{script}` never was {wanted}, but {}\n{page:?}", seen.lock().expect("not poisoned"));
        }
    }

    /// Writes a picture of the page for people to look at.
    pub(crate) async fn screenshot(&self, name: &str) -> PathBuf {
        let shot = self.browser.call(Some(&self.session), "Page.captureScreenshot", json!({ "format": "png" })).await;
        let data = base64::engine::general_purpose::STANDARD.decode(shot["data"].as_str().expect("a picture"));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let data = data.expect("base64");
        assert!(data.starts_with(b"\x89PNG"), "no picture");
        std::fs::write(&path, data).expect("the target directory can be written");
        path
    }
}

async fn read(output: ChildStdout, waiting: Waiting) {
    let mut output = BufReader::new(output);
    let mut message = Vec::new();
    while matches!(output.read_until(0, &mut message).await, Ok(count) if count > 0) {
        message.pop();
        let answer: Value = serde_json::from_slice(&message).expect("JSON");
        message.clear();
        let asked = answer["id"].as_u64().and_then(|id| waiting.lock().expect("not poisoned").remove(&id));
        if let Some(asked) = asked {
            // Whoever asked may have given up.
            let _ = asked.send(answer);
        }
    }
    waiting.lock().expect("not poisoned").clear();
}

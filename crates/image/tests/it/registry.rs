//! A real registry on loopback, and a front before it that misbehaves on order.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use serde_json::json;
use stacyvm_image::Digest;
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::build::{OCI_INDEX, OCI_MANIFEST, TestImage};

/// `tester` with the password `pw`, as `htpasswd -B` writes it.
const HTPASSWD: &str = "tester:$2b$05$abcdefghijklmnopqrstuuHIrMEWpUCQe2YqFR3sXwQ75u4od..9q\n";

fn http_client() -> reqwest::Client {
    // Whoever comes first in this process sets it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// Debian's `docker-registry`, ended with the value.
pub(crate) struct RealRegistry {
    child: Child,
    pub(crate) host: String,
    password: Option<&'static str>,
    directory: Arc<TempDir>,
}

impl RealRegistry {
    pub(crate) fn start() -> Self {
        Self::launch(Arc::new(TempDir::new().unwrap()), None, "")
    }

    /// Only `tester` gets in.
    pub(crate) fn start_with_password() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("htpasswd");
        std::fs::write(&path, HTPASSWD).unwrap();
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", path.display());
        Self::launch(Arc::new(directory), Some("pw"), &auth)
    }

    /// The same content over TLS; certificate and key as PEM files.
    pub(crate) fn restart_with_tls(self, certificate: &Path, key: &Path) -> Self {
        let tls = format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
        Self::launch(self.directory.clone(), None, &tls)
    }

    fn launch(directory: Arc<TempDir>, password: Option<&'static str>, more: &str) -> Self {
        let path = directory.path().display();
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http:\n  addr: '127.0.0.1:0'\n  secret: test\n{more}"
        );
        let config_path = directory.path().join("config.yml");
        std::fs::write(&config_path, config).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config_path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}; install it (scripts/test-packages.txt)"));
        // It picks a free port and says which.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let host = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, rest) = line.split_once("listening on ")?;
                Some(rest.split(['"', ' ', ',']).next().unwrap_or_default().to_owned())
            })
            .expect("docker-registry says where it listens");
        // Keeps the pipe from filling up; ends with the process.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, host, password, directory }
    }

    pub(crate) async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in std::iter::once(&image.config).chain(image.layers.iter().map(|layer| &layer.bytes)) {
            self.push_blob(repository, blob).await;
        }
        self.push_manifest(repository, tag, OCI_MANIFEST, &image.manifest).await;
    }

    /// One name for several platforms; the images must be pushed already.
    pub(crate) async fn push_index(&self, repository: &str, tag: &str, images: &[(&str, &TestImage)]) -> Digest {
        let manifests: Vec<_> = images
            .iter()
            .map(|(architecture, image)| {
                json!({
                    "mediaType": OCI_MANIFEST, "digest": image.digest(), "size": image.manifest.len(),
                    "platform": { "os": "linux", "architecture": architecture },
                })
            })
            .collect();
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests }).to_string();
        self.push_manifest(repository, tag, OCI_INDEX, index.as_bytes()).await;
        Digest::of(index.as_bytes())
    }

    async fn push_blob(&self, repository: &str, bytes: &[u8]) {
        let client = http_client();
        let start = self.authorized(client.post(format!("http://{}/v2/{repository}/blobs/uploads/", self.host)));
        let start = start.send().await.unwrap().error_for_status().unwrap();
        let location = start.headers()[header::LOCATION].to_str().unwrap();
        let separator = if location.contains('?') { '&' } else { '?' };
        let put = client.put(format!("{location}{separator}digest={}", Digest::of(bytes))).body(bytes.to_vec());
        self.authorized(put).send().await.unwrap().error_for_status().unwrap();
    }

    pub(crate) async fn push_manifest(&self, repository: &str, selector: &str, media_type: &str, bytes: &[u8]) {
        let put = http_client()
            .put(format!("http://{}/v2/{repository}/manifests/{selector}", self.host))
            .header(header::CONTENT_TYPE, media_type)
            .body(bytes.to_vec());
        self.authorized(put).send().await.unwrap().error_for_status().unwrap();
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match self.password {
            Some(password) => request.basic_auth("tester", Some(password)),
            None => request,
        }
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the front does to requests that would be answered well.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Ignores ranges: always answers from the start.
    pub(crate) ignore_ranges: bool,
    /// Flips a bit in every blob.
    pub(crate) corrupt_blobs: bool,
    /// Answers manifests with this instead.
    pub(crate) manifest: Option<Vec<u8>>,
    /// Answers everything with this status, this often.
    pub(crate) status: Option<(u16, usize)>,
    /// Wants `Bearer SECRET`, to be had from its own token service.
    pub(crate) token: Option<TokenRules>,
    /// Blobs are elsewhere.
    pub(crate) redirect_blobs_to: Option<String>,
    /// Blobs wait until told to go on.
    pub(crate) hold_blobs: Option<tokio::sync::watch::Receiver<bool>>,
}

#[derive(Debug, Clone)]
pub(crate) struct TokenRules {
    pub(crate) realm: Option<String>,
    /// What the token service wants to see, in `Authorization` or the form.
    pub(crate) credential: Option<&'static str>,
}

/// A request as the front saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

struct FrontState {
    upstream: String,
    host: String,
    faults: Mutex<Faults>,
    seen: Mutex<Vec<Seen>>,
}

pub(crate) struct Front {
    pub(crate) host: String,
    state: Arc<FrontState>,
    server: JoinHandle<()>,
}

impl Front {
    pub(crate) async fn before(upstream: &str, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(FrontState {
            upstream: upstream.to_owned(),
            host: host.clone(),
            faults: Mutex::new(faults),
            seen: Mutex::default(),
        });
        let router = Router::new().fallback(answer).with_state(state.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { host, state, server }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    pub(crate) fn seen_blobs(&self, digest: &Digest) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.path.ends_with(digest.as_str())).collect()
    }

    pub(crate) fn set(&self, faults: Faults) {
        *self.state.faults.lock().unwrap() = faults;
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(State(state): State<Arc<FrontState>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let text = |name: header::HeaderName| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let path = parts.uri.path().to_owned();
    let seen = Seen { path: path.clone(), range: text(header::RANGE), authorization: text(header::AUTHORIZATION) };
    state.seen.lock().unwrap().push(seen.clone());
    let faults = state.faults.lock().unwrap().clone();
    if let Some((status, left)) = faults.status
        && left > 0
    {
        state.faults.lock().unwrap().status = Some((status, left - 1));
        return respond(StatusCode::from_u16(status).unwrap(), HeaderMap::new(), Body::empty());
    }
    if let Some(rules) = &faults.token {
        if path == "/token" {
            let form = axum::body::to_bytes(body, 10_000).await.unwrap();
            let offered = format!("{} {}", seen.authorization.unwrap_or_default(), String::from_utf8_lossy(&form));
            let query = parts.uri.query().unwrap_or_default().to_owned() + &offered;
            assert!(query.contains("repository%3Ateam%2Ftool%3Apull"), "{query}");
            if rules.credential.is_some_and(|wanted| !offered.contains(wanted)) {
                return respond(StatusCode::UNAUTHORIZED, HeaderMap::new(), Body::empty());
            }
            return respond(StatusCode::OK, HeaderMap::new(), Body::from(r#"{"access_token":"SECRET"}"#));
        }
        if seen.authorization.as_deref() != Some("Bearer SECRET") {
            let realm = rules.realm.clone().unwrap_or_else(|| format!("http://{}/token", state.host));
            let mut headers = HeaderMap::new();
            let challenge = format!("Bearer realm=\"{realm}\",service=\"test\"");
            headers.insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
            return respond(StatusCode::UNAUTHORIZED, headers, Body::empty());
        }
    }
    if path.contains("/manifests/")
        && let Some(manifest) = faults.manifest
    {
        return respond(StatusCode::OK, HeaderMap::new(), Body::from(manifest));
    }
    forward(&state, faults, &seen).await
}

async fn forward(state: &FrontState, faults: Faults, seen: &Seen) -> Response<Body> {
    let is_blob = seen.path.contains("/blobs/");
    if is_blob && let Some(elsewhere) = &faults.redirect_blobs_to {
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, format!("{elsewhere}{}", seen.path).parse().unwrap());
        return respond(StatusCode::TEMPORARY_REDIRECT, headers, Body::empty());
    }
    if is_blob && let Some(mut go) = faults.hold_blobs {
        go.wait_for(|go| *go).await.unwrap();
    }
    let mut request = http_client()
        .get(format!("http://{}{}", state.upstream, seen.path))
        .header(header::ACCEPT, format!("{OCI_MANIFEST}, {OCI_INDEX}"));
    if let Some(range) = seen.range.as_ref().filter(|_| !faults.ignore_ranges) {
        request = request.header(header::RANGE, range);
    }
    let upstream = request.send().await.unwrap();
    let status = upstream.status();
    let mut headers = upstream.headers().clone();
    headers.remove(header::TRANSFER_ENCODING);
    let mut bytes = upstream.bytes().await.unwrap().to_vec();
    if !is_blob {
        return respond(status, headers, Body::from(bytes));
    }
    if faults.corrupt_blobs {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }
    respond(status, headers, Body::from(bytes))
}

/// A wire that breaks: what was let through arrives, then the connection ends.
pub(crate) struct Cutter {
    pub(crate) host: String,
    plan: Arc<Mutex<CutPlan>>,
    server: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct CutPlan {
    /// Bytes towards the client before the connection breaks.
    pub(crate) after_bytes: u64,
    /// Connections that break like this.
    pub(crate) cuts: usize,
    /// Later ones break at once, or work.
    pub(crate) then_refuse: bool,
}

impl Cutter {
    pub(crate) async fn before(upstream: &str, plan: CutPlan) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let plan = Arc::new(Mutex::new(plan));
        let (shared, upstream) = (plan.clone(), upstream.to_owned());
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let upstream = TcpStream::connect(&upstream).await.unwrap();
                connections.spawn(relay(client, upstream, shared.clone()));
            }
        });
        Self { host, plan, server }
    }

    pub(crate) fn repair(&self) {
        *self.plan.lock().unwrap() = CutPlan { after_bytes: u64::MAX, cuts: 0, then_refuse: false };
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn relay(mut client: TcpStream, mut upstream: TcpStream, plan: Arc<Mutex<CutPlan>>) {
    let limit = match *plan.lock().unwrap() {
        CutPlan { after_bytes, cuts: 1.., .. } => after_bytes,
        CutPlan { then_refuse: true, .. } => return,
        CutPlan { .. } => u64::MAX,
    };
    let (mut from_client, mut to_client) = client.split();
    let (from_upstream, mut to_upstream) = upstream.split();
    let answers = async {
        let sent = tokio::io::copy(&mut from_upstream.take(limit), &mut to_client).await.unwrap_or(0);
        if sent == limit {
            let mut plan = plan.lock().unwrap();
            plan.cuts = plan.cuts.saturating_sub(1);
        }
    };
    tokio::select! {
        () = answers => {}
        _ = tokio::io::copy(&mut from_client, &mut to_upstream) => {}
    }
}

fn respond(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

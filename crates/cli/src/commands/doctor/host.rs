//! What can be asked of a host without changing it: files, programs, a
//! container daemon. Tests put a directory in the place of the host's root.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// How long a program or a daemon may take to answer (control-plane 3.4).
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Longest answer of a daemon that is read; real ones are a few kilobytes.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The machine that is looked at.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    path: Vec<PathBuf>,
    pub(super) is_root: bool,
    /// What `DOCKER_HOST` says.
    daemon_address: Option<String>,
}

/// What a container daemon says about itself (`GET /info`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct DaemonInfo {
    pub(super) server_version: String,
    pub(super) runtimes: std::collections::BTreeMap<String, serde_json::Value>,
    pub(super) security_options: Option<Vec<String>>,
}

impl Host {
    pub(super) fn this(path: Option<&str>, daemon_address: Option<&str>) -> Self {
        let path = path.unwrap_or(DEFAULT_PATH).split(':').chain(["/usr/sbin", "/sbin"]).map(PathBuf::from).collect();
        let is_root = rustix::process::geteuid().is_root();
        Self { root: PathBuf::from("/"), path, is_root, daemon_address: daemon_address.map(str::to_owned) }
    }

    #[cfg(test)]
    pub(super) fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), path: vec![PathBuf::from("/usr/bin")], is_root: true, daemon_address: None }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn is_file(&self, path: &Path) -> bool {
        self.at(path).is_file()
    }

    pub(super) fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.at(Path::new(path))).ok()
    }

    /// Whether a device is there and may be used.
    pub(super) fn opens(&self, path: &str) -> io::Result<()> {
        OpenOptions::new().read(true).write(true).open(self.at(Path::new(path))).map(drop)
    }

    /// Whether files may be made in a directory.
    pub(super) fn is_writable(&self, path: &Path) -> bool {
        rustix::fs::access(self.at(path), rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// A program by its name, or at a path.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        let is_executable = |path: &Path| {
            let path = self.at(path);
            path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
        };
        if name.contains('/') {
            let path = PathBuf::from(name);
            return is_executable(&path).then_some(path);
        }
        self.path.iter().map(|directory| directory.join(name)).find(|path| is_executable(path))
    }

    /// Runs a program of this host to its end; what it said when it failed.
    pub(super) async fn try_run(&self, program: &str, arguments: &[&str]) -> Result<(), String> {
        let path = self.program(program).ok_or_else(|| format!("{program} is not installed"))?;
        let mut command = tokio::process::Command::new(self.at(&path));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let output = match tokio::time::timeout(ANSWER_LIMIT, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("no answer within {} s", ANSWER_LIMIT.as_secs())),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(said.lines().last().unwrap_or("it failed without a word").trim().to_owned())
    }

    /// The socket of the container daemon; `configured` wins.
    pub(super) fn docker_socket(&self, configured: &str) -> Result<PathBuf, String> {
        let wanted = Some(configured).filter(|text| !text.is_empty()).or(self.daemon_address.as_deref());
        match wanted {
            None => Ok(PathBuf::from("/var/run/docker.sock")),
            Some(text) if text.starts_with('/') => Ok(PathBuf::from(text)),
            Some(text) => match text.strip_prefix("unix://") {
                Some(path) => Ok(PathBuf::from(path)),
                None => Err(format!("{text} is not a socket of this host, and is not asked")),
            },
        }
    }

    /// Asks the daemon at a socket what it is.
    pub(super) async fn daemon_info(&self, socket: &Path) -> io::Result<DaemonInfo> {
        let socket = self.at(socket);
        let asked = tokio::time::timeout(ANSWER_LIMIT, get_info(&socket)).await;
        asked.unwrap_or_else(|_| Err(io::Error::new(ErrorKind::TimedOut, "no answer in time")))
    }
}

/// HTTP/1.0, so that the answer ends where the connection does.
async fn get_info(socket: &Path) -> io::Result<DaemonInfo> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(b"GET /info HTTP/1.0\r\nHost: docker\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await?;
    let other = |why: &str| io::Error::other(format!("what answers is no container daemon: {why}"));
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").ok_or_else(|| other("it has no headers"))?;
    let status = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    if !String::from_utf8_lossy(status).contains(" 200") {
        return Err(other(String::from_utf8_lossy(status).trim()));
    }
    serde_json::from_slice(&answer[end + 4..]).map_err(|error| other(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::net::UnixListener;

    use super::*;

    fn file(root: &Path, path: &str, mode: u32) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "#!/bin/sh\necho no >&2; exit 3\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn programs_are_found_and_run() {
        let root = tempfile::tempdir().unwrap();
        file(root.path(), "usr/bin/tool", 0o755);
        file(root.path(), "usr/bin/data", 0o644);
        let host = Host::below(root.path());
        assert_eq!(host.program("tool"), Some(PathBuf::from("/usr/bin/tool")));
        assert_eq!(host.program("/usr/bin/tool"), Some(PathBuf::from("/usr/bin/tool")));
        assert_eq!((host.program("data"), host.program("other")), (None, None));
        assert_eq!(host.try_run("tool", &[]).await, Err("no".to_owned()));
        assert_eq!(host.try_run("other", &[]).await, Err("other is not installed".to_owned()));
    }

    #[test]
    fn the_socket_is_the_configured_one_then_the_variable() {
        let mut host = Host::below(Path::new("/"));
        assert_eq!(host.docker_socket(""), Ok(PathBuf::from("/var/run/docker.sock")));
        host.daemon_address = Some("unix:///run/user/1/docker.sock".to_owned());
        assert_eq!(host.docker_socket(""), Ok(PathBuf::from("/run/user/1/docker.sock")));
        assert_eq!(host.docker_socket("/x.sock"), Ok(PathBuf::from("/x.sock")));
        assert!(host.docker_socket("tcp://10.0.0.1:2376").is_err());
    }

    async fn answer_once(root: &Path, answer: &'static [u8]) {
        let listener = UnixListener::bind(root.join("d.sock")).unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = [0; 512];
        let length = stream.read(&mut asked).await.unwrap();
        assert!(asked[..length].starts_with(b"GET /info HTTP/1.0\r\n"));
        stream.write_all(answer).await.unwrap();
    }

    async fn ask(answer: &'static [u8]) -> io::Result<DaemonInfo> {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let socket = PathBuf::from("/d.sock");
        let ask = async {
            loop {
                if root.path().join("d.sock").exists() {
                    return host.daemon_info(&socket).await;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(answer_once(root.path(), answer), ask).1
    }

    #[tokio::test]
    async fn a_daemon_says_what_it_is_and_others_are_refused() {
        let info = ask(
            b"HTTP/1.0 200 OK\r\n\r\n{\"ServerVersion\":\"27.1\",\"Runtimes\":{\"runc\":{},\"runsc\":{\"path\":\"x\"}},\
              \"SecurityOptions\":null}",
        )
        .await
        .unwrap();
        assert_eq!((info.server_version.as_str(), info.runtimes.len()), ("27.1", 2));
        assert!(ask(b"HTTP/1.0 403 Forbidden\r\n\r\n").await.unwrap_err().to_string().contains("403"));
        assert!(ask(b"hello").await.unwrap_err().to_string().contains("no headers"));
    }
}

//! A docker daemon of our own: its data, socket and bridge are not anybody
//! else's, and it leaves the firewall alone.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use crate::baseline::{find_program, succeed};

const START_LIMIT: Duration = Duration::from_secs(30);

/// Nothing that is asked here takes this long.
const ANSWER_LIMIT: Duration = Duration::from_mins(1);

/// Of the Engine API that is spoken (Docker 20.10).
const API: &str = "v1.41";

/// A daemon that runs and has the image. Ended, in order, with the value.
pub(crate) struct Dockerd {
    process: Child,
    client: PathBuf,
    socket: PathBuf,
    _bridge: Bridge,
}

impl Dockerd {
    pub(crate) fn start(archive: &Path, directory: &Path) -> anyhow::Result<Self> {
        let client = find_program("docker").context("docker is not installed")?;
        let program = find_program("dockerd").context("dockerd is not installed")?;
        let bridge = Bridge::make()?;
        fs::create_dir_all(directory)?;
        let socket = directory.join("docker.sock");
        let log = fs::File::create(directory.join("daemon.log"))?;
        let process = Command::new(program)
            .args(["--iptables=false", "--ip6tables=false", "--ip-masq=false", "--userland-proxy=false"])
            .arg(format!("--bridge={}", bridge.name))
            .arg(format!("--host=unix://{}", socket.display()))
            .arg("--data-root")
            .arg(directory.join("data"))
            .arg("--exec-root")
            .arg(directory.join("exec"))
            .arg("--pidfile")
            .arg(directory.join("docker.pid"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut daemon = Self { process, client, socket, _bridge: bridge };
        let end = Instant::now() + START_LIMIT;
        while succeed(&mut daemon.docker(&["version"])).is_err() {
            if let Some(status) = daemon.process.try_wait()? {
                let log = fs::read_to_string(directory.join("daemon.log")).unwrap_or_default();
                bail!("dockerd ended with {status}: {}", log.lines().last().unwrap_or_default());
            }
            ensure!(Instant::now() < end, "dockerd did not answer within {START_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        succeed(daemon.docker(&["load", "--input"]).arg(archive))?;
        Ok(daemon)
    }

    /// Docker's own client.
    pub(crate) fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.client);
        command.arg("--host").arg(format!("unix://{}", self.socket.display())).args(arguments);
        command
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// One request to the Engine API, on a connection of its own as clients of
    /// the daemon make them; its answer's body.
    pub(crate) fn api(&self, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(
            stream,
            "{method} /{API}{path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the daemon's answer has no end of headers")?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        ensure!(status.starts_with('2'), "{method} {path}: {status} {body}");
        Ok(body.to_owned())
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}

struct Bridge {
    name: String,
}

impl Bridge {
    fn make() -> anyhow::Result<Self> {
        // An interface's name has at most 15 characters.
        let bridge = Self { name: format!("svmb{}", std::process::id()) };
        succeed(Command::new("ip").args(["link", "add", &bridge.name, "type", "bridge"]))?;
        succeed(Command::new("ip").args(["address", "add", "198.18.255.1/24", "dev", &bridge.name]))?;
        succeed(Command::new("ip").args(["link", "set", &bridge.name, "up"]))?;
        Ok(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.name]).status();
    }
}

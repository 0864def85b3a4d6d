//! A docker daemon of the tests' own (`tests/dockerd.sh`): one for all tests of
//! a program, or one for a test that kills it.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Image of the contract suite.
pub(crate) const IMAGE: &str = "alpine:latest";

/// Ends when it is dropped, and with the program of the tests at the latest:
/// its script then reads the end of its input and cleans up.
pub(crate) struct Dockerd {
    directory: PathBuf,
    control: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    script: Child,
}

impl Dockerd {
    /// The one that tests share. Fails, rather than skips, where there is none.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Dockerd> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// One that runs and has the image of the contract suite.
    pub(crate) fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests start a docker daemon: run them as root");
        let directory = std::env::temp_dir().join(format!("stacyvm-dockerd-{:08x}", rand_u32()));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../providers/tests/dockerd.sh");
        let mut script = Command::new(script)
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the script starts");
        let (stdin, stdout) = (script.stdin.take().expect("piped"), script.stdout.take().expect("piped"));
        let daemon = Self { directory, control: Mutex::new(Some((stdin, BufReader::new(stdout)))), script };
        daemon.command("start");
        daemon.load_image();
        daemon
    }

    /// Starts it again after [`Dockerd::kill`].
    pub(crate) fn restart(&self) {
        self.command("start");
    }

    /// As a crash would.
    pub(crate) fn kill(&self) {
        self.command("kill");
    }

    fn command(&self, command: &str) {
        let mut control = self.control.lock().expect("no test panics in here");
        let (input, output) = control.as_mut().expect("only the end takes it");
        writeln!(input, "{command}").expect("the script takes commands");
        let mut answer = String::new();
        output.read_line(&mut answer).expect("the script answers");
        assert_eq!(answer.trim(), "ok", "dockerd.sh {command}");
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("docker.sock")
    }

    /// Where it listens with TLS.
    pub(crate) fn port(&self) -> u16 {
        let port = std::fs::read_to_string(self.directory.join("port")).expect("a port");
        port.trim().parse().expect("a number")
    }

    /// Runs docker's own client, which must succeed.
    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        let output = self.client(arguments);
        assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn client(&self, arguments: &[&str]) -> std::process::Output {
        self.command_line(arguments).output().expect("docker's client is there")
    }

    /// Starts docker's own client and reads what it writes, line by line.
    pub(crate) fn follow(&self, arguments: &[&str]) -> Followed {
        let mut process =
            self.command_line(arguments).stdout(Stdio::piped()).spawn().expect("docker's client is there");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        Followed { process, lines }
    }

    fn command_line(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(arguments).env("DOCKER_HOST", format!("unix://{}", self.socket().display()));
        command.env("DOCKER_CONFIG", self.directory.join("client")).env_remove("DOCKER_CONTEXT").stdin(Stdio::null());
        command
    }

    /// An image of a file system in an archive, with a configuration as in a
    /// Dockerfile.
    pub(crate) fn import(&self, archive: &Path, name: &str, changes: &[&str]) {
        let changes = changes.iter().flat_map(|change| ["--change", change]);
        let arguments: Vec<&str> =
            ["import"].into_iter().chain(changes).chain([archive.to_str().expect("text"), name]).collect();
        self.docker(&arguments);
    }

    /// The image that everybody asks for, made from busybox.
    fn load_image(&self) {
        let archive = self.directory.join("image.tar");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/make-test-image.sh");
        let made = Command::new(script).arg(&archive).arg(IMAGE).output().expect("the script starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        self.docker(&["load", "--quiet", "--input", archive.to_str().expect("text")]);
    }
}

/// A client of docker's that runs. Ends with the value.
pub(crate) struct Followed {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Iterator for Followed {
    type Item = String;

    /// Waits for the next line.
    fn next(&mut self) -> Option<String> {
        self.lines.next()?.ok()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // The end of its input has the script clean up.
        self.control.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = self.script.wait();
    }
}

fn rand_u32() -> u32 {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).expect("random bytes");
    u32::from_ne_bytes(bytes)
}

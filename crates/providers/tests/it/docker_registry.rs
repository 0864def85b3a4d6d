//! Images that the daemon has to get first, from a registry that wants to know
//! who asks.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use stacyvm_api::SandboxId;
use stacyvm_sandbox::{Progress, ProgressSink, Provider as _, ProviderError, SandboxSpec};

use crate::docker_fixture::{DockerFixture, spec};
use crate::dockerd::IMAGE;

const USER: &str = "somebody";
const PASSWORD: &str = "p4ss:word";

/// A line of `htpasswd`, by the C library's bcrypt.
const HASH: &str = "print crypt($ARGV[0], q($2y$05$abcdefghijklmnopqrstuu))";

/// Debian's `docker-registry`, ended with the value.
struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    host: String,
    _directory: tempfile::TempDir,
}

impl Registry {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, config) = (directory.path().display(), directory.path().join("config.yml"));
        let hashed = Command::new("perl").args(["-e", HASH, PASSWORD]).output().expect("perl starts");
        let users = format!("{USER}:{}\n", String::from_utf8(hashed.stdout).expect("text"));
        std::fs::write(directory.path().join("users"), users).expect("written");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http: {{addr: '127.0.0.1:0', secret: test}}\n\
             auth: {{htpasswd: {{realm: test, path: {path}/users}}}}\n"
        );
        std::fs::write(&config, text).expect("written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}; install it (scripts/test-packages.txt)"));
        // It picks a free port and says which.
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let host = lines.find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split(['"', ' ', ',']).next().unwrap_or_default().to_owned())
        });
        // Keeps the pipe from filling up; ends with the process.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, host: host.expect("it says where it listens"), _directory: directory }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Default)]
struct Recorder(Mutex<Vec<Progress>>);

impl ProgressSink for Recorder {
    fn report(&self, progress: Progress) {
        self.0.lock().expect("no panic in here").push(progress);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_with_the_credentials_of_its_registry() {
    let registry = Registry::start();
    let mut fixture = DockerFixture::start();
    let daemon = fixture.daemon;
    let image = format!("{}/team/tool:1", registry.host);
    daemon.docker(&["login", "--username", USER, "--password", PASSWORD, &registry.host]);
    daemon.docker(&["tag", IMAGE, &image]);
    daemon.docker(&["push", &image]);
    daemon.docker(&["rmi", &image]);
    let wanted = SandboxSpec { image: image.clone(), ..spec() };

    let refused = fixture.provider.create(&SandboxId::random(), &wanted, &()).await.expect_err("nobody is known");
    let ProviderError::Image { message, hint: Some(hint), .. } = &refused else { panic!("{refused:?}") };
    assert!(message.contains("refuses to show it") && hint.contains("docker login"), "{message}: {hint}");

    // As docker's own client wrote it.
    fixture.options.docker_config = Some(daemon.directory().join("client/config.json"));
    fixture.restart();
    let (id, seen) = (SandboxId::random(), Recorder::default());
    fixture.provider.create(&id, &wanted, &seen).await.expect("created");
    let seen = seen.0.into_inner().expect("no panic");
    assert!(seen.iter().any(|step| step.phase == "pull" && step.message.contains("Pull")), "{seen:?}");
    assert_eq!(fixture.output(&id, "echo pulled").await, "pulled");
    assert_eq!(fixture.provider.list().await.expect("listed")[0].image.as_deref(), Some(&*image));
    fixture.provider.destroy(&id).await.expect("destroyed");

    let missing = SandboxSpec { image: format!("{}/team/other:1", registry.host), ..spec() };
    let error = fixture.provider.create(&SandboxId::random(), &missing, &()).await.expect_err("it does not exist");
    assert!(matches!(&error, ProviderError::Image { image, .. } if *image == missing.image), "{error:?}");
    daemon.docker(&["rmi", &image]);
    fixture.finish().await;
}

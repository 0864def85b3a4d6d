//! A docker provider of its own for each test, on the daemon that they share.

use std::sync::Arc;

use stacyvm_api::SandboxId;
use stacyvm_providers::docker::{ClientIdentity, DockerOptions, DockerProvider, Endpoint, TlsFiles};
use stacyvm_sandbox::{EnvdSession, Provider as _, SandboxSpec};

use crate::dockerd::{Dockerd, IMAGE};
use crate::fixture::{self, chain};
use crate::inside;

pub(crate) struct DockerFixture {
    pub(crate) daemon: &'static Dockerd,
    pub(crate) provider: Arc<DockerProvider>,
    pub(crate) options: DockerOptions,
    _data: tempfile::TempDir,
}

impl DockerFixture {
    pub(crate) fn start() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut DockerOptions)) -> Self {
        let daemon = Dockerd::shared();
        let data = tempfile::tempdir().expect("a directory for data");
        let mut options = DockerOptions::new(data.path(), Endpoint::Unix(daemon.socket()));
        change(&mut options);
        let provider = Arc::new(open(&options));
        Self { daemon, provider, options, _data: data }
    }

    /// On the same daemon, reached over TCP with TLS.
    pub(crate) fn elsewhere() -> Self {
        let daemon = Dockerd::shared();
        let file = |name: &str| daemon.directory().join("tls").join(name);
        let identity = ClientIdentity { certificate: file("cert.pem"), key: file("key.pem") };
        let tls = TlsFiles { ca: file("ca.pem"), identity: Some(identity) };
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".into(), port: daemon.port(), tls: Some(tls) };
        Self::with(|options| options.endpoint = endpoint)
    }

    /// As after a crash of the server: another provider takes up the same
    /// directory.
    pub(crate) fn restart(&mut self) {
        self.provider = Arc::new(open(&self.options));
    }

    pub(crate) async fn create(&self, spec: &SandboxSpec) -> SandboxId {
        let id = SandboxId::random();
        if let Err(error) = self.provider.create(&id, spec, &()).await {
            panic!("{}", chain(&error));
        }
        id
    }

    pub(crate) async fn session(&self, id: &SandboxId) -> EnvdSession {
        inside::session(self.provider.as_ref(), id).await
    }

    /// The output of a script that must succeed.
    pub(crate) async fn output(&self, id: &SandboxId, script: &str) -> String {
        inside::output(&self.session(id).await, script).await
    }

    /// This server's own name, which is in the labels of all it makes.
    pub(crate) fn instance(&self) -> String {
        self.provider.describe()["instance"].clone()
    }

    /// Containers and volumes of this fixture's.
    pub(crate) fn remains(&self) -> Vec<String> {
        let filter = format!("label=stacyvm.instance={}", self.instance());
        let containers = self.daemon.docker(&["ps", "--all", "--format", "{{.Names}}", "--filter", &filter]);
        containers.lines().map(str::to_owned).collect()
    }

    /// Proves that nothing is left, then ends the provider.
    pub(crate) async fn finish(self) {
        assert_eq!(self.remains(), Vec::<String>::new());
        self.provider.shutdown().await;
    }
}

fn open(options: &DockerOptions) -> DockerProvider {
    DockerProvider::open(options.clone()).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// A small sandbox of the test image, without network.
pub(crate) fn spec() -> SandboxSpec {
    SandboxSpec { image: IMAGE.into(), ..fixture::spec() }
}

//! Stands in for a provider that stored sandboxes name and that this server is
//! not configured with: they stay on record and nothing about them works until
//! it is back.

use async_trait::async_trait;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::{
    Capabilities, Connection, Created, Ending, HealthReport, ProgressSink, Provider, ProviderError, RuntimeSandbox,
    SandboxSpec,
};

pub(crate) struct MissingProvider {
    name: String,
}

impl MissingProvider {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    fn unavailable<T>(&self) -> Result<T, ProviderError> {
        Err(ProviderError::Unavailable {
            provider: self.name.clone(),
            message: "this server is not configured with it".to_owned(),
            hint: Some(format!("enable the `{}` provider in the configuration", self.name)),
            cause: None,
        })
    }
}

#[async_trait]
impl Provider for MissingProvider {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn check(&self) -> HealthReport {
        let mut report = HealthReport::default();
        report.fail("configured", "this server is not configured with it", "enable it in the configuration");
        report
    }

    async fn create(
        &self,
        _id: &SandboxId,
        _spec: &SandboxSpec,
        _progress: &dyn ProgressSink,
    ) -> Result<Created, ProviderError> {
        self.unavailable()
    }

    async fn connect(&self, _id: &SandboxId) -> Result<Connection, ProviderError> {
        self.unavailable()
    }

    async fn destroy(&self, _id: &SandboxId) -> Result<(), ProviderError> {
        self.unavailable()
    }

    async fn list(&self) -> Result<Vec<RuntimeSandbox>, ProviderError> {
        self.unavailable()
    }

    async fn wait(&self, _id: &SandboxId) -> Result<Ending, ProviderError> {
        self.unavailable()
    }
}

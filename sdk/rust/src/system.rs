//! The server about itself.

use std::collections::BTreeMap;

use reqwest::{Method, StatusCode};
use stacyvm_api::{Health, PoolStatus, ProviderDetail, ProviderHealth, Readiness, Version};

use crate::{Client, ClientError};

impl Client {
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get(&["health"]).await
    }

    pub async fn live(&self) -> Result<Health, ClientError> {
        self.get(&["live"]).await
    }

    /// Whether sandboxes can be made. An answer of "not ready" is a success of
    /// the call: `status` says which.
    pub async fn ready(&self) -> Result<Readiness, ClientError> {
        let response = self.request(Method::GET, &["ready"])?.send().await.map_err(|error| self.broken(error))?;
        if response.status() == StatusCode::SERVICE_UNAVAILABLE || response.status().is_success() {
            return self.read_json(response).await;
        }
        Err(self.refusal(response).await)
    }

    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get(&["version"]).await
    }

    pub async fn providers(&self) -> Result<Vec<ProviderHealth>, ClientError> {
        self.get(&["providers"]).await
    }

    pub async fn provider(&self, name: &str) -> Result<ProviderDetail, ClientError> {
        self.get(&["providers", name]).await
    }

    /// Looks at every provider anew; by name, whether it is healthy.
    pub async fn test_providers(&self) -> Result<BTreeMap<String, bool>, ClientError> {
        self.call(Method::POST, &["providers", "test"], &serde_json::json!({})).await
    }

    pub async fn pool_status(&self) -> Result<PoolStatus, ClientError> {
        self.get(&["pool", "status"]).await
    }

    /// Counters and latencies as JSON; the server's own form.
    pub async fn metrics(&self) -> Result<serde_json::Value, ClientError> {
        self.get(&["metrics"]).await
    }

    /// The same in Prometheus' text format.
    pub async fn metrics_prometheus(&self) -> Result<String, ClientError> {
        let response = self.send(self.request(Method::GET, &["metrics", "prometheus"])?).await?;
        self.read_text(response).await
    }
}

//! Templates: named create requests.

use reqwest::Method;
use stacyvm_api::{Sandbox, Template, TemplateSpawnRequest};

use crate::{Client, ClientError};

impl Client {
    pub async fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get(&["templates"]).await
    }

    pub async fn template(&self, name: &str) -> Result<Template, ClientError> {
        self.get(&["templates", name]).await
    }

    pub async fn create_template(&self, template: &Template) -> Result<Template, ClientError> {
        self.call(Method::POST, &["templates"], template).await
    }

    /// Replaces a template as a whole.
    pub async fn update_template(&self, template: &Template) -> Result<Template, ClientError> {
        self.call(Method::PUT, &["templates", &template.name], template).await
    }

    pub async fn delete_template(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&["templates", name]).await
    }

    /// Makes a sandbox from a template.
    pub async fn spawn_template(&self, name: &str, request: &TemplateSpawnRequest) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &["templates", name, "spawn"], request).await
    }
}

//! API keys, for administrators.

use reqwest::Method;
use stacyvm_api::{ApiKey, ApiKeyQuery, ApiKeyRequest, CreatedApiKey, KeyId, KeyRevokeQuery};

use crate::{Client, ClientError};

impl Client {
    /// Makes a key. The answer is the only one that ever holds it.
    pub async fn create_key(&self, request: &ApiKeyRequest) -> Result<CreatedApiKey, ClientError> {
        self.call(Method::POST, &["admin", "keys"], request).await
    }

    /// The newest first, those that expired included.
    pub async fn keys(&self, query: &ApiKeyQuery) -> Result<Vec<ApiKey>, ClientError> {
        self.json(self.request(Method::GET, &["admin", "keys"])?.query(query)).await
    }

    /// The key stops working before this returns.
    pub async fn revoke_key(&self, id: &KeyId, query: &KeyRevokeQuery) -> Result<(), ClientError> {
        let request = self.request(Method::DELETE, &["admin", "keys", id.as_str()])?;
        self.send(request.query(query)).await.map(drop)
    }
}

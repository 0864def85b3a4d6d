//! Per-owner limits.

use reqwest::Method;
use stacyvm_api::{OwnerId, OwnerQuota, OwnerQuotaRequest, OwnerUsage, QuotaSummary};

use crate::{Client, ClientError};

impl Client {
    pub async fn quotas(&self) -> Result<Vec<OwnerQuota>, ClientError> {
        self.get(&["quotas"]).await
    }

    pub async fn quota_summary(&self) -> Result<QuotaSummary, ClientError> {
        self.get(&["quotas", "summary"]).await
    }

    pub async fn quota(&self, owner: &OwnerId) -> Result<OwnerQuota, ClientError> {
        self.get(&["quotas", owner.as_str()]).await
    }

    /// Replaces an owner's limits as a whole.
    pub async fn save_quota(&self, owner: &OwnerId, request: &OwnerQuotaRequest) -> Result<OwnerQuota, ClientError> {
        self.call(Method::PUT, &["quotas", owner.as_str()], request).await
    }

    pub async fn delete_quota(&self, owner: &OwnerId) -> Result<(), ClientError> {
        self.delete(&["quotas", owner.as_str()]).await
    }

    pub async fn usage(&self, owner: &OwnerId) -> Result<OwnerUsage, ClientError> {
        self.get(&["quotas", owner.as_str(), "usage"]).await
    }
}

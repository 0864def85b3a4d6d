//! The audit log, for administrators.

use reqwest::Method;
use stacyvm_api::{AuditQuery, AuditRecord};

use crate::client::next_cursor;
use crate::{Client, ClientError, Page};

impl Client {
    /// One page, newest first. `format` is left to [`Client::audit_csv`].
    pub async fn audit(&self, query: &AuditQuery) -> Result<Page<AuditRecord>, ClientError> {
        let query = AuditQuery { format: None, ..query.clone() };
        let response = self.send(self.request(Method::GET, &["admin", "audit"])?.query(&query)).await?;
        let next_cursor = next_cursor(&response);
        Ok(Page { items: self.read_json(response).await?, next_cursor })
    }

    /// One page as a table for spreadsheets.
    pub async fn audit_csv(&self, query: &AuditQuery) -> Result<String, ClientError> {
        let query = AuditQuery { format: Some("csv".to_owned()), ..query.clone() };
        let response = self.send(self.request(Method::GET, &["admin", "audit"])?.query(&query)).await?;
        self.read_text(response).await
    }
}

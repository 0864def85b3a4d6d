//! Sandboxes: create, list, look at, extend, destroy.

use reqwest::{Method, StatusCode};
use stacyvm_api::{
    AdmissionDecision, CreateRequest, Duration, ExtendRequest, ListQuery, PruneResult, Sandbox, SandboxId, SandboxStats,
};

use crate::client::next_cursor;
use crate::{Client, ClientError};

/// Sandboxes asked for in one request by [`Client::list_all`].
const PAGE_SIZE: u32 = 500;

/// Part of a listing.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Pass it as the query's `cursor` for the next page.
    pub next_cursor: Option<String>,
}

/// How a destroy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroyed {
    /// It is gone, or never existed.
    Done,
    /// Its runtime did not end it, as while it is away. It stays `destroying`, and
    /// the server goes on trying.
    Retrying,
}

/// One sandbox on the server, known to exist or not.
#[derive(Debug, Clone)]
pub struct SandboxClient {
    pub(crate) client: Client,
    pub(crate) id: SandboxId,
}

impl Client {
    /// Makes a sandbox and waits until it runs.
    pub async fn create(&self, request: &CreateRequest) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &["sandboxes"], request).await
    }

    /// Whether [`Client::create`] would be admitted now, and why not.
    pub async fn admission(&self, request: &CreateRequest) -> Result<AdmissionDecision, ClientError> {
        self.call(Method::POST, &["sandboxes", "admission"], request).await
    }

    /// One page; without a limit in the query, everything.
    pub async fn list(&self, query: &ListQuery) -> Result<Page<Sandbox>, ClientError> {
        let response = self.send(self.request(Method::GET, &["sandboxes"])?.query(query)).await?;
        let next_cursor = next_cursor(&response);
        Ok(Page { items: self.read_json(response).await?, next_cursor })
    }

    /// Every sandbox that the query's filters leave, page by page.
    pub async fn list_all(&self, query: &ListQuery) -> Result<Vec<Sandbox>, ClientError> {
        let mut query = ListQuery { limit: Some(query.limit.unwrap_or(PAGE_SIZE)), ..query.clone() };
        let mut all = Vec::new();
        loop {
            let page = self.list(&query).await?;
            all.extend(page.items);
            if page.next_cursor.is_none() || page.next_cursor == query.cursor {
                return Ok(all);
            }
            query.cursor = page.next_cursor;
        }
    }

    /// Destroys every sandbox whose time is up; the count.
    pub async fn prune(&self) -> Result<u64, ClientError> {
        let result: PruneResult = self.json(self.request(Method::DELETE, &["sandboxes"])?).await?;
        Ok(result.pruned)
    }

    /// A handle on one sandbox. Nothing is sent.
    pub fn sandbox(&self, id: SandboxId) -> SandboxClient {
        SandboxClient { client: self.clone(), id }
    }
}

impl SandboxClient {
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    pub async fn get(&self) -> Result<Sandbox, ClientError> {
        self.client.get(&["sandboxes", self.id.as_str()]).await
    }

    /// Ends the sandbox and frees all it used. Unknown ids succeed.
    pub async fn destroy(&self) -> Result<Destroyed, ClientError> {
        let request = self.client.request(Method::DELETE, &["sandboxes", self.id.as_str()])?;
        let response = self.client.send(request).await?;
        Ok(if response.status() == StatusCode::ACCEPTED { Destroyed::Retrying } else { Destroyed::Done })
    }

    /// The sandbox then lives `ttl` from now.
    pub async fn extend(&self, ttl: Duration) -> Result<Sandbox, ClientError> {
        self.client.call(Method::POST, &["sandboxes", self.id.as_str(), "extend"], &ExtendRequest { ttl }).await
    }

    pub async fn stats(&self) -> Result<SandboxStats, ClientError> {
        self.client.get(&["sandboxes", self.id.as_str(), "stats"]).await
    }

    /// The last lines of all commands' output.
    pub async fn logs(&self, lines: u32) -> Result<Vec<String>, ClientError> {
        let request = self.client.request(Method::GET, &["sandboxes", self.id.as_str(), "logs"])?;
        self.client.json(request.query(&[("lines", lines)])).await
    }
}

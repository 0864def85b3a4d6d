//! The audit log: what the server says about calls, kept behind the requests.
//!
//! A call is left with the writer and never waited for. What may fill the log
//! is bounded by kind: changes and refusals by number, so that no flood of them
//! can displace the record of administration, which is bounded by age alone.

use std::time::Duration;

use stacyvm_api::{AuditQuery, AuditRecord, KeyId, OwnerId};

use crate::EngineError;
use crate::shared::{Shared, cut};
use crate::store::{AuditFilter, AuditRow};

/// Records of one answer, unless the query says, and at most (http-api 4.6).
const PAGE_DEFAULT: u64 = 100;
const PAGE_MAX: u64 = 500;

/// A call, as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    pub kind: AuditKind,
    /// Who was authenticated; never a credential.
    pub actor: String,
    pub key: Option<KeyId>,
    pub owner: Option<OwnerId>,
    pub tenant: Option<String>,
    pub method: String,
    /// Without the query.
    pub path: String,
    pub status: u16,
    pub duration: Duration,
    pub request_id: String,
    pub remote_addr: String,
    pub user_agent: String,
}

/// What decides how long an entry is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditKind {
    /// Administration.
    Admin,
    /// Any other change.
    Call,
    /// What was refused for want of a key or a scope.
    Denied,
}

impl AuditKind {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Call => "call",
            Self::Denied => "denied",
        }
    }
}

/// Records, newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditPage {
    pub items: Vec<AuditRecord>,
    pub next_cursor: Option<String>,
}

impl Shared {
    pub(crate) fn record_call(&self, mut entry: AuditEntry) {
        for text in [&mut entry.path, &mut entry.user_agent, &mut entry.request_id] {
            *text = cut(text);
        }
        self.store.writer().log_call(AuditRow { at: self.now(), entry });
    }

    pub(crate) async fn audit(&self, query: &AuditQuery) -> Result<AuditPage, EngineError> {
        let limit = match query.limit {
            Some(0) => return Err(EngineError::InvalidInput("limit must be 1 or more".to_owned())),
            limit => limit.unwrap_or(PAGE_DEFAULT).min(PAGE_MAX) as u32,
        };
        if query.status == Some(0) {
            return Err(EngineError::InvalidInput("status must be 1 or more".to_owned()));
        }
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (actor, path, cursor) = (given(&query.actor), given(&query.path), given(&query.cursor));
        let method = given(&query.method).map(|method| method.to_uppercase());
        let before = cursor
            .map(|cursor| cursor.parse())
            .transpose()
            .map_err(|_| EngineError::InvalidInput("the cursor is not one that this server gave out".to_owned()))?;
        let filter = AuditFilter {
            before,
            actor: actor.as_deref(),
            method: method.as_deref(),
            status: query.status,
            path_part: path.as_deref(),
        };
        self.store.writer().committed().await?;
        let items = self.store.audit(filter, limit).await?;
        let full = items.len() == limit as usize;
        let next_cursor = items.last().filter(|_| full).map(|last| last.id.to_string());
        Ok(AuditPage { items, next_cursor })
    }
}

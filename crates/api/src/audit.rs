//! The audit log: who called what, when, from where, and how it ended.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{KeyId, OwnerId, Timestamp};

/// One call (http-api 5.12). Neither its query nor its body is kept, nor
/// anything that looks like a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditRecord {
    /// Counts up; newer records have larger ones.
    pub id: u64,
    /// `api_key` and `admin_key` are the configured keys, `key:<name>` is a stored
    /// one, `anonymous` is nobody.
    pub actor: String,
    pub method: String,
    pub path: String,
    pub status: u16,
    /// Until the head of the answer; streams and WebSockets go on behind it.
    pub duration_ms: u64,
    pub request_id: String,
    pub remote_addr: String,
    pub user_agent: String,
    /// As the caller said; empty for none.
    pub tenant_id: String,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<KeyId>,
    /// Whom the call was for: the key's owner, or whom `X-User-ID` named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<OwnerId>,
}

/// `GET /admin/audit`: filters and pages, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// 100 unless given, 500 at most. The next page's cursor is in the response
    /// header `X-Next-Cursor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u32>,
    /// A part of the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// `csv` for a table instead of JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

//! API keys: what is known about them, and the one answer that holds a key.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{Duration, KeyId, OwnerId, Timestamp};

/// What a key may do. No scope includes another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum KeyScope {
    /// Look at sandboxes, files, templates, events and metrics.
    #[serde(rename = "read:*")]
    Read,
    /// Create, change and use them.
    #[serde(rename = "api:*")]
    Api,
    /// Everything below `/admin`: keys and the audit log.
    #[serde(rename = "admin:*")]
    Admin,
}

impl KeyScope {
    pub const ALL: [Self; 3] = [Self::Read, Self::Api, Self::Admin];

    /// The published spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read:*",
            Self::Api => "api:*",
            Self::Admin => "admin:*",
        }
    }
}

impl fmt::Display for KeyScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a scope is read, api or admin")]
pub struct ParseKeyScopeError;

impl FromStr for KeyScope {
    type Err = ParseKeyScopeError;

    /// Also without `:*`, which shells take for a pattern.
    fn from_str(text: &str) -> Result<Self, ParseKeyScopeError> {
        let name = text.strip_suffix(":*").unwrap_or(text);
        let known = Self::ALL.into_iter().find(|scope| scope.as_str().strip_suffix(":*") == Some(name));
        known.ok_or(ParseKeyScopeError)
    }
}

/// `POST /admin/keys`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKeyRequest {
    /// 1 to 64 characters of letters, digits and `.`, `_`, `-`, `@`; no two keys in
    /// force have the same.
    pub name: String,
    /// `read:*` and `api:*` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes: Option<Vec<KeyScope>>,
    /// How long the key is valid; without it, until it is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// Whom everything done with the key is accounted to. Without it, callers say
    /// so themselves in `X-User-ID`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<OwnerId>,
}

/// A key as everybody but its holder may see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    pub id: KeyId,
    pub name: String,
    /// The key's beginning, to recognise it by.
    pub prefix: String,
    pub scopes: Vec<KeyScope>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_id: Option<OwnerId>,
    pub created_at: Timestamp,
    /// Who made it, as the audit log names callers.
    pub created_by: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// To the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Timestamp>,
}

/// The answer to the creation of a key: the only one that ever holds it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    #[serde(flatten)]
    pub about: ApiKey,
    /// `e2b_` and 40 hexadecimal digits, a form that every version of E2B's SDKs
    /// takes.
    pub key: String,
}

impl fmt::Debug for CreatedApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreatedApiKey").field("about", &self.about).finish_non_exhaustive()
    }
}

/// `GET /admin/keys`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct ApiKeyQuery {
    /// Revoked keys too.
    pub revoked: bool,
}

/// How a key is revoked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct KeyRevokeQuery {
    /// Also where nobody could make or revoke keys afterwards.
    pub force: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_written_as_published_and_read_with_and_without_the_star() {
        for scope in KeyScope::ALL {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.as_str());
            assert_eq!(scope.as_str().parse(), Ok(scope));
            assert_eq!(scope.as_str().trim_end_matches(":*").parse(), Ok(scope));
        }
        for text in ["", "*", "read:", "operator:*", "READ"] {
            assert_eq!(text.parse::<KeyScope>(), Err(ParseKeyScopeError), "{text:?}");
        }
    }
}

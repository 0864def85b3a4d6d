//! Ports of a sandbox and who may open their previews.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Duration, Timestamp};

/// Who may open the preview of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortAccess {
    /// Whoever knows the address.
    Public,
    /// Holders of a signed link, or of the API key.
    Token,
}

/// A port inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    pub port: u16,
    /// Whether something listens there.
    pub listening: bool,
    pub access: PortAccess,
    /// Address of the preview; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// `PUT /sandboxes/{id}/ports/{port}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortRequest {
    pub access: PortAccess,
}

/// `POST /sandboxes/{id}/ports/{port}/link`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PortLinkRequest {
    /// How long the link works: 1h unless given, at most 720h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
}

/// A signed link to one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortLink {
    /// Address to open in a browser, token included.
    pub url: String,
    /// The token alone, for programs: header `e2b-traffic-access-token`.
    pub token: String,
    pub expires_at: Timestamp,
}

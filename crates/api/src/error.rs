//! Error codes of the REST API and the body that carries them.
//!
//! The pairing of a code with an HTTP status lives in the server, which is the
//! only crate that knows HTTP.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Machine-readable reason of a failed call. Codes only ever get added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The request is malformed or contradicts itself.
    BadRequest,
    Unauthorized,
    Forbidden,
    /// The sandbox, template, provider or route does not exist.
    NotFound,
    /// A path inside the sandbox does not exist.
    FileNotFound,
    /// A path inside the sandbox exists but the operation does not fit it.
    FileConflict,
    /// The command's own user may not touch that path.
    FileForbidden,
    MethodNotAllowed,
    PayloadTooLarge,
    UnsupportedMediaType,
    RangeNotSatisfiable,
    /// The route speaks WebSocket only.
    UpgradeRequired,
    Conflict,
    /// A command reached its deadline and was killed.
    Timeout,
    /// A quota, a rate limit or a configured maximum.
    ResourceLimit,
    /// The runtime cannot enforce a limit that was asked for.
    LimitUnsupported,
    /// The runtime has no such operation.
    Unsupported,
    /// The image does not exist, or its name is malformed.
    ImageNotFound,
    /// The registry cannot be reached.
    RegistryUnavailable,
    /// No process can be started in the sandbox: its process limit is used up.
    SandboxPidsExhausted,
    /// The kernel killed the command because the sandbox used up its memory.
    SandboxOom,
    /// The sandbox's disk is full.
    SandboxDiskFull,
    /// Nothing listens on that port inside the sandbox.
    PortClosed,
    /// What listens inside the sandbox, or the backend that it is on, does not
    /// answer as it should.
    BadGateway,
    /// What listens inside the sandbox did not answer in time.
    GatewayTimeout,
    /// A runtime or a dependency is not there right now; trying later may help.
    Unavailable,
    InternalError,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Body of every response that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub code: ErrorCode,
    /// One sentence for a person, without host paths or backend output.
    pub message: String,
    /// What to do about it, where there is something to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The id under which the server logged this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_written_in_upper_case() {
        assert_eq!(ErrorCode::SandboxPidsExhausted.to_string(), "SANDBOX_PIDS_EXHAUSTED");
        assert_eq!(serde_json::to_string(&ErrorCode::NotFound).unwrap(), r#""NOT_FOUND""#);
    }
}

//! Paths, headers and query parameters of the plain HTTP part.

/// Carries the agent's token on everything but [`HEALTH`].
pub const TOKEN_HEADER: &str = "x-access-token";

/// Answers 204 while the agent lives.
pub const HEALTH: &str = "/health";
pub const METRICS: &str = "/metrics";
pub const ENVS: &str = "/envs";
pub const INIT: &str = "/init";

/// `GET` reads a file (ranges allowed), `POST` writes one or more.
pub const FILES: &str = "/files";

/// `GET` packs a tree as tar, `PUT` unpacks one.
pub const ARCHIVE: &str = "/stacyvm/archive";

/// `GET` with `Upgrade: stacyvm-dial`; after 101 the connection is the stream.
pub const DIAL: &str = "/stacyvm/dial";
pub const DIAL_PROTOCOL: &str = "stacyvm-dial";

/// Query parameter: the file or tree.
pub const PATH: &str = "path";
/// Query parameter: who owns what is written.
pub const USERNAME: &str = "username";
/// Query parameter: octal permission bits of a written file.
pub const MODE: &str = "mode";
/// Query parameter of [`DIAL`].
pub const PORT: &str = "port";
/// Query parameter of [`DIAL`].
pub const UNIX: &str = "unix";

/// Describes the entry that a `GET` of [`FILES`] carries, as JSON
/// ([`FileHeader`]).
pub const ENTRY_HEADER: &str = "x-stacyvm-entry";

/// Body of every plain HTTP failure.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ErrorBody {
    pub code: u16,
    pub message: String,
    /// Number of the `Reason` in `stacyvm.agent.v1`.
    pub reason: i32,
    pub subject: String,
}

/// A file's description where no message can travel.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct FileHeader {
    pub path: String,
    pub size: u64,
    pub mode: u32,
    pub owner: String,
    pub group: String,
    pub modified_unix_ms: i64,
}

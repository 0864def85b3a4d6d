//! Bodies of the protocol between the provider `custom` and a backend over
//! HTTP (`docs/custom-backend.md`): what a backend has to speak, and what it
//! may speak besides, which it says in `GET /capabilities`.
//!
//! A backend is somebody else's program. What it leaves out has a default, what
//! it adds is ignored, and both published spellings of a file's fields are read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Limit, LimitReport, NetworkRequest, Timestamp};

/// Header that carries the backend's key.
pub const KEY_HEADER: &str = "x-api-key";

/// What `Upgrade` names where a connection becomes plain bytes.
pub const STREAM_PROTOCOL: &str = "stacyvm-stream";

/// An extension that a backend may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// Failures are `{"code", "message", "hint"}`, with a [`Code`] and words for
    /// callers.
    Errors,
    /// A stream of a command ends with a line that tells how it ended, and
    /// `timeout_ms` of a command applies.
    Exit,
    /// Output as base64 where asked for; files are written as raw bytes with
    /// `PUT /files`.
    Bytes,
    /// `details=true` shows owner, group, kind and link target of files, and
    /// `POST /files/mkdir` makes directories.
    Details,
    /// `GET` and `PUT /files/archive`: trees as tar.
    Archive,
    /// `POST /spawn` takes `spec`, above all the id, and answers with limits;
    /// `user` of a command applies; `POST /sandboxes/{id}/deadline`.
    Spec,
    /// `GET /sandboxes`.
    Inventory,
    /// `GET /sandboxes/{id}/stats`.
    Stats,
    /// `GET /sandboxes/{id}/logs`.
    Logs,
    /// `GET /sandboxes/{id}/terminal`, a WebSocket: terminals, input, signals.
    Terminal,
    /// `GET /sandboxes/{id}/ports`, and `/dial` for a raw connection to one.
    Dial,
    /// `GET /sandboxes/{id}/agent`: a raw connection to StacyVM's own agent,
    /// which does everything else.
    Agent,
    /// One that this version does not know.
    #[serde(other)]
    Unknown,
}

/// `GET /capabilities`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "independent yes-or-no facts, named on the wire")]
pub struct Capabilities {
    pub features: Vec<Feature>,
    /// Sandboxes have an outgoing network.
    pub network: bool,
    /// Sandboxes outlive the backend's process.
    pub survives_restart: bool,
    /// Commands and images are imitated, as by the runtime `mock`.
    pub imitated: bool,
    /// A command that runs out of memory ends its sandbox.
    pub oom_ends_sandbox: bool,
    /// What the backend's sandboxes are made by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
}

/// `POST /spawn`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpawnRequest {
    pub image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// Whole numbers are written as such: published backends read only those.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "whole_if_possible")]
    pub vcpus: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<SpawnSpec>,
}

/// What else StacyVM orders, from a backend with [`Feature::Spec`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpawnSpec {
    pub id: String,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids_limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRequest>,
    /// Limits that somebody asked for, rather than defaults.
    #[serde(default)]
    pub requested: Vec<Limit>,
    #[serde(default)]
    pub allow_unenforced: bool,
    #[serde(default)]
    pub disk_in_memory: bool,
    pub expires_at: Timestamp,
    #[serde(default)]
    pub generation: u32,
    /// With [`Feature::Agent`]: what the agent is to demand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_token: Option<String>,
}

/// The answer to `POST /spawn`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawned {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitReport>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
}

/// `POST /exec`, and the first message on a terminal's WebSocket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    pub sandbox_id: String,
    pub command: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// `shell` unless given, or `argv`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// [`Feature::Exit`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// [`Feature::Spec`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// [`Feature::Bytes`]: `base64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// [`Feature::Terminal`]: keep standard input open.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdin: bool,
    /// [`Feature::Terminal`]: columns and rows of the terminal to run it on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminal: Option<(u16, u16)>,
}

/// The answer to `POST /exec` without `stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    pub exit_code: i32,
    #[serde(default)]
    pub stdout: String,
    #[serde(default)]
    pub stderr: String,
}

/// One line of a stream, and one message of a terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamLine {
    /// `stdout` or `stderr`; `exit` ([`Feature::Exit`]) and `error` come last.
    pub stream: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// Bytes of output that were lost, in a line `dropped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    /// [`Feature::Errors`]: why, in a line `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What a client says on a terminal's WebSocket after the first message; input
/// itself is a binary message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalControl {
    CloseStdin,
    Resize { cols: u16, rows: u16 },
    Signal { signal: i32 },
}

/// `POST /files`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteRequest {
    pub sandbox_id: String,
    pub path: String,
    pub content: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// `DELETE /files`, and `POST /files/mkdir` and `/files/chmod`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRequest {
    pub sandbox_id: String,
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recursive: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// `POST /files/move`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    pub sandbox_id: String,
    pub old_path: String,
    pub new_path: String,
}

/// One file. Published backends write the fields as `Path`, `IsDir` and
/// `ModTime`, others as `path`, `is_dir` and `mod_time`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct File {
    #[serde(alias = "Path", alias = "PATH")]
    pub path: String,
    #[serde(alias = "Size")]
    pub size: u64,
    #[serde(alias = "Mode")]
    pub mode: String,
    #[serde(alias = "IsDir", alias = "isDir", alias = "isdir", alias = "Is_Dir")]
    pub is_dir: bool,
    #[serde(alias = "ModTime", alias = "modTime", alias = "modtime", alias = "Mod_Time")]
    pub mod_time: String,
    /// [`Feature::Details`]: `file`, `directory`, `symlink` or `other`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// `GET /status/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// One entry of `GET /sandboxes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Listed {
    pub id: String,
    /// `running` unless given, `paused`, or anything else for one that ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    pub metadata: BTreeMap<String, String>,
    /// As the answer to its spawn had it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitReport>,
}

/// `GET /sandboxes/{id}/stats`. Zero limits mean unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    pub cpu_usec: u64,
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    pub pids: u64,
    pub pids_limit: u64,
    pub oom_kills: u64,
    pub pids_refused: u64,
    pub pids_kills: u64,
    pub disk_kills: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    pub disk_limit_bytes: u64,
}

#[expect(clippy::ref_option, reason = "the signature that serde wants")]
fn whole_if_possible<S: serde::Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match number {
        Some(number) if number.fract() == 0.0 => serializer.serialize_u64(*number as u64),
        other => other.serialize(serializer),
    }
}

/// `POST /sandboxes/{id}/deadline`, with [`Feature::Spec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadlineRequest {
    pub expires_at: Timestamp,
}

/// Why a call failed, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    BadRequest,
    Unauthorized,
    /// The sandbox does not exist or has ended.
    NotFound,
    FileNotFound,
    FileConflict,
    FileForbidden,
    ProcessNotFound,
    CommandNotFound,
    UserNotFound,
    Timeout,
    ResourceLimit,
    LimitUnsupported,
    Unsupported,
    ImageNotFound,
    RegistryUnavailable,
    SandboxPidsExhausted,
    SandboxOom,
    SandboxDiskFull,
    PortClosed,
    Unavailable,
    InternalError,
    #[serde(other)]
    Unknown,
}

/// Body of a failure, with [`Feature::Errors`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: Code,
    /// One sentence for whoever called; passed on from a backend that says that
    /// it has [`Feature::Errors`], and dropped from any other.
    #[serde(default)]
    pub message: String,
    /// What to do about it, where there is something to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_in_every_published_spelling() {
        let expected = File {
            path: "/a".to_owned(),
            size: 1,
            mode: "0755".to_owned(),
            is_dir: true,
            mod_time: "2026-01-02T03:04:05Z".to_owned(),
            ..File::default()
        };
        for text in [
            r#"{"path":"/a","size":1,"mode":"0755","is_dir":true,"mod_time":"2026-01-02T03:04:05Z"}"#,
            r#"{"Path":"/a","Size":1,"Mode":"0755","IsDir":true,"ModTime":"2026-01-02T03:04:05Z"}"#,
            r#"{"path":"/a","size":1,"mode":"0755","isdir":true,"modtime":"2026-01-02T03:04:05Z","more":[1]}"#,
        ] {
            assert_eq!(serde_json::from_str::<File>(text).unwrap(), expected, "{text}");
        }
        assert_eq!(serde_json::to_value(&expected).unwrap().as_object().unwrap().len(), 5);
    }

    #[test]
    fn a_plain_spawn_has_only_the_published_fields() {
        let plain = SpawnRequest { image: "a".to_owned(), vcpus: Some(2.0), ..SpawnRequest::default() };
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"image":"a","vcpus":2}"#);
        let exec = ExecRequest { sandbox_id: "s".to_owned(), command: "c".to_owned(), ..ExecRequest::default() };
        assert_eq!(serde_json::to_string(&exec).unwrap(), r#"{"sandbox_id":"s","command":"c"}"#);
    }

    #[test]
    fn what_a_newer_backend_says_does_not_hurt() {
        let read: Capabilities = serde_json::from_str(r#"{"features":["exit","teleport"],"more":1}"#).unwrap();
        assert_eq!(read.features, [Feature::Exit, Feature::Unknown]);
        let failure: Failure = serde_json::from_str(r#"{"code":"ON_FIRE"}"#).unwrap();
        assert_eq!(failure.code, Code::Unknown);
    }
}

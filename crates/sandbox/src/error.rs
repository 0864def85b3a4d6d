//! Typed failures of providers and sessions.
//!
//! The `Display` text of every variant is fit for the caller: no host paths, no
//! backend output. What is only for the log travels as `source`.

use stacyvm_api::SandboxId;

/// A boxed cause, for the log only.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error("sandbox {0} does not exist on this runtime")]
    NotFound(SandboxId),
    #[error("{operation} is not supported by the `{provider}` runtime")]
    Unsupported { provider: String, operation: &'static str },
    #[error("{message}")]
    InvalidSpec { message: String },
    #[error("{message}")]
    LimitUnsupported { message: String, hint: String },
    #[error("image `{image}`: {message}")]
    Image {
        image: String,
        message: String,
        hint: Option<String>,
        #[source]
        cause: Option<Cause>,
    },
    #[error("image `{image}`: its registry cannot be reached")]
    RegistryUnavailable {
        image: String,
        hint: String,
        #[source]
        cause: Option<Cause>,
    },
    #[error("the runtime has no room for another sandbox: {message}")]
    Exhausted { message: String },
    /// The runtime or something it needs is not there.
    #[error("the `{provider}` runtime is unavailable: {message}")]
    Unavailable {
        provider: String,
        message: String,
        hint: Option<String>,
        #[source]
        cause: Option<Cause>,
    },
    /// The runtime answers, but not in its protocol: trying again does not help.
    #[error("the answer of the `{provider}` runtime makes no sense; it was to {operation}")]
    BadAnswer {
        provider: String,
        operation: &'static str,
        hint: String,
        #[source]
        cause: Cause,
    },
    #[error("the runtime failed to {operation}")]
    Failed {
        operation: &'static str,
        #[source]
        cause: Cause,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The sandbox is gone, or ended while the call ran.
    #[error("the sandbox has ended")]
    Gone,
    #[error("{0}")]
    InvalidArgument(String),
    #[error("no such file or directory: {0}")]
    FileNotFound(String),
    #[error("{0}")]
    FileConflict(String),
    #[error("permission denied: {0}")]
    FileForbidden(String),
    #[error("no process {0} in this sandbox")]
    ProcessNotFound(String),
    /// The command does not exist or is not executable.
    #[error("{0}")]
    CommandNotFound(String),
    #[error("user `{0}` does not exist in the sandbox")]
    UserNotFound(String),
    #[error("the command reached its deadline and was killed")]
    DeadlineExceeded,
    #[error("the sandbox's process limit is used up")]
    PidsExhausted,
    #[error("the sandbox's memory is used up")]
    MemoryExhausted,
    #[error("the sandbox's disk is full")]
    DiskFull,
    /// A limit of the runtime, rather than of the sandbox.
    #[error("the runtime has no room left to {0}; try again later")]
    Limited(&'static str),
    #[error("{0} is not supported by this runtime")]
    Unsupported(&'static str),
    #[error("nothing listens on {0} in the sandbox")]
    PortClosed(String),
    /// The agent does not answer, or not in our protocol.
    #[error("the sandbox does not answer")]
    Unavailable(#[source] Option<Cause>),
    /// What is between us and the sandbox answers, but not in its protocol.
    #[error("the answer of the sandbox's runtime makes no sense; it was to {operation}")]
    BadAnswer {
        operation: &'static str,
        #[source]
        cause: Cause,
    },
    #[error("the sandbox failed to {operation}")]
    Failed {
        operation: &'static str,
        #[source]
        cause: Cause,
    },
}

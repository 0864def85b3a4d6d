//! What can go wrong between us and a backend, and what it means to a caller.
//!
//! Everything a backend writes is somebody else's text: it is read for its
//! `code` and then dropped, never shown and never logged.

use std::time::Duration;

use stacyvm_api::SandboxId;
use stacyvm_api::backend::Code;
use stacyvm_sandbox::{ProviderError, SessionError};

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("the backend cannot be reached")]
    Unreachable(#[source] reqwest::Error),
    #[error("the backend did not answer within {0:?}")]
    TimedOut(Duration),
    #[error("the connection to the backend broke")]
    Broken(#[source] Option<std::io::Error>),
    /// An HTTP status that says no, with the code in the body if there is one.
    #[error("the backend answers HTTP {status}")]
    Refused { status: u16, code: Option<Code> },
    #[error("the backend's answer is not of its protocol: {0}")]
    Garbage(&'static str),
}

/// What a call was about, for what its failure means.
#[derive(Debug, Clone, Copy)]
pub(super) enum About<'a> {
    Sandbox,
    /// A path inside.
    Path(&'a str),
    Command(&'a str),
    User(&'a str),
    Port(u16),
}

impl CallError {
    /// Whether a status can only mean that the sandbox is no more.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Refused { status: 410, .. } => true,
            Self::Refused { status: 404, code } => matches!(code, None | Some(Code::NotFound | Code::Unknown)),
            _ => false,
        }
    }

    /// A 404 that does not say what was not found.
    pub(super) fn is_ambiguous(&self) -> bool {
        matches!(self, Self::Refused { status: 404, code: None | Some(Code::Unknown) })
    }

    /// What to do about it, where it is not about one call.
    fn hint(&self, name: &str) -> String {
        let section = format!("providers.custom of the provider `{name}`");
        match self {
            Self::Unreachable(_) | Self::TimedOut(_) | Self::Broken(_) => {
                format!("check that the backend runs and that base_url in {section} is its address")
            }
            Self::Refused { status: 401 | 403, .. } => {
                format!("set api_key or api_key_file in {section} to the backend's key")
            }
            Self::Refused { .. } => "look at the backend's own log".to_owned(),
            Self::Garbage(_) => format!("check that base_url in {section} is a backend's address"),
        }
    }

    /// The same as one sentence.
    pub(super) fn summary(&self) -> String {
        match self {
            Self::Refused { status: status @ (401 | 403), .. } => {
                format!("the backend refuses the key (HTTP {status})")
            }
            other => other.to_string(),
        }
    }

    /// For a call of the provider.
    pub(super) fn of_provider(
        self,
        name: &str,
        id: &SandboxId,
        image: Option<&str>,
        operation: &'static str,
    ) -> ProviderError {
        let image = || image.unwrap_or_default().to_owned();
        if let Self::Refused { status, code } = &self {
            match (code, status) {
                (Some(Code::ImageNotFound), _) => {
                    let message = "the backend does not have it".to_owned();
                    return ProviderError::Image { image: image(), message, hint: None, cause: None };
                }
                (Some(Code::RegistryUnavailable), _) => {
                    let hint = "the backend's machine has to reach it".to_owned();
                    return ProviderError::RegistryUnavailable { image: image(), hint, cause: None };
                }
                (Some(Code::LimitUnsupported), _) => {
                    return ProviderError::LimitUnsupported {
                        message: "the backend cannot enforce a limit that was asked for".to_owned(),
                        hint: "leave the limit out, or set allow_unenforced".to_owned(),
                    };
                }
                (Some(Code::Unsupported), _) | (_, 405 | 501) => {
                    return ProviderError::Unsupported { provider: name.to_owned(), operation };
                }
                (Some(Code::ResourceLimit), _) | (_, 429) => {
                    return ProviderError::Exhausted { message: "the backend is at its limit".to_owned() };
                }
                (_, 404 | 410) => return ProviderError::NotFound(id.clone()),
                (Some(Code::BadRequest), _) | (_, 400 | 413 | 422) => {
                    return ProviderError::InvalidSpec {
                        message: format!("the backend refuses to {operation} (HTTP {status})"),
                    };
                }
                _ => {}
            }
        }
        match self {
            Self::Garbage(_) => ProviderError::Failed { operation, cause: self.into() },
            other => ProviderError::Unavailable {
                provider: name.to_owned(),
                message: other.summary(),
                hint: Some(other.hint(name)),
                cause: Some(other.into()),
            },
        }
    }

    /// For a call inside a sandbox that exists.
    pub(super) fn of_session(self, about: About<'_>, operation: &'static str) -> SessionError {
        let Self::Refused { status, code } = &self else {
            return match self {
                Self::Garbage(_) => SessionError::Failed { operation, cause: self.into() },
                other => SessionError::Unavailable(Some(other.into())),
            };
        };
        let subject = || match about {
            About::Sandbox => "the sandbox".to_owned(),
            About::Path(text) | About::Command(text) | About::User(text) => text.to_owned(),
            About::Port(port) => format!("port {port}"),
        };
        match (code, status) {
            (Some(Code::FileNotFound), _) => SessionError::FileNotFound(subject()),
            (Some(Code::FileConflict), _) | (None, 409) => {
                SessionError::FileConflict(format!("{} is not what this operation needs it to be", subject()))
            }
            (Some(Code::FileForbidden), _) => SessionError::FileForbidden(subject()),
            (Some(Code::ProcessNotFound), _) => SessionError::ProcessNotFound(subject()),
            (Some(Code::CommandNotFound), _) => {
                SessionError::CommandNotFound(format!("{}: command not found", subject()))
            }
            (Some(Code::UserNotFound), _) => SessionError::UserNotFound(subject()),
            (Some(Code::PortClosed), _) => SessionError::PortClosed(subject()),
            (Some(Code::SandboxPidsExhausted), _) => SessionError::PidsExhausted,
            (Some(Code::SandboxOom), _) => SessionError::MemoryExhausted,
            (Some(Code::SandboxDiskFull), _) | (None, 507) => SessionError::DiskFull,
            (Some(Code::ResourceLimit), _) | (_, 429) => SessionError::Limited(operation),
            (Some(Code::Timeout), _) | (_, 408) => SessionError::DeadlineExceeded,
            (Some(Code::Unsupported), _) | (_, 405 | 501) => SessionError::Unsupported(operation),
            (_, 404) if code.is_none() && matches!(about, About::Path(_)) => SessionError::FileNotFound(subject()),
            (_, 404 | 410) => SessionError::Gone,
            (Some(Code::BadRequest), _) | (_, 400 | 413 | 422) => SessionError::InvalidArgument(format!(
                "the backend refuses to {operation} {} (HTTP {status})",
                subject()
            )),
            (_, 401 | 403 | 500..) => SessionError::Unavailable(Some(self.into())),
            _ => SessionError::Failed { operation, cause: self.into() },
        }
    }
}

//! What can go wrong between us and a backend, and what it means to a caller.
//!
//! Everything a backend writes is somebody else's text: it is read for its
//! `code` and then dropped, never shown and never logged. Only a backend that
//! says that it has [`Feature::Errors`] speaks to callers: what it then writes
//! for them is cut to one line of bounded length and told on as its words.
//!
//! [`Feature::Errors`]: stacyvm_api::backend::Feature::Errors

use std::time::Duration;

use stacyvm_api::SandboxId;
use stacyvm_api::backend::{Code, Failure};
use stacyvm_sandbox::{ProviderError, SessionError};

/// Of a backend's own words, at most.
const WORDS_CHARS_MAX: usize = 512;

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
    #[error("the backend answers HTTP {status}{}", .said.as_ref().map(|said| format!(": {}", said.message)).unwrap_or_default())]
    Refused { status: u16, code: Option<Code>, said: Option<Box<Said>> },
    #[error("the backend's answer is not of its protocol: {0}")]
    Garbage(&'static str),
}

/// What a backend that may speak to callers said to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl Said {
    pub(super) fn of(failure: &Failure) -> Option<Box<Self>> {
        let message = one_line(&failure.message)?;
        Some(Box::new(Self { message, hint: failure.hint.as_deref().and_then(one_line) }))
    }
}

/// Nothing that moves a terminal's cursor or turns the direction of what
/// follows, and no more than anybody reads.
fn one_line(text: &str) -> Option<String> {
    let turns = |it: char| matches!(it, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let plain: String = text.chars().map(|it| if it.is_control() || turns(it) { ' ' } else { it }).collect();
    let line = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(WORDS_CHARS_MAX) {
        Some((end, _)) => Some(format!("{}…", &line[..end])),
        None => Some(line).filter(|line| !line.is_empty()),
    }
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
            Self::Refused { status: 404, code, .. } => matches!(code, None | Some(Code::NotFound | Code::Unknown)),
            _ => false,
        }
    }

    /// A 404 that does not say what was not found.
    pub(super) fn is_ambiguous(&self) -> bool {
        matches!(self, Self::Refused { status: 404, code: None | Some(Code::Unknown), .. })
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
            Self::Refused { said, .. } => said
                .as_ref()
                .and_then(|said| said.hint.clone())
                .unwrap_or_else(|| "look at the backend's own log".to_owned()),
            Self::Garbage(_) => format!("check that base_url in {section} is a backend's address"),
        }
    }

    /// The backend's words, where it may speak.
    fn words(&self) -> Option<&str> {
        match self {
            Self::Refused { said: Some(said), .. } => Some(&said.message),
            _ => None,
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

    /// An answer that is none, for whoever made a call of the provider.
    pub(super) fn of_nonsense(self, name: &str, operation: &'static str) -> ProviderError {
        ProviderError::BadAnswer { provider: name.to_owned(), operation, hint: self.hint(name), cause: self.into() }
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
        if let Self::Refused { status, code, said } = &self {
            let words = |otherwise: &str| self.words().unwrap_or(otherwise).to_owned();
            let hint = said.as_ref().and_then(|said| said.hint.clone());
            match (code, status) {
                (Some(Code::ImageNotFound), _) => {
                    let message = words("the backend does not have it");
                    return ProviderError::Image { image: image(), message, hint, cause: None };
                }
                (Some(Code::RegistryUnavailable), _) => {
                    let hint = hint.unwrap_or_else(|| "the backend's machine has to reach it".to_owned());
                    return ProviderError::RegistryUnavailable { image: image(), hint, cause: None };
                }
                (Some(Code::LimitUnsupported), _) => {
                    return ProviderError::LimitUnsupported {
                        message: words("the backend cannot enforce a limit that was asked for"),
                        hint: hint.unwrap_or_else(|| "leave the limit out, or set allow_unenforced".to_owned()),
                    };
                }
                (Some(Code::Unsupported), _) | (_, 405 | 501) => {
                    return ProviderError::Unsupported { provider: name.to_owned(), operation };
                }
                (Some(Code::ResourceLimit), _) | (_, 429) => {
                    return ProviderError::Exhausted { message: words("the backend is at its limit") };
                }
                (_, 404 | 410) => return ProviderError::NotFound(id.clone()),
                (Some(Code::BadRequest), _) | (_, 400 | 413 | 422) => {
                    let why = self.words().map_or_else(|| format!(" (HTTP {status})"), |words| format!(": {words}"));
                    return ProviderError::InvalidSpec { message: format!("the backend refuses to {operation}{why}") };
                }
                _ => {}
            }
        }
        match self {
            Self::Garbage(_) => self.of_nonsense(name, operation),
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
        let Self::Refused { status, code, .. } = &self else {
            return match self {
                Self::Garbage(_) => SessionError::BadAnswer { operation, cause: self.into() },
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
                let otherwise = || format!("{} is not what this operation needs it to be", subject());
                SessionError::FileConflict(self.words().map_or_else(otherwise, str::to_owned))
            }
            (Some(Code::FileForbidden), _) => SessionError::FileForbidden(subject()),
            (Some(Code::ProcessNotFound), _) => SessionError::ProcessNotFound(subject()),
            (Some(Code::CommandNotFound), _) => {
                let otherwise = || format!("{}: command not found", subject());
                SessionError::CommandNotFound(self.words().map_or_else(otherwise, str::to_owned))
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
            (Some(Code::BadRequest), _) | (_, 400 | 413 | 422) => {
                let why = self.words().map_or_else(|| format!(" (HTTP {status})"), |words| format!(": {words}"));
                let what = match about {
                    About::Sandbox => String::new(),
                    About::Path(_) | About::Command(_) | About::User(_) | About::Port(_) => format!(" {}", subject()),
                };
                SessionError::InvalidArgument(format!("the backend refuses to {operation}{what}{why}"))
            }
            (_, 401 | 403 | 500..) => SessionError::Unavailable(Some(self.into())),
            _ => SessionError::Failed { operation, cause: self.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_one_line_of_bounded_length_and_move_no_cursor() {
        for (text, expected) in [
            ("no such image", Some("no such image")),
            ("\u{1b}[2J one\r\n two\0\u{9b}\u{202e}three ", Some("[2J one two three")),
            ("\t\n", None),
            ("", None),
        ] {
            assert_eq!(one_line(text).as_deref(), expected, "{text:?}");
        }
        let long = one_line(&"ü".repeat(WORDS_CHARS_MAX * 2)).unwrap();
        assert_eq!(long, "ü".repeat(WORDS_CHARS_MAX) + "…");
    }
}

//! Identifiers, validated where they enter and trusted afterwards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Characters after the prefix of our ids: 36^20 is 103 bits, so that a preview
/// host name cannot be guessed.
const SANDBOX_ID_RANDOM_CHARS: usize = 20;

/// Longest id accepted from a remote runtime that names its own sandboxes.
const SANDBOX_ID_MAX_CHARS: usize = 64;

/// Longest owner id in bytes (http-api 1.1).
const OWNER_ID_MAX_BYTES: usize = 128;

/// Why a piece of text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    #[error("a sandbox id is `sb-` and {SANDBOX_ID_RANDOM_CHARS} characters of a-z and 0-9")]
    Sandbox,
    #[error("an owner id has at most {OWNER_ID_MAX_BYTES} bytes, without `/`, `\\`, spaces or control characters")]
    Owner,
    #[error("an exec id is `ex-` and {SANDBOX_ID_RANDOM_CHARS} characters of a-z and 0-9")]
    Exec,
    #[error("a key's id is `key-` and {SANDBOX_ID_RANDOM_CHARS} characters of a-z and 0-9")]
    Key,
}

/// Names one sandbox: `sb-` and 20 characters of base 36, from the system's
/// random source.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "sb-4f9k2m0x7c1v8b3n5q6w")]
pub struct SandboxId(String);

impl SandboxId {
    pub fn random() -> Self {
        Self(random_id("sb-"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxId {
    type Err = ParseIdError;

    /// Accepts our own ids and any other name that is safe as a path component
    /// and as a DNS label, because remote runtimes choose theirs.
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let safe = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let plausible = !text.is_empty()
            && text.len() <= SANDBOX_ID_MAX_CHARS
            && text.bytes().all(safe)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if plausible { Ok(Self(text.to_owned())) } else { Err(ParseIdError::Sandbox) }
    }
}

/// Names one command run in a sandbox, for re-attaching to its output.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "ex-9d2k7m1x0c4v8b3n5q6w")]
pub struct ExecId(String);

impl ExecId {
    pub fn random() -> Self {
        Self(random_id("ex-"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ExecId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if is_random_id(text, "ex-") { Ok(Self(text.to_owned())) } else { Err(ParseIdError::Exec) }
    }
}

/// Names one API key. It is no secret, and not derived from one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "key-7c1v8b3n5q6w4f9k2m0x")]
pub struct KeyId(String);

impl KeyId {
    pub fn random() -> Self {
        Self(random_id("key-"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if is_random_id(text, "key-") { Ok(Self(text.to_owned())) } else { Err(ParseIdError::Key) }
    }
}

/// Whom a sandbox is accounted to. Never empty; "no owner" is `Option::None`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "alice@example.com")]
pub struct OwnerId(String);

impl OwnerId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads an optional owner: blank text means that there is none.
    pub fn parse_optional(text: &str) -> Result<Option<Self>, ParseIdError> {
        let trimmed = text.trim();
        if trimmed.is_empty() { Ok(None) } else { trimmed.parse().map(Some) }
    }
}

impl FromStr for OwnerId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let text = text.trim();
        let forbidden = |c: char| c == '/' || c == '\\' || c == ' ' || c.is_control();
        if text.is_empty() || text.len() > OWNER_ID_MAX_BYTES || text.contains(forbidden) {
            return Err(ParseIdError::Owner);
        }
        Ok(Self(text.to_owned()))
    }
}

fn random_id(prefix: &str) -> String {
    let mut id = String::with_capacity(prefix.len() + SANDBOX_ID_RANDOM_CHARS);
    id.push_str(prefix);
    for _ in 0..SANDBOX_ID_RANDOM_CHARS {
        id.push(char::from(BASE36[rand::random_range(0..BASE36.len())]));
    }
    id
}

fn is_random_id(text: &str, prefix: &str) -> bool {
    text.strip_prefix(prefix)
        .is_some_and(|body| body.len() == SANDBOX_ID_RANDOM_CHARS && body.bytes().all(|byte| BASE36.contains(&byte)))
}

macro_rules! text_conversions {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    )*};
}
text_conversions!(SandboxId, ExecId, KeyId, OwnerId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_sandbox_ids_have_the_published_form() {
        let id = SandboxId::random();
        assert_eq!(id.as_str().len(), 23);
        assert!(id.as_str().starts_with("sb-"));
        assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id.clone()));
        assert_ne!(id, SandboxId::random());
    }

    #[test]
    fn sandbox_ids_that_could_leave_a_directory_or_label_are_refused() {
        for text in ["", "..", "sb-../x", "sb/1", "SB-1", "-a", "a-", "a b", &"a".repeat(65)] {
            assert_eq!(text.parse::<SandboxId>(), Err(ParseIdError::Sandbox), "{text:?}");
        }
    }

    #[test]
    fn owners_follow_the_published_rule() {
        assert_eq!(OwnerId::parse_optional("  "), Ok(None));
        assert_eq!(OwnerId::parse_optional(" a@b ").unwrap().unwrap().as_str(), "a@b");
        for text in ["a/b", "a\\b", "a b", "a\tb", &"x".repeat(129)] {
            assert_eq!(OwnerId::parse_optional(text), Err(ParseIdError::Owner), "{text:?}");
        }
    }
}

//! What can go wrong with an image, said so that the reader knows what to do.

use std::path::PathBuf;
use std::sync::Arc;

use stacyvm_sandbox::ProviderError;

/// A cause that several waiting callers can hold, for the log only.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Cloneable, since every caller that waits for one pull gets its outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    #[error("`{reference}` is not an image reference: {reason}")]
    InvalidReference { reference: String, reason: String },
    #[error("image `{reference}` does not exist in its registry")]
    NotFound { reference: String },
    #[error("image `{reference}` is not in the local store")]
    NotStored { reference: String },
    #[error("the registry refuses access to `{reference}`: {reason}")]
    AccessDenied { reference: String, reason: String },
    #[error("the registry of `{reference}` cannot be reached")]
    RegistryUnavailable {
        reference: String,
        #[source]
        cause: Cause,
    },
    #[error("the registry limits how often `{reference}` may be pulled")]
    RateLimited { reference: String },
    /// An answer that breaks the distribution specification, or a broken image.
    #[error("image `{reference}` is malformed: {reason}")]
    Malformed { reference: String, reason: String },
    #[error("image `{reference}` does not exist for {platform}; it has {available}")]
    PlatformUnavailable { reference: String, platform: String, available: String },
    #[error("{what} does not match its digest: expected {expected}, found {actual}")]
    DigestMismatch { what: String, expected: String, actual: String },
    #[error("{what} is larger than allowed ({limit} bytes)")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} is not supported")]
    Unsupported { what: String },
    /// A layer that cannot be unpacked, or that tries to reach out of itself.
    #[error("layer refused: {reason} (entry `{entry}`)")]
    BadLayer { entry: String, reason: String },
    #[error("`{}` cannot be imported: {reason}", path.display())]
    BadArchive { path: PathBuf, reason: String },
    #[error("credentials for `{registry}`: {reason}")]
    Credentials { registry: String, reason: String },
    #[error("the image store failed to {operation}")]
    Storage {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: Cause,
    },
    #[error("the work on image `{reference}` was cancelled")]
    Cancelled { reference: String },
}

impl ImageError {
    /// What the user can do about it, in one sentence.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::InvalidReference { .. } => {
                Some("write NAME[:TAG] or NAME@sha256:DIGEST, for example alpine:3.20".into())
            }
            Self::NotFound { .. } => Some("check the name and the tag; `stacyvm image list` shows what is here".into()),
            Self::NotStored { .. } => Some("`stacyvm image pull` or `stacyvm image import` brings it here".into()),
            Self::AccessDenied { .. } => Some(
                "the image may not exist, or needs a login: `docker login`, or a docker config.json with `auths`"
                    .into(),
            ),
            Self::RegistryUnavailable { .. } => Some(
                "use image=\"host\", which needs no download, bring the image in with `stacyvm image import FILE`, \
                 or check network, proxy and registry name"
                    .into(),
            ),
            Self::RateLimited { .. } => Some("log in to the registry, or wait and try again".into()),
            Self::PlatformUnavailable { .. } => Some("choose an image built for this machine".into()),
            Self::Storage { cause, .. } => storage_hint(cause),
            Self::Malformed { .. }
            | Self::DigestMismatch { .. }
            | Self::TooLarge { .. }
            | Self::Unsupported { .. }
            | Self::BadLayer { .. }
            | Self::BadArchive { .. }
            | Self::Credentials { .. }
            | Self::Cancelled { .. } => None,
        }
    }

    pub(crate) fn storage(
        operation: &'static str,
        path: impl Into<PathBuf>,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::Storage { operation, path: path.into(), cause: Arc::new(cause) }
    }

    pub(crate) fn malformed(reference: &dyn std::fmt::Display, reason: impl Into<String>) -> Self {
        Self::Malformed { reference: reference.to_string(), reason: reason.into() }
    }

    /// As a failure to make a sandbox from `image`.
    pub fn into_provider_error(self, image: &str) -> ProviderError {
        let hint = self.hint();
        match self {
            Self::RegistryUnavailable { ref cause, .. } => ProviderError::RegistryUnavailable {
                image: image.to_owned(),
                hint: hint.unwrap_or_default(),
                cause: Some(Box::new(cause.clone())),
            },
            other => ProviderError::Image {
                image: image.to_owned(),
                message: other.to_string(),
                hint,
                cause: Some(Box::new(other)),
            },
        }
    }
}

fn storage_hint(cause: &Cause) -> Option<String> {
    let io = cause.downcast_ref::<std::io::Error>()?;
    match io.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Some("the disk is full: `stacyvm image rm` frees space, or move the data directory".into())
        }
        std::io::ErrorKind::PermissionDenied => Some("the data directory belongs to another user".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_registry_names_the_ways_out() {
        let error = ImageError::RegistryUnavailable {
            reference: "docker.io/library/alpine:latest".into(),
            cause: Arc::new(std::io::Error::other("connection refused")),
        };
        let hint = error.hint().unwrap();
        assert!(hint.contains("image=\"host\""), "{hint}");
        assert!(hint.contains("stacyvm image import"), "{hint}");
        match error.into_provider_error("alpine") {
            ProviderError::RegistryUnavailable { image, hint, .. } => {
                assert_eq!(image, "alpine");
                assert!(hint.contains("stacyvm image import"));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

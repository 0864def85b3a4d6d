//! Failures of this provider, and what of them a caller gets to see.

use std::io;
use std::path::PathBuf;

use stacyvm_api::SandboxId;
use stacyvm_sandbox::ProviderError;

use super::NAME;
use super::spawner::CallError;
use super::spawner::protocol::{Failure, FailureKind};
use crate::host::obstacle::Obstacle;

/// What to do where the host shows only parts of its `/proc` or `/sys`.
pub(super) const KERNEL_FILES_FIX: &str = "run the server as root, or outside of a container; Docker shows all with \
                                           --security-opt systempaths=unconfined";

/// What is wrong with a data directory that layers of images cannot be used
/// from, and what to do.
pub(super) const OWNERS_FIXED: &str = "the file system of the data directory cannot shift the owners of files";
pub(super) const OWNERS_FIXED_FIX: &str = "give the server a data directory on ext4, xfs, btrfs or tmpfs; in a \
                                           container (overlayfs), that is a volume";

#[derive(Debug, thiserror::Error)]
pub(super) enum OciError {
    #[error("{operation}: {path}", path = path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{operation}")]
    System {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("launch")]
    Launch(#[from] CallError),
    #[error("image store")]
    Image(#[source] Box<stacyvm_image::ImageError>),
    #[error("{0} exists already")]
    Exists(SandboxId),
    #[error("no range of uids is left on this host")]
    NoUids,
    #[error("{0} did not end although it was killed")]
    Unkillable(SandboxId),
}

impl OciError {
    pub(super) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { operation, path: path.into(), source }
    }

    pub(super) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }

    /// What the caller sees of a failed creation.
    pub(super) fn of_create(self, image: &str) -> ProviderError {
        match self {
            Self::Launch(CallError::Failed(failure)) if failure.kind == FailureKind::UnknownUser => {
                ProviderError::InvalidSpec { message: failure.message }
            }
            Self::Launch(CallError::Failed(failure)) if failure.kind == FailureKind::Image => ProviderError::Image {
                image: image.to_owned(),
                message: failure.message.clone(),
                hint: None,
                cause: Some(failure.into()),
            },
            Self::Launch(CallError::Failed(failure)) if failure.kind == FailureKind::NamespacesForbidden => {
                let Obstacle { message, fix } = Obstacle::find();
                unavailable(message, fix, failure)
            }
            Self::Launch(CallError::Failed(failure)) if failure.kind == FailureKind::KernelFilesHidden => {
                unavailable(failure.message.clone(), KERNEL_FILES_FIX.into(), failure)
            }
            Self::Launch(CallError::Failed(failure)) if failure.kind == FailureKind::OwnersFixed => {
                unavailable(OWNERS_FIXED.into(), OWNERS_FIXED_FIX.into(), failure)
            }
            Self::Exists(_) => ProviderError::InvalidSpec { message: self.to_string() },
            Self::NoUids => ProviderError::Exhausted { message: self.to_string() },
            Self::Launch(CallError::Start(_)) => ProviderError::Unavailable {
                provider: NAME.to_owned(),
                message: "its helper process cannot be started".into(),
                hint: None,
                cause: Some(self.into()),
            },
            Self::File { source, .. } | Self::System { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                ProviderError::Unavailable {
                    provider: NAME.to_owned(),
                    message: "the disk that holds the server's data directory is full".into(),
                    hint: Some("its operator has to free some space".into()),
                    cause: Some(source.into()),
                }
            }
            other => other.of("create the sandbox"),
        }
    }

    pub(super) fn of(self, operation: &'static str) -> ProviderError {
        ProviderError::Failed { operation, cause: self.into() }
    }
}

fn unavailable(message: String, fix: String, failure: Failure) -> ProviderError {
    ProviderError::Unavailable { provider: NAME.to_owned(), message, hint: Some(fix), cause: Some(failure.into()) }
}

//! Failures of this provider, and what of them a caller gets to see.

use std::io;
use std::path::PathBuf;

use stacyvm_api::SandboxId;
use stacyvm_sandbox::ProviderError;

use super::NAME;

/// Where PRoot comes from.
pub(super) const INSTALL_FIX: &str = "install the package proot, or set providers.proot.proot_binary to where it is";

#[derive(Debug, thiserror::Error)]
pub(super) enum ProotError {
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
    /// The launcher said why.
    #[error("{step}: {message}")]
    Launch { step: String, message: String },
    /// It ended, or its agent never answered; with what it last wrote.
    #[error("PRoot did not start the agent: {output}")]
    NoAgent { output: String },
    #[error("no program {}", .0.display())]
    NoProgram(PathBuf),
    #[error("{0} exists already")]
    Exists(SandboxId),
    #[error(
        "the image does not fit into the sandbox's disk of {0} MiB, which holds its own copy of it: ask for more \
         (`disk_size_mb`, at most providers.proot.max_disk_mb)"
    )]
    TooLarge(u64),
    #[error("no uid is left on this host")]
    NoUids,
    #[error("{0} did not end although it was killed")]
    Unkillable(SandboxId),
}

impl ProotError {
    pub(super) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { operation, path: path.into(), source }
    }

    pub(super) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }

    pub(super) fn of(self, operation: &'static str) -> ProviderError {
        match self {
            Self::Exists(_) | Self::TooLarge(_) => ProviderError::InvalidSpec { message: self.to_string() },
            Self::NoUids => ProviderError::Exhausted { message: self.to_string() },
            Self::NoProgram(_) => ProviderError::Unavailable {
                provider: NAME.to_owned(),
                message: "PRoot is not installed".into(),
                hint: Some(INSTALL_FIX.into()),
                cause: Some(self.into()),
            },
            other => ProviderError::Failed { operation, cause: other.into() },
        }
    }
}

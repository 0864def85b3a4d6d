//! Everything that can go wrong for a caller, in one enum.
//!
//! `rpc` maps it to Connect codes and `web` to HTTP statuses; both carry the
//! [`Reason`] beside it so that our client need not read prose.

use std::io;
use std::path::Path;

use rustix::io::Errno;
use stacyvm_envd::agent::Reason;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    InvalidArgument(String),
    #[error("no such file or directory: {0}")]
    FileNotFound(String),
    /// Something of another kind, or anything at all, is in the way.
    #[error("{0}")]
    FileConflict(String),
    #[error("already exists: {0}")]
    FileExists(String),
    #[error("permission denied: {0}")]
    FileForbidden(String),
    #[error("no process {0}")]
    ProcessNotFound(String),
    #[error("{0}")]
    CommandNotFound(String),
    #[error("no user {0}")]
    UserNotFound(String),
    #[error("the process limit is used up")]
    PidsExhausted,
    #[error("the memory is used up")]
    MemoryExhausted,
    #[error("the disk is full")]
    DiskFull,
    #[error("nothing listens on {0}")]
    PortClosed(String),
    #[error("the command reached its deadline and was killed")]
    DeadlineExceeded,
    /// One of our own limits.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::InvalidArgument(_) => Reason::InvalidArgument,
            Self::FileNotFound(_) => Reason::FileNotFound,
            Self::FileConflict(_) | Self::FileExists(_) => Reason::FileConflict,
            Self::FileForbidden(_) => Reason::FileForbidden,
            Self::ProcessNotFound(_) => Reason::ProcessNotFound,
            Self::CommandNotFound(_) => Reason::CommandNotFound,
            Self::UserNotFound(_) => Reason::UserNotFound,
            Self::PidsExhausted => Reason::PidsExhausted,
            Self::MemoryExhausted => Reason::MemoryExhausted,
            Self::DiskFull => Reason::DiskFull,
            Self::PortClosed(_) => Reason::PortClosed,
            Self::DeadlineExceeded => Reason::DeadlineExceeded,
            Self::Busy(_) => Reason::Busy,
            Self::Internal(_) => Reason::Internal,
        }
    }

    /// What it is about, where the reason alone does not say.
    pub(crate) fn subject(&self) -> &str {
        match self {
            Self::FileNotFound(subject)
            | Self::FileExists(subject)
            | Self::FileForbidden(subject)
            | Self::ProcessNotFound(subject)
            | Self::UserNotFound(subject)
            | Self::PortClosed(subject) => subject,
            Self::InvalidArgument(_)
            | Self::FileConflict(_)
            | Self::CommandNotFound(_)
            | Self::PidsExhausted
            | Self::MemoryExhausted
            | Self::DiskFull
            | Self::DeadlineExceeded
            | Self::Busy(_)
            | Self::Internal(_) => "",
        }
    }

    /// A failed file operation on `path`.
    pub(crate) fn file(path: &Path, error: &io::Error) -> Self {
        let shown = path.display().to_string();
        let Some(errno) = Errno::from_io_error(error) else {
            return Self::Internal(format!("{shown}: {error}"));
        };
        match errno {
            Errno::NOENT => Self::FileNotFound(shown),
            Errno::EXIST => Self::FileExists(shown),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => Self::FileForbidden(shown),
            Errno::NOTDIR => Self::FileConflict(format!("not a directory: {shown}")),
            Errno::ISDIR => Self::FileConflict(format!("is a directory: {shown}")),
            Errno::NOTEMPTY => Self::FileConflict(format!("directory not empty: {shown}")),
            Errno::BUSY | Errno::TXTBSY | Errno::XDEV => Self::FileConflict(format!("{shown}: {error}")),
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::DiskFull,
            Errno::NOMEM => Self::MemoryExhausted,
            Errno::LOOP => Self::InvalidArgument(format!("too many symbolic links: {shown}")),
            Errno::NAMETOOLONG => Self::InvalidArgument(format!("name too long: {shown}")),
            Errno::INVAL => Self::InvalidArgument(format!("invalid path: {shown}")),
            Errno::MFILE | Errno::NFILE => Self::Busy("too many open files".to_owned()),
            _ => Self::Internal(format!("{shown}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_errors_keep_their_meaning() {
        let file = |errno: Errno| Failure::file(Path::new("/a"), &errno.into());
        assert_eq!(file(Errno::NOENT), Failure::FileNotFound("/a".to_owned()));
        assert_eq!(file(Errno::NOSPC), Failure::DiskFull);
        assert_eq!(file(Errno::ISDIR), Failure::FileConflict("is a directory: /a".to_owned()));
        assert_eq!(file(Errno::ACCESS).reason(), Reason::FileForbidden);
    }
}

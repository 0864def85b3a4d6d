//! What a check is, and how it says that something is wrong.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use stacyvm_sandbox::SessionError;

use crate::{Context, TargetError};

/// One promise of the contract.
pub struct Check {
    /// `C..` are the checks of the published suite, `S..` are ours.
    pub id: &'static str,
    /// What holds when it passes, in one line.
    pub title: &'static str,
    /// The check is skipped where the target lacks one of these.
    pub needs: &'static [Ability],
    /// The check fails when it takes longer.
    pub deadline: Duration,
    pub(crate) body: Body,
}

pub(crate) type Body = for<'a> fn(&'a Context) -> Pin<Box<dyn Future<Output = Checked> + Send + 'a>>;

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").field("id", &self.id).field("title", &self.title).finish_non_exhaustive()
    }
}

/// Something a runtime, or the way we reach it, may honestly not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ability {
    /// Real programs of a real image.
    Programs,
    /// Terminals, standard input and signals.
    Terminal,
    Watch,
    /// Reaching a port inside.
    Dial,
    /// Reaching a unix socket inside.
    Sockets,
    /// Listing what listens inside.
    Ports,
    /// Readings of memory and processes.
    Usage,
    /// A sandbox that outlives a command that runs out of memory.
    OutlivesOom,
    /// Output and files that are not text.
    Bytes,
    /// Owners, kinds and links of files, and making directories.
    FileDetails,
    /// Trees as tar.
    Archives,
    /// Output while a command runs.
    LiveOutput,
    /// Commands as another user.
    Users,
    /// Failures that tell what was wrong.
    Failures,
    /// Limits of a sandbox that are known to hold.
    Limits,
    /// Names and modes that only the kernel has a say in.
    ExactFiles,
    /// Processes and a host name of one's own.
    OwnProcesses,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Programs => "running real programs",
            Self::Terminal => "terminals, stdin and signals",
            Self::Watch => "watching files",
            Self::Dial => "dialing a port inside",
            Self::Sockets => "dialing a unix socket inside",
            Self::Ports => "listing ports inside",
            Self::Usage => "reading resource usage",
            Self::OutlivesOom => "outliving a command that runs out of memory",
            Self::Bytes => "output and files that are not text",
            Self::FileDetails => "details of files",
            Self::Archives => "trees as archives",
            Self::LiveOutput => "output while a command runs",
            Self::Users => "commands as another user",
            Self::Failures => "failures that tell what was wrong",
            Self::Limits => "limits that are known to hold",
            Self::ExactFiles => "names and modes exactly as the kernel keeps them",
            Self::OwnProcesses => "processes that nobody else sees",
        })
    }
}

/// Why a check failed: what was expected and what was there instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(pub String);

pub type Checked = Result<(), Failure>;

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Self(format!("a call failed: {}", chain(&error)))
    }
}

impl From<TargetError> for Failure {
    fn from(error: TargetError) -> Self {
        Self(chain(&error))
    }
}

/// An error with all its causes, for the person who reads the report.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Fails the check with a message unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::check::Failure::new(format!($($message)+)));
        }
    };
}
pub(crate) use ensure;

/// Fails the check unless both are equal, showing both.
pub(crate) fn expect_eq<T: PartialEq + fmt::Debug + ?Sized>(what: &str, got: &T, expected: &T) -> Checked {
    if got == expected {
        Ok(())
    } else {
        Err(Failure(format!("{what}: expected {}, got {}", shown(expected), shown(got))))
    }
}

/// Fails the check unless the call failed in the way that `matches` accepts.
pub(crate) fn expect_error<T>(
    what: &str,
    outcome: Result<T, SessionError>,
    expected: &str,
    matches: impl Fn(&SessionError) -> bool,
) -> Checked {
    match outcome {
        Err(error) if matches(&error) => Ok(()),
        Err(error) => Err(Failure(format!("{what}: expected the error {expected}, got {error:?}"))),
        Ok(_) => Err(Failure(format!("{what}: expected the error {expected}, but it succeeded"))),
    }
}

/// Longest value shown in a failure.
const SHOWN_CHARS_MAX: usize = 400;

fn shown<T: fmt::Debug + ?Sized>(value: &T) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}… ({} characters)", &text[..end], text.chars().count()),
        None => text,
    }
}

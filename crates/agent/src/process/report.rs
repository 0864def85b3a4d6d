//! What a supervisor tells the agent, over a connection of their own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::lock;
use crate::descriptor::watch_descriptor;

/// Length of one report.
const REPORT_BYTES: usize = 12;

/// More than a command's supervisor says in all.
const MAX_REPORTS: usize = 3;

/// What the supervisor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// The command's program runs.
    Started { pid: i32 },
    /// The command was never started.
    Refused { step: Step, errno: i32 },
    /// Wait status of the command.
    Ended { status: i32 },
}

/// Where starting a command can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Fork,
    Session,
    Terminal,
    User,
    Workdir,
    Exec,
}

impl Report {
    fn decode(bytes: [u8; REPORT_BYTES]) -> Option<Self> {
        let word = |at: usize| Some(i32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (kind, first, second) = (word(0)?, word(4)?, word(8)?);
        Some(match kind {
            1 => Self::Started { pid: first },
            2 => Self::Refused { step: Step::from_code(first)?, errno: second },
            3 => Self::Ended { status: first },
            _ => return None,
        })
    }

    pub(super) fn encode(self) -> [u8; REPORT_BYTES] {
        let (kind, first, second) = match self {
            Self::Started { pid } => (1, pid, 0),
            Self::Refused { step, errno } => (2, step as i32, errno),
            Self::Ended { status } => (3, status, 0),
        };
        let mut bytes = [0; REPORT_BYTES];
        bytes[..4].copy_from_slice(&i32::to_ne_bytes(kind));
        bytes[4..8].copy_from_slice(&i32::to_ne_bytes(first));
        bytes[8..].copy_from_slice(&i32::to_ne_bytes(second));
        bytes
    }
}

impl Step {
    fn from_code(code: i32) -> Option<Self> {
        [Self::Fork, Self::Session, Self::Terminal, Self::User, Self::Workdir, Self::Exec]
            .into_iter()
            .find(|step| *step as i32 == code)
    }
}

/// The agent's end of the connection. While it is open, the supervisor stays.
pub(crate) struct Reports {
    connection: AsyncFd<OwnedFd>,
    /// Read, but not taken.
    waiting: Mutex<Vec<u8>>,
}

impl Reports {
    pub(super) fn new(connection: OwnedFd) -> io::Result<Self> {
        Ok(Self { connection: watch_descriptor(connection, Interest::READABLE)?, waiting: Mutex::default() })
    }

    /// The next one; `None` when there will be no more.
    pub(super) async fn next(&self) -> Option<Report> {
        loop {
            if let Some(report) = self.take() {
                return Report::decode(report);
            }
            let mut ready = self.connection.readable().await.ok()?;
            let mut bytes = [0; MAX_REPORTS * REPORT_BYTES];
            match rustix::net::recv(self.connection.get_ref(), &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return None,
                Ok((_, count)) => {
                    lock(&self.waiting).extend_from_slice(&bytes[..count]);
                    // Less than there was room for is all there is: no second
                    // read has to find that out.
                    if count < bytes.len() {
                        ready.clear_ready();
                    }
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(_) => return None,
            }
        }
    }

    fn take(&self) -> Option<[u8; REPORT_BYTES]> {
        let mut waiting = lock(&self.waiting);
        let report = *waiting.first_chunk()?;
        waiting.drain(..REPORT_BYTES);
        Some(report)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn reports_survive_the_wire() {
        for report in [
            Report::Started { pid: 42 },
            Report::Refused { step: Step::Workdir, errno: libc::ENOENT },
            Report::Ended { status: 0x0b00 },
        ] {
            assert_eq!(Report::decode(report.encode()), Some(report));
        }
        assert_eq!(Report::decode([9; REPORT_BYTES]), None);
    }

    #[tokio::test]
    async fn reports_are_taken_one_by_one_however_they_arrive() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let reports = Reports::new(ours.into()).unwrap();
        let (started, ended) = (Report::Started { pid: 42 }, Report::Ended { status: 7 });
        theirs.write_all(&[started.encode(), ended.encode()].concat()).unwrap();
        assert_eq!(reports.next().await, Some(started));
        theirs.write_all(&started.encode()[..5]).unwrap();
        assert_eq!(reports.next().await, Some(ended));
        let (last, ()) = tokio::join!(reports.next(), async { theirs.write_all(&started.encode()[5..]).unwrap() });
        assert_eq!(last, Some(started));
        drop(theirs);
        assert_eq!(reports.next().await, None);
    }
}

//! Pseudo-terminals.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::TerminalSize;
use crate::user::Identity;

/// A new terminal: our side, not blocking, and the command's.
///
/// The command's side is opened through ours, not through its path: what
/// `/dev/pts` shows is up to the guest.
pub(crate) fn open(size: TerminalSize, identity: &Identity) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    resize(&ours, size)?;
    // Programs such as `su`, `screen` or `ssh` reopen it by name as the user.
    // Without the right to give it away it still works as it is.
    let _ = rustix::fs::fchown(&theirs, Some(Uid::from_raw(identity.uid)), Some(Gid::from_raw(identity.gid)));
    let _ = rustix::fs::fchmod(&theirs, Mode::from_raw_mode(0o620));
    rustix::fs::fcntl_setfl(&ours, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok((ours, theirs))
}

pub(crate) fn resize(terminal: impl AsFd, size: TerminalSize) -> io::Result<()> {
    let window = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, window)?)
}

//! Pseudo-terminals.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::TerminalSize;
use crate::user::Identity;

/// `UNIX98_PTY_SLAVE_MAJOR` of the kernel.
const TERMINAL_MAJOR: u32 = 136;

/// A new terminal: our side, not blocking, and the command's.
///
/// The command's side is opened through ours, not through its path: what
/// `/dev/pts` shows is up to the guest.
pub(crate) fn open(size: TerminalSize, identity: &Identity) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&ours)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let theirs = match rustix::pty::ioctl_tiocgptpeer(&ours, flags) {
        // gVisor has no such call.
        Err(Errno::NOTTY | Errno::INVAL) => open_by_name(&ours)?,
        opened => opened?,
    };
    resize(&ours, size)?;
    // Programs such as `su`, `screen` or `ssh` reopen it by name as the user.
    // Without the right to give it away it still works as it is.
    let _ = rustix::fs::fchown(&theirs, Some(Uid::from_raw(identity.uid)), Some(Gid::from_raw(identity.gid)));
    let _ = rustix::fs::fchmod(&theirs, Mode::from_raw_mode(0o620));
    rustix::fs::fcntl_setfl(&ours, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok((ours, theirs))
}

/// Opens the command's side by its path, and makes sure that it is a terminal
/// and nothing that was put there.
fn open_by_name(ours: &OwnedFd) -> io::Result<OwnedFd> {
    let name = rustix::pty::ptsname(ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name, flags, Mode::empty())?;
    let found = rustix::fs::fstat(&theirs)?;
    let is_terminal = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && rustix::fs::major(found.st_rdev) == TERMINAL_MAJOR;
    if !is_terminal {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    rustix::fs::fcntl_setfl(&theirs, OFlags::RDWR)?;
    Ok(theirs)
}

pub(crate) fn resize(terminal: impl AsFd, size: TerminalSize) -> io::Result<()> {
    let window = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, window)?)
}

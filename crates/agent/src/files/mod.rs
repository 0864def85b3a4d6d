//! Files of the sandbox.
//!
//! Everything here blocks and runs on the agent's blocking threads, in short
//! steps: a slow client never occupies one. Whatever a guest puts in place of a
//! file (a pipe, a device, a loop of links) must not hold a call up.

pub(crate) mod archive;
pub(crate) mod content;
pub(crate) mod entry;
pub(crate) mod glob;
mod tar;
pub(crate) mod tree;
pub(crate) mod watch;

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::Failure;

/// Opens a regular file for reading. Pipes, devices and sockets are refused
/// without waiting for their other end.
pub(crate) fn open_regular(path: &Path) -> Result<File, Failure> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fail = |error: Errno| Failure::file(path, &error.into());
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        // A socket, or a device that is not there.
        Errno::NXIO | Errno::NODEV => Failure::FileConflict(format!("not a regular file: {}", path.display())),
        error => fail(error),
    })?;
    match FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(fail)?.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(fail(Errno::ISDIR)),
        FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => return Err(Failure::FileConflict(format!("not a regular file: {}", path.display()))),
    }
    let file = File::from(fd);
    refuse_own_memory(&file).map_err(|error| Failure::file(path, &error))?;
    Ok(file)
}

/// The agent's own `/proc` entries (`mem` above all) would show its token.
fn refuse_own_memory(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    if rustix::fs::fstatfs(file)?.f_type as i64 != PROC_SUPER_MAGIC {
        return Ok(());
    }
    let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let own = format!("/proc/{}/", std::process::id());
    if opened.to_string_lossy().starts_with(&own) { Err(Errno::ACCESS.into()) } else { Ok(()) }
}

/// Runs a blocking step.
pub(crate) async fn blocking<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(step).await {
        Ok(result) => result,
        Err(error) => Err(Failure::Internal(format!("a file operation failed: {error}"))),
    }
}

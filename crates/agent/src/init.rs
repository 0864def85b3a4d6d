//! The first program of a container whose runtime passes on no descriptors.
//!
//! ```text
//! launcher ── configuration, one line ──► standard input
//!                                          workspace ─ listen ─ answer
//! launcher ◄── BootReply, one line ────── standard output ─► serve, detached
//! ```
//!
//! Until the answer nothing of the image has run, so that nobody could read the
//! configuration or answer in the agent's place.

use std::fs::DirBuilder;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};
use rustix::io::Errno;
use stacyvm_envd::boot::MAX_BOOT_BYTES;
use stacyvm_envd::{BootConfig, BootRefusal, BootReply};

use crate::boot::Tracer;
use crate::serve::Peers;
use crate::user::{self, Identity};
use crate::{Failure, boot, kernel};

/// Where commands start unless the image says otherwise.
const WORKSPACE: &str = "/workspace";

/// Serves on `socket` until the sandbox ends.
pub(crate) fn init(socket: &str) -> io::Result<()> {
    let config = boot::parse(&read_line()?)?;
    let listener = match prepare(&config, Path::new(socket)) {
        Ok(listener) => listener,
        Err((reason, message)) => {
            answer(&BootReply::Refused { reason, message: message.clone() })?;
            return Err(io::Error::other(message));
        }
    };
    answer(&BootReply::Ready(kernel::seen()))?;
    detach()?;
    boot::run(config, listener, Peers::FromOutside, Tracer::Nobody)
}

fn read_line() -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    io::stdin().lock().take(MAX_BOOT_BYTES as u64 + 1).read_until(b'\n', &mut line)?;
    Ok(line)
}

fn answer(reply: &BootReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut output = io::stdout().lock();
    output.write_all(&line)?;
    output.flush()
}

/// The launcher has heard all it will hear. Whatever carried it may go away.
fn detach() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    if null.as_raw_fd() <= 2 {
        let _is_one_of_them = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
    Ok(())
}

fn prepare(config: &BootConfig, socket: &Path) -> Result<UnixListener, (BootRefusal, String)> {
    let user = config.default_user.as_deref().filter(|user| !user.is_empty()).unwrap_or("root");
    let owner = user::resolve(user).map_err(|failure| match failure {
        Failure::UserNotFound(name) => (BootRefusal::UnknownUser, format!("the image has no user `{name}`")),
        other => (BootRefusal::System, other.to_string()),
    })?;
    rustix::process::chdir("/").map_err(|error| (BootRefusal::System, format!("enter /: {error}")))?;
    prepare_directories(&owner, &config.workdir).map_err(|(path, error)| {
        (BootRefusal::Image, format!("the sandbox's directory {path} cannot be made: {error}"))
    })?;
    UnixListener::bind(socket)
        .map_err(|error| (BootRefusal::System, format!("listen on {}: {error}", socket.display())))
}

/// What every sandbox has, whatever its image.
fn prepare_directories<'a>(owner: &Identity, workdir: &'a str) -> Result<(), (&'a str, io::Error)> {
    make("/tmp", 0o1777).map_err(|error| ("/tmp", error))?;
    make(WORKSPACE, 0o755).and_then(|()| own(owner)).map_err(|error| (WORKSPACE, error))?;
    make(workdir, 0o755).map_err(|error| (workdir, error))
}

fn make(path: &str, mode: u32) -> io::Result<()> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    // The umask has taken what others may.
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).map_err(io::Error::from)
}

/// Hands the workspace, not what an image has put into it, to the user.
fn own(owner: &Identity) -> io::Result<()> {
    if owner.uid == 0 {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    match rustix::fs::chownat(CWD, WORKSPACE, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
        // It is his already, in a container that runs as nobody else.
        Err(Errno::PERM) if rustix::process::geteuid() == uid => Ok(()),
        result => result.map_err(io::Error::from),
    }
}

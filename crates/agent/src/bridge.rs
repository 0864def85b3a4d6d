//! `connect SOCKET`: standard input and output as a way to the agent's socket,
//! for runtimes that offer nothing but an `exec`.
//!
//! Two threads and no runtime: it is started once per connection.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

/// What a pipe holds.
const COPY_BYTES: usize = 64 << 10;

pub(crate) fn connect(socket: &str) -> io::Result<()> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let agent = UnixStream::connect(socket)?;
    let to_agent = agent.try_clone()?;
    std::thread::Builder::new().spawn(move || {
        let _ = copy(input, &to_agent);
        let _ = to_agent.shutdown(Shutdown::Write);
    })?;
    // The program ends with this direction: an agent that closes has said all,
    // and whoever still holds standard input open would not notice otherwise.
    copy(agent, output)
}

/// Plain reads and writes: the standard library's copy splices, and between a
/// socket and a pipe that others poll, bytes were then seen to stay for seconds.
fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

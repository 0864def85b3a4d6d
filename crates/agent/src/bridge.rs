//! `connect SOCKET`: standard input and output as a way to the agent's socket,
//! for runtimes that offer nothing but an `exec`.
//!
//! Two threads and no runtime: it is started once per connection, and the
//! kernel moves the bytes where it can (`splice`).

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

pub(crate) fn connect(socket: &str) -> io::Result<()> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let agent = UnixStream::connect(socket)?;
    let to_agent = agent.try_clone()?;
    std::thread::Builder::new().spawn(move || {
        let _ = io::copy(&mut &input, &mut &to_agent);
        let _ = to_agent.shutdown(Shutdown::Write);
    })?;
    // The program ends with this direction: an agent that closes has said all,
    // and whoever still holds standard input open would not notice otherwise.
    io::copy(&mut &agent, &mut output).map(drop)
}

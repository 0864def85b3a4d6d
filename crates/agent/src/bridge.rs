//! `connect SOCKET`: standard input and output as a way to the agent's socket,
//! for runtimes that offer nothing but an `exec`.

use std::io;

use tokio::net::UnixStream;

pub(crate) fn connect(socket: &str) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut stdio = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
        tokio::io::copy_bidirectional(&mut stdio, &mut stream).await?;
        Ok(())
    })
}

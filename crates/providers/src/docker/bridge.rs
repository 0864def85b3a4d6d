//! The way to an agent that works with every daemon and runtime: an `exec` of
//! `stacyvm-agent connect`, whose standard input and output are the stream.

use std::io;

use bollard::container::LogOutput;
use bollard::errors::Error as ApiError;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::ExecConfig;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use stacyvm_sandbox::AgentIo;
use tokio_util::io::StreamReader;

use super::container::SOCKET;
use super::daemon::Daemon;
use super::error::{bounded, is_unreachable, status};
use super::place;

/// Read at once; the daemon writes frames of up to 32 KiB.
const READ_BYTES: usize = 64 << 10;

/// Opens one stream, which ends with the container: a daemon may forget to end
/// those of an `exec` whose runtime died.
pub(super) async fn open(
    daemon: &Daemon,
    container: &str,
    ended: impl Future<Output = ()> + Send + 'static,
) -> io::Result<Box<dyn AgentIo>> {
    let exec = ExecConfig {
        cmd: Some(vec![place::PROGRAM.to_owned(), "connect".to_owned(), SOCKET.to_owned()]),
        user: Some("0:0".to_owned()),
        // The image's own may have been removed by the guest.
        working_dir: Some("/".to_owned()),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        tty: Some(false),
        ..ExecConfig::default()
    };
    let exec = daemon.client.create_exec(container, exec).await.map_err(as_io)?;
    let options = StartExecOptions { detach: false, tty: false, output_capacity: Some(READ_BYTES) };
    match daemon.client.start_exec(&exec.id, Some(options)).await.map_err(as_io)? {
        StartExecResults::Attached { output, input } => {
            let output = standard_output(output).take_until(Box::pin(ended));
            Ok(Box::new(tokio::io::join(StreamReader::new(output), input)))
        }
        StartExecResults::Detached => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn standard_output(
    output: impl Stream<Item = Result<LogOutput, ApiError>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static {
    let bytes = output.filter_map(|output| async move {
        match output {
            Ok(LogOutput::StdOut { message }) => Some(Ok(message)),
            Ok(LogOutput::StdErr { message }) => {
                tracing::debug!(message = bounded(&String::from_utf8_lossy(&message)), "the bridge complains");
                None
            }
            Ok(LogOutput::Console { .. } | LogOutput::StdIn { .. }) => {
                Some(Err(io::Error::new(io::ErrorKind::InvalidData, "the daemon mixes up the bridge's streams")))
            }
            Err(error) => Some(Err(as_io(error))),
        }
    });
    Box::pin(bytes)
}

/// `NotFound` says that the sandbox has ended; a daemon that is away does not.
fn as_io(error: ApiError) -> io::Error {
    let kind = match status(&error) {
        // No such container, or it does not run.
        Some(404 | 409) => io::ErrorKind::NotFound,
        _ if is_unreachable(&error) => io::ErrorKind::HostUnreachable,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_daemon_can_say_that_a_sandbox_is_gone() {
        let answered = |status_code| ApiError::DockerResponseServerError { status_code, message: String::new() };
        assert_eq!(as_io(answered(404)).kind(), io::ErrorKind::NotFound);
        assert_eq!(as_io(answered(409)).kind(), io::ErrorKind::NotFound);
        assert_eq!(as_io(answered(500)).kind(), io::ErrorKind::Other);
        let away = ApiError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert_eq!(as_io(away).kind(), io::ErrorKind::HostUnreachable);
    }
}

//! What keeps a process of ours from outliving the one that started it for
//! itself: the other end of its standard input, which the kernel closes however
//! its owner ends. (A parent's death signal would come with the end of a mere
//! thread.)

use std::process::{ExitCode, Stdio};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use crate::commands::exit_status;

/// The option that makes standard input a lifeline.
pub(crate) const OPTION: &str = "end-with-stdin";

/// Cancels once standard input is closed.
pub(crate) fn watch(gone: CancellationToken) {
    // It ends with this process: nothing else ends such a wait.
    std::thread::spawn(move || {
        let _closed = gone.drop_guard();
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    });
}

/// Runs this command line again in a process that has a lifeline, and cuts it at
/// `stop`: what is begun there is ended in order, also after a `kill -9` of this
/// process.
pub(crate) async fn run_on_one(stop: CancellationToken) -> anyhow::Result<ExitCode> {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).arg(format!("--{OPTION}")).stdin(Stdio::piped());
    let mut process = command.spawn().context("cannot start this program once more")?;
    let lifeline = process.stdin.take();
    let status = tokio::select! {
        status = process.wait() => status,
        () = stop.cancelled() => {
            drop(lifeline);
            process.wait().await
        }
    };
    let status = status.context("wait for the process that does the work")?;
    let code = status.code().with_context(|| format!("the process that did the work ended with {status}"))?;
    Ok(exit_status(code))
}

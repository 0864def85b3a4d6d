//! Starting a container's agent: the configuration goes in on standard input,
//! the answer comes back on standard output, and both are closed for good.
//!
//! This way nothing of the configuration is in argv, in the environment, in
//! labels or in a file, and no further process is needed.

use std::time::Duration;

use bollard::container::{AttachContainerResults, LogOutput};
use bollard::query_parameters::AttachContainerOptionsBuilder;
use futures_util::StreamExt as _;
use stacyvm_envd::{BootConfig, BootReply, GuestKernel};
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::daemon::Daemon;
use super::error::{DockerError, bounded};

/// A real kernel takes milliseconds, an emulated one on a busy host seconds.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// One line of JSON about a kernel.
const MAX_ANSWER_BYTES: usize = 16 << 10;

/// Of what a runtime or the agent complains about.
const MAX_COMPLAINT_BYTES: usize = 4 << 10;

/// Starts a container that was created, and returns once its agent serves.
pub(super) async fn start(daemon: &Daemon, container: &str, config: &BootConfig) -> Result<GuestKernel, DockerError> {
    // Before the start, or an answer could be missed.
    let options = AttachContainerOptionsBuilder::default().stream(true).stdin(true).stdout(true).stderr(true).build();
    let attached = daemon.client.attach_container(container, Some(options)).await;
    let attached = attached.map_err(DockerError::api("attach to the container"))?;
    daemon.client.start_container(container, None).await.map_err(DockerError::api("start the container"))?;
    let talk = talk(attached, config);
    match timeout(ANSWER_TIME, talk).await {
        Ok(Ok(BootReply::Ready(kernel))) => Ok(kernel),
        Ok(Ok(BootReply::Refused { reason, message })) => {
            Err(DockerError::Refused { reason, message: bounded(&message) })
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(DockerError::AgentSilent(ANSWER_TIME.as_secs())),
    }
}

async fn talk(mut attached: AttachContainerResults, config: &BootConfig) -> Result<BootReply, DockerError> {
    const TELL: &str = "tell the agent its configuration";
    let mut line = serde_json::to_vec(config).map_err(|error| DockerError::system(TELL)(error.into()))?;
    line.push(b'\n');
    // A container that ended at once does not read: its complaint says more.
    let told = async {
        attached.input.write_all(&line).await?;
        attached.input.flush().await
    };
    let told = told.await;
    let (mut answer, mut complaint) = (Vec::new(), Vec::new());
    while let Some(output) = attached.output.next().await {
        match output.map_err(DockerError::api("read the agent's answer"))? {
            LogOutput::StdOut { message } => {
                answer.extend_from_slice(&message);
                if let Some(end) = answer.iter().position(|byte| *byte == b'\n') {
                    return parse(&answer[..end]);
                }
                if answer.len() > MAX_ANSWER_BYTES {
                    break;
                }
            }
            LogOutput::StdErr { message } => {
                let room = MAX_COMPLAINT_BYTES.saturating_sub(complaint.len()).min(message.len());
                complaint.extend_from_slice(&message[..room]);
            }
            LogOutput::StdIn { .. } | LogOutput::Console { .. } => {}
        }
    }
    told.map_err(DockerError::system(TELL))?;
    Err(DockerError::AgentEnded(bounded(&String::from_utf8_lossy(&complaint))))
}

fn parse(answer: &[u8]) -> Result<BootReply, DockerError> {
    serde_json::from_slice(answer).map_err(|error| DockerError::AgentEnded(format!("it answers nonsense: {error}")))
}

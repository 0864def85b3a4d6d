//! The three Connect services. Only this folder names types of the framework,
//! so that another one could take its place.

mod agent;
mod filesystem;
mod process;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use connectrpc::dispatcher::Chain;
use connectrpc::{ConnectError, ConnectRpcService, ErrorCode, ErrorDetail, Limits, RequestContext};
use stacyvm_envd::agent::{AgentServer, FAILURE_TYPE, Failure as FailureDetail};
use stacyvm_envd::filesystem::FilesystemServer;
use stacyvm_envd::process::ProcessServer;

use crate::{Failure, Sandbox};

/// One request message.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// What decoding one message may take.
const MAX_ELEMENT_BYTES: usize = 8 << 20;

/// Silence after which a stream says that it lives, unless the client asks for
/// another time.
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

pub(crate) type Service = ConnectRpcService<Chain<AgentServer<Rpc>, Chain<ProcessServer<Rpc>, FilesystemServer<Rpc>>>>;

/// Implements all three services.
pub(crate) struct Rpc {
    sandbox: Arc<Sandbox>,
}

pub(crate) fn service(sandbox: Arc<Sandbox>) -> Service {
    let rpc = Arc::new(Rpc { sandbox });
    let limits = Limits::default()
        .with_max_message_size(MAX_MESSAGE_BYTES)
        .with_max_request_body_size(MAX_MESSAGE_BYTES)
        .with_element_memory_limit(MAX_ELEMENT_BYTES);
    let services = Chain(
        AgentServer::from_arc(Arc::clone(&rpc)),
        Chain(ProcessServer::from_arc(Arc::clone(&rpc)), FilesystemServer::from_arc(rpc)),
    );
    ConnectRpcService::new(services).with_limits(limits)
}

/// `Authorization: Basic base64("user:")`, as envd's clients name the user.
fn user(ctx: &RequestContext) -> Result<Option<String>, Failure> {
    let Some(header) = ctx.header(http::header::AUTHORIZATION) else { return Ok(None) };
    let invalid = || Failure::InvalidArgument("the Authorization header is not Basic `user:`".to_owned());
    let encoded = header.to_str().ok().and_then(|text| text.strip_prefix("Basic ")).ok_or_else(invalid)?;
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).map_err(|_| invalid())?;
    let text = String::from_utf8(decoded).map_err(|_| invalid())?;
    let user = text.split_once(':').map_or(text.as_str(), |(user, _)| user);
    Ok(Some(user.to_owned()).filter(|user| !user.is_empty()))
}

fn keepalive(ctx: &RequestContext) -> Duration {
    ctx.header(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_KEEPALIVE, Duration::from_secs)
}

impl From<Failure> for ConnectError {
    fn from(failure: Failure) -> Self {
        let code = match &failure {
            Failure::InvalidArgument(_) | Failure::CommandNotFound(_) => ErrorCode::InvalidArgument,
            Failure::FileNotFound(_) | Failure::ProcessNotFound(_) => ErrorCode::NotFound,
            Failure::FileExists(_) => ErrorCode::AlreadyExists,
            Failure::FileConflict(_) | Failure::PortClosed(_) => ErrorCode::FailedPrecondition,
            Failure::FileForbidden(_) => ErrorCode::PermissionDenied,
            Failure::UserNotFound(_) => ErrorCode::Unauthenticated,
            Failure::PidsExhausted | Failure::MemoryExhausted | Failure::DiskFull | Failure::Busy(_) => {
                ErrorCode::ResourceExhausted
            }
            Failure::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            Failure::Internal(_) => ErrorCode::Internal,
        };
        let detail = FailureDetail { reason: failure.reason().into(), subject: failure.subject().to_owned() };
        ConnectError::new(code, failure.to_string()).with_detail(ErrorDetail::from_message(FAILURE_TYPE, &detail))
    }
}

//! Failures of this provider, and what of them a caller gets to see.

use std::io;

use bollard::errors::Error as ApiError;
use stacyvm_api::SandboxId;
use stacyvm_envd::BootRefusal;
use stacyvm_image::ImageError;
use stacyvm_sandbox::ProviderError;

use super::NAME;

/// Of the daemon's words, what a log line or an answer takes.
const MAX_MESSAGE_CHARS: usize = 512;

/// What runsc says where it cannot set up its network stack, whatever network the
/// container has.
const GVISOR_WITHOUT_NETWORK: &str = "network enabled in root network namespace";

#[derive(Debug, thiserror::Error)]
pub(super) enum DockerError {
    #[error("{operation}")]
    Api {
        operation: &'static str,
        #[source]
        source: ApiError,
    },
    #[error("{operation}")]
    System {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Image(Box<ImageError>),
    /// The daemon could not get it, in its own words.
    #[error("{message}")]
    Pull { message: String },
    #[error("{0} exists already")]
    Exists(SandboxId),
    #[error("the daemon has no runtime `{0}`")]
    UnknownRuntime(String),
    #[error("the daemon has no network `{0}`")]
    UnknownNetwork(String),
    #[error("the daemon's storage cannot bound the size of a sandbox's disk")]
    DiskUnbounded,
    #[error("its runtime `{runtime}` did not start the container: {why}")]
    Unstarted {
        runtime: String,
        why: String,
        #[source]
        source: Box<DockerError>,
    },
    /// The agent, or the runtime in its place, ended before it answered.
    #[error("the sandbox's agent did not start: {0}")]
    AgentEnded(String),
    #[error("the sandbox's agent did not answer within {0} seconds")]
    AgentSilent(u64),
    #[error("{message}")]
    Refused { reason: BootRefusal, message: String },
    /// It is not what the configuration promises.
    #[error("the sandbox does not run as configured: {0}")]
    NotAsPromised(String),
    #[error("{0} did not go away although it was killed")]
    Unremovable(SandboxId),
    #[error("its task ended")]
    TaskEnded,
}

impl DockerError {
    pub(super) fn api(operation: &'static str) -> impl FnOnce(ApiError) -> Self {
        move |source| Self::Api { operation, source }
    }

    pub(super) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }

    /// The answer's HTTP status, if the daemon answered.
    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Self::Api { source, .. } => status(source),
            _ => None,
        }
    }

    /// What the daemon said, if it refused something.
    pub(super) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Api { source: ApiError::DockerResponseServerError { message, .. }, .. } => Some(message),
            _ => None,
        }
    }

    /// What the caller sees of a failed creation.
    pub(super) fn of_create(self, image: &str) -> ProviderError {
        let unavailable = |error: Self, hint: String| ProviderError::Unavailable {
            provider: NAME.to_owned(),
            message: error.to_string(),
            hint: Some(hint),
            cause: Some(error.into()),
        };
        match self {
            Self::Image(error) => (*error).into_provider_error(image),
            Self::Pull { message } => pull_failure(image, message),
            Self::Refused { reason: BootRefusal::UnknownUser, message } => ProviderError::InvalidSpec { message },
            Self::Refused { reason: BootRefusal::Image, message } => {
                ProviderError::Image { image: image.to_owned(), message, hint: None, cause: None }
            }
            Self::Exists(_) => ProviderError::InvalidSpec { message: self.to_string() },
            Self::DiskUnbounded => ProviderError::LimitUnsupported {
                message: self.to_string(),
                hint: "keep the daemon's data on xfs mounted with pquota (overlay2), or on btrfs or zfs; \
                       or accept it with allow_unenforced"
                    .into(),
            },
            Self::UnknownRuntime(_) => {
                unavailable(self, "register it in the daemon's daemon.json, or set providers.docker.runtime".into())
            }
            Self::UnknownNetwork(ref name) => {
                let hint = format!("docker network create {name}, or set providers.docker.network_mode");
                unavailable(self, hint)
            }
            Self::NotAsPromised(_) => unavailable(
                self,
                "see how the daemon's daemon.json defines the runtime of providers.docker.runtime".into(),
            ),
            Self::Unstarted { ref runtime, ref why, .. } => {
                let hint = unstarted_hint(runtime, why);
                unavailable(self, hint)
            }
            Self::AgentEnded(_) | Self::AgentSilent(_) => unavailable(
                self,
                "see that the daemon's runtime can run the image, and that memory_mb is enough for it".into(),
            ),
            other => other.of("create the sandbox"),
        }
    }

    pub(super) fn of(self, operation: &'static str) -> ProviderError {
        match &self {
            Self::Api { source, .. } if is_unreachable(source) => ProviderError::Unavailable {
                provider: NAME.to_owned(),
                message: "its daemon does not answer".into(),
                hint: Some("start the daemon, or see providers.docker.socket".into()),
                cause: Some(self.into()),
            },
            _ => ProviderError::Failed { operation, cause: self.into() },
        }
    }
}

fn unstarted_hint(runtime: &str, why: &str) -> String {
    if why.contains(GVISOR_WITHOUT_NETWORK) {
        return format!(
            "gVisor's network stack does not work on the daemon's host: add \"--network=none\" to \"runtimeArgs\" of \
             `{runtime}` in its daemon.json and restart the daemon; previews need no network"
        );
    }
    format!("`docker run --rm --runtime {runtime} IMAGE true` on the daemon's host has to work")
}

pub(super) fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// No answer at all, as opposed to a refusal.
pub(super) fn is_unreachable(error: &ApiError) -> bool {
    matches!(error, ApiError::IOError { .. } | ApiError::HyperResponseError { .. } | ApiError::RequestTimeoutError)
}

/// An error with all its causes, bounded.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    bounded(&text)
}

/// One line of somebody else's text.
pub(super) fn bounded(text: &str) -> String {
    text.trim().chars().take(MAX_MESSAGE_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The daemon says in words only why it could not pull.
fn pull_failure(image: &str, message: String) -> ProviderError {
    const UNREACHABLE: [&str; 10] = [
        "dial tcp",
        "no such host",
        "lookup ",
        "i/o timeout",
        "connection refused",
        "connection reset",
        "network is unreachable",
        "TLS handshake",
        "request canceled",
        "server misbehaving",
    ];
    if UNREACHABLE.iter().any(|words| message.contains(words)) {
        return ProviderError::RegistryUnavailable {
            image: image.to_owned(),
            hint: "look at the daemon's network and proxy settings, or load the image with `docker load`".into(),
            cause: Some(message.into()),
        };
    }
    let denied = ["denied", "unauthorized", "authentication required", "no basic auth credentials"]
        .iter()
        .any(|words| message.contains(words));
    let hint = denied.then(|| "see that it exists, and `docker login` where images.docker_config is kept".to_owned());
    let shown =
        if denied { "it does not exist, or its registry refuses to show it" } else { "the daemon cannot get it" };
    ProviderError::Image { image: image.to_owned(), message: shown.to_owned(), hint, cause: Some(message.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_words_about_a_pull_are_told_apart() {
        let of = |message: &str| pull_failure("x", message.to_owned());
        let offline = "Get \"https://registry/v2/\": dial tcp: lookup registry: no such host";
        assert!(matches!(of(offline), ProviderError::RegistryUnavailable { .. }));
        let denied = "pull access denied for x, repository does not exist or may require 'docker login'";
        assert!(matches!(of(denied), ProviderError::Image { hint: Some(_), .. }));
        assert!(matches!(of("manifest for x:1 not found: manifest unknown"), ProviderError::Image { hint: None, .. }));
    }

    #[test]
    fn what_gvisor_needs_without_a_network_is_named() {
        let hint = |why: &str| {
            let source = ApiError::DockerResponseServerError { status_code: 500, message: why.into() };
            let source = Box::new(DockerError::api("start the container")(source));
            let failed = DockerError::Unstarted { runtime: "runsc".into(), why: why.into(), source };
            match failed.of_create("image") {
                ProviderError::Unavailable { hint: Some(hint), .. } => hint,
                other => panic!("{other:?}"),
            }
        };
        let said = hint("starting container: cannot run with network enabled in root network namespace");
        assert!(said.contains("--network=none") && said.contains("`runsc`"), "{said}");
        assert!(hint("exec format error").contains("docker run --rm --runtime runsc"));
    }

    #[test]
    fn a_daemon_that_is_away_is_unavailable_and_one_that_refuses_is_not() {
        let gone = ApiError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        let gone = DockerError::api("list containers")(gone).of("list sandboxes");
        assert!(matches!(gone, ProviderError::Unavailable { .. }));
        let refused = ApiError::DockerResponseServerError { status_code: 500, message: "no".into() };
        let refused = DockerError::api("list containers")(refused);
        assert_eq!((refused.status(), refused.refusal()), (Some(500), Some("no")));
        assert!(matches!(refused.of("list sandboxes"), ProviderError::Failed { .. }));
    }
}

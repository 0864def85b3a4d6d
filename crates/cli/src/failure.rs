//! How a command fails: what is said, what is suggested, and the exit status.

use std::fmt::Write as _;
use std::process::ExitCode;

use stacyvm_api::ErrorCode;
use stacyvm_client::ClientError;
use stacyvm_image::ImageError;
use stacyvm_sandbox::ProviderError;

/// Something did not work.
const FAILED: u8 = 1;

/// `run`, `exec` and `shell`: the command could not be run at all, as opposed
/// to having failed by itself. Docker's number for the same.
const NOT_RUN: u8 = 125;

/// The ways out where no registry answers.
const NO_REGISTRY: &str = "use --image host, or bring the image in with `stacyvm image import`";

/// A command reached its deadline: the number of coreutils' `timeout`.
const TIMED_OUT: u8 = 124;

/// An error with advice.
#[derive(Debug)]
pub(crate) struct Advice {
    message: String,
    hint: String,
}

impl Advice {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

impl std::fmt::Display for Advice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Advice {}

/// Marks an error as "the command was not run", for the exit status.
#[derive(Debug)]
pub(crate) struct NotRun;

impl std::fmt::Display for NotRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the command was not run")
    }
}

/// The exit status for an error that ends the program.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    let timed_out = client_error(error).and_then(ClientError::code) == Some(ErrorCode::Timeout);
    match error.downcast_ref::<NotRun>() {
        _ if timed_out => TIMED_OUT.into(),
        Some(NotRun) => NOT_RUN.into(),
        None => FAILED.into(),
    }
}

/// The error as it is printed, without colours: `error:`, its causes, `hint:`.
pub(crate) fn text(error: &anyhow::Error) -> String {
    let mut messages: Vec<String> = error.chain().map(ToString::to_string).collect();
    if error.downcast_ref::<NotRun>().is_some() && messages.len() > 1 {
        messages.remove(0);
    }
    // Wrappers that only repeat what is inside them add nothing.
    messages.dedup_by(|inner, outer| outer.ends_with(inner.as_str()));
    let mut text = format!("error: {}", messages.remove(0).replace('\n', "\n       "));
    for cause in messages {
        let _ = write!(text, "\n  caused by: {cause}");
    }
    if let Some(id) = client_error(error).and_then(request_id) {
        let _ = write!(text, "\n  request id: {id}");
    }
    if let Some(hint) = hint(error) {
        let _ = write!(text, "\nhint: {hint}");
    }
    text
}

/// Worth telling whoever runs the server, when the fault is the server's.
fn request_id(error: &ClientError) -> Option<&str> {
    match error {
        ClientError::Api(api) if api.status >= 500 => api.request_id.as_deref(),
        _ => None,
    }
}

fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(advice) = error.chain().find_map(|cause| cause.downcast_ref::<Advice>()) {
        return Some(advice.hint.clone());
    }
    if let Some(image) = error.chain().find_map(|cause| cause.downcast_ref::<ImageError>()) {
        let unreachable = matches!(image, ImageError::RegistryUnavailable { .. });
        return if unreachable { Some(NO_REGISTRY.to_owned()) } else { image.hint() };
    }
    if let Some(ProviderError::Unavailable { hint, .. }) = error.chain().find_map(|cause| cause.downcast_ref()) {
        return hint.clone();
    }
    let client = client_error(error)?;
    // The server speaks of headers and fields; here there are options.
    let here = match client.code() {
        Some(ErrorCode::Unauthorized) => Some("pass the server's key with --api-key or STACYVM_API_KEY"),
        Some(ErrorCode::RegistryUnavailable) => Some(NO_REGISTRY),
        Some(ErrorCode::LimitUnsupported) => Some("leave the limit out, or accept that with --allow-unenforced"),
        _ => None,
    };
    here.or_else(|| client.hint()).map(str::to_owned)
}

fn client_error(error: &anyhow::Error) -> Option<&ClientError> {
    error.chain().find_map(|cause| cause.downcast_ref::<ClientError>())
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn causes_follow_and_repetition_does_not() {
        let error = anyhow!("disk full").context("write b").context("copy a to b");
        assert_eq!(text(&error), "error: copy a to b\n  caused by: write b\n  caused by: disk full");
        let error = anyhow!("gone").context("cannot start: gone");
        assert_eq!(text(&error), "error: cannot start: gone");
    }

    #[test]
    fn advice_is_shown_last_and_once() {
        let error = Err::<(), _>(Advice::new("no such file", "make it")).context("copy").unwrap_err();
        assert_eq!(text(&error), "error: copy\n  caused by: no such file\nhint: make it");
    }

    #[test]
    fn not_run_sets_the_status_and_stays_out_of_the_text() {
        let error = anyhow!("no server").context(NotRun);
        assert_eq!(text(&error), "error: no server");
        assert_eq!(format!("{:?}", exit_code(&error)), format!("{:?}", ExitCode::from(125)));
        assert_eq!(format!("{:?}", exit_code(&anyhow!("x"))), format!("{:?}", ExitCode::from(1)));
    }
}

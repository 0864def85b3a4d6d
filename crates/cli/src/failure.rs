//! How a command fails: what is said, what is suggested, and the exit status.

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;
use stacyvm_api::ErrorCode;
use stacyvm_client::ClientError;
use stacyvm_engine::EngineError;
use stacyvm_image::ImageError;
use stacyvm_sandbox::ProviderError;

use crate::output::Form;

/// Something did not work.
const FAILED: u8 = 1;

/// The command line is wrong: clap's number.
const MISUSED: u8 = 2;

/// `run`, `exec` and `shell`: the command could not be run at all, as opposed
/// to having failed by itself. Docker's number for the same.
const NOT_RUN: u8 = 125;

/// The ways out where no registry answers: each provider's own image among them.
const NO_REGISTRY: &str = "bring the image in with `stacyvm image import`, or use what needs no registry: --image host \
                           with the provider oci, --image rootfs with proot (`stacyvm rootfs build --include`)";

/// A command reached its deadline: the number of coreutils' `timeout`.
const TIMED_OUT: u8 = 124;

/// An error with advice.
#[derive(Debug)]
pub(crate) struct Advice {
    message: String,
    hint: String,
    fault: Fault,
    /// The API's code, where this program says in other words what it means.
    code: Option<ErrorCode>,
}

/// What an error with advice is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The command line, which clap alone cannot judge.
    Usage,
    Other,
}

impl Advice {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), fault: Fault::Other, code: None }
    }

    /// Nothing was tried, because the command line is wrong.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { fault: Fault::Usage, ..Self::new(message, hint) }
    }

    pub(crate) fn of(self, code: ErrorCode) -> Self {
        Self { code: Some(code), ..self }
    }
}

impl std::fmt::Display for Advice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Advice {}

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
        _ if is_misuse(error) => MISUSED.into(),
        _ if timed_out => TIMED_OUT.into(),
        Some(NotRun) => NOT_RUN.into(),
        None => FAILED.into(),
    }
}

/// An error as it is told, to people or to programs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    /// The API's code where the server refused, else one of this program's own.
    code: String,
    message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    causes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    /// Worth telling whoever runs the server, when the fault is the server's.
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
}

impl Report {
    pub(crate) fn new(error: &anyhow::Error) -> Self {
        let mut causes = messages(error);
        if error.downcast_ref::<NotRun>().is_some() && causes.len() > 1 {
            causes.remove(0);
        }
        // Wrappers that only repeat what is inside them add nothing.
        causes.dedup_by(|inner, outer| outer.ends_with(inner.as_str()));
        let message = causes.remove(0);
        let request_id = client_error(error).and_then(request_id).map(str::to_owned);
        Self { code: code(error), message, causes, hint: hint(error), request_id }
    }

    /// A command line that could not be understood.
    pub(crate) fn usage(message: String, hint: String) -> Self {
        Self { code: USAGE.to_owned(), message, causes: Vec::new(), hint: Some(hint), request_id: None }
    }

    pub(crate) fn print(&self, form: Form) {
        let text = match form {
            Form::Human => self.text(),
            Form::Json => json!({ "error": self }).to_string(),
        };
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// Without colours: `error:`, its causes, `hint:`.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("error: {}", self.message.replace('\n', "\n       "));
        for cause in &self.causes {
            let _ = write!(text, "\n  caused by: {cause}");
        }
        if let Some(id) = &self.request_id {
            let _ = write!(text, "\n  request id: {id}");
        }
        if let Some(hint) = &self.hint {
            let _ = write!(text, "\nhint: {hint}");
        }
        text
    }
}

/// The code of a wrong command line.
const USAGE: &str = "USAGE";

/// The code of an error. What has none of the API's is told apart as far as a
/// program may want to act differently.
fn code(error: &anyhow::Error) -> String {
    if is_misuse(error) {
        return USAGE.to_owned();
    }
    if let Some(code) = error.chain().find_map(|cause| cause.downcast_ref::<Advice>()).and_then(|advice| advice.code) {
        return code.to_string();
    }
    if let Some(error) = client_error(error) {
        return client_code(error).to_owned();
    }
    if let Some(error) = error.chain().find_map(|cause| cause.downcast_ref::<EngineError>()) {
        return error.code().to_string();
    }
    "FAILED".to_owned()
}

pub(crate) fn client_code(error: &ClientError) -> &str {
    match error {
        ClientError::Api(api) if api.code_text.is_empty() => "BAD_ANSWER",
        ClientError::Api(api) => &api.code_text,
        ClientError::InvalidArgument { .. } => USAGE,
        ClientError::Connect { .. } => "NO_SERVER",
        ClientError::Tls { .. } | ClientError::NoTls(_) => "NO_SECURE_CONNECTION",
        ClientError::Transport { .. } => "CONNECTION_BROKEN",
        ClientError::Protocol(_) => "BAD_ANSWER",
        ClientError::Upload(_) => "FAILED",
    }
}

/// The error and its causes, outermost first.
fn messages(error: &anyhow::Error) -> Vec<String> {
    let mut messages = Vec::new();
    for cause in error.chain() {
        if let Some(ClientError::Connect { source, .. }) = cause.downcast_ref() {
            // Between what is known already and the reason are only layers.
            messages.push(format!("{cause} ({})", innermost(source)));
            break;
        }
        messages.push(cause.to_string());
    }
    messages
}

fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let text = last.to_string();
    // The number says nothing that its words do not.
    let words = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

fn is_misuse(error: &anyhow::Error) -> bool {
    let fault = error.chain().find_map(|cause| cause.downcast_ref::<Advice>()).map(|advice| advice.fault);
    fault == Some(Fault::Usage)
}

fn request_id(error: &ClientError) -> Option<&str> {
    match error {
        ClientError::Api(api) if api.status >= 500 => api.request_id.as_deref(),
        _ => None,
    }
}

/// What to do about it, where that is known.
pub(crate) fn hint(error: &anyhow::Error) -> Option<String> {
    // The first finds it as a context too, which is no cause of its own.
    let advice = error.downcast_ref().or_else(|| error.chain().find_map(|cause| cause.downcast_ref::<Advice>()));
    if let Some(advice) = advice {
        return Some(advice.hint.clone());
    }
    if let Some(image) = error.chain().find_map(|cause| cause.downcast_ref::<ImageError>()) {
        let unreachable = matches!(image, ImageError::RegistryUnavailable { .. });
        return if unreachable { Some(NO_REGISTRY.to_owned()) } else { image.hint() };
    }
    if let Some(ProviderError::Unavailable { hint, .. }) = error.chain().find_map(|cause| cause.downcast_ref()) {
        return hint.clone();
    }
    if let Some(engine) = error.chain().find_map(|cause| cause.downcast_ref::<EngineError>()) {
        return engine.hint();
    }
    let client = client_error(error)?;
    // The server speaks of headers and fields; here there are options.
    let here = match client.code() {
        Some(ErrorCode::Unauthorized) => Some("pass the server's key with --api-key or STACYVM_API_KEY"),
        Some(ErrorCode::RegistryUnavailable) => Some(NO_REGISTRY),
        Some(ErrorCode::Unsupported) => Some("`stacyvm providers` shows what each runtime can do"),
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

    fn text(error: &anyhow::Error) -> String {
        Report::new(error).text()
    }

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

    #[test]
    fn a_wrong_command_line_has_a_status_and_a_code_of_its_own() {
        let error = anyhow::Error::from(Advice::usage("no command", "name one"));
        assert_eq!(format!("{:?}", exit_code(&error)), format!("{:?}", ExitCode::from(2)));
        let json = serde_json::to_value(Report::new(&error)).unwrap();
        assert_eq!(json, json!({ "code": "USAGE", "message": "no command", "hint": "name one" }));
        let wrapped = Err::<(), _>(error).context("b").context("a").unwrap_err();
        let json = serde_json::to_value(Report::new(&wrapped)).unwrap();
        assert_eq!((&json["message"], &json["causes"]), (&json!("a"), &json!(["b", "no command"])));
    }
}

//! What a request means: mode, quoting, deadline, environment (providers.md
//! 1.5).

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use stacyvm_api::{ContentEncoding, ExecMode, ExecRequest};
use stacyvm_sandbox::StartRequest;

use super::StartOptions;
use crate::order::check_environment;
use crate::{EngineError, LimitExceeded};

/// A command line with its arguments.
const COMMAND_MAX_BYTES: usize = 1 << 20;
/// Linux takes 128 KiB for a single argument.
const ARGUMENT_MAX_BYTES: usize = 128 * 1024;
const WORKDIR_MAX_BYTES: usize = 4096;
/// Input given with the request; more goes through `send_input`.
const STDIN_MAX_BYTES: usize = 16 << 20;

/// Bounds on a command's time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimeLimits {
    pub(crate) default: Option<Duration>,
    pub(crate) max: Option<Duration>,
}

/// A request, checked and resolved.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    pub(crate) start: StartRequest,
    /// As the log shows it.
    pub(crate) command: String,
    pub(crate) stdin: Option<Bytes>,
    /// Whether input ends after `stdin`.
    pub(crate) close_stdin: bool,
}

pub(crate) fn resolve(
    request: ExecRequest,
    options: StartOptions,
    limits: TimeLimits,
) -> Result<Resolved, EngineError> {
    let invalid = |message: &str| Err(EngineError::InvalidInput(message.to_owned()));
    let args = request.args.unwrap_or_default();
    let mode = mode(request.mode.as_deref().unwrap_or_default())?;
    if request.command.contains('\0') || args.iter().any(|argument| argument.contains('\0')) {
        return invalid("a command cannot contain NUL");
    }
    let command_line = match mode {
        ExecMode::Shell => vec!["sh".to_owned(), "-c".to_owned(), shell_text(&request.command, &args)],
        ExecMode::Argv => {
            if request.command.trim().is_empty() {
                return invalid("command is required in argv mode");
            }
            std::iter::once(request.command.clone()).chain(args.iter().cloned()).collect()
        }
    };
    let longest = command_line.iter().map(String::len).max().unwrap_or(0);
    if longest > ARGUMENT_MAX_BYTES || command_line.iter().map(String::len).sum::<usize>() > COMMAND_MAX_BYTES {
        return invalid("a command has at most 1 MiB, and one argument at most 128 KiB; write long text to a file");
    }
    let env = request.env.unwrap_or_default();
    check_environment(&env)?;
    let workdir = request.workdir.filter(|path| !path.trim().is_empty());
    if workdir.as_ref().is_some_and(|path| path.len() > WORKDIR_MAX_BYTES || path.contains('\0')) {
        return invalid("workdir is not a path");
    }
    let stdin = stdin(request.stdin, request.encoding)?;
    let keep_open = options.keep_stdin_open || request.keep_stdin_open.unwrap_or(false);
    let command = match mode {
        ExecMode::Shell => shell_text(&request.command, &args),
        ExecMode::Argv => command_line.join(" "),
    };
    let start = StartRequest {
        argv: command_line,
        env,
        workdir,
        user: request.user.filter(|user| !user.trim().is_empty()),
        tag: None,
        deadline: deadline(request.timeout.map(stacyvm_api::Duration::get), limits)?,
        stdin: stdin.is_some() || keep_open,
        terminal: options.terminal,
    };
    Ok(Resolved { start, command, stdin, close_stdin: !keep_open })
}

fn mode(text: &str) -> Result<ExecMode, EngineError> {
    match text.trim() {
        "" | "shell" => Ok(ExecMode::Shell),
        "argv" => Ok(ExecMode::Argv),
        other => Err(EngineError::InvalidInput(format!("exec mode `{other}` is neither `shell` nor `argv`"))),
    }
}

/// The command, then each argument in single quotes; a quote inside becomes
/// `'"'"'`.
fn shell_text(command: &str, args: &[String]) -> String {
    let mut text = command.to_owned();
    for argument in args {
        text.push_str(" '");
        text.push_str(&argument.replace('\'', r#"'"'"'"#));
        text.push('\'');
    }
    text
}

/// `0s` asks for as long as is allowed.
fn deadline(asked: Option<Duration>, limits: TimeLimits) -> Result<Option<Duration>, EngineError> {
    match (asked, limits.max) {
        (None, max) => Ok(match (limits.default, max) {
            (Some(default), Some(max)) => Some(default.min(max)),
            (default, max) => default.or(max),
        }),
        (Some(asked), max) if asked.is_zero() => Ok(max),
        (Some(asked), Some(max)) if asked > max => Err(EngineError::Limit(LimitExceeded::ExecTimeout { asked, max })),
        (Some(asked), _) => Ok(Some(asked)),
    }
}

fn stdin(text: Option<String>, encoding: Option<ContentEncoding>) -> Result<Option<Bytes>, EngineError> {
    let Some(text) = text else { return Ok(None) };
    let bytes = match encoding.unwrap_or_default() {
        ContentEncoding::Utf8 => text.into_bytes(),
        ContentEncoding::Base64 => STANDARD
            .decode(text.as_bytes())
            .map_err(|error| EngineError::InvalidInput(format!("stdin is not base64: {error}")))?,
    };
    if bytes.len() > STDIN_MAX_BYTES {
        return Err(EngineError::InvalidInput("stdin has at most 16 MiB; write longer input to a file".to_owned()));
    }
    Ok(Some(bytes.into()))
}

/// A signal by name, with or without `SIG`, or by number; as on Linux.
pub(crate) fn signal_number(text: &str) -> Result<i32, EngineError> {
    const NAMES: [(&str, i32); 31] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("STKFLT", 16),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("TTIN", 21),
        ("TTOU", 22),
        ("URG", 23),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("VTALRM", 26),
        ("PROF", 27),
        ("WINCH", 28),
        ("IO", 29),
        ("PWR", 30),
        ("SYS", 31),
    ];
    const SIGNAL_MAX: i32 = 64;
    let text = text.trim();
    let unknown = || EngineError::InvalidInput(format!("`{text}` is not a signal; write for example TERM or 15"));
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=SIGNAL_MAX).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: TimeLimits = TimeLimits { default: None, max: Some(Duration::from_mins(10)) };

    fn argv(command: &str, args: &[&str], mode: &str) -> Result<Vec<String>, EngineError> {
        let request = ExecRequest {
            command: command.to_owned(),
            args: Some(args.iter().map(|&argument| argument.to_owned()).collect()),
            mode: Some(mode.to_owned()),
            ..ExecRequest::default()
        };
        resolve(request, StartOptions::default(), LIMITS).map(|resolved| resolved.start.argv)
    }

    #[test]
    fn shell_arguments_are_quoted_and_argv_is_literal() {
        assert_eq!(argv("echo", &["a b", "it's"], " ").unwrap(), ["sh", "-c", r#"echo 'a b' 'it'"'"'s'"#]);
        assert_eq!(argv("", &[], "shell").unwrap(), ["sh", "-c", ""]);
        assert_eq!(argv("echo", &["$HOME", "a b"], " argv ").unwrap(), ["echo", "$HOME", "a b"]);
        for (command, args, mode) in
            [("", vec![], "argv"), (" \t", vec!["x"], "argv"), ("x", vec![], "bash"), ("x\0", vec![], "")]
        {
            assert!(matches!(argv(command, &args, mode), Err(EngineError::InvalidInput(_))), "{command:?} {mode}");
        }
        assert!(argv("echo", &["x".repeat(ARGUMENT_MAX_BYTES).as_str()], "").is_err());
    }

    #[test]
    fn a_deadline_is_always_within_the_maximum() {
        let seconds = Duration::from_secs;
        let limits = |default: Option<u64>, max: Option<u64>| TimeLimits {
            default: default.map(seconds),
            max: max.map(seconds),
        };
        let table = [
            (None, limits(None, None), Some(None)),
            (None, limits(None, Some(60)), Some(Some(60))),
            (None, limits(Some(5), Some(60)), Some(Some(5))),
            (None, limits(Some(90), Some(60)), Some(Some(60))),
            (Some(0), limits(Some(5), Some(60)), Some(Some(60))),
            (Some(0), limits(Some(5), None), Some(None)),
            (Some(60), limits(None, Some(60)), Some(Some(60))),
            (Some(61), limits(None, Some(60)), None),
            (Some(61), limits(None, None), Some(Some(61))),
        ];
        for (asked, limits, expected) in table {
            let resolved = deadline(asked.map(seconds), limits).ok();
            assert_eq!(resolved, expected.map(|span| span.map(seconds)), "{asked:?} {limits:?}");
        }
    }

    #[test]
    fn input_is_decoded_and_closed_unless_it_is_to_stay_open() {
        let request =
            |stdin: &str, encoding| ExecRequest { stdin: Some(stdin.to_owned()), encoding, ..ExecRequest::default() };
        let resolved =
            resolve(request("aGk=", Some(ContentEncoding::Base64)), StartOptions::default(), LIMITS).unwrap();
        assert_eq!((resolved.stdin.as_deref(), resolved.close_stdin), (Some(&b"hi"[..]), true));
        assert!(resolve(request("%", Some(ContentEncoding::Base64)), StartOptions::default(), LIMITS).is_err());
        let open = StartOptions { keep_stdin_open: true, ..StartOptions::default() };
        assert!(!resolve(request("x", None), open, LIMITS).unwrap().close_stdin);
        let none = resolve(ExecRequest::default(), StartOptions::default(), LIMITS).unwrap();
        assert!(!none.start.stdin);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("TERM", 15), ("SIGINT", 2), ("sigkill", 9), ("9", 9), (" 34 ", 34)] {
            assert_eq!(signal_number(text).unwrap(), number);
        }
        for text in ["", "0", "65", "-1", "SIGNOPE", "SIG"] {
            assert!(signal_number(text).is_err(), "{text:?}");
        }
    }
}

//! What is said of a command line that cannot be understood.

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::failure::Report;
use crate::output::Form;

/// Before it are this program's options, behind it is the command to run.
const DASHES: &str = "--";

/// Commands that run another.
const RUNNERS: [&str; 3] = ["run", "exec", "shell"];

/// Prints help, the version, or what is wrong.
pub(crate) fn report(mut error: clap::Error) -> ExitCode {
    let line: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let tips = forgotten_dashes(&error, &line);
    if !tips.is_empty() {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips.into_iter().map(Into::into).collect()));
    }
    let is_misuse = error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !is_misuse || !wants_json(&line) {
        error.exit();
    }
    told(&error.render().to_string()).print(Form::Json);
    // All of clap's errors have this status.
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn wants_json(line: &[String]) -> bool {
    line.iter().take_while(|word| *word != DASHES).any(|word| word == "--json")
}

/// Clap's text in parts: what is wrong, and its tips.
fn told(text: &str) -> Report {
    let (first, rest) = text.split_once("\n\n").unwrap_or((text, ""));
    let joined = first.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let message = joined.strip_prefix("error: ").unwrap_or(&joined).to_owned();
    let tips: Vec<&str> = rest.lines().filter_map(|line| line.trim_start().strip_prefix("tip: ")).collect();
    let usage = rest.lines().find_map(|line| line.strip_prefix("Usage: ").map(|usage| format!("write {usage}")));
    let hint = if tips.is_empty() { usage.unwrap_or_else(|| "see --help".to_owned()) } else { tips.join("; ") };
    Report::usage(message, hint)
}

/// Tips where words of the command to run were taken for this program's.
fn forgotten_dashes(error: &clap::Error, line: &[String]) -> Vec<String> {
    let Some(ContextValue::String(taken)) = error.get(ContextKind::InvalidArg) else { return Vec::new() };
    let Some(runner) = line.iter().position(|word| RUNNERS.contains(&word.as_str())) else { return Vec::new() };
    if error.kind() != ErrorKind::UnknownArgument
        || error.get(ContextKind::SuggestedArg).is_some()
        || line.iter().any(|word| word == DASHES)
    {
        return Vec::new();
    }
    // Of `-la` clap names `-l`.
    let is_taken = |word: &String| word == taken || (taken.len() == 2 && word.starts_with(taken.as_str()));
    let Some(at) = line.iter().skip(runner + 1).position(is_taken).map(|at| at + runner + 1) else {
        return Vec::new();
    };
    let (before, command) = (&line[1..at], &line[at..]);
    // A key is not written a second time.
    let holds_key = before.iter().any(|word| word.starts_with("--api-key"));
    let before_text = if holds_key { format!("{} …", line[runner]) } else { words(before) };
    let mut tips = vec![format!("put -- before the command: stacyvm {before_text} -- {}", words(command))];
    let names_image = |word: &String| ["-i", "--image", "--template"].contains(&word.as_str());
    if let ([image, command @ ..], "run", false) = (command, line[runner].as_str(), before.iter().any(names_image))
        && !command.is_empty()
        && !image.starts_with('-')
    {
        let with_image = format!("stacyvm {before_text} --image {image} -- {}", words(command));
        tips.push(format!("if `{image}` is the image, name it with --image: {with_image}"));
    }
    tips
}

/// Words as a shell would have to read them.
fn words(line: &[String]) -> String {
    let is_plain = |word: &str| {
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./=:,@%+".contains(&byte))
    };
    let quoted = |word: &String| {
        if is_plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    line.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::commands::Cli;

    /// Tips for a line that clap refuses.
    fn tips(line: &str) -> Vec<String> {
        let line: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let error = Cli::command().try_get_matches_from(&line).unwrap_err();
        forgotten_dashes(&error, &line)
    }

    #[test]
    fn a_command_without_dashes_is_shown_with_them() {
        let id = "sb-4f9k2m0x7c1v8b3n5q6w";
        let expected = [format!("put -- before the command: stacyvm exec {id} -- ls -la")];
        assert_eq!(tips(&format!("stacyvm exec {id} ls -la")), expected);
        let expected = [format!("put -- before the command: stacyvm exec {id} -- -la")];
        assert_eq!(tips(&format!("stacyvm exec {id} -la")), expected);
        assert_eq!(
            tips("stacyvm --json run host python3 -c print(1)"),
            [
                "put -- before the command: stacyvm --json run -- host python3 -c 'print(1)'",
                "if `host` is the image, name it with --image: stacyvm --json run --image host -- python3 -c 'print(1)'",
            ]
        );
        assert_eq!(
            tips("stacyvm run -i host python3 -c 1"),
            ["put -- before the command: stacyvm run -i host -- python3 -c 1"]
        );
    }

    #[test]
    fn a_key_is_not_repeated() {
        assert_eq!(tips("stacyvm --api-key e2b_1 run -i host ls"), ["put -- before the command: stacyvm run … -- ls"]);
    }

    #[test]
    fn other_slips_are_left_to_clap() {
        for line in
            ["stacyvm spawn --memroy 5", "stacyvm run --memroy 5 -- ls", "stacyvm run --memroy 5", "stacyvm lst"]
        {
            assert_eq!(tips(line), Vec::<String>::new(), "{line}");
        }
    }

    #[test]
    fn what_clap_says_is_told_in_parts() {
        let error = |line: &str| {
            let error = Cli::command().try_get_matches_from(line.split(' ')).unwrap_err();
            serde_json::to_value(told(&error.render().to_string())).unwrap()
        };
        let slip = error("stacyvm spawn --memroy 5");
        assert_eq!(
            (&slip["code"], &slip["message"]),
            (&"USAGE".into(), &"unexpected argument '--memroy' found".into())
        );
        assert!(slip["hint"].as_str().unwrap().contains("--memory"), "{slip}");
        let missing = error("stacyvm inspect");
        let message = "the following required arguments were not provided: <ID>";
        assert_eq!((&missing["message"], &missing["hint"]), (&message.into(), &"write stacyvm inspect <ID>".into()));
    }
}

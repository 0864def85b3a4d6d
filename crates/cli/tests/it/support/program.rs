//! Running the program as a person does, and what came of it.

use std::process::{Output, Stdio};

use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::within;

/// What a program did.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Command line, for messages.
    what: String,
    output: Output,
}

/// Runs a program to its end with `input` as all there is to read.
pub(crate) async fn run(command: Command, input: &[u8]) -> Ran {
    let mut command = command;
    let what = format!("{:?}", command.as_std());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    let feed = async {
        // It need not read all of it, or any.
        let _ = stdin.write_all(input).await;
        drop(stdin);
    };
    let ((), output) = within(&what, async { tokio::join!(feed, child.wait_with_output()) }).await;
    Ran { what, output: output.expect("it can be waited for") }
}

impl Ran {
    /// It must have succeeded.
    pub(crate) fn ok(self) -> Self {
        assert!(self.output.status.success(), "{self}");
        self
    }

    /// It must have failed with this status, and said so to a person: an error,
    /// and what to do about it.
    pub(crate) fn failed(self, status: i32) -> Self {
        assert_eq!(self.status(), Some(status), "{self}");
        let said = |word: &str| self.stderr().lines().any(|line| line.starts_with(word));
        assert!(said("error: ") && said("hint: "), "{self}");
        self
    }

    pub(crate) fn status(&self) -> Option<i32> {
        self.output.status.code()
    }

    pub(crate) fn stdout(&self) -> &str {
        std::str::from_utf8(&self.output.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    pub(crate) fn stdout_bytes(&self) -> &[u8] {
        &self.output.stdout
    }

    pub(crate) fn stderr(&self) -> &str {
        std::str::from_utf8(&self.output.stderr).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// The JSON that a successful run printed, and nothing beside it.
    pub(crate) fn json<T: DeserializeOwned>(self) -> T {
        let ran = self.ok();
        assert_eq!(ran.stderr(), "", "{ran}");
        serde_json::from_slice(&ran.output.stdout).unwrap_or_else(|error| panic!("{error}: {ran}"))
    }

    /// `text` stands somewhere in what was said.
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stdout().contains(text) || self.stderr().contains(text), "`{text}` is not in: {self}");
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy;
        let (out, err) = (text(&self.output.stdout), text(&self.output.stderr));
        write!(f, "{} ended with {}\nstdout: {out}\nstderr: {err}", self.what, self.output.status)
    }
}

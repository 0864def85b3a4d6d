//! Runs what `syntax` read, on the mock's file tree and nothing else: no
//! program of the host is ever started.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use stacyvm_sandbox::SessionError;
use tokio::task::JoinHandle;

use super::program;
use super::sandbox::MockSandbox;
use super::syntax::{self, Body, Command, List, Part, Pipeline, Separator, Target, Word};
use super::tree::join;
use crate::process::{Channel, Process};

/// A shell, or one program, in one command's process group.
#[derive(Debug)]
pub(super) struct Shell {
    pub(super) sandbox: Arc<MockSandbox>,
    pub(super) process: Arc<Process>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) directory: String,
    pub(super) user: String,
    pub(super) status: i32,
    jobs: Vec<JoinHandle<()>>,
}

/// Where a program's three streams lead.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    pub(super) input: Input,
    pub(super) output: Output,
    pub(super) errors: Output,
}

#[derive(Debug, Clone)]
pub(super) enum Input {
    /// The command's own standard input.
    Process,
    Bytes(Arc<Mutex<VecDeque<u8>>>),
}

#[derive(Debug, Clone)]
pub(super) enum Output {
    Process(Channel),
    Buffer(Arc<Mutex<Vec<u8>>>),
    File(String),
    Null,
}

/// `Break` carries the status of `exit`.
pub(super) type Flow = ControlFlow<i32>;
type FlowFuture<'a> = Pin<Box<dyn Future<Output = Flow> + Send + 'a>>;

impl Shell {
    pub(super) fn new(
        sandbox: Arc<MockSandbox>,
        process: Arc<Process>,
        environment: BTreeMap<String, String>,
        directory: String,
        user: String,
    ) -> Self {
        Self { sandbox, process, environment, directory, user, status: 0, jobs: Vec::new() }
    }

    /// Runs one command line to its end and says its status.
    pub(super) async fn run(&mut self, argv: Vec<String>) -> i32 {
        let streams = Streams {
            input: Input::Process,
            output: Output::Process(Channel::Stdout),
            errors: Output::Process(Channel::Stderr),
        };
        match self.run_program(argv, &streams).await {
            Flow::Break(status) => status,
            Flow::Continue(()) => self.status,
        }
    }

    pub(super) async fn run_script(&mut self, text: &str, streams: &Streams) -> Flow {
        match syntax::parse(text) {
            Ok(list) => self.run_list(&list, streams).await,
            Err(message) => {
                self.complain(streams, &message).await;
                self.status = 2;
                Flow::Break(2)
            }
        }
    }

    /// One program, with the shell's own among them.
    pub(super) fn run_program<'a>(&'a mut self, argv: Vec<String>, streams: &'a Streams) -> FlowFuture<'a> {
        Box::pin(program::run(self, argv, streams))
    }

    pub(super) fn subshell(&self) -> Self {
        Self {
            sandbox: Arc::clone(&self.sandbox),
            process: Arc::clone(&self.process),
            environment: self.environment.clone(),
            directory: self.directory.clone(),
            user: self.user.clone(),
            status: self.status,
            jobs: Vec::new(),
        }
    }

    pub(super) async fn wait_for_jobs(&mut self) {
        for job in self.jobs.drain(..) {
            let _ended_either_way = job.await;
        }
    }

    /// A path as the shell's current directory sees it.
    pub(super) fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { join(&self.directory, path) }
    }

    pub(super) async fn write(&self, output: &Output, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return;
        }
        match output {
            Output::Process(channel) => {
                let shown = if self.process.terminal { with_carriage_returns(&bytes) } else { bytes };
                self.sandbox.append_console(&shown);
                self.process.emit(*channel, shown).await;
            }
            Output::Buffer(buffer) => buffer.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes),
            Output::File(path) => self.sandbox.append(path, &bytes, &self.user),
            Output::Null => {}
        }
    }

    pub(super) async fn complain(&self, streams: &Streams, message: &str) {
        self.write(&streams.errors, format!("{message}\n")).await;
    }

    fn run_list<'a>(&'a mut self, list: &'a List, streams: &'a Streams) -> FlowFuture<'a> {
        Box::pin(async move {
            let mut skip = false;
            for (pipeline, separator) in &list.0 {
                if !skip {
                    if *separator == Separator::Background {
                        self.run_in_background(pipeline, streams);
                    } else {
                        self.run_pipeline(pipeline, streams).await?;
                    }
                }
                skip = match separator {
                    Separator::And => self.status != 0,
                    Separator::Or => self.status == 0,
                    Separator::Sequence | Separator::Background => false,
                };
            }
            Flow::Continue(())
        })
    }

    fn run_in_background(&mut self, pipeline: &Pipeline, streams: &Streams) {
        let (mut shell, group) = (self.subshell(), self.process.group.clone());
        let (pipeline, mut streams) = (pipeline.clone(), streams.clone());
        streams.input = Input::empty();
        self.jobs.push(tokio::spawn(async move {
            tokio::select! {
                () = group.cancelled() => {}
                _status = shell.run_pipeline(&pipeline, &streams) => {}
            }
        }));
        self.status = 0;
    }

    /// The programs of a pipeline run one after the other; what one wrote is
    /// the next one's input.
    async fn run_pipeline(&mut self, pipeline: &Pipeline, streams: &Streams) -> Flow {
        let Some((last, earlier)) = pipeline.0.split_last() else { return Flow::Continue(()) };
        let mut input = streams.input.clone();
        for command in earlier {
            let buffer = Arc::new(Mutex::new(Vec::new()));
            let through = Streams { input, output: Output::Buffer(Arc::clone(&buffer)), ..streams.clone() };
            let mut shell = self.subshell();
            let _its_own_exit = shell.run_command(command, &through).await;
            let written = std::mem::take(&mut *buffer.lock().unwrap_or_else(PoisonError::into_inner));
            input = Input::of(written);
        }
        let streams = Streams { input, ..streams.clone() };
        if earlier.is_empty() {
            return self.run_command(last, &streams).await;
        }
        let mut shell = self.subshell();
        self.status = match shell.run_command(last, &streams).await {
            Flow::Break(status) => status,
            Flow::Continue(()) => shell.status,
        };
        Flow::Continue(())
    }

    async fn run_command(&mut self, command: &Command, streams: &Streams) -> Flow {
        let streams = match self.redirected(command, streams).await {
            Ok(streams) => streams,
            Err(message) => {
                self.complain(streams, &message).await;
                self.status = 1;
                return Flow::Continue(());
            }
        };
        match &command.body {
            Body::Subshell(list) => {
                let mut shell = self.subshell();
                self.status = match shell.run_list(list, &streams).await {
                    Flow::Break(status) => status,
                    Flow::Continue(()) => shell.status,
                };
                Flow::Continue(())
            }
            Body::Simple { assignments, words } => {
                let mut argv = Vec::new();
                for word in words {
                    let text = self.expand(word).await;
                    if word.quoted || !text.is_empty() {
                        argv.push(text);
                    }
                }
                let mut kept = Vec::new();
                for (name, word) in assignments {
                    let value = self.expand(word).await;
                    let before = self.environment.insert(name.clone(), value);
                    kept.push((name.clone(), before));
                }
                if argv.is_empty() {
                    self.status = 0;
                    return Flow::Continue(());
                }
                let flow = self.run_program(argv, &streams).await;
                for (name, before) in kept {
                    match before {
                        Some(value) => self.environment.insert(name, value),
                        None => self.environment.remove(&name),
                    };
                }
                flow
            }
        }
    }

    async fn redirected(&mut self, command: &Command, streams: &Streams) -> Result<Streams, String> {
        let mut streams = streams.clone();
        for redirect in &command.redirects {
            match &redirect.to {
                Target::Copy(1) if redirect.from == 2 => streams.errors = streams.output.clone(),
                Target::Copy(2) if redirect.from == 1 => streams.output = streams.errors.clone(),
                Target::Copy(_) => {}
                Target::Read(word) => {
                    let path = self.expand(word).await;
                    let absolute = self.absolute(&path);
                    let bytes = self.sandbox.read_all(&absolute).map_err(|error| shell_message(&path, &error))?;
                    streams.input = Input::of(bytes.to_vec());
                }
                Target::Write(word) | Target::Append(word) => {
                    let path = self.expand(word).await;
                    let truncate = matches!(redirect.to, Target::Write(_));
                    let output = self.open(&path, truncate).map_err(|error| shell_message(&path, &error))?;
                    if redirect.from == 2 {
                        streams.errors = output;
                    } else {
                        streams.output = output;
                    }
                }
            }
        }
        Ok(streams)
    }

    fn open(&self, path: &str, truncate: bool) -> Result<Output, SessionError> {
        let absolute = self.absolute(path);
        if absolute == "/dev/null" {
            return Ok(Output::Null);
        }
        self.sandbox.open_for_writing(&absolute, truncate, &self.user)?;
        Ok(Output::File(absolute))
    }

    async fn expand(&mut self, word: &Word) -> String {
        let mut text = String::new();
        for part in &word.parts {
            match part {
                Part::Text(plain) => text.push_str(plain),
                Part::Variable(name) => match name.as_str() {
                    "?" => text.push_str(&self.status.to_string()),
                    "$" => text.push_str(&self.process.pid.to_string()),
                    name => text.push_str(self.environment.get(name).map_or("", String::as_str)),
                },
                Part::Substitution(list) => {
                    let buffer = Arc::new(Mutex::new(Vec::new()));
                    let streams = Streams {
                        input: Input::empty(),
                        output: Output::Buffer(Arc::clone(&buffer)),
                        errors: Output::Process(Channel::Stderr),
                    };
                    let mut shell = self.subshell();
                    let _its_own_exit = shell.run_list(list, &streams).await;
                    let written = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                    text.push_str(String::from_utf8_lossy(&written).trim_end_matches('\n'));
                }
            }
        }
        text
    }
}

impl Input {
    pub(super) fn empty() -> Self {
        Self::of(Vec::new())
    }

    fn of(bytes: Vec<u8>) -> Self {
        Self::Bytes(Arc::new(Mutex::new(bytes.into())))
    }

    /// What is there, or `None` at the end.
    pub(super) async fn read(&self, process: &Process) -> Option<Vec<u8>> {
        match self {
            Self::Process => process.read_stdin().await,
            Self::Bytes(bytes) => {
                let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
                if bytes.is_empty() { None } else { Some(bytes.drain(..).collect()) }
            }
        }
    }

    pub(super) async fn read_line(&self, process: &Process) -> Option<Vec<u8>> {
        match self {
            Self::Process => process.read_stdin_line().await,
            Self::Bytes(bytes) => {
                let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
                let length = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
                if length == 0 { None } else { Some(bytes.drain(..length).collect()) }
            }
        }
    }
}

/// A terminal's line discipline writes a carriage return before each newline.
fn with_carriage_returns(bytes: &[u8]) -> Bytes {
    let mut shown = Vec::with_capacity(bytes.len() + 8);
    for byte in bytes {
        if *byte == b'\n' {
            shown.push(b'\r');
        }
        shown.push(*byte);
    }
    shown.into()
}

pub(super) fn shell_message(path: &str, error: &SessionError) -> String {
    match error {
        SessionError::FileNotFound(_) => format!("sh: {path}: No such file or directory"),
        other => format!("sh: {path}: {other}"),
    }
}

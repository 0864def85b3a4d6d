//! Running a command to its end and keeping what it wrote.

use futures_util::StreamExt as _;
use stacyvm_sandbox::{Exit, ProcessEvent, ProcessStream};

use crate::Failure;

/// Most output that a check keeps; floods are counted, not collected.
const OUTPUT_BYTES_MAX: usize = 16 << 20;

/// What a finished command wrote, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) terminal: Vec<u8>,
    /// Bytes that the runtime says it dropped.
    pub(crate) dropped: u64,
    pub(crate) exit: Exit,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output of a command that must have succeeded.
    pub(crate) fn success(&self) -> Result<String, Failure> {
        if self.exit.code == Some(0) {
            return Ok(self.text());
        }
        Err(Failure(format!("a command failed with {:?}: {}{}", self.exit, self.text(), self.error_text())))
    }
}

/// Reads a command's events in order, one at a time.
pub(crate) struct Reader {
    stream: futures_util::stream::Fuse<ProcessStream>,
    output: Output,
    exited: bool,
}

impl Reader {
    /// Takes a stream whose first event must be `Started`.
    pub(crate) async fn open(mut stream: ProcessStream) -> Result<Self, Failure> {
        let pid = loop {
            match stream.next().await {
                Some(Ok(ProcessEvent::Started { pid })) => break pid,
                Some(Ok(ProcessEvent::Keepalive)) => {}
                Some(Ok(other)) => return Err(Failure(format!("the first event was {other:?}, not Started"))),
                Some(Err(error)) => return Err(error.into()),
                None => return Err(Failure::new("the stream ended before the command started")),
            }
        };
        let exit = Exit { code: None, signal: None, timed_out: false };
        let output = Output { pid, stdout: Vec::new(), stderr: Vec::new(), terminal: Vec::new(), dropped: 0, exit };
        Ok(Self { stream: stream.fuse(), output, exited: false })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.output.pid
    }

    pub(crate) fn seen(&self) -> &Output {
        &self.output
    }

    /// Takes one more event; `false` at the end of the stream.
    pub(crate) async fn step(&mut self) -> Result<bool, Failure> {
        let Some(event) = self.stream.next().await else {
            return if self.exited { Ok(false) } else { Err(Failure::new("the stream ended without Exited")) };
        };
        let event = event?;
        if self.exited && event != ProcessEvent::Keepalive {
            return Err(Failure(format!("after Exited came {event:?}")));
        }
        match event {
            ProcessEvent::Started { .. } => return Err(Failure::new("Started came twice")),
            ProcessEvent::Stdout(bytes) => self.output.stdout.extend_from_slice(&bytes),
            ProcessEvent::Stderr(bytes) => self.output.stderr.extend_from_slice(&bytes),
            ProcessEvent::Terminal(bytes) => self.output.terminal.extend_from_slice(&bytes),
            ProcessEvent::Dropped { bytes } => self.output.dropped += bytes,
            ProcessEvent::Keepalive => {}
            ProcessEvent::Exited(exit) => {
                self.exited = true;
                self.output.exit = exit;
            }
        }
        let kept = self.output.stdout.len() + self.output.stderr.len() + self.output.terminal.len();
        if kept > OUTPUT_BYTES_MAX {
            return Err(Failure(format!("more than {OUTPUT_BYTES_MAX} bytes of output")));
        }
        Ok(true)
    }

    /// Reads on until the condition holds; an end of the stream before is a failure.
    pub(crate) async fn until(&mut self, what: &str, holds: impl Fn(&Output) -> bool) -> Result<(), Failure> {
        while !holds(&self.output) {
            if !self.step().await? {
                return Err(Failure(format!("the command ended before {what}; it wrote {:?}", self.output)));
            }
        }
        Ok(())
    }

    /// Reads to the end of the stream.
    pub(crate) async fn finish(mut self) -> Result<Output, Failure> {
        while self.step().await? {}
        Ok(self.output)
    }
}

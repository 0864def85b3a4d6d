//! What this process knows of the commands of one sandbox: the protocol has no
//! list of them, and no way to read the output of one a second time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use stacyvm_sandbox::{Exit, ListedProcess, ProcessSelector, SessionError, StartRequest};
use tokio::sync::mpsc;

use super::terminal::Input;
use crate::process::{Channel, NewProcess, Process};

/// Commands that ended and can still be read, at most.
const ENDED_MAX: usize = 64;
/// Output that is handed on at once: a line of a backend may hold far more than
/// what is kept for readers.
const PIECE_BYTES_MAX: usize = 64 << 10;
/// Output kept for `console`.
const CONSOLE_BYTES_MAX: usize = 256 << 10;

#[derive(Default)]
pub(super) struct Inside {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_pid: u32,
    commands: Vec<Command>,
    console: VecDeque<u8>,
    gone: bool,
}

#[derive(Clone)]
pub(super) struct Command {
    pub(super) process: Arc<Process>,
    /// Where its input goes, if it has any.
    pub(super) input: Option<mpsc::Sender<Input>>,
}

impl Inside {
    /// A command that was started. The number is ours: the protocol has none.
    pub(super) fn add(&self, request: &StartRequest, input: Option<mpsc::Sender<Input>>) -> Arc<Process> {
        let mut state = self.lock();
        state.last_pid += 1;
        let process = Process::new(NewProcess {
            pid: state.last_pid,
            tag: request.tag.clone(),
            argv: request.argv.clone(),
            terminal: request.terminal,
            stdin_open: request.stdin,
        });
        if state.gone {
            process.lose();
        }
        state.commands.push(Command { process: Arc::clone(&process), input });
        let ended = state.commands.iter().filter(|command| command.process.is_over()).count();
        if ended > ENDED_MAX
            && let Some(oldest) = state.commands.iter().position(|command| command.process.is_over())
        {
            state.commands.remove(oldest);
        }
        process
    }

    pub(super) fn find(&self, selector: &ProcessSelector) -> Result<Command, SessionError> {
        let state = self.lock();
        let found = state.commands.iter().rev().find(|command| match selector {
            ProcessSelector::Pid(pid) => command.process.pid == *pid,
            ProcessSelector::Tag(tag) => command.process.tag.as_deref() == Some(tag),
        });
        found.cloned().ok_or_else(|| {
            SessionError::ProcessNotFound(match selector {
                ProcessSelector::Pid(pid) => pid.to_string(),
                ProcessSelector::Tag(tag) => tag.clone(),
            })
        })
    }

    pub(super) fn list(&self) -> Vec<ListedProcess> {
        let state = self.lock();
        let lost = Exit { code: None, signal: None, timed_out: false };
        let listed = state.commands.iter().map(|Command { process, .. }| ListedProcess {
            pid: process.pid,
            tag: process.tag.clone(),
            argv: process.argv.clone(),
            exit: process.exit().or(process.is_over().then_some(lost)),
            terminal: process.terminal,
        });
        listed.collect()
    }

    /// Output of a command; waits for readers that are behind.
    pub(super) async fn emit(&self, process: &Process, channel: Channel, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES_MAX));
            {
                let console = &mut self.lock().console;
                console.extend(&piece);
                let surplus = console.len().saturating_sub(CONSOLE_BYTES_MAX);
                console.drain(..surplus);
            }
            process.emit(channel, piece).await;
        }
    }

    pub(super) fn console(&self, lines: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.lock().console.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect()
    }

    /// The sandbox ended, and with it every command.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.gone = true;
        for command in &state.commands {
            command.process.lose();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

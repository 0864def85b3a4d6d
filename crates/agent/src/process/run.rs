//! A command's life after its start: reading its output, watching for its end.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use rustix::process::Signal;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::output::{MAX_BUFFER_BYTES, OutputKind};
use super::report::Report;
use super::{DRAIN_TIME, Exit, Phase, Process, Processes, REPORT_TIME, STALL_PATIENCE, foreground, lock};
use crate::console::Source;

/// Read from a pipe at once; the pipe holds no more.
const READ_BYTES: usize = 64 << 10;

/// Data that fills less of the read buffer than this is copied out of it, so
/// that a short piece does not keep a long buffer alive.
const KEEP_WHOLE_BYTES: usize = 48 << 10;

/// Readers may be this far behind before the command is held up. The rest of
/// the buffer is room for what is in the pipe when the command ends.
const HELD_UP_AT: u64 = (MAX_BUFFER_BYTES - 4 * READ_BYTES) as u64;

/// Between two looks at a command that writes nowhere.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

pub(super) type Pipes = Vec<(OutputKind, Arc<AsyncFd<OwnedFd>>)>;

pub(super) async fn run(process: Arc<Process>, processes: Arc<Processes>, pipes: Pipes, deadline: Option<Duration>) {
    let deadline = deadline.and_then(|span| Instant::now().checked_add(span));
    let (open, all_closed) = mpsc::channel(1);
    let pumps: Vec<Pump> = pipes
        .into_iter()
        .map(|(kind, pipe)| {
            let drained = Arc::new(tokio::sync::Notify::new());
            let pump = pump(Arc::clone(&process), Arc::clone(&processes), kind, pipe, Arc::clone(&drained));
            let open = open.clone();
            let task = tokio::spawn(async move {
                pump.await;
                drop(open);
            });
            Pump { drained, task }
        })
        .collect();
    drop(open);

    let status = tokio::select! {
        status = wait(&process, deadline) => status,
        never = wake_supervisor(process.supervisor, all_closed) => match never {},
    };

    lock(&process.state).phase = Phase::Draining;
    process.phase_changed.notify_waiters();
    process.consumed.notify_waiters();
    let give_up_at = Instant::now() + DRAIN_TIME;
    for mut pump in pumps {
        // First whatever is in the pipe, however long that takes; then a little
        // while for those that still hold it open.
        tokio::select! {
            () = pump.drained.notified() => {}
            _ = &mut pump.task => continue,
        }
        let _ = timeout_at(give_up_at, &mut pump.task).await;
    }
    finish(&process, status);
    processes.forget_old();
}

struct Pump {
    /// Told once everything that was in the pipe at the command's end is out.
    drained: Arc<tokio::sync::Notify>,
    task: JoinHandle<()>,
}

/// Makes a supervisor go on that somebody inside has stopped. Once nobody can
/// write any more, a command that has not ended is a rare one.
async fn wake_supervisor(supervisor: i32, mut open: mpsc::Receiver<Infallible>) -> Infallible {
    open.recv().await;
    let mut pause = REPORT_TIME;
    loop {
        sleep(pause).await;
        foreground::tell(supervisor, Signal::CONT);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits for the main process; kills the tree at the deadline.
async fn wait(process: &Arc<Process>, deadline: Option<Instant>) -> Option<i32> {
    let reports = lock(&process.reports).clone()?;
    let ended = reports.next();
    tokio::pin!(ended);
    let in_time = match deadline {
        Some(deadline) => timeout_at(deadline, &mut ended).await.ok(),
        None => Some((&mut ended).await),
    };
    let report = if let Some(report) = in_time {
        report
    } else {
        lock(&process.state).timed_out = true;
        process.kill().await;
        timeout(REPORT_TIME, ended).await.ok().flatten()
    };
    match report {
        Some(Report::Ended { status }) => Some(status),
        // The supervisor was killed or is kept from speaking by somebody
        // inside; the command must not go on with nobody to end it.
        None | Some(Report::Started { .. } | Report::Refused { .. }) => {
            process.kill().await;
            None
        }
    }
}

fn finish(process: &Process, status: Option<i32>) {
    let mut state = lock(&process.state);
    let timed_out = state.timed_out;
    let exit = match status {
        Some(status) if libc::WIFEXITED(status) => {
            Exit { code: Some(libc::WEXITSTATUS(status)), signal: None, timed_out }
        }
        Some(status) => Exit { code: None, signal: Some(libc::WTERMSIG(status)), timed_out },
        None => Exit { code: None, signal: Some(libc::SIGKILL), timed_out },
    };
    state.phase = Phase::Ended;
    state.exit = Some((exit, Instant::now()));
    drop(state);
    // Lets the supervisor go, unless somebody is killing the tree right now.
    lock(&process.reports).take();
    process.produced.notify_waiters();
    process.phase_changed.notify_waiters();
    process.consumed.notify_waiters();
}

/// Moves bytes from a pipe into the buffer until its end.
async fn pump(
    process: Arc<Process>,
    processes: Arc<Processes>,
    kind: OutputKind,
    pipe: Arc<AsyncFd<OwnedFd>>,
    drained: Arc<tokio::sync::Notify>,
) {
    let source = Source::from(process.pid) << 1 | u64::from(kind == OutputKind::Stderr);
    let mut buffer: Vec<u8> = Vec::new();
    let mut last_bytes = None;
    // Hardly a command has written anything by now.
    wait_while_running(&process, &pipe).await;
    loop {
        let phase = lock(&process.state).phase;
        let draining = phase == Phase::Draining;
        if draining {
            let left = *last_bytes.get_or_insert_with(|| pipe_bytes(&pipe));
            if left == 0 {
                // More than the main process can have left behind: somebody
                // else writes. That is no longer this command's output.
                drained.notify_one();
                until_ended(&process).await;
                continue;
            }
        } else {
            hold_up(&process).await;
        }
        if buffer.capacity() < READ_BYTES {
            buffer = Vec::with_capacity(READ_BYTES);
        }
        buffer.clear();
        match rustix::io::read(pipe.get_ref(), rustix::buffer::spare_capacity(&mut buffer)) {
            Ok(0) => return,
            Ok(count) => {
                last_bytes = last_bytes.map(|left: usize| left.saturating_sub(count)).filter(|_| draining);
                let bytes = if count >= KEEP_WHOLE_BYTES {
                    Bytes::from(std::mem::take(&mut buffer))
                } else {
                    Bytes::copy_from_slice(&buffer)
                };
                lock(&processes.console).push(source, &bytes);
                keep(&process, kind, bytes);
                // A command that writes without end must not keep others waiting.
                tokio::task::consume_budget().await;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if draining {
                    drained.notify_one();
                }
                // An idle command holds no read buffer.
                buffer = Vec::new();
                wait_readable(&process, &pipe).await;
            }
            // EIO: the last user of the terminal is gone.
            Err(_) => return,
        }
    }
}

fn keep(process: &Process, kind: OutputKind, bytes: Bytes) {
    let mut state = lock(&process.state);
    if state.phase != Phase::Ended {
        let protected_from = state.readers.values().map(|reader| reader.offset).min();
        state.output.push(kind, bytes, protected_from);
        drop(state);
        process.produced.notify_waiters();
    }
}

/// What the pipe holds at most.
fn pipe_bytes(pipe: &AsyncFd<OwnedFd>) -> usize {
    rustix::pipe::fcntl_getpipe_size(pipe.get_ref()).unwrap_or(READ_BYTES)
}

async fn until_ended(process: &Process) {
    loop {
        let changed = process.phase_changed.notified();
        if lock(&process.state).phase == Phase::Ended {
            return;
        }
        changed.await;
    }
}

/// Until there is something to read, or the command has ended.
async fn wait_readable(process: &Process, pipe: &AsyncFd<OwnedFd>) {
    if !wait_while_running(process, pipe).await {
        clear(pipe.readable().await);
    }
}

/// The same of a command that runs; false, at once, of one that does not.
async fn wait_while_running(process: &Process, pipe: &AsyncFd<OwnedFd>) -> bool {
    let changed = process.phase_changed.notified();
    if lock(&process.state).phase != Phase::Running {
        return false;
    }
    tokio::select! {
        ready = pipe.readable() => clear(ready),
        () = changed => {}
    }
    true
}

/// The next read finds out by itself; the readiness is only a wake-up.
fn clear(ready: std::io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, OwnedFd>>) {
    if let Ok(mut ready) = ready {
        ready.clear_ready();
    }
}

/// Waits while a reader that keeps taking is too far behind.
async fn hold_up(process: &Process) {
    loop {
        let changed = process.consumed.notified();
        let until = {
            let mut state = lock(&process.state);
            if state.phase != Phase::Running {
                return;
            }
            let end = state.output.end();
            let now = Instant::now();
            state
                .readers
                .values_mut()
                .filter(|reader| end.saturating_sub(reader.offset) >= HELD_UP_AT)
                // Patience begins when there is something to take.
                .map(|reader| *reader.waits_since.get_or_insert(now) + STALL_PATIENCE)
                .filter(|until| *until > now)
                .max()
        };
        let Some(until) = until else { return };
        let _ = timeout_at(until, changed).await;
    }
}

//! One sandbox of the mock: its files, its commands and its end.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use stacyvm_api::{Limit, SandboxId, Timestamp};
use stacyvm_sandbox::{EntryKind, Exit, FileEntry, ProcessSelector, ResourceUsage, SandboxSpec, SessionError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::tree::Tree;
use crate::process::{NewProcess, Process};

/// The agent ends a sandbox this long after an expiry that nobody extended.
const DEADLINE_GRACE: Duration = Duration::from_mins(1);
/// Console lines kept (agent contract).
const CONSOLE_LINES_MAX: usize = 1000;
/// Ended commands kept for those who attach late.
const ENDED_PROCESSES_MAX: usize = 256;
/// Port on which every mock sandbox echoes what it is sent (RFC 862).
pub(super) const ECHO_PORT: u16 = 7;

/// What listens on a port inside a mock sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MockService {
    /// Sends back what it is sent.
    Echo,
    /// Answers every HTTP/1.1 request with this text and the request's head.
    Http(String),
    /// What listens at this address of the host, for tests that bring a server.
    At(SocketAddr),
}

#[derive(Debug)]
pub(super) struct MockSandbox {
    pub(super) id: SandboxId,
    pub(super) spec: SandboxSpec,
    pub(super) created_at: Timestamp,
    pub(super) paused: AtomicBool,
    /// The next commands find the process limit used up.
    pub(super) pids_exhausted: AtomicBool,
    pub(super) disk_full: AtomicBool,
    pub(super) out_of_memory: AtomicBool,
    pub(super) ended: CancellationToken,
    tree: Mutex<Tree>,
    processes: Mutex<Processes>,
    console: Mutex<Console>,
    services: Mutex<BTreeMap<u16, MockService>>,
    expires_at: watch::Sender<Timestamp>,
    /// Times a limit killed something here.
    kills: Mutex<BTreeMap<Limit, u64>>,
    cpu_usec: AtomicU64,
}

#[derive(Debug)]
struct Processes {
    next_pid: u32,
    all: Vec<Arc<Process>>,
}

#[derive(Debug, Default)]
struct Console {
    lines: VecDeque<String>,
    partial: Vec<u8>,
}

impl MockSandbox {
    pub(super) fn new(id: SandboxId, spec: SandboxSpec) -> Arc<Self> {
        let sandbox = Arc::new(Self {
            id,
            created_at: Timestamp::now(),
            paused: AtomicBool::new(false),
            pids_exhausted: AtomicBool::new(false),
            disk_full: AtomicBool::new(false),
            out_of_memory: AtomicBool::new(false),
            ended: CancellationToken::new(),
            tree: Mutex::new(Tree::new()),
            // Pid 1 is the agent.
            processes: Mutex::new(Processes { next_pid: 2, all: Vec::new() }),
            console: Mutex::default(),
            services: Mutex::new(BTreeMap::from([(ECHO_PORT, MockService::Echo)])),
            expires_at: watch::Sender::new(spec.expires_at),
            kills: Mutex::default(),
            cpu_usec: AtomicU64::new(0),
            spec,
        });
        tokio::spawn(keep_deadline(Arc::downgrade(&sandbox), sandbox.expires_at.subscribe(), sandbox.ended.clone()));
        sandbox
    }

    /// Its init ends, and everything with it.
    pub(super) fn die(&self) {
        self.ended.cancel();
        for process in &lock(&self.processes).all {
            process.lose();
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.ended.is_cancelled()
    }

    pub(super) fn hostname(&self) -> &str {
        &self.spec.hostname
    }

    pub(super) fn expires_at(&self) -> Timestamp {
        *self.expires_at.borrow()
    }

    pub(super) fn set_deadline(&self, expires_at: Timestamp) {
        self.expires_at.send_replace(expires_at);
    }

    pub(super) fn usage(&self) -> ResourceUsage {
        let running = lock(&self.processes).all.iter().filter(|process| process.exit().is_none()).count() as u64;
        ResourceUsage {
            cpu_usec: self.cpu_usec.fetch_add(1000, Ordering::Relaxed),
            memory_bytes: (1 + running) << 20,
            memory_limit_bytes: self.spec.memory_mib << 20,
            pids: 1 + running,
            pids_limit: self.spec.pids_limit,
            oom_kills: self.kills(Limit::Memory),
            pids_refused: 0,
            pids_kills: self.kills(Limit::Pids),
            disk_kills: self.kills(Limit::Disk),
            disk_bytes: None,
            disk_limit_bytes: self.spec.disk.size_mib.unwrap_or(0) << 20,
        }
    }

    fn kills(&self, limit: Limit) -> u64 {
        lock(&self.kills).get(&limit).copied().unwrap_or(0)
    }

    pub(super) fn count_kill(&self, limit: Limit) {
        *lock(&self.kills).entry(limit).or_default() += 1;
    }

    // Commands.

    pub(super) fn add_process(&self, make: impl FnOnce(u32) -> NewProcess) -> Arc<Process> {
        let mut processes = lock(&self.processes);
        let pid = processes.next_pid;
        processes.next_pid += 1;
        let process = Process::new(make(pid));
        processes.all.push(Arc::clone(&process));
        let ended = processes.all.iter().filter(|process| process.exit().is_some()).count();
        if ended > ENDED_PROCESSES_MAX
            && let Some(oldest) = processes.all.iter().position(|process| process.exit().is_some())
        {
            processes.all.remove(oldest);
        }
        process
    }

    pub(super) fn processes(&self) -> Vec<Arc<Process>> {
        lock(&self.processes).all.clone()
    }

    pub(super) fn process(&self, selector: &ProcessSelector) -> Result<Arc<Process>, SessionError> {
        let processes = lock(&self.processes);
        let found = processes.all.iter().rev().find(|process| match selector {
            ProcessSelector::Pid(pid) => process.pid == *pid,
            ProcessSelector::Tag(tag) => process.tag.as_deref() == Some(tag),
        });
        found.cloned().ok_or_else(|| {
            SessionError::ProcessNotFound(match selector {
                ProcessSelector::Pid(pid) => pid.to_string(),
                ProcessSelector::Tag(tag) => tag.clone(),
            })
        })
    }

    /// False when there is no such process.
    pub(super) fn signal(&self, pid: u32, signal: i32) -> bool {
        let Ok(process) = self.process(&ProcessSelector::Pid(pid)) else { return false };
        if signal != 0 {
            process.kill(Exit { code: None, signal: Some(signal), timed_out: false });
        }
        true
    }

    // Console and services.

    pub(super) fn append_console(&self, bytes: &[u8]) {
        let mut console = lock(&self.console);
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&std::mem::take(&mut console.partial)).into_owned();
                    if console.lines.len() == CONSOLE_LINES_MAX {
                        console.lines.pop_front();
                    }
                    console.lines.push_back(line);
                }
                b'\r' => {}
                _ if console.partial.len() < 4096 => console.partial.push(*byte),
                _ => {}
            }
        }
    }

    pub(super) fn console(&self, lines: usize) -> Vec<String> {
        let console = lock(&self.console);
        let skip = console.lines.len().saturating_sub(lines);
        console.lines.iter().skip(skip).cloned().collect()
    }

    pub(super) fn listen(&self, port: u16, service: MockService) {
        lock(&self.services).insert(port, service);
    }

    pub(super) fn service(&self, port: u16) -> Option<MockService> {
        lock(&self.services).get(&port).cloned()
    }

    pub(super) fn ports(&self) -> Vec<u16> {
        lock(&self.services).keys().copied().collect()
    }

    // Files.

    pub(super) fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.tree)
    }

    /// The tree for a change, unless the disk is full.
    pub(super) fn tree_for_writing(&self) -> Result<MutexGuard<'_, Tree>, SessionError> {
        if self.disk_full.load(Ordering::Relaxed) { Err(SessionError::DiskFull) } else { Ok(self.tree()) }
    }

    pub(super) fn read_all(&self, path: &str) -> Result<Bytes, SessionError> {
        Ok(self.tree().read(path)?.1)
    }

    pub(super) fn open_for_writing(&self, path: &str, truncate: bool, user: &str) -> Result<(), SessionError> {
        let mut tree = self.tree_for_writing()?;
        let exists = tree.stat(path).is_ok();
        if truncate || !exists {
            // A shell makes no missing parents.
            let parent = path.rsplit_once('/').map_or("/", |(parent, _)| if parent.is_empty() { "/" } else { parent });
            if !tree.is_directory(parent)? {
                return Err(SessionError::FileNotFound(path.to_owned()));
            }
            tree.write(path, Bytes::new(), None, user)?;
        }
        Ok(())
    }

    /// What does not fit is lost, as for a program that ignores errors.
    pub(super) fn append(&self, path: &str, bytes: &[u8], user: &str) {
        let Ok(mut tree) = self.tree_for_writing() else { return };
        let mut content = tree.read(path).map(|(_, bytes)| bytes.to_vec()).unwrap_or_default();
        content.extend_from_slice(bytes);
        let _lost = tree.write(path, content.into(), None, user);
    }

    pub(super) fn directory(&self, path: &str) -> Result<String, SessionError> {
        let tree = self.tree();
        let resolved = tree.resolve(path)?;
        if tree.is_directory(&resolved)? { Ok(resolved) } else { Err(SessionError::FileNotFound(path.to_owned())) }
    }

    pub(super) fn kind(&self, path: &str) -> Option<EntryKind> {
        let tree = self.tree();
        let resolved = tree.resolve(path).ok()?;
        tree.stat(&resolved).ok().map(|entry| entry.kind)
    }

    pub(super) fn names(&self, path: &str) -> Result<Vec<String>, SessionError> {
        Ok(self.tree().list(path, 1)?.into_iter().map(|entry| entry.name).collect())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), SessionError> {
        self.tree_for_writing()?.rename(from, to, self.user())
    }

    pub(super) fn link(&self, path: &str, target: &str, user: &str) -> Result<(), SessionError> {
        self.tree_for_writing()?.link(path, target, user)
    }

    pub(super) fn make_dir(&self, path: &str, user: &str) -> Result<FileEntry, SessionError> {
        self.tree_for_writing()?.make_dir(path, user)
    }

    pub(super) fn chmod(&self, path: &str, mode: u32) -> Result<(), SessionError> {
        self.tree().chmod(path, mode)
    }

    pub(super) fn remove(&self, path: &str, recursive: bool) -> Result<(), SessionError> {
        self.tree().remove(path, recursive)
    }

    pub(super) fn user(&self) -> &str {
        self.spec.user.as_deref().unwrap_or("root")
    }
}

/// Ends the sandbox when its expiry is long past, as the agent does.
async fn keep_deadline(
    sandbox: std::sync::Weak<MockSandbox>,
    mut expires_at: watch::Receiver<Timestamp>,
    ended: CancellationToken,
) {
    loop {
        let left = expires_at.borrow_and_update().since(Timestamp::now()) + DEADLINE_GRACE;
        let overdue = Timestamp::now().since(*expires_at.borrow());
        tokio::select! {
            () = ended.cancelled() => return,
            () = tokio::time::sleep(left.saturating_sub(overdue)) => {
                if let Some(sandbox) = sandbox.upgrade() {
                    sandbox.die();
                }
                return;
            }
            changed = expires_at.changed() => if changed.is_err() { return },
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

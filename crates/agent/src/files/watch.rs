//! Watching directories for changes, by inotify.
//!
//! The kernel's queue is the only buffer: it is bounded, and when it overflows
//! the watcher is told that changes were lost.

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::blocking;
use crate::Failure;

/// Watched trees at once.
const MAX_WATCHES: usize = 64;

/// Directories of one watched tree.
const MAX_DIRECTORIES: usize = 8192;

/// Changes kept for a watcher that is asked from time to time.
const MAX_QUEUED: usize = 8192;

const READ_BYTES: usize = 8192;

/// File systems whose changes made elsewhere are never seen here.
const NETWORK_FILE_SYSTEMS: [u32; 6] = [
    0x6969,      // NFS
    0x517b,      // SMB
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x5346_414f, // AFS
    0x00c3_6400, // Ceph
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    Create,
    Write,
    Remove,
    Rename,
    Chmod,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// Relative to the watched directory.
    pub name: PathBuf,
    pub kind: ChangeKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WatchOptions {
    pub depth: Depth,
    pub network: NetworkMounts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Only entries of the directory itself.
    Direct,
    /// Everything below, also what is made later.
    Recursive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NetworkMounts {
    Refused,
    Allowed,
}

/// All watches of the sandbox.
#[derive(Default)]
pub(crate) struct Watchers {
    open: Arc<AtomicUsize>,
    polled: Mutex<HashMap<String, Arc<Polled>>>,
    created: AtomicUsize,
}

/// A watch that somebody waits on.
pub(crate) struct Watch {
    root: PathBuf,
    inotify: Arc<AsyncFd<OwnedFd>>,
    /// Directory by watch descriptor, relative to the root.
    directories: HashMap<i32, PathBuf>,
    depth: Depth,
    ready: VecDeque<Change>,
    root_is_gone: bool,
    _counted: Counted,
}

/// A watch that is asked from time to time.
struct Polled {
    state: Mutex<PolledState>,
    stop: Notify,
}

#[derive(Default)]
struct PolledState {
    changes: VecDeque<Change>,
    failure: Option<Failure>,
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Watchers {
    /// Begins to watch a directory.
    pub(crate) async fn watch(&self, root: PathBuf, options: WatchOptions) -> Result<Watch, Failure> {
        let counted = Counted(Arc::clone(&self.open));
        if self.open.fetch_add(1, Ordering::Relaxed) >= MAX_WATCHES {
            return Err(Failure::Busy(format!("more than {MAX_WATCHES} directories are watched")));
        }
        blocking(move || Watch::new(root, options, counted)).await
    }

    /// A watch to be asked by its id.
    pub(crate) async fn create(&self, root: PathBuf, options: WatchOptions) -> Result<String, Failure> {
        let watch = self.watch(root, options).await?;
        let id = format!("w{}", self.created.fetch_add(1, Ordering::Relaxed));
        let polled = Arc::new(Polled { state: Mutex::default(), stop: Notify::new() });
        lock(&self.polled).insert(id.clone(), Arc::clone(&polled));
        tokio::spawn(collect(watch, polled));
        Ok(id)
    }

    /// What changed since the last call.
    pub(crate) fn take(&self, id: &str) -> Result<Vec<Change>, Failure> {
        let polled = lock(&self.polled).get(id).cloned();
        let polled = polled.ok_or_else(|| Failure::FileNotFound(format!("watcher {id}")))?;
        let mut state = lock(&polled.state);
        match state.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(state.changes.drain(..).collect()),
        }
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), Failure> {
        let removed = lock(&self.polled).remove(id);
        removed.ok_or_else(|| Failure::FileNotFound(format!("watcher {id}")))?.stop.notify_one();
        Ok(())
    }
}

impl Watch {
    fn new(root: PathBuf, options: WatchOptions, counted: Counted) -> Result<Self, Failure> {
        let metadata = std::fs::metadata(&root).map_err(|error| Failure::file(&root, &error))?;
        if !metadata.is_dir() {
            return Err(Failure::InvalidArgument(format!("not a directory: {}", root.display())));
        }
        if options.network == NetworkMounts::Refused && is_network_mount(&root) {
            let shown = root.display();
            return Err(Failure::InvalidArgument(format!(
                "on a network file system, where changes go unseen: {shown}"
            )));
        }
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|error| used_up(&root, error))?;
        let mut watch = Self {
            inotify: Arc::new(register(inotify)?),
            root,
            directories: HashMap::new(),
            depth: options.depth,
            ready: VecDeque::new(),
            root_is_gone: false,
            _counted: counted,
        };
        watch.add(PathBuf::new(), Found::Known)?;
        Ok(watch)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The next change; `None` once the directory itself is gone.
    pub(crate) async fn next(&mut self) -> Result<Option<Change>, Failure> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(Some(change));
            }
            if self.root_is_gone {
                return Ok(None);
            }
            self.read()?;
            if self.ready.is_empty() && !self.root_is_gone {
                let inotify = Arc::clone(&self.inotify);
                let mut ready = inotify
                    .readable()
                    .await
                    .map_err(|error| Failure::Internal(format!("watch {}: {error}", self.root.display())))?;
                ready.clear_ready();
            }
        }
    }

    /// Takes what the kernel has queued. Short: it runs on the agent's only
    /// thread, and a new directory seldom has much in it yet.
    fn read(&mut self) -> Result<(), Failure> {
        let inotify = Arc::clone(&self.inotify);
        let mut buffer = [MaybeUninit::uninit(); READ_BYTES];
        let mut reader = inotify::Reader::new(inotify.get_ref(), &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(error) => return Err(Failure::file(&self.root, &error.into())),
            };
            let flags = event.events();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                return Err(Failure::Busy(
                    "too many changes at once: some were lost, list the directory anew".to_owned(),
                ));
            }
            let name = event.file_name().map(|name| PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes())));
            self.take(event.wd(), flags, name)?;
            if reader.is_buffer_empty() && !self.ready.is_empty() {
                return Ok(());
            }
        }
    }

    fn take(&mut self, descriptor: i32, flags: ReadFlags, name: Option<PathBuf>) -> Result<(), Failure> {
        let Some(dir) = self.directories.get(&descriptor).cloned() else { return Ok(()) };
        if flags.contains(ReadFlags::IGNORED) {
            self.directories.remove(&descriptor);
            self.root_is_gone |= dir.as_os_str().is_empty();
            return Ok(());
        }
        let Some(name) = name else {
            // About the directory itself: its parent tells the same, except of
            // the root.
            if dir.as_os_str().is_empty() && flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF) {
                let kind = if flags.contains(ReadFlags::MOVE_SELF) { ChangeKind::Rename } else { ChangeKind::Remove };
                self.ready.push_back(Change { name: PathBuf::from("."), kind });
                self.root_is_gone = true;
            }
            return Ok(());
        };
        let name = dir.join(name);
        let kind = if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            ChangeKind::Create
        } else if flags.contains(ReadFlags::MODIFY) {
            ChangeKind::Write
        } else if flags.contains(ReadFlags::DELETE) {
            ChangeKind::Remove
        } else if flags.contains(ReadFlags::MOVED_FROM) {
            self.forget(&name);
            ChangeKind::Rename
        } else if flags.contains(ReadFlags::ATTRIB) {
            ChangeKind::Chmod
        } else {
            return Ok(());
        };
        self.ready.push_back(Change { name: name.clone(), kind });
        if kind == ChangeKind::Create && flags.contains(ReadFlags::ISDIR) && self.depth == Depth::Recursive {
            self.add(name, Found::New)?;
        }
        Ok(())
    }

    /// Watches a directory and, when asked for, those below it.
    fn add(&mut self, dir: PathBuf, found: Found) -> Result<(), Failure> {
        let mut waiting = vec![dir];
        while let Some(dir) = waiting.pop() {
            let path = self.root.join(&dir);
            if self.directories.len() >= MAX_DIRECTORIES {
                return Err(Failure::Busy(format!("more than {MAX_DIRECTORIES} directories to watch")));
            }
            let mut flags = WatchFlags::CREATE
                | WatchFlags::MODIFY
                | WatchFlags::DELETE
                | WatchFlags::MOVE
                | WatchFlags::ATTRIB
                | WatchFlags::DELETE_SELF
                | WatchFlags::MOVE_SELF
                | WatchFlags::ONLYDIR;
            if !dir.as_os_str().is_empty() {
                flags |= WatchFlags::DONT_FOLLOW;
            }
            match inotify::add_watch(self.inotify.get_ref(), &path, flags) {
                Ok(descriptor) => self.directories.insert(descriptor, dir.clone()),
                // It went away again.
                Err(Errno::NOENT | Errno::NOTDIR) if !dir.as_os_str().is_empty() => continue,
                Err(error) => return Err(used_up(&path, error)),
            };
            if self.depth == Depth::Direct {
                return Ok(());
            }
            for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                let name = dir.join(entry.file_name());
                // Made between the directory and our watch on it.
                if found == Found::New {
                    self.ready.push_back(Change { name: name.clone(), kind: ChangeKind::Create });
                }
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    waiting.push(name);
                }
            }
        }
        Ok(())
    }

    /// A directory that moved away is no longer watched, nor what is below it.
    fn forget(&mut self, name: &Path) {
        let gone: Vec<i32> = self
            .directories
            .iter()
            .filter(|(_, dir)| dir.starts_with(name))
            .map(|(&descriptor, _)| descriptor)
            .collect();
        for descriptor in gone {
            self.directories.remove(&descriptor);
            let _ = inotify::remove_watch(self.inotify.get_ref(), descriptor);
        }
    }
}

/// Whether entries of a directory are news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Known,
    New,
}

/// Gathers changes until the watch is removed.
async fn collect(mut watch: Watch, polled: Arc<Polled>) {
    loop {
        let next = tokio::select! {
            next = watch.next() => next,
            () = polled.stop.notified() => return,
        };
        let mut state = lock(&polled.state);
        match next {
            Ok(Some(change)) if state.changes.len() < MAX_QUEUED => {
                // Programs write in many small steps: one is enough to tell.
                if state.changes.back() != Some(&change) {
                    state.changes.push_back(change);
                }
            }
            Ok(Some(_)) => {
                state.changes.clear();
                state.failure = Some(Failure::Busy(format!("more than {MAX_QUEUED} changes were not fetched")));
            }
            Ok(None) => return,
            Err(failure) => {
                state.failure = Some(failure);
                return;
            }
        }
    }
}

fn is_network_mount(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| NETWORK_FILE_SYSTEMS.contains(&(found.f_type as u32)))
}

fn used_up(path: &Path, error: Errno) -> Failure {
    match error {
        Errno::NOSPC | Errno::MFILE | Errno::NFILE => {
            Failure::Busy("the machine's limit of watched directories is used up".to_owned())
        }
        error => Failure::file(path, &error.into()),
    }
}

fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, Failure> {
    crate::descriptor::watch_descriptor(fd, Interest::READABLE)
        .map_err(|error| Failure::Internal(format!("inotify: {error}")))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

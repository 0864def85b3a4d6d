//! What the parts of this provider share.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::ProviderError;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::NAME;
use super::error::ProotError;
use super::launcher::protocol::{Job, Reply};
use super::options::ProotOptions;
use super::registry::{Live, Registry};
use super::state::{self, Layout, OnDisk, Record};
use super::{members, watcher};
use crate::host::cgroup::Cgroups;
use crate::host::claims::{Claims, Instance};
use crate::host::ids::UidRanges;
use crate::host::obstacle::Obstacle;
use crate::host::{on_disk, process, trash};

/// How long to wait for an earlier process of this server to let go.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Roots copied at a time; it is the disk that is waited for.
const MAX_COPIES: usize = 2;

/// First kernel that counts processes of a user per user namespace.
const NAMESPACED_RLIMITS: (u32, u32) = (5, 14);

pub(super) struct Runtime {
    pub(super) options: ProotOptions,
    pub(super) layout: Layout,
    pub(super) uids: UidRanges,
    pub(super) cgroups: Cgroups,
    pub(super) registry: Registry,
    /// Why sandboxes share the host's namespaces, where they do.
    pub(super) shared: Option<String>,
    pub(super) copies: Semaphore,
    pub(super) background: TaskTracker,
    pub(super) stopping: CancellationToken,
    trash_gate: tokio::sync::Mutex<()>,
    /// Held as long as this process owns the data directory.
    _lock: File,
}

impl Runtime {
    pub(super) async fn open(options: &ProotOptions) -> Result<Arc<Self>, ProviderError> {
        let layout = Layout::new(&options.data_dir, options.workspace_base.as_deref());
        make_directories(&layout).map_err(|error| unavailable("its directories cannot be made", error))?;
        refuse_endless_copy(&options.rootfs, &[layout.root(), layout.base()])?;
        let lock = lock(layout.root()).await?;
        let shared = if options.namespaces {
            match options.launcher.run(&Job::Probe, None).await {
                Ok(Reply::Failed { step, message }) => Some(refusal(Obstacle::known(), &step, &message)),
                Ok(Reply::Probed | Reply::Launched(_)) => None,
                Err(error) => return Err(error.of("look for namespaces")),
            }
        } else {
            Some("switched off (providers.proot.namespaces)".to_owned())
        };
        let opened = Self::assemble(options, layout, lock, shared);
        let runtime = Arc::new(opened.map_err(|error| unavailable("its data directory cannot be used", error))?);
        let watching = Arc::clone(&runtime);
        runtime.background.spawn(async move {
            watching.stopping.run_until_cancelled(watcher::watch(&watching)).await;
        });
        Ok(runtime)
    }

    fn assemble(options: &ProotOptions, layout: Layout, lock: File, shared: Option<String>) -> io::Result<Self> {
        let instance = Instance::open(layout.root())?;
        let used = known(&layout)?.into_iter().filter_map(|id| record_of(&layout, &id)?.uid);
        let uids = if is_root() {
            UidRanges::open(Claims::open(&options.run_dir, "uids", instance.clone())?, used)?
        } else {
            UidRanges::shared()
        };
        let runtime = Self {
            options: options.clone(),
            uids,
            cgroups: Cgroups::open(&options.cgroup_parent, instance.id()),
            registry: Registry::default(),
            shared,
            copies: Semaphore::new(MAX_COPIES),
            background: TaskTracker::new(),
            stopping: CancellationToken::new(),
            trash_gate: tokio::sync::Mutex::default(),
            layout,
            _lock: lock,
        };
        // Limits that are looked after from here must go on being so.
        for id in known(&runtime.layout)? {
            let found = runtime.adopt(&id).map_err(io::Error::other)?;
            // Nobody makes one at this time, so that it had an agent.
            if let Some(live) = found.filter(|live| members::is_childless(live.identity.pid)) {
                watcher::end(&live, "its agent is gone");
            }
        }
        Ok(runtime)
    }

    /// The sandbox if its PRoot lives, whichever process of this server made it.
    pub(super) fn adopt(&self, id: &SandboxId) -> Result<Option<Arc<Live>>, ProotError> {
        let look = || ProotError::system("look at PRoot");
        if let Some(live) = self.registry.find(id) {
            let ended = process::has_ended(live.proot()).map_err(look())?;
            return Ok((!ended).then_some(live));
        }
        let sandbox = self.layout.sandbox(id);
        let on_disk = state::load(&sandbox).map_err(ProotError::file("read", &sandbox))?;
        let OnDisk::Launched(record, identity) = on_disk else { return Ok(None) };
        if record.boot_id != on_disk::boot_id() {
            return Ok(None);
        }
        let Some(proot) = process::open(&identity).map_err(look())? else { return Ok(None) };
        // The process before may have ended while it had stopped it.
        members::go_on(&proot);
        let agent = members::agent_of(identity.pid);
        let live = Arc::new(Live::new(*record, identity, proot, agent).map_err(look())?);
        self.registry.add(id, Arc::clone(&live));
        Ok(Some(live))
    }

    /// Every sandbox that has a directory.
    pub(super) fn known(&self) -> io::Result<BTreeSet<SandboxId>> {
        known(&self.layout)
    }

    pub(super) fn record(&self, id: &SandboxId) -> Option<Record> {
        record_of(&self.layout, id)
    }

    /// Whether the kernel counts one sandbox's processes by their user.
    pub(super) fn counts_processes(&self) -> bool {
        is_root() || (self.shared.is_none() && kernel() >= NAMESPACED_RLIMITS)
    }

    /// Removes what destroyed sandboxes left; returns how many trees that was.
    pub(super) async fn remove_trash(&self) -> Result<usize, ProotError> {
        let _alone = self.trash_gate.lock().await;
        let directory = self.layout.trash();
        let removed = tokio::task::spawn_blocking(move || trash::empty(&directory)).await;
        removed.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).map_err(ProotError::system("remove files"))
    }

    pub(super) fn empty_trash(self: &Arc<Self>) {
        let runtime = Arc::clone(self);
        self.background.spawn(async move {
            if let Err(error) = runtime.remove_trash().await {
                tracing::warn!(error = &error as &dyn std::error::Error, "what a sandbox left cannot be removed");
            }
        });
    }

    pub(super) async fn shutdown(&self) {
        self.stopping.cancel();
        // Before what takes long: whoever waits for large trees to be removed may
        // give up.
        self.cgroups.close();
        if let Err(error) = self.uids.release_unused() {
            tracing::warn!(%error, "uids stay claimed");
        }
        self.background.close();
        self.background.wait().await;
    }

    /// What keeps another user from his files, as root without namespaces.
    pub(super) fn closed_directory(&self) -> Option<PathBuf> {
        if is_root() && self.shared.is_some() { first_closed(&self.layout.sandboxes()) } else { None }
    }

    /// The directory that sandboxes of other users do not see into: the
    /// server's data, and whatever above it they could not pass.
    pub(super) fn hidden(&self) -> PathBuf {
        let (data, base) = (&self.options.data_dir, self.layout.base());
        let own = if base.starts_with(data) { data } else { base };
        first_closed(own).unwrap_or_else(|| own.to_owned())
    }
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The outermost directory on the way that others may not pass.
fn first_closed(path: &Path) -> Option<PathBuf> {
    let mut ancestors: Vec<&Path> = path.ancestors().collect();
    ancestors.reverse();
    let is_closed = |path: &&Path| std::fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o001 == 0);
    ancestors.into_iter().find(is_closed).map(Path::to_owned)
}

fn kernel() -> (u32, u32) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn known(layout: &Layout) -> io::Result<BTreeSet<SandboxId>> {
    let mut known = BTreeSet::new();
    for entry in std::fs::read_dir(layout.sandboxes())? {
        known.extend(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    Ok(known)
}

fn record_of(layout: &Layout, id: &SandboxId) -> Option<Record> {
    match state::load(&layout.sandbox(id)).ok()? {
        OnDisk::Launched(record, _) | OnDisk::Remains(Some(record)) => Some(*record),
        OnDisk::Remains(None) | OnDisk::Nothing => None,
    }
}

fn make_directories(layout: &Layout) -> io::Result<()> {
    let private = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    private(layout.root())?;
    // A directory that was there before has the modes somebody gave it.
    let is_ours = layout.base() == layout.root() || !layout.base().exists();
    private(layout.base())?;
    for directory in [layout.sandboxes(), layout.trash()] {
        private(&directory)?;
    }
    if is_root() {
        // Sandboxes run as other users, who have to pass; they cannot look.
        let sandboxes = layout.sandboxes();
        for directory in is_ours.then_some(layout.base()).into_iter().chain([sandboxes.as_path()]) {
            std::fs::set_permissions(directory, PermissionsExt::from_mode(0o711))?;
        }
    }
    Ok(())
}

/// Sandboxes are copies of the root: one that holds them would hold itself.
fn refuse_endless_copy(rootfs: &Path, kept: &[&Path]) -> Result<(), ProviderError> {
    let Ok(root) = rootfs.canonicalize() else { return Ok(()) };
    let Some(inner) = kept.iter().filter_map(|path| path.canonicalize().ok()).find(|path| path.starts_with(&root))
    else {
        return Ok(());
    };
    let shown = rootfs.display();
    let message = if root == Path::new("/") {
        format!("providers.proot.rootfs_path is {shown}, this host's own root, and every sandbox would copy it")
    } else {
        format!(
            "sandboxes are kept in {}, below providers.proot.rootfs_path ({shown}), which they copy",
            inner.display()
        )
    };
    let hint = "set providers.proot.rootfs_path to a directory of its own; `stacyvm rootfs build` makes one";
    let provider = NAME.to_owned();
    Err(ProviderError::Unavailable { provider, message, hint: Some(hint.to_owned()), cause: None })
}

async fn lock(root: &Path) -> Result<File, ProviderError> {
    let path = root.join("lock");
    let opened = File::options().create(true).truncate(false).write(true).open(&path);
    let lock = opened.map_err(|error| unavailable("its data directory cannot be locked", error))?;
    let deadline = tokio::time::Instant::now() + LOCK_LIMIT;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::WOULDBLOCK) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(LOCK_RETRY).await;
            }
            Err(error) => return Err(unavailable("another server uses its data directory", error.into())),
        }
    }
}

/// Why there are no namespaces: the setting that forbids them, where one is
/// known, since the kernel's own word for that is "no space" or "not permitted".
fn refusal(obstacle: Option<Obstacle>, step: &str, message: &str) -> String {
    match obstacle {
        Some(obstacle) => format!("{} ({step}: {message})", obstacle.message),
        None => format!("{step}: {message}"),
    }
}

fn unavailable(message: &str, error: io::Error) -> ProviderError {
    ProviderError::Unavailable {
        provider: NAME.to_owned(),
        message: message.to_owned(),
        hint: None,
        cause: Some(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_forbids_namespaces_is_named_before_the_kernels_word() {
        let setting = Obstacle { message: "user.max_user_namespaces is 0".into(), fix: String::new() };
        let kernels = "No space left on device";
        let said = refusal(Some(setting), "make namespaces", kernels);
        assert_eq!(said, "user.max_user_namespaces is 0 (make namespaces: No space left on device)");
        assert_eq!(refusal(None, "make namespaces", kernels), "make namespaces: No space left on device");
    }

    #[tokio::test]
    async fn control_groups_are_given_back_before_trash_that_takes_long() {
        let (data, rootfs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = ProotOptions {
            run_dir: data.path().join("run"),
            rootfs: rootfs.path().to_owned(),
            cgroup_parent: "stacyvm-test".into(),
            namespaces: false,
            ..ProotOptions::new(data.path())
        };
        let runtime = Runtime::open(&options).await.unwrap();
        let groups = runtime.cgroups.directories("");
        assert!(!groups.is_empty() && groups.iter().all(|group| group.exists()), "{groups:?}");
        let trash = runtime.trash_gate.lock().await;
        runtime.empty_trash();
        let mut ended = Box::pin(runtime.shutdown());
        assert!(futures_util::poll!(&mut ended).is_pending());
        assert!(!groups.iter().any(|group| group.exists()), "{groups:?}");
        drop(trash);
        ended.await;
    }
}

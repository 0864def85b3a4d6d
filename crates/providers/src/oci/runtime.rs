//! What the parts of this provider share.

use crate::host::is_ordinary_user;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;
use stacyvm_api::SandboxId;
use stacyvm_image::{Image, ImageStore};
use stacyvm_sandbox::ProviderError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::NAME;
use super::disk::Disks;
use super::error::OciError;
use super::external::{Binary, Hierarchies};
use super::host_image::HostImage;
use super::network::{self, Destination, Network};
use super::options::{OciOptions, OciRuntime};
use super::pairs::{Creations, PairPool};
use super::registry::Registry;
use super::spawner::Spawner;
use super::spawner::protocol::{Done, Job};
use super::state::{self, Layout, OnDisk, Record};
use crate::host::cgroup::Cgroups;
use crate::host::claims::{Claims, Instance};
use crate::host::ids::UidRanges;
use crate::host::trash;

/// How long to wait for an earlier process of this server to let go.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(20);

pub(super) struct Runtime {
    pub(super) layout: Layout,
    pub(super) instance: Instance,
    pub(super) spawner: Arc<Spawner>,
    /// What starts sandboxes, where that is not this program.
    pub(super) external: Option<Binary>,
    pub(super) run_dir: PathBuf,
    cgroup_parent: String,
    pub(super) uids: Arc<UidRanges>,
    pub(super) creations: Arc<Creations>,
    /// For sandboxes without a network.
    pub(super) plain: Arc<PairPool>,
    pub(super) network: Arc<Network>,
    /// For sandboxes with one, where that is offered.
    pub(super) connected: Option<Arc<PairPool>>,
    pub(super) images: Option<ImageStore>,
    pub(super) cgroups: Cgroups,
    pub(super) disks: Arc<Disks>,
    pub(super) host_image: HostImage,
    pub(super) registry: Registry,
    pub(super) background: TaskTracker,
    pub(super) stopping: CancellationToken,
    trash: Arc<TrashWork>,
    /// Held as long as this process owns the data directory.
    _lock: File,
}

/// Who removes what destroyed sandboxes left.
#[derive(Default)]
struct TrashWork {
    /// Something came in after the last look.
    has_more: AtomicBool,
    /// Somebody is at it in the background.
    is_emptied: AtomicBool,
    /// One at a time, so that each tree is counted once.
    gate: tokio::sync::Mutex<()>,
}

impl Runtime {
    pub(super) async fn open(options: &OciOptions) -> Result<Arc<Self>, ProviderError> {
        let layout = Layout::new(options.data_dir.join("oci"));
        make_directories(&layout).map_err(|error| unavailable("its data directory cannot be made", error))?;
        let lock = lock(layout.root()).await?;
        let external = match &options.runtime {
            OciRuntime::Builtin => None,
            OciRuntime::Program { name, search } => Some(Binary::find(name, search, &options.run_dir).await?),
        };
        let opened = Self::assemble(options, layout, lock, external);
        let runtime = Arc::new(opened.map_err(|error| unavailable("its data directory cannot be used", error))?);
        runtime.start_background();
        Ok(runtime)
    }

    fn assemble(options: &OciOptions, layout: Layout, lock: File, external: Option<Binary>) -> io::Result<Self> {
        let instance = Instance::open(layout.root())?;
        let spawner = Arc::new(Spawner::new(options.spawner.clone()));
        let records = records(&layout)?;
        let claims = |kind| Claims::open(&options.run_dir, kind, instance.clone());
        let uids = Arc::new(if is_ordinary_user() {
            UidRanges::shared()
        } else {
            UidRanges::open(claims("uids")?, records.iter().map(|record| record.uid_base))?
        });
        let creations = Arc::new(Creations::new());
        let pool = |network, wanted| {
            let (spawner, uids, creations) = (Arc::clone(&spawner), Arc::clone(&uids), Arc::clone(&creations));
            // Another program mounts everything itself.
            let scratch = external.is_none().then(|| layout.scratch());
            Arc::new(PairPool::new(spawner, uids, network, wanted, creations, scratch))
        };
        let plain = pool(None, options.prepared);
        let name_servers = options.bridge.as_ref().map(|bridge| bridge.name_servers.clone()).unwrap_or_default();
        let sandboxes = records.iter().filter_map(|record| record.network.connected()).collect();
        let network = Arc::new(Network::new(claims("subnets")?, options.run_dir.clone(), name_servers, sandboxes));
        let bridge = options.bridge.as_ref().filter(|_| !is_ordinary_user() && network::nft().is_some());
        let connected = bridge.map(|bridge| pool(Some(Arc::clone(&network)), bridge.prepared));
        Ok(Self {
            external,
            run_dir: options.run_dir.clone(),
            cgroup_parent: options.cgroup_parent.clone(),
            creations,
            plain,
            network,
            connected,
            images: options.images.clone(),
            cgroups: Cgroups::open(&options.cgroup_parent, instance.id()),
            disks: Arc::new(Disks::open(&layout, &options.disk)),
            host_image: HostImage::build(&layout.host_images(), &options.host_image)?,
            registry: Registry::default(),
            background: TaskTracker::new(),
            stopping: CancellationToken::new(),
            trash: Arc::default(),
            layout,
            instance,
            spawner,
            uids,
            _lock: lock,
        })
    }

    fn start_background(self: &Arc<Self>) {
        for pool in self.pools() {
            let (pool, stopping) = (Arc::clone(pool), self.stopping.clone());
            self.background.spawn(async move { stopping.run_until_cancelled(pool.refill()).await });
        }
        let (disks, stopping) = (Arc::clone(&self.disks), self.stopping.clone());
        self.background.spawn(async move { stopping.run_until_cancelled(disks.refill()).await });
        let network = Arc::clone(&self.network);
        self.background.spawn(async move {
            if let Err(error) = network.resume().await {
                tracing::error!(%error, "sandboxes that were running have no network");
            }
        });
    }

    fn pools(&self) -> impl Iterator<Item = &Arc<PairPool>> {
        std::iter::once(&self.plain).chain(self.connected.as_ref())
    }

    /// How many pairs of namespaces are ready.
    pub(super) fn pairs_ready(&self) -> usize {
        self.pools().map(|pool| pool.ready()).sum()
    }

    /// Keeps an image's layers for a sandbox, whoever runs.
    pub(super) async fn lease(&self, id: &SandboxId, image: &Image) -> Result<(), OciError> {
        match &self.images {
            Some(store) => store.lease(id.as_str(), image).await.map_err(|error| OciError::Image(error.into())),
            None => Ok(()),
        }
    }

    pub(super) async fn release(&self, id: &SandboxId) -> Result<(), OciError> {
        match &self.images {
            Some(store) => store.release(id.as_str()).await.map_err(|error| OciError::Image(error.into())),
            None => Ok(()),
        }
    }

    /// Lets a sandbox reach more than the internet.
    pub(super) async fn allow(&self, port: u32, destinations: &[Destination]) -> Result<(), OciError> {
        self.network.allow(port, destinations).await.map_err(OciError::system("open the network"))
    }

    /// A sandbox's group, as other runtimes are told: the same in every
    /// hierarchy.
    pub(super) fn cgroups_path(&self, id: &SandboxId) -> PathBuf {
        Path::new("/").join(&self.cgroup_parent).join(self.instance.id()).join(id.as_str())
    }

    /// Has the runtime that started a sandbox delete what it remembers. All that
    /// is known to be left is freed without it, so that a sandbox goes although
    /// its runtime was uninstalled.
    pub(super) async fn forget(&self, record: &Record) {
        let Some(container) = record.container(&self.layout.sandbox(&record.id)) else { return };
        if let Err(error) = self.spawner.call(Job::Forget(container), &[]).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(sandbox = %record.id, error, "its runtime did not delete it; its remains are removed");
        }
    }

    /// Every sandbox that has a directory.
    pub(super) fn known(&self) -> io::Result<BTreeSet<SandboxId>> {
        known(&self.layout)
    }

    /// Every sandbox that has a record.
    pub(super) fn records(&self) -> io::Result<Vec<Record>> {
        records(&self.layout)
    }

    /// Takes a sandbox's port back in the background: the kernel waits for
    /// every processor when a device goes.
    pub(super) fn disconnect(&self, record: &Record) {
        if let Some(connected) = record.network.connected() {
            let network = Arc::clone(&self.network);
            self.background.spawn(async move {
                if let Err(error) = network.detach(connected).await {
                    tracing::warn!(%error, "a port of the router stays in use");
                }
            });
        }
    }

    /// Lets go of a disk in the background, which can take long.
    pub(super) fn let_go(&self, disk: OwnedFd) {
        self.background.spawn_blocking(move || drop(disk));
    }

    /// Removes what destroyed sandboxes left; returns how many trees that was.
    /// An ordinary user's sandboxes have uids that only his spawner can touch.
    pub(super) async fn remove_trash(&self) -> Result<usize, OciError> {
        let _alone = self.trash.gate.lock().await;
        remove_trash(&self.spawner, self.layout.trash()).await
    }

    /// The same in the background.
    pub(super) fn empty_trash(&self) {
        self.trash.has_more.store(true, Ordering::SeqCst);
        if self.trash.is_emptied.swap(true, Ordering::SeqCst) {
            return;
        }
        let (work, trash, spawner) = (Arc::clone(&self.trash), self.layout.trash(), Arc::clone(&self.spawner));
        self.background.spawn(async move {
            loop {
                while work.has_more.swap(false, Ordering::SeqCst) {
                    let _alone = work.gate.lock().await;
                    if let Err(error) = remove_trash(&spawner, trash.clone()).await {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, "a destroyed sandbox's files cannot be removed; the sweep tries again");
                    }
                }
                work.is_emptied.store(false, Ordering::SeqCst);
                // What came in between saw that somebody is at it.
                let nobody_else = work.has_more.load(Ordering::SeqCst) && !work.is_emptied.swap(true, Ordering::SeqCst);
                if !nobody_else {
                    return;
                }
            }
        });
    }

    /// Ends background work, but no sandbox.
    pub(super) async fn shutdown(&self) {
        self.stopping.cancel();
        self.background.close();
        self.background.wait().await;
        for pool in self.pools() {
            pool.clear().await;
        }
        self.disks.clear();
        if let Err(error) = self.network.remove_unused().await {
            tracing::warn!(%error, "the network of sandboxes stays");
        }
        self.network.stop().await;
        self.spawner.stop().await;
        if let Err(error) = self.uids.release_unused() {
            tracing::warn!(%error, "claims on uids stay");
        }
        self.cgroups.close();
        match Hierarchies::find() {
            Ok(hierarchies) => hierarchies.remove_parents(&self.cgroup_parent, self.instance.id()),
            Err(error) => tracing::warn!(%error, "empty control groups of other runtimes stay"),
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

async fn remove_trash(spawner: &Spawner, trash: PathBuf) -> Result<usize, OciError> {
    if is_ordinary_user() {
        // Without one, as where the kernel forbids namespaces, there are at
        // most our own files.
        if let Ok((Done::TrashEmptied(trees), _)) = spawner.call(Job::EmptyTrash { trash: trash.clone() }, &[]).await {
            return Ok(trees);
        }
    }
    let emptied = tokio::task::spawn_blocking(move || trash::empty(&trash)).await;
    emptied.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(OciError::system("empty the trash"))
}

fn make_directories(layout: &Layout) -> io::Result<()> {
    let mut private = std::fs::DirBuilder::new();
    private.recursive(true).mode(0o700);
    for directory in [layout.sandboxes(), layout.scratch(), layout.host_images(), layout.trash()] {
        private.create(directory)?;
    }
    std::fs::set_permissions(layout.root(), std::os::unix::fs::PermissionsExt::from_mode(0o700))
}

/// Keeps a second server out of the same directory.
async fn lock(root: &Path) -> Result<File, ProviderError> {
    let path = root.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(|error| unavailable("its data directory cannot be locked", error))?;
    let attempt = async {
        while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            tokio::time::sleep(LOCK_RETRY).await;
        }
    };
    match tokio::time::timeout(LOCK_LIMIT, attempt).await {
        Ok(()) => Ok(file),
        Err(_) => Err(ProviderError::Unavailable {
            provider: NAME.to_owned(),
            message: "another server uses the same data directory".into(),
            hint: Some("stop it, or give this one a data directory of its own".into()),
            cause: None,
        }),
    }
}

fn known(layout: &Layout) -> io::Result<BTreeSet<SandboxId>> {
    let mut known = BTreeSet::new();
    for entry in std::fs::read_dir(layout.sandboxes())? {
        known.extend(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    Ok(known)
}

fn records(layout: &Layout) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    for id in known(layout)? {
        match state::load(&layout.sandbox(&id))? {
            OnDisk::Launched(record, _) | OnDisk::Remains(Some(record)) => records.push(*record),
            OnDisk::Remains(None) | OnDisk::Nothing => {}
        }
    }
    Ok(records)
}

fn unavailable(message: &str, cause: io::Error) -> ProviderError {
    ProviderError::Unavailable {
        provider: NAME.to_owned(),
        message: message.to_owned(),
        hint: None,
        cause: Some(cause.into()),
    }
}

//! Making a sandbox.
//!
//! ```text
//! (caller) image ─▶ (own task) namespaces ─▶ directory, record ─▶ groups ─▶ launch ─▶ live
//!                        any failure, or nobody waiting any more ─▶ everything is freed
//! ```
//!
//! The part that makes things runs in a task of its own, because a future that
//! is dropped half-way cannot clean up after itself.

use crate::host::is_ordinary_user;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use stacyvm_api::{Limit, LimitReport, NetworkMode, SandboxId};
use stacyvm_envd::{BootConfig, Role};
use stacyvm_image::Image;
use stacyvm_sandbox::{Created, ProgressSink, ProviderError, SandboxSpec};
use tokio::sync::oneshot;

use super::disk::{DiskChoice, DiskRecord};
use super::error::OciError;
use super::external::{Binary, Hierarchies};
use super::launch::ReadyMounts;
use super::network::{self, Destination, Port};
use super::pairs::Pair;
use super::registry::Live;
use super::runtime::Runtime;
use super::spawner::CallError;
use super::spawner::protocol::{Done, HostPlan, Job, LaunchPlan, RootPlan, RuntimePlan};
use super::state::{self, NetworkRecord, NewRecord, Record};
use super::strays;
use crate::host::cgroup::CgroupPlan;
use crate::host::cgroup::Limits;
use crate::host::channel;

/// An image, ready to be a root.
pub(super) struct ResolvedImage {
    pub(super) layers: Vec<PathBuf>,
    pub(super) host: Option<HostPlan>,
    pub(super) digest: Option<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    pub(super) workdir: Option<String>,
    /// Keeps the layers on disk until the sandbox's lease does.
    pub(super) stored: Option<Image>,
}

/// Everything decided before anything is made.
struct Plan {
    id: SandboxId,
    spec: SandboxSpec,
    image: ResolvedImage,
    limits: Limits,
    report: LimitReport,
    disk: DiskChoice,
    /// `None` is no network at all.
    allowed: Option<Vec<Destination>>,
}

/// Makes a sandbox of a resolved image.
pub(super) async fn create(
    runtime: &Arc<Runtime>,
    id: &SandboxId,
    spec: &SandboxSpec,
    image: ResolvedImage,
) -> Result<Created, ProviderError> {
    let plan = plan(runtime, id, spec, image)?;
    let image = spec.image.clone();
    let created = Created { limits: plan.report.clone(), image_digest: plan.image.digest.clone() };
    let (sender, receiver) = oneshot::channel();
    let runtime = Arc::clone(runtime);
    let tasks = runtime.background.clone();
    tasks.spawn(async move {
        let made = make_or_free(&runtime, &plan).await;
        let succeeded = made.is_ok();
        if sender.send(made).is_err() && succeeded {
            tracing::info!(sandbox = %plan.id, "nobody waits for this sandbox any more; it is destroyed");
            if let Err(error) = super::destroy::destroy(&runtime, &plan.id).await {
                tracing::warn!(sandbox = %plan.id, error = &error as &dyn std::error::Error, "it stays for the sweep");
            }
        }
    });
    match receiver.await {
        Ok(Ok(())) => Ok(created),
        Ok(Err(error)) => Err(error.of_create(&image)),
        Err(_) => Err(ProviderError::Failed { operation: "create the sandbox", cause: "its task ended".into() }),
    }
}

fn plan(runtime: &Runtime, id: &SandboxId, spec: &SandboxSpec, image: ResolvedImage) -> Result<Plan, ProviderError> {
    let allowed = plan_network(runtime, spec)?;
    let limits = Limits { memory_bytes: spec.memory_mib << 20, vcpus: spec.vcpus, pids: spec.pids_limit };
    let mut report = runtime.cgroups.report(&limits);
    let held_memory = if report.enforced.contains(&Limit::Memory) { limits.memory_bytes } else { 0 };
    let disk = runtime.disks.choose(&spec.disk, held_memory)?;
    if disk.is_bounded() { &mut report.enforced } else { &mut report.unenforced }.push(Limit::Disk);
    report.disk_backend = Some(disk.backend().to_owned());
    refuse_unenforced(runtime, spec, &report)?;
    Ok(Plan { id: id.clone(), spec: spec.clone(), image, limits, report, disk, allowed })
}

/// What a sandbox with a network may reach besides the internet.
fn plan_network(runtime: &Runtime, spec: &SandboxSpec) -> Result<Option<Vec<Destination>>, ProviderError> {
    let invalid = |message: String| Err(ProviderError::InvalidSpec { message });
    let allow = &spec.network.allow;
    match &spec.network.mode {
        NetworkMode::None if allow.is_empty() => Ok(None),
        NetworkMode::None => invalid("`network.allow` needs the network `bridge`".into()),
        NetworkMode::Bridge if is_ordinary_user() => invalid(
            "the network `bridge` needs a server that runs as root; this one has `none`, over which commands, files \
             and ports work too"
                .into(),
        ),
        NetworkMode::Bridge if runtime.connected.is_none() => {
            invalid("this server offers sandboxes no network; use the network `none`".into())
        }
        NetworkMode::Bridge if allow.len() > network::MAX_ALLOWED => {
            invalid(format!("`network.allow` takes at most {} destinations", network::MAX_ALLOWED))
        }
        NetworkMode::Bridge => match allow.iter().map(|text| Destination::parse(text)).collect() {
            Ok(destinations) => Ok(Some(destinations)),
            Err(message) => invalid(format!("network.allow: {message}")),
        },
        NetworkMode::Named(name) => {
            invalid(format!("the oci runtime has the networks `none` and `bridge`, not `{name}`"))
        }
    }
}

/// A limit that was asked for and cannot be held is refused, unless the caller
/// said that it may be. Who asks for memory means swap too.
fn refuse_unenforced(runtime: &Runtime, spec: &SandboxSpec, report: &LimitReport) -> Result<(), ProviderError> {
    let asked = |limit: &Limit| match limit {
        Limit::Swap => spec.requested.contains(&Limit::Memory),
        Limit::Memory | Limit::Cpu | Limit::Pids | Limit::Disk => spec.requested.contains(limit),
    };
    let missing: Vec<&Limit> = report.unenforced.iter().filter(|limit| asked(limit)).collect();
    if missing.is_empty() || spec.allow_unenforced {
        return Ok(());
    }
    let names: Vec<String> = missing.iter().map(|limit| format!("{limit:?}").to_lowercase()).collect();
    let hint = if missing == [&Limit::Disk] {
        runtime.disks.advice()
    } else {
        "leave it out, accept it with allow_unenforced, or run the server as root on a host with the control \
         groups memory, cpu and pids"
            .to_owned()
    };
    let message = format!("this host cannot enforce the limit on {}", names.join(" and "));
    Err(ProviderError::LimitUnsupported { message, hint })
}

async fn make_or_free(runtime: &Arc<Runtime>, plan: &Plan) -> Result<(), OciError> {
    let alone = runtime.registry.alone(&plan.id).await;
    let creation = runtime.creations.begin();
    let made = make(runtime, plan).await;
    drop(creation);
    match made {
        Ok(live) => {
            alone.set_live(Some(Arc::new(live)));
            Ok(())
        }
        // Not ours to free.
        Err(error @ OciError::Exists(_)) => Err(error),
        Err(error) => {
            if let Err(left) = super::destroy::free(runtime, &plan.id, None).await {
                tracing::warn!(sandbox = %plan.id, error = &left as &dyn std::error::Error, "remains stay for the sweep");
            }
            Err(error)
        }
    }
}

async fn make(runtime: &Arc<Runtime>, plan: &Plan) -> Result<Live, OciError> {
    let sandbox = runtime.layout.sandbox(&plan.id);
    match std::fs::DirBuilder::new().mode(0o700).create(&sandbox) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(OciError::Exists(plan.id.clone()));
        }
        made => made.map_err(OciError::file("make", &sandbox))?,
    }
    let lease = async {
        match &plan.image.stored {
            Some(stored) => runtime.lease(&plan.id, stored).await,
            None => Ok(()),
        }
    };
    // The lease is written by another thread meanwhile.
    let (leased, order) = tokio::join!(lease, order(runtime, plan, &sandbox));
    leased?;
    let Order { record, job, fds } = order?;
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let (done, fds) = runtime.spawner.call(job, &fds).await?;
    let (Done::Launched(_), Some(pidfd)) = (done, fds.into_iter().next()) else {
        return Err(CallError::Lost.into());
    };
    Live::new(record, pidfd).map_err(OciError::system("watch the sandbox's init"))
}

/// What the spawner is asked for, once all that it needs is there.
struct Order {
    record: Record,
    job: Job,
    fds: Vec<OwnedFd>,
}

async fn order(runtime: &Runtime, plan: &Plan, sandbox: &std::path::Path) -> Result<Order, OciError> {
    let Pair { uids, user, network, mounts, port, .. } = take_pair(runtime, plan).await?;
    let (uid_base, own) = (uids.base(), OwnNetwork::of(plan, port.as_ref()));
    let (disk, disk_mount) = runtime.disks.take(plan.disk, uid_base).await?;
    let groups = groups(runtime, &plan.id).map_err(OciError::system("find the control groups"))?;
    let held = Held { uid_base, disk, groups, runtime: runtime.external.clone() };
    let record = Record::from(record(plan, held, port.as_ref()));
    state::save(sandbox, &record).map_err(OciError::file("write the record in", sandbox))?;
    // The record owns both from here on, and only whoever frees the sandbox
    // gives them back: twice would hand a range in use to somebody else.
    uids.keep();
    let port = port.map(Port::keep);
    let (groups, listener, boot) = prepare(runtime, plan, &record, sandbox)?;
    if let Some(port) = port {
        runtime.allow(port, plan.allowed.as_deref().unwrap_or_default()).await?;
    }
    let launch = LaunchPlan { has_mounts: mounts.is_some(), ..launch_plan(runtime, plan, &record, groups, own) };
    let job = job(runtime, plan, &record, launch);
    let mut fds = vec![listener, boot, user, network];
    fds.extend(mounts.into_iter().flat_map(|ReadyMounts { dev, sys }| [dev, sys]));
    fds.extend(disk_mount);
    Ok(Order { record, job, fds })
}

/// Namespaces as the sandbox needs them.
async fn take_pair(runtime: &Runtime, plan: &Plan) -> Result<Pair, OciError> {
    match (&runtime.connected, &plan.allowed) {
        (Some(connected), Some(_)) => connected.take().await,
        _ => runtime.plain.take().await,
    }
}

/// What a sandbox's `/etc` says about its network.
struct OwnNetwork {
    hosts: String,
    resolv_conf: String,
}

impl OwnNetwork {
    fn of(plan: &Plan, port: Option<&Port>) -> Self {
        let address = port.map_or_else(|| "127.0.1.1".to_owned(), |port| port.address().to_string());
        let name = &plan.spec.hostname;
        Self {
            hosts: format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{name}\n"),
            resolv_conf: port.map_or_else(
                || "# This sandbox has no network.\n".to_owned(),
                |port| format!("nameserver {}\n", port.gateway()),
            ),
        }
    }
}

/// Control groups that a sandbox will have, made by us or by its runtime.
fn groups(runtime: &Runtime, id: &SandboxId) -> std::io::Result<Vec<PathBuf>> {
    let mut groups = runtime.cgroups.directories(id.as_str());
    if runtime.external.is_some() {
        groups.extend(Hierarchies::find()?.groups(&runtime.cgroups_path(id)));
        groups.sort_unstable();
        groups.dedup();
    }
    Ok(groups)
}

/// Whoever is to launch the sandbox.
fn job(runtime: &Runtime, plan: &Plan, record: &Record, mut launch: LaunchPlan) -> Job {
    let Some(container) = record.container(&runtime.layout.sandbox(&plan.id)) else {
        return Job::Launch(Box::new(launch));
    };
    // Reachable for the sandbox's root, unlike anything in the data directory.
    launch.root.scratch.clone_from(&runtime.run_dir);
    let cgroups_path = runtime.cgroups_path(&plan.id);
    let limits = runtime.cgroups.for_bundle(&plan.limits);
    Job::LaunchWith(Box::new(launch), Box::new(RuntimePlan { container, cgroups_path, limits }))
}

/// The files and groups of a sandbox. What it returns is owned by the record
/// that was written first.
fn prepare(
    runtime: &Runtime,
    plan: &Plan,
    record: &Record,
    sandbox: &std::path::Path,
) -> Result<(CgroupPlan, OwnedFd, OwnedFd), OciError> {
    runtime.disks.make_directory(&record.disk, sandbox).map_err(OciError::file("make a disk in", sandbox))?;
    let groups =
        runtime.cgroups.create(plan.id.as_str(), &plan.limits).map_err(OciError::system("make the control groups"))?;
    if record.runtime.is_some() {
        let directory = state::runtime_dir(sandbox);
        std::fs::DirBuilder::new().mode(0o700).create(&directory).map_err(OciError::file("make", &directory))?;
    }
    let listener = channel::listen(sandbox).map_err(OciError::file("listen in", sandbox))?;
    let boot = boot_config(plan).map_err(OciError::system("pass on the boot configuration"))?;
    Ok((groups, listener, boot))
}

/// What was taken for a sandbox, or will be, besides its network.
struct Held {
    uid_base: u32,
    disk: DiskRecord,
    groups: Vec<PathBuf>,
    runtime: Option<Binary>,
}

fn record(plan: &Plan, held: Held, port: Option<&Port>) -> NewRecord {
    let network = port.map_or(NetworkRecord::None, |port| NetworkRecord::Bridge {
        port: port.number(),
        allow: plan.allowed.iter().flatten().map(Destination::to_string).collect(),
    });
    NewRecord {
        id: plan.id.clone(),
        image: plan.spec.image.clone(),
        metadata: plan.spec.metadata.clone(),
        uid_base: held.uid_base,
        network,
        disk: held.disk,
        groups: held.groups,
        layers: plan.image.layers.clone(),
        memory_limit_bytes: plan.limits.memory_bytes,
        pids_limit: plan.limits.pids,
        limits: plan.report.clone(),
        runtime: held.runtime,
    }
}

fn launch_plan(runtime: &Runtime, plan: &Plan, record: &Record, cgroup: CgroupPlan, own: OwnNetwork) -> LaunchPlan {
    let sandbox = runtime.layout.sandbox(&plan.id);
    let hostname = plan.spec.hostname.clone();
    LaunchPlan {
        identity_file: state::identity_file(&sandbox),
        label: strays::label(runtime.instance.id(), &plan.id),
        root: RootPlan {
            scratch: runtime.layout.scratch(),
            uid_base: record.uid_base,
            layers: plan.image.layers.clone(),
            disk: record.disk.plan(&sandbox),
            host: plan.image.host.clone(),
            hosts: own.hosts,
            resolv_conf: own.resolv_conf,
        },
        hostname,
        has_mounts: false,
        cgroup,
        user: plan.user().map(str::to_owned),
        workdir: plan.image.workdir.clone(),
    }
}

impl Plan {
    fn user(&self) -> Option<&str> {
        self.spec.user.as_deref().or(self.image.user.as_deref()).filter(|user| !user.is_empty())
    }
}

/// A file in memory, at its beginning, with what the agent reads first.
fn boot_config(plan: &Plan) -> std::io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let mut env = plan.image.env.clone();
    env.extend(plan.spec.env.clone());
    let config = BootConfig {
        token: plan.spec.agent_token.clone(),
        generation: plan.spec.generation,
        role: Role::Init,
        env,
        default_user: plan.user().map(str::to_owned),
        workdir: plan.image.workdir.clone().unwrap_or_else(|| "/workspace".to_owned()),
        expires_at_unix_ms: plan.spec.expires_at.unix_ms(),
        shares_host_network: false,
        capabilities: None,
    };
    let mut file = std::fs::File::from(rustix::fs::memfd_create("boot", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(&config)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// Search path of commands in an image that sets none (moby's default).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An image out of the store, pulled if need be.
pub(super) async fn resolve_stored(
    runtime: &Runtime,
    reference: &str,
    progress: &dyn ProgressSink,
) -> Result<ResolvedImage, ProviderError> {
    let Some(store) = &runtime.images else {
        return Err(ProviderError::Image {
            image: reference.to_owned(),
            message: "this server has no image store".into(),
            hint: Some("use the image `host`".into()),
            cause: None,
        });
    };
    let image = store.get(reference, progress).await.map_err(|error| error.into_provider_error(reference))?;
    let mut env: BTreeMap<String, String> = image.config.env.iter().cloned().collect();
    env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    Ok(ResolvedImage {
        layers: image.layers.clone(),
        host: None,
        digest: Some(image.digest.clone()),
        env,
        user: image.config.user.clone(),
        // `/` is what an image says that says nothing.
        workdir: image.config.workdir.clone().filter(|workdir| workdir != "/"),
        stored: Some(image),
    })
}

/// Image `host`, as every other image looks.
pub(super) fn resolve_host(runtime: &Runtime) -> ResolvedImage {
    let image = &runtime.host_image;
    ResolvedImage {
        layers: vec![image.skeleton.clone()],
        host: Some(image.plan.clone()),
        digest: Some(image.digest.clone()),
        env: [("PATH", DEFAULT_PATH), ("LANG", "C.UTF-8")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        user: None,
        workdir: None,
        stored: None,
    }
}

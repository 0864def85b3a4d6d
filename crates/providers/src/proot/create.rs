//! Making a sandbox.
//!
//! ```text
//! (caller) image ─▶ (own task) uid ─▶ directory, record ─▶ copy ─▶ groups ─▶ launch ─▶ agent answers
//!                        any failure, or nobody waiting any more ─▶ everything is freed
//! ```
//!
//! The part that makes things runs in a task of its own, because a future that
//! is dropped half-way cannot clean up after itself.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use stacyvm_api::{LimitReport, NetworkMode, SandboxId, Timestamp};
use stacyvm_envd::{BootConfig, Role};
use stacyvm_sandbox::{AgentChannel as _, Created, ProviderError, SandboxSpec};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use super::NAME;
use super::error::ProotError;
use super::launcher::Inherited;
use super::launcher::protocol::{Job, LaunchPlan, NamespacePlan, Reply};
use super::limits::{self, Limits};
use super::registry::Live;
use super::rootfs::{self, Place, Source};
use super::runtime::{Runtime, is_root};
use super::state::{self, Record};
use super::{destroy, loader, members, program};
use crate::host::channel::{self, SocketChannel};
use crate::host::{on_disk, process};

/// How long the agent may take to answer.
const AGENT_LIMIT: Duration = Duration::from_secs(20);

/// No more of PRoot's complaints is shown in the log.
const MAX_LOG_CHARS: usize = 2000;

/// What to do where the host's network may not be shared.
pub(super) const KEY_FIX: &str = "make a key (`stacyvm key create NAME`), so that not everybody who reaches this port \
                                  can use the host's network; or let sandboxes have namespaces of their own \
                                  (providers.proot.namespaces, and a kernel that gives them)";

/// The same where sandboxes have networks of their own, unless this is asked for.
const OWN_NETWORK_FIX: &str = "leave the network `host` out: sandboxes have one of their own here (`none`); or make a \
                               key (`stacyvm key create NAME`)";

/// Everything decided before anything is made.
struct Plan {
    id: SandboxId,
    spec: SandboxSpec,
    source: Source,
    limits: Limits,
    report: LimitReport,
    program: PathBuf,
    shares_network: bool,
}

/// Makes a sandbox of a resolved image.
pub(super) async fn create(
    runtime: &Arc<Runtime>,
    id: &SandboxId,
    spec: &SandboxSpec,
    source: Source,
) -> Result<Created, ProviderError> {
    let plan = plan(runtime, id, spec, source)?;
    let created = Created { limits: plan.report.clone(), image_digest: plan.source.digest.clone() };
    let (sender, receiver) = oneshot::channel();
    let runtime = Arc::clone(runtime);
    let tasks = runtime.background.clone();
    tasks.spawn(async move {
        let made = make_or_free(&runtime, &plan).await;
        let succeeded = made.is_ok();
        if sender.send(made).is_err() && succeeded {
            tracing::info!(sandbox = %plan.id, "nobody waits for this sandbox any more; it is destroyed");
            if let Err(error) = destroy::destroy(&runtime, &plan.id).await {
                tracing::warn!(sandbox = %plan.id, error = &error as &dyn std::error::Error, "it stays for the sweep");
            }
        }
    });
    match receiver.await {
        Ok(made) => made.map(|()| created).map_err(|error| error.of("create the sandbox")),
        Err(_) => Err(ProviderError::Failed { operation: "create the sandbox", cause: "its task ended".into() }),
    }
}

fn plan(runtime: &Runtime, id: &SandboxId, spec: &SandboxSpec, source: Source) -> Result<Plan, ProviderError> {
    let shares_network = plan_network(runtime, spec)?;
    let known =
        runtime.known().map_err(|error| ProotError::system("list sandboxes")(error).of("create the sandbox"))?;
    let most = runtime.options.max_sandboxes;
    if most > 0 && known.len() >= most {
        let message = format!("providers.proot.max_sandboxes is {most}");
        return Err(ProviderError::Exhausted { message });
    }
    let (limits, report) = limits::choose(runtime, spec)?;
    let program = program::find(&runtime.options).map_err(|error| error.of("create the sandbox"))?;
    Ok(Plan { id: id.clone(), spec: spec.clone(), source, limits, report, program, shares_network })
}

/// Whether the sandbox is to see the host's network.
fn plan_network(runtime: &Runtime, spec: &SandboxSpec) -> Result<bool, ProviderError> {
    let invalid = |message: &str| Err(ProviderError::InvalidSpec { message: message.to_owned() });
    match &spec.network.mode {
        _ if !spec.network.allow.is_empty() => {
            invalid("the proot runtime cannot tell destinations apart: leave `network.allow` out")
        }
        NetworkMode::None if runtime.shared.is_none() => Ok(false),
        NetworkMode::None => invalid(
            "this host gives no network namespace, so the proot runtime cannot hold the network `none`; ask for `host`, \
             and know that commands then reach what the host reaches",
        ),
        NetworkMode::Named(name) if name == super::SHARED_NETWORK => {
            if runtime.options.shared_network.is_given() {
                Ok(true)
            } else {
                let fix = if runtime.shared.is_none() { OWN_NETWORK_FIX } else { KEY_FIX };
                Err(ProviderError::Unavailable {
                    provider: NAME.to_owned(),
                    message: "sandboxes would share this host's network, and this server demands no key".into(),
                    hint: Some(fix.into()),
                    cause: None,
                })
            }
        }
        NetworkMode::Bridge => invalid("the proot runtime has no network `bridge`; it has `none` and `host`"),
        NetworkMode::Named(name) => {
            invalid(&format!("the proot runtime has the networks `none` and `host`, not `{name}`"))
        }
    }
}

async fn make_or_free(runtime: &Arc<Runtime>, plan: &Plan) -> Result<(), ProotError> {
    let alone = runtime.registry.alone(&plan.id).await;
    match make(runtime, plan).await {
        Ok(live) => {
            alone.set_live(Some(Arc::new(live)));
            Ok(())
        }
        // Not ours to free.
        Err(error @ ProotError::Exists(_)) => Err(error),
        Err(error) => {
            if let Err(left) = destroy::free(runtime, &plan.id).await {
                tracing::warn!(sandbox = %plan.id, error = &left as &dyn std::error::Error, "remains stay for the sweep");
            }
            Err(error)
        }
    }
}

async fn make(runtime: &Arc<Runtime>, plan: &Plan) -> Result<Live, ProotError> {
    let sandbox = runtime.layout.sandbox(&plan.id);
    match std::fs::DirBuilder::new().mode(0o700).create(&sandbox) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(ProotError::Exists(plan.id.clone())),
        made => made.map_err(ProotError::file("make", &sandbox))?,
    }
    let uid = if is_root() {
        let taken = runtime.uids.take().map_err(ProotError::system("take a uid"))?;
        Some(taken.ok_or(ProotError::NoUids)?)
    } else {
        None
    };
    let record = record(runtime, plan, uid);
    if let Err(error) = state::save(&sandbox, &record) {
        uid.inspect(|uid| runtime.uids.give_back(*uid));
        return Err(ProotError::file("write the record in", &sandbox)(error));
    }
    fill(runtime, plan, &sandbox, uid).await?;
    let limits = plan.limits.for_groups(&plan.spec);
    let groups = runtime.cgroups.create(plan.id.as_str(), &limits);
    let cgroup = groups.map_err(ProotError::system("make the control groups"))?;
    let listener = channel::listen(&sandbox).map_err(ProotError::file("listen in", &sandbox))?;
    let boot = boot_config(plan).map_err(ProotError::system("pass on the boot configuration"))?;
    let launch = LaunchPlan {
        identity_file: state::identity_file(&sandbox),
        log_file: state::log_file(&sandbox),
        namespaces: runtime.shared.is_none().then(|| NamespacePlan {
            hostname: plan.spec.hostname.clone(),
            own_network: !plan.shares_network,
            hide: uid.map(|_| (runtime.hidden(), sandbox.clone())),
        }),
        become_id: uid,
        cgroup,
        max_processes: plan.limits.max_processes,
        memory_is_watched: plan.limits.watched.memory,
        max_file_bytes: Some(plan.limits.disk_bytes).filter(|bytes| *bytes > 0),
        reach: program::reach(&plan.program, &sandbox),
        program: plan.program.clone(),
        argv: program::arguments(&sandbox),
        env: program::environment(&sandbox, plan.id.to_string()),
    };
    let job = Job::Launch(Box::new(launch));
    let identity = match runtime.options.launcher.run(&job, Some(Inherited { listener, boot })).await? {
        Reply::Launched(identity) => identity,
        Reply::Failed { step, message } => return Err(ProotError::Launch { step, message }),
        Reply::Probed => return Err(ProotError::Launch { step: "launch".into(), message: "a wrong answer".into() }),
    };
    let no_agent = || ProotError::NoAgent { output: log_of(&sandbox) };
    let found = process::open(&identity).map_err(ProotError::system("look at PRoot"))?;
    let watched = Live::new(record.clone(), identity.clone(), found.ok_or_else(no_agent)?, None);
    let live = watched.map_err(ProotError::system("watch PRoot"))?;
    tokio::select! {
        answered = tokio::time::timeout(AGENT_LIMIT, answer(&sandbox)) => {
            match answered {
                Ok(Ok(())) => {}
                Ok(Err(error)) if !is_hangup(&error) => return Err(ProotError::system("talk to the agent")(error)),
                // It ended, or never came.
                Ok(Err(_)) | Err(_) => return Err(no_agent()),
            }
        }
        _ = live.ended() => return Err(no_agent()),
    }
    Ok(live.with_agent(members::agent_of(identity.pid)))
}

/// The sandbox's files.
async fn fill(runtime: &Runtime, plan: &Plan, sandbox: &Path, uid: Option<u32>) -> Result<(), ProotError> {
    let Ok(_permit) = runtime.copies.acquire().await else {
        return Err(ProotError::System { operation: "copy the root", source: io::ErrorKind::Other.into() });
    };
    let (layers, hostname) = (plan.source.layers.clone(), plan.spec.hostname.clone());
    let (shares_network, workdir) = (plan.shares_network, plan.source.workdir.clone());
    let (sandbox, program) = (sandbox.to_owned(), plan.program.clone());
    let disk = Some(plan.limits.disk_bytes).filter(|bytes| *bytes > 0);
    let filled = tokio::task::spawn_blocking(move || {
        let place =
            Place { hostname: &hostname, shares_network, owner: uid, workdir: workdir.as_deref(), most_bytes: disk };
        rootfs::build(&layers, &state::root_dir(&sandbox), &place).map_err(|error| match (error.kind(), disk) {
            (io::ErrorKind::QuotaExceeded, Some(bytes)) => ProotError::TooLarge(bytes >> 20),
            _ => ProotError::file("fill", &sandbox)(error),
        })?;
        let agent = state::agent_file(&sandbox);
        std::fs::write(&agent, stacyvm_agent_embed::AGENT).map_err(ProotError::file("write", &agent))?;
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode));
        mode(&agent, 0o555).map_err(ProotError::file("set the mode of", &agent))?;
        loader::write(&program, &sandbox).map_err(ProotError::file("copy the loader of", &program))?;
        let temporary = state::temporary_dir(&sandbox);
        std::fs::create_dir(&temporary).map_err(ProotError::file("make", &temporary))?;
        if uid.is_some() {
            let chown = std::os::unix::fs::chown;
            chown(&temporary, uid, uid).map_err(ProotError::file("give away", &temporary))?;
            // Its user may pass, and nobody else of this host.
            chown(&sandbox, None, uid).map_err(ProotError::file("give away", &sandbox))?;
            mode(&sandbox, 0o710).map_err(ProotError::file("set the mode of", &sandbox))?;
        }
        Ok(())
    });
    filled
        .await
        .unwrap_or_else(|_| Err(ProotError::System { operation: "copy the root", source: io::ErrorKind::Other.into() }))
}

fn record(runtime: &Runtime, plan: &Plan, uid: Option<u32>) -> Record {
    Record {
        version: Record::VERSION,
        id: plan.id.clone(),
        image: plan.spec.image.clone(),
        created_at: Timestamp::now(),
        metadata: plan.spec.metadata.clone(),
        boot_id: on_disk::boot_id(),
        uid,
        namespaces: runtime.shared.is_none(),
        groups: runtime.cgroups.directories(plan.id.as_str()),
        memory_limit_bytes: plan.limits.memory_bytes,
        pids_limit: plan.spec.pids_limit,
        disk_limit_bytes: plan.limits.disk_bytes,
        watched: plan.limits.watched,
        limits: plan.report.clone(),
    }
}

/// A file in memory, at its beginning, with what the agent reads first.
fn boot_config(plan: &Plan) -> io::Result<OwnedFd> {
    use std::io::{Seek as _, Write as _};
    let mut env = plan.source.env.clone();
    env.extend(plan.spec.env.clone());
    let config = BootConfig {
        token: plan.spec.agent_token.clone(),
        generation: plan.spec.generation,
        role: Role::Process,
        env,
        default_user: plan.spec.user.clone().or_else(|| plan.source.user.clone()).filter(|user| !user.is_empty()),
        workdir: plan.source.workdir.clone().unwrap_or_else(|| "/workspace".to_owned()),
        expires_at_unix_ms: plan.spec.expires_at.unix_ms(),
        shares_host_network: plan.shares_network,
        capabilities: None,
    };
    let mut file = std::fs::File::from(rustix::fs::memfd_create("boot", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(&config)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// Waits until the agent answers: before that, PRoot may still fail.
async fn answer(sandbox: &Path) -> io::Result<()> {
    let mut stream = SocketChannel::new(sandbox)?.open().await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").await?;
    let mut first = [0; 12];
    stream.read_exact(&mut first).await?;
    if first.starts_with(b"HTTP/1.1 204") { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether the other side of the socket went away.
fn is_hangup(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | UnexpectedEof)
}

fn log_of(sandbox: &Path) -> String {
    let text = std::fs::read(state::log_file(sandbox)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.trim().chars().take(MAX_LOG_CHARS).collect()
}

//! A sandbox as the daemon is asked to make it. Decisions only; nothing here
//! talks to anybody.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, Mount, MountType, RestartPolicy,
    RestartPolicyNameEnum,
};
use stacyvm_api::{Limit, LimitReport, NetworkMode, SandboxId};
use stacyvm_envd::{BootConfig, Role};
use stacyvm_sandbox::{ProviderError, SandboxSpec};

use super::daemon::Facts;
use super::image::ImageFacts;
use super::label;
use super::options::{DockerOptions, Network, Seccomp};
use super::place::{self, Place};
use super::runtime::Promise;

/// The agent's socket, in a directory in memory that only root can enter.
const SOCKET_DIR: &str = "/.stacyvm/run";
pub(super) const SOCKET: &str = "/.stacyvm/run/agent.sock";
const SOCKET_DIR_OPTIONS: &str = "rw,nosuid,nodev,noexec,size=64k,mode=0700";

const WORKSPACE: &str = "/workspace";
const TMP: &str = "/tmp";
/// Docker's own default would forbid to run what a build puts there.
const TMP_OPTIONS: &str = "rw,exec,nosuid,nodev,mode=1777";

/// The agent is root in the container, whoever commands run as.
const AGENT_USER: &str = "0:0";

const CPU_NANOS: f64 = 1e9;

/// gVisor's kernel is threads of the host, and so is every thread of the guest,
/// up to twice; without room it dies, and the sandbox with it.
const GVISOR_THREADS: u64 = 256;
const GVISOR_THREADS_PER_PROCESS: u64 = 2;

/// One sandbox to make, everything decided.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) id: SandboxId,
    pub(super) spec: SandboxSpec,
    pub(super) image: ImageFacts,
    pub(super) network: Network,
    pub(super) report: LimitReport,
    /// Have the storage driver bound the disk.
    pub(super) bound_disk: bool,
    /// What the configured runtime stands for.
    pub(super) promise: Promise,
}

impl Plan {
    pub(super) fn new(
        id: &SandboxId,
        spec: &SandboxSpec,
        image: ImageFacts,
        facts: &Facts,
        options: &DockerOptions,
    ) -> Result<Self, ProviderError> {
        let network = network_of(spec, options)?;
        if spec.disk.in_memory {
            let message = "the docker runtime keeps disks on the daemon's storage; \
                           for a disk in memory use the provider oci, or a `tmpfs`";
            return Err(ProviderError::InvalidSpec { message: message.into() });
        }
        let bound_disk = spec.disk.size_mib.is_some() && facts.may_bound_disks();
        let promise = facts.promise_of(&options.runtime);
        let report = report(facts, promise, bound_disk);
        refuse_unenforced(spec, &report, promise)?;
        Ok(Self { id: id.clone(), spec: spec.clone(), image, network, report, bound_disk, promise })
    }

    /// As after an attempt that showed that the storage driver cannot.
    pub(super) fn without_disk_bound(mut self) -> Self {
        self.bound_disk = false;
        self.report.enforced.retain(|limit| *limit != Limit::Disk);
        self.report.unenforced.push(Limit::Disk);
        self.report.disk_backend = Some("none".to_owned());
        self
    }

    pub(super) fn shares_host_network(&self) -> bool {
        self.network == Network::Host
    }

    fn workdir(&self) -> &str {
        self.image.workdir.as_deref().unwrap_or(WORKSPACE)
    }

    /// What the agent is told. Nothing of it goes to the daemon's records.
    pub(super) fn boot(&self, options: &DockerOptions) -> BootConfig {
        let mut env = self.image.env.clone();
        env.extend(self.spec.env.clone());
        let user = self.spec.user.as_ref().or(options.user.as_ref()).or(self.image.user.as_ref());
        BootConfig {
            token: self.spec.agent_token.clone(),
            generation: self.spec.generation,
            role: Role::Init,
            env,
            default_user: user.filter(|user| !user.is_empty()).cloned(),
            workdir: self.workdir().to_owned(),
            expires_at_unix_ms: self.spec.expires_at.unix_ms(),
            shares_host_network: self.shares_host_network(),
            capabilities: Some(options.capabilities.bits()),
        }
    }

    pub(super) fn container(&self, options: &DockerOptions, instance: &str, place: &Place) -> ContainerCreateBody {
        ContainerCreateBody {
            image: Some(self.image.id.clone()),
            hostname: Some(self.spec.hostname.clone()),
            user: Some(AGENT_USER.to_owned()),
            entrypoint: Some(vec![place::PROGRAM.to_owned()]),
            cmd: Some(vec!["init".to_owned(), SOCKET.to_owned()]),
            working_dir: Some(self.workdir().to_owned()),
            // A check of the image's would run beside the agent, before and
            // after it serves.
            healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
            labels: Some(label::of_sandbox(&self.id, &self.spec, &self.report, instance, options)),
            // The way of the boot configuration, once.
            open_stdin: Some(true),
            stdin_once: Some(true),
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(false),
            host_config: Some(self.host_config(options, place)),
            ..ContainerCreateBody::default()
        }
    }

    fn host_config(&self, options: &DockerOptions, place: &Place) -> HostConfig {
        let memory_bytes = i64::try_from(self.spec.memory_mib << 20).unwrap_or(i64::MAX);
        let size = self.spec.disk.size_mib.filter(|_| self.bound_disk);
        HostConfig {
            runtime: Some(options.runtime.clone()),
            network_mode: Some(self.network.mode().to_owned()),
            memory: Some(memory_bytes),
            // The sum of both: no swap.
            memory_swap: Some(memory_bytes),
            nano_cpus: Some((self.spec.vcpus * CPU_NANOS) as i64),
            pids_limit: Some(i64::try_from(self.host_threads()).unwrap_or(i64::MAX)),
            storage_opt: size.map(|mib| HashMap::from([("size".to_owned(), format!("{mib}M"))])),
            cap_drop: Some(vec!["ALL".to_owned()]),
            cap_add: Some(options.capabilities.of_container(self.shares_host_network())),
            security_opt: Some(security(&options.seccomp)),
            readonly_rootfs: Some(options.read_only_rootfs),
            mounts: Some(mounts(options, place)),
            tmpfs: Some(tmpfs(options)),
            // The agent is the init process.
            init: Some(false),
            auto_remove: Some(false),
            privileged: Some(false),
            restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), ..RestartPolicy::default() }),
            // Commands' output is the agent's; nothing else is ever written.
            log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), ..HostConfigLogConfig::default() }),
            ..HostConfig::default()
        }
    }
}

impl Plan {
    /// What the host's kernel counts against the limit on processes.
    fn host_threads(&self) -> u64 {
        match self.promise {
            Promise::Gvisor => self.spec.pids_limit.saturating_mul(GVISOR_THREADS_PER_PROCESS) + GVISOR_THREADS,
            Promise::HostKernel | Promise::OwnKernel | Promise::Nothing => self.spec.pids_limit,
        }
    }
}

fn security(seccomp: &Seccomp) -> Vec<String> {
    let mut options = vec!["no-new-privileges".to_owned()];
    match seccomp {
        Seccomp::Default => {}
        Seccomp::Unconfined => options.push("seccomp=unconfined".to_owned()),
        Seccomp::Profile(profile) => options.push(format!("seccomp={profile}")),
    }
    options
}

fn mounts(options: &DockerOptions, place: &Place) -> Vec<Mount> {
    let mut mounts = vec![place.mount()];
    if options.read_only_rootfs && !options.tmpfs.contains_key(WORKSPACE) {
        // Anonymous: it goes with the container.
        mounts.push(Mount {
            typ: Some(MountType::VOLUME),
            target: Some(WORKSPACE.to_owned()),
            read_only: Some(false),
            ..Mount::default()
        });
    }
    mounts
}

fn tmpfs(options: &DockerOptions) -> HashMap<String, String> {
    let mut tmpfs: HashMap<String, String> =
        options.tmpfs.iter().map(|(path, options)| (path.clone(), options.clone())).collect();
    if options.read_only_rootfs {
        tmpfs.entry(TMP.to_owned()).or_insert_with(|| TMP_OPTIONS.to_owned());
    }
    tmpfs.insert(SOCKET_DIR.to_owned(), SOCKET_DIR_OPTIONS.to_owned());
    tmpfs
}

/// The daemon's network for what was asked.
fn network_of(spec: &SandboxSpec, options: &DockerOptions) -> Result<Network, ProviderError> {
    let invalid = |message: String| Err(ProviderError::InvalidSpec { message });
    if !spec.network.allow.is_empty() {
        return invalid(
            "the docker runtime has no list of allowed destinations: its networks are the daemon's; \
             leave `network.allow` out, or use the provider oci"
                .into(),
        );
    }
    match (&spec.network.mode, &options.network) {
        (NetworkMode::None, _) => Ok(Network::None),
        (NetworkMode::Bridge, Network::None) => {
            invalid("this server gives sandboxes no network; use the network `none`".into())
        }
        (NetworkMode::Bridge, configured) => Ok(configured.clone()),
        (NetworkMode::Named(name), configured) if name == configured.mode() => Ok(configured.clone()),
        (NetworkMode::Named(name), configured) => invalid(format!(
            "the docker runtime has the networks `none` and `bridge` (which is `{configured}` here), not `{name}`"
        )),
    }
}

fn report(facts: &Facts, promise: Promise, bound_disk: bool) -> LimitReport {
    let limits = [
        (Limit::Memory, facts.memory_limit),
        (Limit::Swap, facts.swap_limit),
        (Limit::Cpu, facts.cpu_limit),
        // gVisor is bounded as a whole, but counts no processes inside.
        (Limit::Pids, facts.pids_limit && promise != Promise::Gvisor),
        (Limit::Disk, bound_disk),
    ];
    let of = |wanted: bool| limits.iter().filter(|(_, held)| *held == wanted).map(|(limit, _)| *limit).collect();
    let disk_backend = if bound_disk { "storage_opt" } else { "none" };
    LimitReport {
        enforced: of(true),
        unenforced: of(false),
        disk_backend: Some(disk_backend.to_owned()),
        ..LimitReport::default()
    }
}

/// A limit that was asked for and cannot be held is refused, unless the caller
/// said that it may be. Who asks for memory means swap too.
fn refuse_unenforced(spec: &SandboxSpec, report: &LimitReport, promise: Promise) -> Result<(), ProviderError> {
    let asked = |limit: &Limit| match limit {
        Limit::Swap => spec.requested.contains(&Limit::Memory),
        Limit::Memory | Limit::Cpu | Limit::Pids | Limit::Disk => spec.requested.contains(limit),
    };
    let missing: Vec<&Limit> = report.unenforced.iter().filter(|limit| asked(limit)).collect();
    if missing.is_empty() || spec.allow_unenforced {
        return Ok(());
    }
    let names: Vec<String> = missing.iter().map(|limit| format!("{limit:?}").to_lowercase()).collect();
    let hint = if promise == Promise::Gvisor && missing == [&Limit::Pids] {
        "gVisor counts no processes, only the sandbox as a whole is bounded: leave pids_limit out, or accept it with \
         allow_unenforced"
    } else {
        "give its host the control group controllers (for disks: a storage driver with quotas), leave it out, or \
         accept it with allow_unenforced"
    };
    Err(ProviderError::LimitUnsupported {
        message: format!("this daemon cannot enforce the limit on {}", names.join(" and ")),
        hint: hint.into(),
    })
}

//! What a runtime is told about a sandbox: `config.json` of its bundle.
//!
//! Everything in it is taken from where the built-in launcher has it, so that
//! the two cannot drift apart. Paths are those of the stage's mount namespace.

use std::io;
use std::path::Path;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, Capabilities, Linux, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder, LinuxCpuBuilder,
    LinuxDeviceCgroupBuilder, LinuxIdMapping, LinuxIdMappingBuilder, LinuxMemoryBuilder, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder, LinuxSeccomp,
    LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator,
    LinuxSyscall, LinuxSyscallBuilder, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use rustix::process::Resource;

use crate::host::cgroup::BundleLimits;
use crate::host::{ids, seccomp};
use crate::oci::capabilities;
use crate::oci::launch::{SOFT_OPEN_FILES, devices, kernel_files};
use crate::oci::spawner::protocol::{LaunchPlan, RuntimePlan};

/// Version of the specification that all of this is in (2020).
const SPECIFICATION: &str = "1.0.2";

/// Names in the bundle's directory.
pub(super) const ROOT: &str = "root";
pub(super) const USER_NAMESPACE: &str = "user";
pub(super) const NETWORK_NAMESPACE: &str = "net";

#[derive(Debug, thiserror::Error)]
pub(super) enum BundleError {
    #[error(transparent)]
    Specification(#[from] OciSpecError),
    #[error("the specification knows no capability {0}")]
    Capability(&'static str),
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Describes a sandbox whose agent is `program` (a path inside), in the bundle
/// directory `bundle`.
pub(super) fn describe(
    plan: &LaunchPlan,
    runtime: &RuntimePlan,
    bundle: &Path,
    program: &str,
) -> Result<Spec, BundleError> {
    let spec = SpecBuilder::default()
        .version(SPECIFICATION)
        .root(RootBuilder::default().path(ROOT).readonly(false).build()?)
        .hostname(plan.hostname.as_str())
        .process(process(plan, program)?)
        .mounts(mounts()?)
        .linux(linux(plan, runtime, bundle)?)
        .build()?;
    Ok(spec)
}

fn process(plan: &LaunchPlan, program: &str) -> Result<Process, BundleError> {
    let process = ProcessBuilder::default()
        .terminal(false)
        .user(UserBuilder::default().uid(0u32).gid(0u32).build()?)
        .args([program, "serve"].map(str::to_owned))
        .env([plan.label.clone()])
        .cwd("/")
        .capabilities(capabilities()?)
        .rlimits(rlimits()?)
        .no_new_privileges(true)
        .build()?;
    Ok(process)
}

fn capabilities() -> Result<LinuxCapabilities, BundleError> {
    let mut all = Capabilities::new();
    for (name, _) in capabilities::SANDBOX.iter_names() {
        all.insert(name.parse().map_err(|_| BundleError::Capability(name))?);
    }
    let none = Capabilities::new();
    let described = LinuxCapabilitiesBuilder::default()
        .bounding(all.clone())
        .permitted(all.clone())
        .effective(all)
        .inheritable(none.clone())
        .ambient(none)
        .build()?;
    Ok(described)
}

fn rlimits() -> Result<Vec<PosixRlimit>, BundleError> {
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(SOFT_OPEN_FILES);
    let limit = |kind, soft: u64, hard: u64| PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build();
    Ok(vec![
        limit(PosixRlimitType::RlimitCore, 0, 0)?,
        limit(PosixRlimitType::RlimitNofile, hard.min(SOFT_OPEN_FILES), hard)?,
    ])
}

fn mounts() -> Result<Vec<Mount>, BundleError> {
    let terminals = format!("gid={}", devices::TTY_GROUP);
    let shared_memory = format!("size={}m", devices::SHARED_MEMORY_MIB);
    let mount = |to: &str, kind: &str, options: &[&str]| {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        MountBuilder::default().destination(to).typ(kind).source(kind).options(options).build()
    };
    Ok(vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=64k", "nr_inodes=256"])?,
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", terminals.as_str()],
        )?,
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", shared_memory.as_str()])?,
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
    ])
}

fn linux(plan: &LaunchPlan, runtime: &RuntimePlan, bundle: &Path) -> Result<Linux, BundleError> {
    let (masked, read_only) = kernel_files::hidden()?;
    let ids = id_mapping(plan.root.uid_base)?;
    let linux = LinuxBuilder::default()
        .namespaces(namespaces(bundle)?)
        // What the joined namespace has already; some runtimes insist on them.
        .uid_mappings(vec![ids])
        .gid_mappings(vec![ids])
        .cgroups_path(runtime.cgroups_path.as_path())
        .resources(resources(&runtime.limits)?)
        .seccomp(filter()?)
        .masked_paths(masked)
        .readonly_paths(read_only)
        .build()?;
    Ok(linux)
}

fn id_mapping(base: u32) -> Result<LinuxIdMapping, OciSpecError> {
    LinuxIdMappingBuilder::default().container_id(0u32).host_id(base).size(ids::RANGE).build()
}

/// The two that are ready are joined, the rest is new.
fn namespaces(bundle: &Path) -> Result<Vec<LinuxNamespace>, OciSpecError> {
    let fresh = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Cgroup,
    ]
    .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build());
    let joined = [(LinuxNamespaceType::User, USER_NAMESPACE), (LinuxNamespaceType::Network, NETWORK_NAMESPACE)]
        .map(|(kind, name)| LinuxNamespaceBuilder::default().typ(kind).path(bundle.join(name)).build());
    fresh.into_iter().chain(joined).collect()
}

/// The limits once more. Our own groups, in which the runtime puts the sandbox,
/// have them already.
fn resources(limits: &BundleLimits) -> Result<LinuxResources, OciSpecError> {
    let none = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
    let mut resources = LinuxResourcesBuilder::default().devices(vec![none]);
    if let Some(bytes) = limits.memory_bytes {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let memory = LinuxMemoryBuilder::default().limit(bytes);
        // Memory and swap together: the same bound leaves no swap.
        resources = resources.memory(if limits.no_swap { memory.swap(bytes) } else { memory }.build()?);
    }
    if let Some((quota_usec, period_usec)) = limits.cpu {
        let quota = i64::try_from(quota_usec).unwrap_or(i64::MAX);
        resources = resources.cpu(LinuxCpuBuilder::default().quota(quota).period(period_usec).build()?);
    }
    if let Some(pids) = limits.pids {
        let limit = i64::try_from(pids).unwrap_or(i64::MAX);
        resources = resources.pids(LinuxPidsBuilder::default().limit(limit).build()?);
    }
    resources.build()
}

/// The profile of [`seccomp`] in the specification's words.
fn filter() -> Result<LinuxSeccomp, OciSpecError> {
    let mut calls = vec![allow(seccomp::always_allowed().map(|(name, _)| name).collect(), None)?];
    let namespaces = LinuxSeccompArgBuilder::default()
        .index(0usize)
        .value(seccomp::NAMESPACE_FLAGS)
        .value_two(0u64)
        .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
        .build()?;
    calls.push(allow(vec!["clone".into()], Some(namespaces))?);
    let equal = |value: u64| {
        let argument = LinuxSeccompArgBuilder::default().index(0usize).value(value);
        argument.op(LinuxSeccompOperator::ScmpCmpEq).build()
    };
    for family in seccomp::SOCKET_FAMILIES {
        calls.push(allow(vec!["socket".into()], Some(equal(family as u64)?))?);
    }
    for personality in seccomp::PERSONALITIES {
        calls.push(allow(vec!["personality".into()], Some(equal(personality)?))?);
    }
    calls.push(
        LinuxSyscallBuilder::default()
            .names(vec!["clone3".into()])
            .action(LinuxSeccompAction::ScmpActErrno)
            .errno_ret(libc::ENOSYS as u32)
            .build()?,
    );
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(libc::EPERM as u32)
        .architectures(vec![ARCHITECTURE])
        .syscalls(calls)
        .build()
}

fn allow(names: Vec<String>, when: Option<LinuxSeccompArg>) -> Result<LinuxSyscall, OciSpecError> {
    let call = LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActAllow);
    match when {
        Some(argument) => call.args(vec![argument]),
        None => call,
    }
    .build()
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Arch = Arch::ScmpArchX86_64;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Arch = Arch::ScmpArchAarch64;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::host::cgroup::CgroupPlan;
    use crate::oci::spawner::protocol::{DiskPlan, RootPlan};

    fn described(limits: BundleLimits) -> Value {
        let root = RootPlan {
            scratch: "/run/stacyvm".into(),
            uid_base: 0x7000_0000,
            layers: Vec::new(),
            disk: DiskPlan::Memory { size_bytes: None, inodes: None },
            host: None,
            hosts: String::new(),
            resolv_conf: String::new(),
        };
        let plan = LaunchPlan {
            identity_file: "/data/init.json".into(),
            label: "LABEL=it".into(),
            hostname: "box".into(),
            root,
            has_mounts: false,
            cgroup: CgroupPlan::default(),
            user: None,
            workdir: None,
        };
        let runtime = RuntimePlan {
            container: crate::oci::external::Container {
                program: "/usr/bin/crun".into(),
                name: "crun".into(),
                state_dir: "/data/runtime".into(),
                id: "sb".into(),
            },
            cgroups_path: "/stacyvm/0123/sb".into(),
            limits,
        };
        let spec = describe(&plan, &runtime, Path::new("/run/stacyvm"), "/proc/self/fd/5").unwrap();
        serde_json::to_value(spec).unwrap()
    }

    #[test]
    fn a_bundle_has_what_the_built_in_launcher_does() {
        let limits =
            BundleLimits { memory_bytes: Some(1 << 20), no_swap: true, cpu: Some((50_000, 100_000)), pids: Some(9) };
        let config = described(limits);
        let capabilities = config["process"]["capabilities"]["bounding"].as_array().unwrap();
        assert_eq!(capabilities.len(), capabilities::SANDBOX.bits().count_ones() as usize);
        assert!(capabilities.contains(&json!("CAP_MKNOD")) && !capabilities.contains(&json!("CAP_NET_RAW")));
        assert_eq!(config["process"]["capabilities"]["ambient"], json!([]));
        assert_eq!(config["process"]["noNewPrivileges"], json!(true));
        assert_eq!(config["process"]["env"], json!(["LABEL=it"]));
        assert_eq!(config["process"]["args"], json!(["/proc/self/fd/5", "serve"]));
        let linux = &config["linux"];
        assert_eq!(linux["uidMappings"], json!([{ "hostID": 0x7000_0000_u32, "containerID": 0, "size": 65_536 }]));
        let resources = &linux["resources"];
        assert_eq!(resources["memory"], json!({ "limit": 1 << 20, "swap": 1 << 20 }));
        assert_eq!(resources["cpu"], json!({ "quota": 50_000, "period": 100_000 }));
        assert_eq!(resources["pids"], json!({ "limit": 9 }));
        assert_eq!(resources["devices"], json!([{ "allow": false, "access": "rwm" }]));
        assert!(linux["maskedPaths"].as_array().unwrap().contains(&json!("/sys/devices/virtual/block")));
        assert!(linux["readonlyPaths"].as_array().unwrap().contains(&json!("/proc/sys")));
        let joined = json!({ "type": "user", "path": "/run/stacyvm/user" });
        let namespaces = linux["namespaces"].as_array().unwrap();
        assert!(namespaces.len() == 7 && namespaces.contains(&joined), "{namespaces:?}");
    }

    #[test]
    fn limits_that_the_host_does_not_hold_are_not_asked_for() {
        let limits = BundleLimits { memory_bytes: None, no_swap: false, cpu: None, pids: None };
        let config = described(limits);
        let resources = config["linux"]["resources"].as_object().unwrap();
        assert_eq!(resources.keys().collect::<Vec<_>>(), ["devices"]);
    }

    #[test]
    fn the_filter_names_every_call_of_the_profile() {
        let config = described(BundleLimits::default());
        let filter = &config["linux"]["seccomp"];
        assert_eq!((&filter["defaultAction"], &filter["defaultErrnoRet"]), (&json!("SCMP_ACT_ERRNO"), &json!(1)));
        let calls = filter["syscalls"].as_array().unwrap();
        let always = calls[0]["names"].as_array().unwrap();
        assert_eq!(always.len(), seccomp::always_allowed().count());
        assert!(always.contains(&json!("openat")) && always.contains(&json!("removexattrat")));
        for refused in ["clone", "clone3", "mount", "unshare", "socket", "keyctl"] {
            assert!(!always.contains(&json!(refused)), "{refused}");
        }
        let of = |name: &str| calls.iter().filter(|call| call["names"] == json!([name])).collect::<Vec<_>>();
        assert_eq!(of("socket").len(), seccomp::SOCKET_FAMILIES.len());
        assert_eq!(of("personality").len(), seccomp::PERSONALITIES.len());
        assert_eq!(of("clone")[0]["args"][0]["op"], json!("SCMP_CMP_MASKED_EQ"));
        assert_eq!(of("clone3")[0]["errnoRet"], json!(libc::ENOSYS));
    }
}

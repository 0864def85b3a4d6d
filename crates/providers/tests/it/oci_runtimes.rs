//! The same sandboxes, started by OCI runtimes of the host.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use stacyvm_api::{FindingLevel, Limit, NetworkMode, SandboxId};
use stacyvm_providers::oci::{BridgeOptions, OciProvider, OciRuntime};
use stacyvm_sandbox::{DiskRequest, NetworkPolicy, Provider, ProviderError, RuntimeState, SandboxSpec};

use crate::fixture::{Fixture, chain, eventually, options, spec};
use crate::oci_conformance::passes_with;

/// Both are packages of `scripts/test-packages.txt`.
const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// Uids and gids from here on are sandboxes'.
const FIRST_UID: u32 = 0x7000_0000;

fn program(name: impl Into<String>) -> OciRuntime {
    OciRuntime::Program { name: name.into(), search: "/usr/sbin:/usr/bin".to_owned() }
}

async fn with(runtime: impl Into<String>) -> Fixture {
    Fixture::with(|options| options.runtime = program(runtime)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn runc_passes_the_contract() {
    passes_with("host", |options| options.runtime = program("runc")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crun_passes_the_contract() {
    passes_with("host", |options| options.runtime = program("crun")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_passes_the_contract_with_crun() {
    passes_with("alpine:latest", |options| options.runtime = program("crun")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_made_and_leaves_nothing() {
    for runtime in RUNTIMES {
        let fixture = with(runtime).await;
        let described = fixture.provider.describe();
        assert_eq!(described["runtime"], runtime);
        assert!(described["runtime_version"].starts_with(char::is_numeric), "{described:?}");
        let health = fixture.provider.check().await;
        let finding = health.findings.iter().find(|finding| finding.name == "oci.runtime").expect("a finding");
        assert!(finding.level == FindingLevel::Ok && finding.message.contains(runtime), "{finding:?}");

        let id = SandboxId::random();
        let created =
            fixture.provider.create(&id, &spec(), &()).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(created.limits.enforced, [Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids]);
        assert_eq!(created.limits.unenforced, [Limit::Disk]);
        assert_eq!(fixture.output(&id, "echo $GREETING; pwd; hostname; id -u").await, "hello\n/workspace\nbox\n0");
        let usage = fixture.provider.usage(&id).await.expect("usage");
        assert_eq!((usage.memory_limit_bytes, usage.pids_limit), (256 << 20, 64));
        assert!(usage.memory_bytes > 0 && usage.pids > 0, "the sandbox is in its groups: {usage:?}");
        let remembered = remembered(&fixture, &id);
        assert!(remembered.is_dir(), "{runtime} started it: {}", remembered.display());

        fixture.provider.destroy(&id).await.expect("destroyed");
        assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(_))));
        let spawner = fixture.provider.spawner_pid().await.expect("a spawner");
        eventually("nobody stays a child of the spawner", async || children_of(spawner).is_empty()).await;
        fixture.finish().await;
    }
    // Runtimes may hand what they find in `/dev` to the sandbox's root.
    let null = std::fs::metadata("/dev/null").expect("it is there");
    assert!(null.uid() < FIRST_UID && null.gid() < FIRST_UID, "the host's /dev/null is nobody's: {null:?}");
}

/// Everything about its walls that a guest can see, as text that is the same in
/// every sandbox.
const WALLS: &str = r"
import ctypes, os, re
def text(path):
    try: return open(path).read(200)
    except OSError as error: return error.strerror
status = open('/proc/self/status').read()
for name in 'CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Groups Umask'.split():
    print(name, re.search(r'^%s:\s*(.*)$' % name, status, re.M).group(1))
print('map', open('/proc/self/uid_map').read().split()[0::2], open('/proc/self/gid_map').read().split()[0::2])
print('dev', sorted(name for name in os.listdir('/dev') if name != 'core'))
for name in 'null zero full random urandom tty'.split():
    node = os.stat('/dev/' + name)
    print(name, os.major(node.st_rdev), os.minor(node.st_rdev), oct(node.st_mode), node.st_uid, node.st_gid)
for path in '/proc/kcore /proc/keys /proc/timer_list /proc/interrupts'.split():
    print(path, repr(text(path)) if os.path.exists(path) else 'missing')
for path in '/proc/acpi /proc/scsi /sys/firmware /sys/devices/virtual/block'.split():
    print(path, os.listdir(path) if os.path.exists(path) else 'missing')
for path in '/proc/sys/kernel/hostname /proc/sysrq-trigger /sys/kernel/uevent_seqnum /sys/class/net/lo/mtu'.split():
    try: os.close(os.open(path, os.O_WRONLY)); print(path, 'opened')
    except OSError as error: print(path, 'refused')
print('net', os.listdir('/sys/class/net'), 'cgroups', os.path.exists('/sys/fs/cgroup/memory'))
kinds = {}
for line in open('/proc/self/mountinfo'):
    fields = line.split()
    kinds[fields[4]] = (fields[fields.index('-') + 1], sorted(set(fields[5].split(',')) & {'ro', 'rw', 'nosuid', 'nodev'}))
for path in '/ /proc /dev /dev/pts /dev/shm /sys /usr'.split():
    print(path, kinds.get(path))
libc = ctypes.CDLL(None, use_errno=True)
def errno(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(number, *arguments)
    return ctypes.get_errno()
calls = dict(mount=165, umount=166, unshare=272, setns=308, bpf=321, userfaultfd=323, perf=298, io_uring=425,
             keyctl=250, add_key=248, request_key=249, by_handle=304, init_module=175, kexec=246, open_tree=428,
             fsopen=430, mount_setattr=442, swapon=167, syslog=103, acct=163, clone3=435, pivot_root=155)
for name, number in calls.items():
    print(name, errno(number, -1, 0, 0, 0, 0, 0))
print('clone', errno(56, 0x10000000, 0, 0, 0, 0))
print('sockets', [(family, errno(41, family, 1, 0)) for family in (1, 2, 10, 17, 31, 38, 40)])
print('personality', errno(135, ctypes.c_ulong(0x40000)), errno(135, ctypes.c_ulong(0xffffffff)))
import resource
print('limits', resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE))
print('descriptors', sorted(os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))
";

#[tokio::test(flavor = "multi_thread")]
async fn the_walls_are_those_of_the_built_in_launcher() {
    let script = format!("cat > /tmp/walls.py <<'END'\n{WALLS}\nEND\npython3 /tmp/walls.py");
    let builtin = Fixture::start().await;
    let id = builtin.create(&spec()).await;
    let expected = builtin.output(&id, &script).await;
    assert!(expected.contains("mount 1\n") && expected.contains("clone3 38\n"), "{expected}");
    builtin.provider.destroy(&id).await.expect("destroyed");
    builtin.finish().await;
    for runtime in RUNTIMES {
        let fixture = with(runtime).await;
        let id = fixture.create(&spec()).await;
        let walls = fixture.output(&id, &script).await;
        assert_eq!(walls, expected, "{runtime}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold() {
    for runtime in RUNTIMES {
        let fixture = with(runtime).await;
        let disk = DiskRequest { size_mib: Some(32), in_memory: false };
        let id = fixture.create(&SandboxSpec { disk, ..spec() }).await;
        let full = fixture.sh(&id, "head -c 64m /dev/zero > /workspace/big").await;
        assert!(full.exit.code != Some(0) && full.stderr.contains("No space left"), "{runtime}: {full:?}");
        fixture.output(&id, "rm /workspace/big").await;
        let hog = fixture.sh(&id, "python3 -c 'x = bytearray(400 << 20)'").await;
        assert_ne!(hog.exit.code, Some(0), "{runtime}: {hog:?}");
        let crowd = fixture.sh(&id, "i=0; while [ $i -lt 100 ]; do sleep 5 & i=$((i+1)); done").await;
        assert_ne!(crowd.exit.code, Some(0), "{runtime}: {crowd:?}");
        let usage = fixture.provider.usage(&id).await.expect("usage");
        assert!(usage.oom_kills > 0 && usage.pids_refused > 0, "{runtime}: {usage:?}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_the_sandboxs_own() {
    for runtime in RUNTIMES {
        let fixture = Fixture::with(|options| {
            options.runtime = program(runtime);
            options.bridge = Some(BridgeOptions { prepared: 1, ..BridgeOptions::default() });
        })
        .await;
        let network = NetworkPolicy { mode: NetworkMode::Bridge, allow: Vec::new() };
        let id = fixture.create(&SandboxSpec { network, ..spec() }).await;
        assert_eq!(fixture.output(&id, "ls /sys/class/net").await, "eth0\nlo");
        // Its gateway, which is our name server, answers; root binds low ports.
        let script = "gateway=$(sed -n 's/^nameserver //p' /etc/resolv.conf); python3 -c \"
import socket, sys
socket.create_connection(('$gateway', 53), 5).close()
socket.create_server(('0.0.0.0', 80)).close()
print('reached')\"";
        assert_eq!(fixture.output(&id, script).await, "reached", "{runtime}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_outlive_the_server_and_a_change_of_its_runtime() {
    let mut fixture = with("crun").await;
    let of_crun = fixture.create(&spec()).await;
    fixture.output(&of_crun, "echo kept > /tmp/file").await;

    fixture.options.runtime = program("runc");
    fixture.restart().await;
    assert!(fixture.provider.sweep().await.expect("swept").is_empty(), "a running sandbox is no orphan");
    assert_eq!(fixture.output(&of_crun, "cat /tmp/file").await, "kept");
    let of_runc = fixture.create(&spec()).await;

    fixture.options.runtime = OciRuntime::Builtin;
    fixture.restart().await;
    let own = fixture.create(&spec()).await;
    let all = [of_crun, of_runc, own];
    for id in &all {
        assert_eq!(fixture.output(id, "echo here").await, "here");
    }
    let listed = fixture.provider.list().await.expect("listed");
    assert!(listed.len() == 3 && listed.iter().all(|sandbox| sandbox.state == RuntimeState::Running), "{listed:?}");
    let maps: std::collections::BTreeSet<String> = {
        let mut maps = std::collections::BTreeSet::new();
        for id in &all {
            maps.insert(fixture.output(id, "cat /proc/self/uid_map").await);
        }
        maps
    };
    assert_eq!(maps.len(), 3, "each has uids of its own");
    for id in &all {
        fixture.provider.destroy(id).await.expect("destroyed");
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_or_was_half_made_is_freed() {
    for runtime in RUNTIMES {
        let mut fixture = with(runtime).await;
        let (ended, half) = (fixture.create(&spec()).await, fixture.create(&spec()).await);
        kill_init(&fixture, &ended);
        // As if the server and its spawner had died before they noted its init.
        std::fs::remove_file(fixture.oci_dir().join("sandboxes").join(half.as_str()).join("init.json")).expect("noted");
        fixture.restart().await;
        let listed = fixture.provider.list().await.expect("listed");
        assert_eq!(
            listed.iter().map(|found| (&found.id, found.state)).collect::<Vec<_>>(),
            [(&ended, RuntimeState::Dead)]
        );
        let freed = fixture.provider.sweep().await.expect("swept").join("\n");
        assert!(freed.contains(half.as_str()) && !freed.contains(ended.as_str()), "{freed}");
        fixture.provider.destroy(&ended).await.expect("destroyed");
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_and_abandoned_creations_leave_nothing() {
    for runtime in RUNTIMES {
        let fixture = with(runtime).await;
        let nobody = SandboxSpec { user: Some("nobody-of-this-name".into()), ..spec() };
        let failed = fixture.provider.create(&SandboxId::random(), &nobody, &()).await;
        assert!(matches!(&failed, Err(ProviderError::InvalidSpec { .. })), "{failed:?}");
        for delay_millis in [0, 2, 5, 10, 20, 40] {
            let (id, wanted) = (SandboxId::random(), spec());
            let creating = fixture.provider.create(&id, &wanted, &());
            let _ = tokio::time::timeout(std::time::Duration::from_millis(delay_millis), creating).await;
            if fixture.provider.list().await.expect("listed").iter().any(|sandbox| sandbox.id == id) {
                fixture.provider.destroy(&id).await.expect("destroyed");
            }
        }
        fixture.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_goes_although_its_runtime_was_uninstalled() {
    let directory = tempfile::tempdir().expect("a directory");
    let copy = directory.path().join("crun");
    std::fs::copy("/usr/bin/crun", &copy).expect("crun is installed (scripts/test-packages.txt)");
    let fixture = with(copy.to_str().expect("text")).await;
    let id = fixture.create(&spec()).await;
    assert_eq!(fixture.output(&id, "echo here").await, "here");
    std::fs::remove_file(&copy).expect("removed");
    let health = fixture.provider.check().await;
    let finding = health.findings.iter().find(|finding| finding.name == "oci.runtime").expect("a finding");
    assert!(finding.level == FindingLevel::Failure && finding.fix.is_some(), "{finding:?}");
    let failed = fixture.provider.create(&SandboxId::random(), &spec(), &()).await;
    assert!(matches!(failed, Err(ProviderError::Failed { .. })), "{failed:?}");
    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_usable_runtime_is_refused_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let gvisor = script(
        directory.path(),
        "runsc",
        "case $1 in --version) echo 'runsc version 0.0~1.0'; echo 'spec: 1.0.2' ;; create) echo '-bundle, -pid-file' ;; esac",
    );
    let plain = directory.path().join("plain");
    std::fs::write(&plain, "not a program").expect("written");
    let plain = plain.to_str().expect("text").to_owned();
    for (wanted, says, advises) in [
        ("no-such-runtime", "there is no program `no-such-runtime`", "apt-get install"),
        ("/nowhere/crun", "there is no program `/nowhere/crun`", "builtin"),
        ("bin/crun", "neither the name of a program nor an absolute path", "builtin"),
        ("/usr/bin/true", "is not an OCI runtime", "builtin, crun or runc"),
        (plain.as_str(), "there is no program", "builtin"),
        (gvisor.as_str(), "no --preserve-fds", "provider `docker`"),
    ] {
        let (message, hint) = refusal(wanted).await;
        assert!(message.contains(says) && hint.contains(advises), "{wanted}: {message} ({hint})");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_fails_or_lies_is_found_out() {
    const KNOWN: &str = "case \"$*\" in --version) echo 'fake version 1'; echo 'spec: 1.0.2'; exit ;; \
                         'create --help') echo --preserve-fds; exit ;; esac; log=$4; for last; do :; done; verb=$7;";
    let directory = tempfile::tempdir().expect("a directory");
    let failing =
        script(directory.path(), "failing", &format!("{KNOWN} echo '{{\"msg\":\"out of luck\"}}' >> $log; exit 3"));
    // One that starts something outside of every namespace and calls it the sandbox.
    let lying = script(directory.path(), "lying", &format!("{KNOWN} [ $verb = create ] && echo $PPID > pid; exit 0"));
    for (runtime, why) in [(failing, "out of luck"), (lying, "did not enter the user namespace")] {
        let fixture = with(runtime).await;
        let failed = fixture.provider.create(&SandboxId::random(), &spec(), &()).await.expect_err("refused");
        let failed = chain(&failed);
        assert!(failed.contains(why), "{failed}");
        fixture.finish().await;
    }
}

/// What the provider says when it is opened with a runtime it cannot use.
async fn refusal(runtime: &str) -> (String, String) {
    let data = tempfile::tempdir().expect("a directory");
    let mut options = options(data.path());
    options.runtime = program(runtime);
    match OciProvider::open(options).await {
        Err(ProviderError::Unavailable { message, hint, .. }) => (message, hint.expect("advice")),
        Err(other) => panic!("{runtime}: {other:?}"),
        Ok(_) => panic!("{runtime} was taken"),
    }
}

fn script(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    path.to_str().expect("text").to_owned()
}

/// Where a sandbox's runtime keeps what it remembers.
fn remembered(fixture: &Fixture, id: &SandboxId) -> PathBuf {
    fixture.oci_dir().join("sandboxes").join(id.as_str()).join("runtime").join(id.as_str())
}

fn kill_init(fixture: &Fixture, id: &SandboxId) {
    let noted = std::fs::read(fixture.oci_dir().join("sandboxes").join(id.as_str()).join("init.json"));
    let noted: serde_json::Value = serde_json::from_slice(&noted.expect("readable")).expect("JSON");
    let pid = noted["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
}

fn children_of(parent: u32) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("readable").flatten();
    let stats = processes.filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok());
    // Behind the name: state, parent.
    let is_child =
        |stat: &String| stat.rsplit_once(')').and_then(|(_, rest)| rest.split(' ').nth(2)) == Some(&parent.to_string());
    stats.filter(is_child).collect()
}

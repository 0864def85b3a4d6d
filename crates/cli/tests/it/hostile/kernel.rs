//! Ways out of a container: system calls, kernel files, and the first process.

use stacyvm_api::{ErrorCode, ExecRequest, SandboxState, WriteRequest};

use super::{Attack, refusal};
use crate::support::{eventually, output, script, sh, small};

/// Calls that reach beyond the sandbox, with their numbers on x86-64 and arm64.
/// What a program without privileges may try is here too: none may even begin.
const FORBIDDEN: &str = r#"
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
column = 0 if platform.machine() == "x86_64" else 1
CLONE_NEWUSER = 0x10000000
calls = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    "unshare": (272, 97, CLONE_NEWUSER), "setns": (308, 268), "clone": (56, 220, CLONE_NEWUSER | 17),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "ptrace": (101, 117, 16, 1), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "open_by_handle_at": (304, 265), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "acct": (163, 89), "syslog": (103, 116),
    "sethostname": (170, 161), "quotactl": (179, 60), "fanotify_init": (300, 262),
}
for name, call in calls.items():
    arguments = list(call[2:]) + [0] * (6 - len(call[2:]))
    result = libc.syscall(ctypes.c_long(call[column]), *map(ctypes.c_long, arguments))
    if result != -1 or ctypes.get_errno() != errno.EPERM:
        print(name, result, ctypes.get_errno())
# What is newer than the list does not exist, so that libraries fall back.
if libc.syscall(ctypes.c_long(435), 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:
    print("clone3", ctypes.get_errno())
"#;

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_reach_beyond_the_sandbox_are_refused() {
    let attack = Attack::by_host_programs().await;
    assert_eq!(attack.python(FORBIDDEN).await, "", "these were let through");
    let families = "
import socket
for family in (17, 15, 29, 30, 31, 38, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind)
            print(family, kind)
        except PermissionError:
            pass
for family in (socket.AF_INET, socket.AF_INET6):
    try:
        socket.socket(family, socket.SOCK_RAW, 1)
        print('raw', family)
    except PermissionError:
        pass
";
    assert_eq!(attack.python(families).await, "", "sockets of these kinds could be made");
    // Whatever is setuid or has capabilities gives none.
    let status = output(&attack.guest, "grep -E '^(NoNewPrivs|Seccomp|CapBnd|CapAmb):' /proc/self/status").await;
    let fields: Vec<&str> = status.split_whitespace().collect();
    // Docker's default set without CAP_NET_RAW.
    let expected = ["CapBnd:", "00000000a80405fb", "CapAmb:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"];
    assert_eq!(fields, expected);
    let device = sh(&attack.guest, "mknod /tmp/disk b 254 0").await;
    assert_ne!(device.exit_code, 0, "{device:?}");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernels_files_show_nothing_of_the_host_and_take_nothing() {
    let attack = Attack::by_host_programs().await;
    let writable = "
import os
for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/drop_caches', '/proc/sys/net/ipv4/ip_forward',
             '/proc/sysrq-trigger', '/proc/kcore', '/proc/kmsg', '/sys/kernel/mm/ksm/run', '/sys/power/state',
             '/sys/kernel/uevent_helper', '/proc/1/mem', '/proc/irq/default_smp_affinity'):
    try:
        os.close(os.open(path, os.O_WRONLY))
        print(path)
    except OSError:
        pass
";
    assert_eq!(attack.python(writable).await, "", "these can be written to");
    let empty = output(
        &attack.guest,
        "cat /proc/keys /proc/timer_list /proc/interrupts; ls -A /proc/acpi /sys/firmware /usr/src | grep -v :$; true",
    )
    .await;
    assert_eq!(empty, "");
    assert_eq!(output(&attack.guest, "grep -c cgroup /proc/self/mounts; true").await, "0");
    let groups = output(&attack.guest, "cut -d: -f3 /proc/self/cgroup | sort -u").await;
    assert_eq!(groups, "/", "it sees where it is in the host's control groups");
    let mounts = output(&attack.guest, "cat /proc/self/mountinfo").await;
    let data_dir = attack.server.site.data_dir();
    assert!(!mounts.contains(&*data_dir.to_string_lossy()), "{mounts}");
    let devices = output(&attack.guest, "find /dev -type b -o -type c | sort | xargs").await;
    assert_eq!(
        devices, "/dev/full /dev/null /dev/pts/ptmx /dev/random /dev/tty /dev/urandom /dev/zero",
        "devices of the sandbox"
    );
    // Keys of the session that the server was started in.
    assert_eq!(output(&attack.guest, "cat /proc/key-users | wc -l").await.trim(), "1");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_to_be_learned_of_the_agent() {
    let attack = Attack::by_host_programs().await;
    let look = "
import os
agents = []
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        if open(f'/proc/{pid}/cmdline').read().startswith('stacyvm-agent'):
            agents.append(pid)
    except OSError:
        pass
assert '1' in agents, agents
for pid in agents:
    for name in ('environ', 'maps', 'mem', 'auxv', 'stack', 'syscall', 'pagemap'):
        try:
            found = open(f'/proc/{pid}/{name}', 'rb').read(64)
            if found:
                print(pid, name, found)
        except OSError:
            pass
    for name in ('root', 'cwd', 'exe', *(f'fd/{number}' for number in range(64))):
        try:
            print(pid, name, os.readlink(f'/proc/{pid}/{name}'))
        except OSError:
            pass
    print(open(f'/proc/{pid}/cmdline').read().replace(chr(0), ' '))
";
    let found = attack.python(look).await;
    assert!(found.lines().all(|line| line.trim() == "stacyvm-agent serve"), "{found}");

    // It listens where only the host can connect, and hands nothing on.
    let sockets = output(&attack.guest, "find / -xdev -type s 2>/dev/null; grep -c ' 01 ' /proc/net/unix; true").await;
    assert_eq!(sockets, "0", "sockets that listen");
    let own =
        output(&attack.guest, "ls -l /proc/self/fd | grep -c socket; env | grep -ci -e token -e stacyvm; true").await;
    assert_eq!(own, "0\n0");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_process_cannot_be_killed_from_inside() {
    let attack = Attack::by_host_programs().await;
    for signal in ["KILL", "STOP", "SEGV", "SEGV", "BUS", "QUIT", "USR1", "HUP", "ABRT", "TSTP", "PIPE", "CHLD", "INT"]
    {
        let sent = sh(&attack.guest, &format!("kill -{signal} 1; echo sent")).await;
        assert_eq!(sent.stdout, "sent\n", "{signal}: {sent:?}");
    }
    assert_eq!(output(&attack.guest, "echo alive").await, "alive");
    // Everything there is, the agent's helpers and the killer included.
    for _ in 0..100 {
        // It may be quicker than the helper that is to say that it runs.
        let killed = attack.guest.exec(&script("kill -9 -1; echo survived")).await.expect("a result");
        assert!(matches!(killed.exit_code, 0 | 137), "{killed:?}");
    }
    let alive = eventually("commands run again", async || {
        let result = attack.guest.exec(&script("echo alive")).await.ok()?;
        (result.exit_code == 0).then_some(result.stdout)
    })
    .await;
    assert_eq!(alive, "alive\n");
    // Its children can end, be orphaned and stay zombies as they like.
    output(&attack.guest, "for i in 1 2 3 4 5 6 7 8; do (sleep 0.01 & sleep 0.01 &) ; done; true").await;
    let zombies = "for status in /proc/[0-9]*/status; do grep -l '^State:.Z' $status; done 2>/dev/null | wc -l";
    eventually("orphans are reaped", async || (output(&attack.guest, zombies).await == "0").then_some(())).await;
    attack.ends_well().await;
}

/// Limits that would leave the agent nothing to answer with.
#[tokio::test(flavor = "multi_thread")]
async fn the_agents_own_limits_are_out_of_the_guests_reach() {
    let attack = Attack::by_host_programs().await;
    let limit = "
import os, resource
agents = []
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        if open(f'/proc/{pid}/cmdline').read().startswith('stacyvm-agent'):
            agents.append(int(pid))
    except OSError:
        pass
# The agent and at least the helper of this very command.
assert 1 in agents and len(agents) > 1, agents
for pid in agents:
    for name in ('NOFILE', 'AS', 'NPROC', 'FSIZE', 'DATA', 'STACK', 'CPU', 'MEMLOCK', 'RTTIME'):
        try:
            resource.prlimit(pid, getattr(resource, f'RLIMIT_{name}'), (1, 1))
            print(pid, name)
        except PermissionError:
            pass
# Whoever wants less for himself or his children may have it.
child = os.fork() or os.execvp('sleep', ['sleep', '60'])
for pid in (os.getpid(), child):
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (64, 64)
";
    assert_eq!(attack.python(limit).await, "", "these limits were set");
    assert_eq!(output(&attack.guest, "grep ^Uid: /proc/self/status | xargs").await, "Uid: 0 0 0 0");
    let write =
        WriteRequest { path: "/tmp/file".to_owned(), content: "still here".to_owned(), ..WriteRequest::default() };
    attack.guest.write_file(&write).await.expect("written");
    assert_eq!(attack.guest.read_file("/tmp/file").await.expect("read"), *b"still here");
    assert_eq!(output(&attack.guest, "cat /tmp/file").await, "still here");
    attack.ends_well().await;
}

/// Who has the uid that sets the agent apart could end it like its root.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_guests_root_ends_it() {
    let attack = Attack::by_host_programs().await;
    for user in ["1000", "65534"] {
        let request = ExecRequest { user: Some(user.to_owned()), ..script("kill -TERM 1 2>&1; kill -INT 1; true") };
        let refused = attack.guest.exec(&request).await.expect("a result");
        assert!(refused.stdout.contains("not permitted"), "{user}: {refused:?}");
    }
    let agents_own = ExecRequest { user: Some("65535".to_owned()), ..script("kill -TERM 1") };
    assert_eq!(refusal(attack.guest.exec(&agents_own).await), ErrorCode::BadRequest);
    assert_eq!(output(&attack.guest, "echo alive").await, "alive");
    attack.ends_well().await;
}

/// As in any container, the first process ends when its root asks it to.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_itself_is_marked_and_can_be_destroyed() {
    let attack = Attack::by(&small()).await;
    // It asks everything else to end too, the one that asked included.
    assert_eq!(sh(&attack.guest, "kill -TERM 1; sleep 60").await.signal, Some(15));
    let ended = eventually("its end is noticed", async || {
        attack.guest.get().await.ok().filter(|sandbox| sandbox.state == SandboxState::Error)
    })
    .await;
    assert_eq!(ended.reason.as_deref(), Some("it ended by itself"));
    assert_eq!(refusal(attack.guest.exec(&script("true")).await), ErrorCode::Conflict);
    assert_eq!(refusal(attack.guest.read_file("/etc/passwd").await), ErrorCode::Conflict);
    attack.ends_well().await;
}

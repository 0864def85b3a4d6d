//! Which system calls PRoot's guests lack, beyond the profile of all sandboxes.
//!
//! PRoot shows a root by rewriting the paths in system calls. It rewrites the
//! calls it knows: released versions are older than `statx` or `openat2`, and a
//! path in one of those would be the host's. They answer `ENOSYS`, as an older
//! kernel would, and C libraries fall back to calls that PRoot knows. What
//! works on paths without system calls of its own (`io_uring`) is not there
//! either.
//!
//! Sockets that send to a path without connecting to it first are not there:
//! PRoot rewrites the path in `connect`, not in `sendto`.
//!
//! PRoot's memory is not a guest's to read or write: by `/proc` it is Landlock
//! that keeps it closed, by system calls this.
//!
//! Without a pid namespace a guest must not end PRoot, whose tracees would go
//! on by themselves, nor change what other processes of its user may use: on an
//! ordinary user's server those are the server's too. Shared memory with a
//! number for a name would outlive the sandbox there.

use crate::host::seccomp::{Program, give, instruction, load};

/// Answer `ENOSYS`.
const MISSING: &[i64] = &[
    libc::SYS_statx,
    libc::SYS_openat2,
    libc::SYS_execveat,
    libc::SYS_faccessat2,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// `fchmodat2` is the first of the calls that came after every release of
/// PRoot so far; later ones take paths too (`setxattrat`, `file_getattr`).
const FIRST_UNKNOWN: u32 = 452;

/// Calls that name a process in their first argument.
const TO_PROCESS: &[i64] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_pidfd_open,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
];

/// Missing where the host's processes are visible: `kill` and files do as well.
const MISSING_WHEN_SHARED: &[i64] =
    &[libc::SYS_pidfd_send_signal, libc::SYS_shmget, libc::SYS_msgget, libc::SYS_semget];

/// Calls that change how a process is scheduled: their first argument is zero
/// for the caller itself.
const SCHEDULING: &[i64] = &[libc::SYS_sched_setscheduler, libc::SYS_sched_setparam, libc::SYS_sched_setattr];

/// `ioprio_set(2)`: all processes of a user.
const IOPRIO_WHO_USER: u32 = 3;

/// Requests of `ioctl` that choose who gets a descriptor's signals.
const FIOSETOWN: u32 = 0x8901;
const SIOCSPGRP: u32 = 0x8902;

/// `F_SETOWN_EX` of `fcntl(2)`.
const F_SETOWN_EX: u32 = 15;

/// The part of a socket's type that is not a flag.
const SOCKET_TYPE_MASK: u32 = 0xf;

const OFFSET_OF_NUMBER: u32 = 0;

/// Of an argument in `struct seccomp_data`, the low half on little-endian
/// machines; the high half is behind it.
const fn argument(index: u32) -> u32 {
    16 + index * 8
}

const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

const ALLOW: libc::sock_filter = give(libc::SECCOMP_RET_ALLOW);

/// What a sandbox shares.
pub(super) struct Sharing {
    /// PRoot itself, by the number that a guest sees.
    pub(super) proot: i32,
    /// Without a pid namespace.
    pub(super) hosts_processes: bool,
    /// Memory is held by the watcher, which sees what processes have mapped: a
    /// file in memory that is mapped nowhere would escape it.
    pub(super) memory_is_watched: bool,
}

pub(super) fn build(sharing: &Sharing) -> Program {
    let mut program = vec![load(OFFSET_OF_NUMBER)];
    program.extend(unless(libc::BPF_JGE, FIRST_UNKNOWN, &[give(ENOSYS)]));
    let mut missing = MISSING.to_vec();
    if sharing.memory_is_watched {
        missing.push(libc::SYS_memfd_create);
    }
    if sharing.hosts_processes {
        missing.extend(MISSING_WHEN_SHARED);
    }
    for number in missing {
        program.extend(call(number, &[give(ENOSYS)]));
    }
    for number in [libc::SYS_socket, libc::SYS_socketpair] {
        program.extend(call(number, &no_datagrams_to_paths()));
    }
    for (number, index) in [(libc::SYS_process_vm_readv, 0), (libc::SYS_process_vm_writev, 0), (libc::SYS_ptrace, 1)] {
        program.extend(call(number, &not_of(index, &[sharing.proot])));
    }
    if sharing.hosts_processes {
        for (number, decision) in apart(sharing.proot) {
            program.extend(call(number, &decision));
        }
    }
    program.push(ALLOW);
    program
}

/// Of local sockets, those that connect.
fn no_datagrams_to_paths() -> Program {
    let mut local =
        vec![load(argument(1)), instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, SOCKET_TYPE_MASK)];
    for kind in [libc::SOCK_DGRAM, libc::SOCK_RAW] {
        local.extend(equal(kind.cast_unsigned(), &[give(EPERM)]));
    }
    let mut decision = vec![load(argument(0))];
    decision.extend(equal(libc::AF_UNIX.cast_unsigned(), &local));
    decision.push(ALLOW);
    decision
}

/// An argument that names none of these processes.
fn not_of(index: u32, targets: &[i32]) -> Program {
    let mut decision = vec![load(argument(index))];
    for target in targets {
        decision.extend(equal(target.cast_unsigned(), &[give(EPERM)]));
    }
    decision.push(ALLOW);
    decision
}

/// What keeps a guest's hands off PRoot and other processes of its user.
fn apart(proot: i32) -> Vec<(i64, Program)> {
    // Itself, its group, and everybody.
    let to_process = not_of(0, &[proot, -proot, -1]);
    let mut decisions: Vec<(i64, Program)> = TO_PROCESS.iter().map(|number| (*number, to_process.clone())).collect();

    let only_zero = |index| [vec![load(argument(index))], equal(0, &[ALLOW]), vec![give(EPERM)]].concat();
    decisions.extend(SCHEDULING.iter().map(|number| (*number, only_zero(0))));
    // Programs name their own threads here.
    decisions.push((libc::SYS_sched_setaffinity, not_of(0, &[proot])));
    for (number, everybody) in [(libc::SYS_setpriority, libc::PRIO_USER), (libc::SYS_ioprio_set, IOPRIO_WHO_USER)] {
        let refused = [vec![load(argument(0))], equal(everybody, &[give(EPERM)])].concat();
        decisions.push((number, [refused, only_zero(1)].concat()));
    }
    // Limits of others may be read: no new ones are given then.
    let high = [vec![load(argument(2) + 4)], equal(0, &[ALLOW])].concat();
    let reads = [vec![load(argument(2))], equal(0, &high), vec![give(EPERM)]].concat();
    decisions.push((libc::SYS_prlimit64, [vec![load(argument(0))], equal(0, &[ALLOW]), reads].concat()));

    // A signal of the guest's choice to whom it chooses.
    for (number, requests) in
        [(libc::SYS_fcntl, [libc::F_SETOWN.cast_unsigned(), F_SETOWN_EX]), (libc::SYS_ioctl, [FIOSETOWN, SIOCSPGRP])]
    {
        let mut decision = vec![load(argument(1))];
        for request in requests {
            decision.extend(equal(request, &[give(EPERM)]));
        }
        decision.push(ALLOW);
        decisions.push((number, decision));
    }
    // Whoever looks for what is left of a sandbox has to see what it uses.
    let hides = [vec![load(argument(1))], equal(0, &[give(EPERM)])].concat();
    let dumpable = equal(libc::PR_SET_DUMPABLE.cast_unsigned(), &hides);
    decisions.push((libc::SYS_prctl, [vec![load(argument(0))], dumpable, vec![ALLOW]].concat()));
    decisions
}

/// Decides one call; the decision ends in an answer, whatever it loads.
fn call(number: i64, decision: &[libc::sock_filter]) -> Program {
    equal(number as u32, decision)
}

fn equal(value: u32, then: &[libc::sock_filter]) -> Program {
    unless(libc::BPF_JEQ, value, then)
}

/// Does `then` if the comparison holds, and steps over it if not.
fn unless(comparison: u32, value: u32, then: &[libc::sock_filter]) -> Program {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    let mut part = vec![instruction(code, 0, u8::try_from(then.len()).unwrap_or(u8::MAX), value)];
    part.extend_from_slice(then);
    part
}

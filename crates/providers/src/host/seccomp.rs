//! Which system calls a sandbox may make.
//!
//! An allow-list after Docker's default profile (moby `profiles/seccomp`) for a
//! container without `CAP_SYS_ADMIN`. So mounting, `setns`, `unshare`, `bpf`,
//! `userfaultfd`, `perf_event_open`, `io_uring_*`, `keyctl` and `add_key` are
//! refused; `clone` may not make namespaces; and `clone3`, whose flags a filter
//! cannot see, answers `ENOSYS`, so that programs fall back to `clone`. Calls
//! newer than this list answer `ENOSYS` too: a C library then uses the older
//! way instead of failing.
//!
//! Stricter than Docker: sockets only of the families below (Docker lets some
//! thirty through), and no foreign architectures (i386 and x32 programs end
//! with `SIGSYS`).
//!
//! The program is built once, by the spawner. Numbers that are always allowed
//! are found by binary search in front of seccompiler's program for the calls
//! whose arguments matter: the kernel emulates the whole filter for every
//! number at each installation, and a linear list of 350 costs it as much as
//! all the rest of a sandbox.

use std::collections::BTreeMap;

use seccompiler::{
    SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp as Op, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Newest system call the lists below decide on (`removexattrat`, Linux 6.13).
const NEWEST_KNOWN: u32 = 466;

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET together.
pub(crate) const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// Socket families a sandbox may use. Others load kernel modules that hardly
/// anybody has looked at, or (`AF_VSOCK`) ignore network namespaces.
pub(crate) const SOCKET_FAMILIES: [i32; 5] =
    [libc::AF_UNSPEC, libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// `personality` values Docker lets through: PER_LINUX, PER_LINUX32,
/// UNAME26, both, and asking for the current one.
pub(crate) const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

pub(crate) type Program = Vec<libc::sock_filter>;

/// Builds the profile.
pub(crate) fn build() -> Result<Program, seccompiler::BackendError> {
    let arguments_matter: seccompiler::BpfProgram = SeccompFilter::new(
        conditional_calls()?,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        target()?,
    )?
    .try_into()?;

    let mut always: Vec<u32> = always_allowed().map(|(_, number)| number as u32).collect();
    always.sort_unstable();
    always.dedup();

    let mut program = vec![
        load(OFFSET_OF_ARCH),
        jump_if_equal(AUDIT_ARCH, 1, 0),
        give(libc::SECCOMP_RET_KILL_PROCESS),
        load(OFFSET_OF_NUMBER),
        jump_if_equal(libc::SYS_clone3 as u32, 0, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        jump_if_greater(NEWEST_KNOWN, 0, 1),
        give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ];
    search(&ranges(&always), &mut program);
    program.extend(arguments_matter.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }));
    Ok(program)
}

/// Names and numbers of the calls that are allowed whatever their arguments.
/// Names are those of libseccomp, in which other runtimes take a profile.
pub(crate) fn always_allowed() -> impl Iterator<Item = (String, i64)> {
    let of_kernel = |name: &str| name.trim_start_matches("SYS_").to_lowercase();
    ALWAYS_ALLOWED.iter().chain(ALWAYS_ALLOWED_HERE).map(move |(name, number)| (of_kernel(name), *number))
}

fn target() -> Result<TargetArch, seccompiler::BackendError> {
    std::env::consts::ARCH.try_into()
}

fn conditional_calls() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let when = |argument, length, op, value| {
        SeccompCondition::new(argument, length, op, value).and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut calls = BTreeMap::new();
    calls.insert(libc::SYS_clone, vec![when(0, ArgLen::Qword, Op::MaskedEq(NAMESPACE_FLAGS), 0)?]);
    let families = SOCKET_FAMILIES
        .iter()
        .map(|family| when(0, ArgLen::Dword, Op::Eq, *family as u64))
        .collect::<Result<_, _>>()?;
    calls.insert(libc::SYS_socket, families);
    let personalities =
        PERSONALITIES.iter().map(|value| when(0, ArgLen::Dword, Op::Eq, *value)).collect::<Result<_, _>>()?;
    calls.insert(libc::SYS_personality, personalities);
    Ok(calls)
}

/// Runs of consecutive numbers, first and last.
fn ranges(sorted: &[u32]) -> Vec<(u32, u32)> {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &number in sorted {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    ranges
}

/// Appends a search for the number in the accumulator: `ALLOW` when it is in
/// one of `ranges`, else on behind everything appended here.
fn search(ranges: &[(u32, u32)], program: &mut Program) {
    let [(first, last)] = ranges else {
        let (low, high) = ranges.split_at(ranges.len() / 2);
        if low.is_empty() {
            return;
        }
        let mut low_part = Program::new();
        search(low, &mut low_part);
        let mut high_part = Program::new();
        search(high, &mut high_part);
        // Conditional jumps reach 255 instructions; the halves may be longer.
        program.push(jump_if_greater_or_equal(high[0].0, 0, 1));
        program.push(jump(low_part.len() as u32 + 1));
        program.append(&mut low_part);
        program.push(jump(high_part.len() as u32));
        program.append(&mut high_part);
        return;
    };
    program.push(jump_if_greater_or_equal(*first, 0, 2));
    program.push(jump_if_greater(*last, 1, 0));
    program.push(give(libc::SECCOMP_RET_ALLOW));
}

/// Offsets in `struct seccomp_data`.
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_ARCH: u32 = 4;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

pub(crate) const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

pub(crate) fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump(distance: u32) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, distance)
}

fn jump_if_equal(value: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, then, otherwise, value)
}

fn jump_if_greater(value: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, then, otherwise, value)
}

fn jump_if_greater_or_equal(value: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, then, otherwise, value)
}

pub(crate) const fn give(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

/// Calls that the libc crate has no names for. Numbers of those newer than it
/// are the same on every architecture.
mod newer {
    #[cfg(target_arch = "x86_64")]
    pub(crate) const IO_PGETEVENTS: i64 = 333;
    #[cfg(target_arch = "aarch64")]
    pub(crate) const IO_PGETEVENTS: i64 = 292;
    pub(crate) const CACHESTAT: i64 = 451;
    pub(crate) const FCHMODAT2: i64 = 452;
    pub(crate) const MAP_SHADOW_STACK: i64 = 453;
    pub(crate) const FUTEX_WAKE: i64 = 454;
    pub(crate) const FUTEX_WAIT: i64 = 455;
    pub(crate) const FUTEX_REQUEUE: i64 = 456;
    pub(crate) const STATMOUNT: i64 = 457;
    pub(crate) const LISTMOUNT: i64 = 458;
    pub(crate) const MSEAL: i64 = 462;
    pub(crate) const SETXATTRAT: i64 = 463;
    pub(crate) const GETXATTRAT: i64 = 464;
    pub(crate) const LISTXATTRAT: i64 = 465;
    pub(crate) const REMOVEXATTRAT: i64 = 466;
}

type Call = (&'static str, i64);

macro_rules! calls {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

macro_rules! newer_calls {
    ($($name:ident)*) => { [$((stringify!($name), newer::$name)),*] };
}

/// Allowed whatever the arguments, on every 64-bit architecture.
#[rustfmt::skip]
static ALWAYS_ALLOWED: &[Call] = &{
    const NAMED: &[Call] = calls![
        SYS_accept SYS_accept4 SYS_adjtimex SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_chroot
        SYS_clock_adjtime SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_close SYS_close_range
        SYS_connect SYS_copy_file_range SYS_dup SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait
        SYS_epoll_pwait2 SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_faccessat
        SYS_faccessat2 SYS_fadvise64 SYS_fallocate SYS_fanotify_mark SYS_fchdir SYS_fchmod SYS_fchmodat
        SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr SYS_flock
        SYS_fremovexattr SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex
        SYS_futex_waitv SYS_getcpu SYS_getcwd SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid
        SYS_getgroups SYS_getitimer SYS_getpeername SYS_getpgid SYS_getpid SYS_getppid SYS_getpriority
        SYS_getrandom SYS_getresgid SYS_getresuid SYS_getrlimit SYS_get_robust_list SYS_getrusage
        SYS_getsid SYS_getsockname SYS_getsockopt SYS_gettid SYS_gettimeofday SYS_getuid SYS_getxattr
        SYS_inotify_add_watch SYS_inotify_init1 SYS_inotify_rm_watch SYS_io_cancel SYS_ioctl
        SYS_io_destroy SYS_io_getevents SYS_ioprio_get SYS_ioprio_set SYS_io_setup
        SYS_io_submit SYS_kill SYS_landlock_add_rule SYS_landlock_create_ruleset
        SYS_landlock_restrict_self SYS_lgetxattr SYS_linkat SYS_listen SYS_listxattr SYS_llistxattr
        SYS_lremovexattr SYS_lseek SYS_lsetxattr SYS_madvise SYS_membarrier SYS_memfd_create
        SYS_memfd_secret SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap
        SYS_mprotect SYS_mq_getsetattr SYS_mq_notify SYS_mq_open SYS_mq_timedreceive SYS_mq_timedsend
        SYS_mq_unlink SYS_mremap SYS_msgctl SYS_msgget SYS_msgrcv SYS_msgsnd SYS_msync SYS_munlock
        SYS_munlockall SYS_munmap SYS_name_to_handle_at SYS_nanosleep SYS_newfstatat SYS_openat
        SYS_openat2 SYS_pidfd_open SYS_pidfd_send_signal SYS_pipe2 SYS_pkey_alloc SYS_pkey_free
        SYS_pkey_mprotect SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64
        SYS_process_mrelease SYS_process_vm_readv SYS_process_vm_writev SYS_pselect6 SYS_ptrace
        SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read SYS_readahead SYS_readlinkat SYS_readv
        SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_remap_file_pages SYS_removexattr SYS_renameat
        SYS_renameat2 SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigpending SYS_rt_sigprocmask
        SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo
        SYS_sched_getaffinity SYS_sched_getattr SYS_sched_getparam SYS_sched_get_priority_max
        SYS_sched_get_priority_min SYS_sched_getscheduler SYS_sched_rr_get_interval
        SYS_sched_setaffinity SYS_sched_setattr SYS_sched_setparam SYS_sched_setscheduler
        SYS_sched_yield SYS_seccomp SYS_semctl SYS_semget SYS_semop SYS_semtimedop SYS_sendfile
        SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups
        SYS_setitimer SYS_setpgid SYS_setpriority SYS_setregid SYS_setresgid SYS_setresuid SYS_setreuid
        SYS_setrlimit SYS_set_robust_list SYS_setsid SYS_setsockopt SYS_set_tid_address SYS_setuid
        SYS_setxattr SYS_shmat SYS_shmctl SYS_shmdt SYS_shmget SYS_shutdown SYS_sigaltstack
        SYS_signalfd4 SYS_socketpair SYS_splice SYS_statfs SYS_statx SYS_symlinkat SYS_sync
        SYS_sync_file_range SYS_syncfs SYS_sysinfo SYS_tee SYS_tgkill SYS_timer_create
        SYS_timer_delete SYS_timer_getoverrun SYS_timer_gettime SYS_timer_settime SYS_timerfd_create
        SYS_timerfd_gettime SYS_timerfd_settime SYS_times SYS_tkill SYS_truncate SYS_umask SYS_uname
        SYS_unlinkat SYS_utimensat SYS_vmsplice SYS_wait4 SYS_waitid SYS_write SYS_writev
    ];
    const NEWER: [Call; 14] = newer_calls![
        IO_PGETEVENTS CACHESTAT FCHMODAT2 MAP_SHADOW_STACK FUTEX_WAKE FUTEX_WAIT FUTEX_REQUEUE STATMOUNT LISTMOUNT
        MSEAL SETXATTRAT GETXATTRAT LISTXATTRAT REMOVEXATTRAT
    ];
    let mut all = [("", 0); NAMED.len() + NEWER.len()];
    let mut index = 0;
    while index < all.len() {
        all[index] = if index < NAMED.len() { NAMED[index] } else { NEWER[index - NAMED.len()] };
        index += 1;
    }
    all
};

/// What only this architecture has: on x86_64 the calls that newer ones
/// replaced.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
static ALWAYS_ALLOWED_HERE: &[Call] = calls![
    SYS_access SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create
    SYS_epoll_ctl_old SYS_epoll_wait SYS_epoll_wait_old SYS_eventfd SYS_fork SYS_futimesat SYS_getdents
    SYS_getpgrp SYS_get_thread_area SYS_inotify_init SYS_lchown SYS_link SYS_lstat SYS_mkdir SYS_mknod
    SYS_modify_ldt SYS_open SYS_pause SYS_pipe SYS_poll SYS_readlink SYS_rename SYS_rmdir SYS_select
    SYS_set_thread_area SYS_signalfd SYS_stat SYS_symlink SYS_time SYS_unlink SYS_utime SYS_utimes
    SYS_vfork
];
#[cfg(target_arch = "aarch64")]
static ALWAYS_ALLOWED_HERE: &[Call] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn verdict(program: &Program, arch: u32, number: i64, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend((number as u32).to_ne_bytes());
        data.extend(arch.to_ne_bytes());
        data.extend(0u64.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut accumulator, mut at) = (0u32, 0usize);
        loop {
            let i = program[at];
            at += 1;
            let code = u32::from(i.code);
            let chosen = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
            match code & 0x07 {
                libc::BPF_LD => {
                    let offset = i.k as usize;
                    accumulator = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                libc::BPF_JMP => {
                    at += match code & 0xf0 {
                        libc::BPF_JA => i.k as usize,
                        libc::BPF_JEQ => chosen(accumulator == i.k),
                        libc::BPF_JGT => chosen(accumulator > i.k),
                        libc::BPF_JGE => chosen(accumulator >= i.k),
                        other => panic!("jump {other:#x}"),
                    }
                }
                libc::BPF_ALU => accumulator &= i.k,
                libc::BPF_RET => return i.k,
                other => panic!("class {other:#x}"),
            }
        }
    }

    fn call(number: i64, first: u64) -> u32 {
        verdict(&build().unwrap(), AUDIT_ARCH, number, [first, 0, 0, 0, 0, 0])
    }

    const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const MISSING: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    #[test]
    fn every_listed_call_is_allowed_and_no_other() {
        let program = build().unwrap();
        let conditional = [libc::SYS_clone, libc::SYS_socket, libc::SYS_personality];
        for number in 0..=i64::from(NEWEST_KNOWN) {
            if conditional.contains(&number) || number == libc::SYS_clone3 {
                continue;
            }
            let listed = always_allowed().any(|(_, allowed)| allowed == number);
            let expected = if listed { libc::SECCOMP_RET_ALLOW } else { REFUSED };
            assert_eq!(verdict(&program, AUDIT_ARCH, number, [0; 6]), expected, "system call {number}");
        }
    }

    #[test]
    fn what_reaches_beyond_the_sandbox_is_refused() {
        for number in [
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_open_by_handle_at,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_reboot,
            libc::SYS_open_tree,
            libc::SYS_fsopen,
            libc::SYS_mount_setattr,
        ] {
            assert_eq!(call(number, 0), REFUSED, "system call {number}");
        }
    }

    #[test]
    fn clone_makes_processes_but_no_namespaces() {
        assert_eq!(call(libc::SYS_clone, libc::SIGCHLD as u64), libc::SECCOMP_RET_ALLOW);
        for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET, libc::CLONE_NEWPID] {
            assert_eq!(call(libc::SYS_clone, flag as u64), REFUSED);
        }
        assert_eq!(call(libc::SYS_clone3, 0), MISSING);
    }

    #[test]
    fn sockets_are_of_the_usual_families() {
        assert_eq!(call(libc::SYS_socket, libc::AF_INET6 as u64), libc::SECCOMP_RET_ALLOW);
        assert_eq!(call(libc::SYS_socket, libc::AF_UNIX as u64), libc::SECCOMP_RET_ALLOW);
        for family in [libc::AF_VSOCK, libc::AF_ALG, libc::AF_PACKET, libc::AF_BLUETOOTH] {
            assert_eq!(call(libc::SYS_socket, family as u64), REFUSED);
        }
    }

    #[test]
    fn unknown_numbers_and_foreign_architectures_have_their_own_answers() {
        assert_eq!(call(i64::from(NEWEST_KNOWN) + 1, 0), MISSING);
        assert_eq!(call(0x4000_0000 + libc::SYS_read, 0), MISSING);
        let i386 = 0x4000_0003;
        assert_eq!(verdict(&build().unwrap(), i386, libc::SYS_read, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(call(libc::SYS_personality, 0x40_0000), REFUSED);
    }
}

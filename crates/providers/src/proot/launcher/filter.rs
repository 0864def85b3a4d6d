//! Which system calls PRoot's guests lack, beyond the profile of all sandboxes.
//!
//! PRoot shows a root by rewriting the paths in system calls. It rewrites the
//! calls it knows: released versions are older than `statx` or `openat2`, and a
//! path in one of those would be the host's. They answer `ENOSYS`, as an older
//! kernel would, and C libraries fall back to calls that PRoot knows. What
//! works on paths without system calls of its own (`io_uring`) is not there
//! either.
//!
//! Without a pid namespace a guest must not end PRoot, whose tracees would go
//! on by themselves.

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

/// Offsets in `struct seccomp_data`; the low half of the first argument on
/// little-endian machines.
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_FIRST_ARGUMENT: u32 = 16;

const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

/// Builds the filter. `protected` is PRoot itself, where a guest could reach it.
pub(super) fn build(protected: Option<i32>) -> Program {
    let mut program = vec![load(OFFSET_OF_NUMBER)];
    program.extend(unless(libc::BPF_JGE, FIRST_UNKNOWN, &[give(ENOSYS)]));
    for number in MISSING {
        program.extend(unless(libc::BPF_JEQ, *number as u32, &[give(ENOSYS)]));
    }
    if let Some(pid) = protected {
        // Itself, its group, and everybody.
        let mut refusals = vec![load(OFFSET_OF_FIRST_ARGUMENT)];
        for target in [pid, -pid, -1] {
            refusals.extend(unless(libc::BPF_JEQ, target.cast_unsigned(), &[give(EPERM)]));
        }
        refusals.push(give(libc::SECCOMP_RET_ALLOW));
        for number in TO_PROCESS {
            program.extend(unless(libc::BPF_JEQ, *number as u32, &refusals));
        }
    }
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program
}

/// Does `then` if the comparison holds, and steps over it if not.
fn unless(comparison: u32, value: u32, then: &[libc::sock_filter]) -> Vec<libc::sock_filter> {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    let mut part = vec![instruction(code, 0, u8::try_from(then.len()).unwrap_or(u8::MAX), value)];
    part.extend_from_slice(then);
    part
}

//! A disk in memory: a tmpfs that is mounted by the launch and charged to the
//! sandbox.

use super::{BYTES_PER_INODE, MIN_INODES};

/// Part of the memory limit that files may take unless a size is asked for, so
/// that a guest that fills its disk is told so and not killed.
const DEFAULT_PART: u64 = 2;

/// Size of a disk for which none was asked; `None` without a memory limit, and
/// then the kernel's own default holds (half of the host's memory).
pub(super) fn default_bytes(memory_limit_bytes: u64) -> Option<u64> {
    (memory_limit_bytes > 0).then_some(memory_limit_bytes / DEFAULT_PART)
}

/// Files such a disk may have: each takes memory even when it is empty.
pub(super) fn inodes(size_bytes: u64) -> u64 {
    (size_bytes / BYTES_PER_INODE).max(MIN_INODES)
}

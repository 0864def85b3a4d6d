//! How much memory the agent keeps.
//!
//! It sits idle in every sandbox, so what it does not use is given back at
//! once. While the bytes of a file pass through, that would be the larger part
//! of the work: each piece would be new memory from the kernel, cleared page by
//! page. So it keeps some until the last such body has passed.

#![expect(unsafe_code, reason = "settings of malloc have no safe interface")]

use std::sync::{Mutex, PoisonError};

/// Larger than any piece of a body, so that those come from the heap.
const MAPPED_FROM_BYTES: i32 = 1 << 20;

/// What may lie unused at the end of the heap.
const KEPT_IDLE_BYTES: i32 = 256 << 10;
const KEPT_BUSY_BYTES: i32 = 4 << 20;

/// Bodies that pass through now.
static PASSING: Mutex<usize> = Mutex::new(0);

/// Before the second thread: one heap for all of them.
pub(crate) fn keep_small() {
    set(libc::M_ARENA_MAX, 1);
    set(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
    set(libc::M_TRIM_THRESHOLD, KEPT_IDLE_BYTES);
}

/// As long as this lives, memory is used again.
pub(crate) struct Passing(());

impl Passing {
    pub(crate) fn begin() -> Self {
        let mut passing = PASSING.lock().unwrap_or_else(PoisonError::into_inner);
        *passing += 1;
        if *passing == 1 {
            set(libc::M_TRIM_THRESHOLD, KEPT_BUSY_BYTES);
        }
        Self(())
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        let mut passing = PASSING.lock().unwrap_or_else(PoisonError::into_inner);
        *passing -= 1;
        if *passing == 0 {
            set(libc::M_TRIM_THRESHOLD, KEPT_IDLE_BYTES);
            trim();
        }
    }
}

fn set(parameter: i32, value: i32) {
    // SAFETY: takes plain numbers, and may be called at any time by any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(parameter, value);
    }
}

fn trim() {
    // SAFETY: gives back only what nobody uses, at any time, by any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

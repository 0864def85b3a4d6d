//! Where the kernel writes a command's pid, in memory that outlives whoever
//! started it: a command can kill its supervisor (`kill -9 -1`) before that has
//! said a word.

#![expect(unsafe_code, reason = "memory that is shared with a fork has no safe interface")]

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{LazyLock, Mutex};

use super::lock;

/// Commands that can be starting at the same time; one page.
const SLOTS: usize = 1024;

struct Page {
    slots: NonNull<AtomicI32>,
    free: Mutex<Vec<usize>>,
}

// SAFETY: the page is never unmapped, and everything in it is atomic.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

static PAGE: LazyLock<Option<Page>> = LazyLock::new(|| {
    // SAFETY: a new mapping that nothing else refers to, of zeroes, which are
    // valid atomics.
    let start = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        libc::mmap(ptr::null_mut(), SLOTS * size_of::<AtomicI32>(), protection, flags, -1, 0)
    };
    let slots = (start != libc::MAP_FAILED).then(|| NonNull::new(start.cast())).flatten()?;
    Some(Page { slots, free: Mutex::new((0..SLOTS).collect()) })
});

/// One word of the page, zero until a pid is there.
pub(super) struct PidSlot(usize);

impl PidSlot {
    /// `None` while very many commands are starting, or without memory.
    pub(super) fn take() -> Option<Self> {
        let page = PAGE.as_ref()?;
        let slot = Self(lock(&page.free).pop()?);
        slot.word()?.store(0, Ordering::Relaxed);
        Some(slot)
    }

    pub(super) fn pid(&self) -> Option<i32> {
        Some(self.word()?.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    pub(super) fn as_ptr(&self) -> *mut libc::pid_t {
        self.word().map_or(ptr::null_mut(), AtomicI32::as_ptr)
    }

    fn word(&self) -> Option<&'static AtomicI32> {
        // SAFETY: the index is one of the page's, which lives for ever.
        PAGE.as_ref().map(|page| unsafe { page.slots.add(self.0).as_ref() })
    }
}

impl Drop for PidSlot {
    fn drop(&mut self) {
        if let Some(page) = PAGE.as_ref() {
            lock(&page.free).push(self.0);
        }
    }
}

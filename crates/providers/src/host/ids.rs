//! Which of the host's uids belong to which sandbox.
//!
//! Every sandbox has 65,536 of its own, so that a process that somehow got out
//! of one would still be a stranger to the files and processes of another.
//! Ranges are claimed from the host in blocks, and handed out from memory.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};

use super::claims::Claims;

/// Uids (and gids) of one sandbox.
pub(crate) const RANGE: u32 = 65_536;

/// First uid given out. What lies below is used by distributions, `/etc/subuid`
/// and systemd (whose containers end at 0x6fff_ffff).
const FIRST: u32 = 0x7000_0000;

/// First uid not given out; the last numbers are the kernel's (-1, -2).
const END: u32 = 0xfffe_0000;

/// Sandboxes per claimed block.
const RANGES_PER_BLOCK: u32 = 64;

const BLOCKS: u32 = (END - FIRST) / RANGE / RANGES_PER_BLOCK;

pub(crate) struct UidRanges {
    /// `None` for an ordinary user, who has but one range, which all his
    /// sandboxes share.
    claims: Option<Claims>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    blocks: BTreeSet<u32>,
    used: BTreeSet<u32>,
}

impl UidRanges {
    /// Takes up the blocks an earlier process of this server claimed; `used`
    /// are the bases of its sandboxes.
    pub(crate) fn open(claims: Claims, used: impl IntoIterator<Item = u32>) -> io::Result<Self> {
        let blocks = claims.held()?.into_iter().collect();
        let state = Mutex::new(State { blocks, used: used.into_iter().collect() });
        Ok(Self { claims: Some(claims), state })
    }

    /// The one range of an ordinary user's spawner, in its own counting.
    pub(crate) fn shared() -> Self {
        Self { claims: None, state: Mutex::default() }
    }

    /// A range nobody uses; `None` when the host has no more.
    pub(crate) fn take(&self) -> io::Result<Option<u32>> {
        let Some(claims) = &self.claims else { return Ok(Some(0)) };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let free = state.blocks.iter().flat_map(|block| bases(*block)).find(|base| !state.used.contains(base));
        let base = if let Some(base) = free {
            base
        } else {
            let Some(block) = claims.take(BLOCKS, |block| !state.blocks.contains(&block))? else {
                return Ok(None);
            };
            state.blocks.insert(block);
            let Some(base) = bases(block).find(|base| !state.used.contains(base)) else { return Ok(None) };
            base
        };
        state.used.insert(base);
        Ok(Some(base))
    }

    pub(crate) fn give_back(&self, base: u32) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).used.remove(&base);
    }

    /// Returns blocks to the host in which nothing is used.
    pub(crate) fn release_unused(&self) -> io::Result<()> {
        let Some(claims) = &self.claims else { return Ok(()) };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { blocks, used } = &mut *state;
        let unused: Vec<u32> =
            blocks.iter().copied().filter(|block| bases(*block).all(|base| !used.contains(&base))).collect();
        for block in unused {
            claims.release(block)?;
            blocks.remove(&block);
        }
        Ok(())
    }
}

fn bases(block: u32) -> impl Iterator<Item = u32> {
    (0..RANGES_PER_BLOCK).map(move |index| FIRST + (block * RANGES_PER_BLOCK + index) * RANGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::claims::Instance;

    #[test]
    fn ranges_never_overlap_and_come_back() {
        let root = tempfile::tempdir().unwrap();
        let claims = || {
            let instance = Instance::open(root.path()).unwrap();
            Claims::open(&root.path().join("run"), "uids", instance).unwrap()
        };
        let ranges = UidRanges::open(claims(), []).unwrap();
        let taken: BTreeSet<u32> = (0..=RANGES_PER_BLOCK).map(|_| ranges.take().unwrap().unwrap()).collect();
        assert_eq!(taken.len(), RANGES_PER_BLOCK as usize + 1);
        assert!(taken.iter().all(|base| base % RANGE == 0 && *base >= FIRST && *base < END));

        let restarted = UidRanges::open(claims(), taken.iter().copied()).unwrap();
        let next = restarted.take().unwrap().unwrap();
        assert!(!taken.contains(&next));
        restarted.give_back(FIRST);
        assert_eq!(restarted.take().unwrap(), Some(FIRST));
    }

    #[test]
    fn the_last_block_ends_before_the_kernels_own_numbers() {
        assert!(bases(BLOCKS - 1).all(|base| base.checked_add(RANGE).is_some_and(|end| end <= END)));
    }
}

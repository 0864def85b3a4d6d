//! Loop file systems that are made ahead.
//!
//! Making one takes a few milliseconds, most of them in mke2fs, which is as
//! long as all the rest of a sandbox. So some are kept ready: of the size that
//! the server expects, and later of the size that was asked for twice in a row.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::loop_image::{self, LoopImage};

pub(super) struct LoopPool {
    formatter: PathBuf,
    /// On which file system the images are.
    directory: PathBuf,
    wanted: usize,
    state: Mutex<State>,
    taken: Notify,
}

#[derive(Default)]
struct State {
    size_bytes: Option<u64>,
    asked_before: Option<u64>,
    ready: VecDeque<LoopImage>,
}

impl LoopPool {
    /// `expected_bytes` is the size that is probably asked for.
    pub(super) fn open(directory: PathBuf, wanted: usize, expected_bytes: Option<u64>) -> Result<Self, String> {
        let formatter = loop_image::find_formatter()?;
        let state = Mutex::new(State { size_bytes: expected_bytes, ..State::default() });
        Ok(Self { formatter, directory, wanted, state, taken: Notify::new() })
    }

    /// A ready disk of this size, or a new one.
    pub(super) async fn take(&self, size_bytes: u64) -> io::Result<LoopImage> {
        let (ready, outdated) = self.lock().take(size_bytes);
        self.taken.notify_one();
        if !outdated.is_empty() {
            // Unmounting is the kernel's work, but takes this thread's time.
            tokio::task::spawn_blocking(move || drop(outdated));
        }
        match ready {
            Some(image) => Ok(image),
            None => LoopImage::make(&self.formatter, &self.directory, size_bytes).await,
        }
    }

    /// Refills after every take until the future is dropped.
    pub(super) async fn refill(&self) {
        loop {
            while let Some(size_bytes) = self.missing() {
                match LoopImage::make(&self.formatter, &self.directory, size_bytes).await {
                    Ok(image) => self.lock().add(image),
                    Err(error) => {
                        tracing::warn!(%error, "cannot keep disks ready");
                        break;
                    }
                }
            }
            self.taken.notified().await;
        }
    }

    /// How many are ready.
    pub(super) fn ready(&self) -> usize {
        self.lock().ready.len()
    }

    /// Frees what is ready.
    pub(super) fn clear(&self) {
        let ready = std::mem::take(&mut self.lock().ready);
        drop(ready);
    }

    fn missing(&self) -> Option<u64> {
        self.lock().missing(self.wanted)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is ready of this size, and what is not worth keeping any more.
    fn take(&mut self, size_bytes: u64) -> (Option<LoopImage>, VecDeque<LoopImage>) {
        let repeated = self.asked_before.replace(size_bytes) == Some(size_bytes);
        let mut outdated = VecDeque::new();
        if repeated && self.size_bytes != Some(size_bytes) {
            self.size_bytes = Some(size_bytes);
            outdated = std::mem::take(&mut self.ready);
        }
        let ready = if self.size_bytes == Some(size_bytes) { self.ready.pop_front() } else { None };
        (ready, outdated)
    }

    /// The size to make one more of.
    fn missing(&self, wanted: usize) -> Option<u64> {
        self.size_bytes.filter(|_| self.ready.len() < wanted)
    }

    /// Keeps a disk, unless another size is wanted meanwhile.
    fn add(&mut self, image: LoopImage) {
        if self.size_bytes == Some(image.size_bytes) {
            self.ready.push_back(image);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_asked_for_twice_in_a_row_is_made_ahead() {
        let mut state = State { size_bytes: Some(10), ..State::default() };
        assert_eq!(state.missing(1), Some(10));
        assert_eq!(state.missing(0), None);
        for size_bytes in [20, 10, 20, 10] {
            state.take(size_bytes);
            assert_eq!(state.missing(1), Some(10), "one that is asked for now and then changes nothing");
        }
        state.take(20);
        state.take(20);
        assert_eq!(state.missing(1), Some(20));
    }

    #[test]
    fn without_demand_nothing_is_made() {
        let mut state = State::default();
        assert_eq!(state.missing(4), None);
        state.take(10);
        assert_eq!(state.missing(4), None);
    }
}

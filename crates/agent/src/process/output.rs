//! What a command wrote, as far back as is kept.
//!
//! Every byte has an offset, counted over stdout and stderr together in the
//! order in which the agent read them. The buffer is bounded: old bytes make
//! way, and whoever asks for them is told how many are gone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};

/// Kept for each command while there is room.
pub(crate) const MAX_BUFFER_BYTES: usize = 1 << 20;

/// Kept for each command once all buffers together are full.
const MIN_BUFFER_BYTES: usize = 64 << 10;

/// All buffers together, about.
const MAX_TOTAL_BYTES: usize = 32 << 20;

/// Alternating one-byte writes to stdout and stderr must not cost more in
/// bookkeeping than in bytes.
const MAX_CHUNKS: usize = 4096;

/// Writes of one stream are joined up to this size, so that a command that
/// writes byte by byte does not cost an allocation for each.
const JOIN_BYTES: usize = 4096;

static TOTAL_BYTES: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputKind {
    Stdout,
    Stderr,
    Terminal,
}

/// One answer to "what comes after this offset".
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Data(OutputKind, Bytes),
    /// This many bytes are no longer held.
    Dropped(u64),
    Nothing,
}

/// Whether all buffers together hold more than they should.
pub(crate) fn is_total_exceeded() -> bool {
    TOTAL_BYTES.load(Ordering::Relaxed) > MAX_TOTAL_BYTES
}

#[derive(Debug, Default)]
pub(crate) struct OutputBuffer {
    chunks: VecDeque<Chunk>,
    /// Offset of the first byte held.
    start: u64,
    /// Offset after the last byte written.
    end: u64,
}

#[derive(Debug)]
struct Chunk {
    offset: u64,
    kind: OutputKind,
    bytes: Bytes,
}

impl OutputBuffer {
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// `protected_from` is what a reader still wants: that goes only when the
    /// buffer itself is full, not when all buffers together are.
    pub(crate) fn push(&mut self, kind: OutputKind, bytes: Bytes, protected_from: Option<u64>) {
        let length = bytes.len();
        TOTAL_BYTES.fetch_add(length, Ordering::Relaxed);
        match self.chunks.back_mut() {
            Some(last) if last.kind == kind && last.bytes.len() + length <= JOIN_BYTES => {
                let mut joined = BytesMut::with_capacity(last.bytes.len() + length);
                joined.extend_from_slice(&last.bytes);
                joined.extend_from_slice(&bytes);
                last.bytes = joined.freeze();
            }
            _ => self.chunks.push_back(Chunk { offset: self.end, kind, bytes }),
        }
        self.end += length as u64;
        self.trim(protected_from.unwrap_or(self.end));
    }

    /// Gives up what is held; readers are told.
    pub(crate) fn clear(&mut self) {
        self.chunks.clear();
        TOTAL_BYTES.fetch_sub((self.end - self.start) as usize, Ordering::Relaxed);
        self.start = self.end;
    }

    /// At most `max` bytes of one stream from `offset` on.
    pub(crate) fn read(&self, offset: u64, max: usize) -> Read {
        if offset < self.start {
            return Read::Dropped(self.start - offset);
        }
        let next = self.chunks.partition_point(|chunk| chunk.offset + chunk.bytes.len() as u64 <= offset);
        let Some(chunk) = self.chunks.get(next) else { return Read::Nothing };
        let from = (offset - chunk.offset) as usize;
        let to = chunk.bytes.len().min(from.saturating_add(max));
        Read::Data(chunk.kind, chunk.bytes.slice(from..to))
    }

    fn trim(&mut self, protected_from: u64) {
        let crowded = is_total_exceeded();
        while let Some(oldest) = self.chunks.front()
            && self.chunks.len() > 1
        {
            let held = (self.end - self.start) as usize;
            let wanted = oldest.offset + oldest.bytes.len() as u64 > protected_from;
            let limit = if crowded && !wanted { MIN_BUFFER_BYTES } else { MAX_BUFFER_BYTES };
            if held <= limit && self.chunks.len() <= MAX_CHUNKS {
                break;
            }
            let length = oldest.bytes.len();
            self.chunks.pop_front();
            self.start += length as u64;
            TOTAL_BYTES.fetch_sub(length, Ordering::Relaxed);
        }
    }
}

impl Drop for OutputBuffer {
    fn drop(&mut self) {
        TOTAL_BYTES.fetch_sub((self.end - self.start) as usize, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(buffer: &OutputBuffer, mut offset: u64) -> (Vec<u8>, u64) {
        let (mut bytes, mut dropped) = (Vec::new(), 0);
        loop {
            match buffer.read(offset, 1000) {
                Read::Data(_, data) => {
                    offset += data.len() as u64;
                    bytes.extend_from_slice(&data);
                }
                Read::Dropped(count) => {
                    offset += count;
                    dropped += count;
                }
                Read::Nothing => return (bytes, dropped),
            }
        }
    }

    #[test]
    fn every_byte_is_found_at_its_offset() {
        let mut buffer = OutputBuffer::default();
        for byte in 0..=255u8 {
            buffer.push(OutputKind::Stdout, Bytes::copy_from_slice(&[byte]), None);
        }
        buffer.push(OutputKind::Stderr, Bytes::from_static(b"err"), None);
        assert_eq!(buffer.chunks.len(), 2, "small writes are joined");
        assert_eq!(buffer.read(255, 10), Read::Data(OutputKind::Stdout, Bytes::from_static(&[255])));
        assert_eq!(buffer.read(257, 10), Read::Data(OutputKind::Stderr, Bytes::from_static(b"rr")));
        assert_eq!(buffer.read(259, 10), Read::Nothing);
        assert_eq!(buffer.read(9999, 10), Read::Nothing);
        assert_eq!(read_all(&buffer, 0).0.len(), 259);
    }

    #[test]
    fn old_bytes_make_way_and_are_counted() {
        let mut buffer = OutputBuffer::default();
        let written = 3 * MAX_BUFFER_BYTES;
        for _ in 0..written / 8192 {
            buffer.push(OutputKind::Stdout, Bytes::from(vec![b'x'; 8192]), None);
        }
        let (bytes, dropped) = read_all(&buffer, 0);
        assert_eq!(bytes.len() as u64 + dropped, written as u64);
        assert!(dropped > 0 && bytes.len() <= MAX_BUFFER_BYTES);
    }

    #[test]
    fn alternating_writes_stay_bounded() {
        let mut buffer = OutputBuffer::default();
        for _ in 0..MAX_CHUNKS {
            buffer.push(OutputKind::Stdout, Bytes::from_static(b"o"), None);
            buffer.push(OutputKind::Stderr, Bytes::from_static(b"e"), None);
        }
        assert!(buffer.chunks.len() <= MAX_CHUNKS);
        assert_eq!(read_all(&buffer, 0).1, MAX_CHUNKS as u64);
    }
}

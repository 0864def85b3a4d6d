//! Content that is cheap to make, the same every time, and that shows cuts,
//! repeats and swapped blocks: pseudo-random bytes in a stream.

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use stacyvm_sandbox::{ByteStream, SessionError};

use crate::Failure;

const CHUNK_BYTES: usize = 64 << 10;

/// A stream of `length` pseudo-random bytes.
pub(crate) fn stream_of(length: u64, seed: u64) -> ByteStream {
    Box::pin(stream::iter(Chunks::new(length, seed)).map(Ok))
}

/// SHA-256 of what [`stream_of`] gives, in hexadecimal.
pub(crate) fn digest_of(length: u64, seed: u64) -> String {
    let mut hash = Sha256::new();
    for chunk in Chunks::new(length, seed) {
        hash.update(&chunk);
    }
    hex(&hash.finalize())
}

/// Length and SHA-256 of a stream, read to its end without keeping it.
pub(crate) async fn measure(mut stream: ByteStream) -> Result<(u64, String), Failure> {
    let mut hash = Sha256::new();
    let mut length = 0;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        length += chunk.len() as u64;
        hash.update(&chunk);
    }
    Ok((length, hex(&hash.finalize())))
}

/// All of a stream, which must not be longer than `most`.
pub(crate) async fn collect(mut stream: ByteStream, most: usize) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    while let Some(chunk) = stream.next().await {
        content.extend_from_slice(&chunk?);
        if content.len() > most {
            return Err(Failure(format!("the content is longer than {most} bytes")));
        }
    }
    Ok(content)
}

/// One chunk as a stream.
pub(crate) fn once(content: impl Into<Bytes>) -> ByteStream {
    let content = content.into();
    Box::pin(stream::once(async move { Ok::<_, SessionError>(content) }))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('?'));
        text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('?'));
        text
    })
}

pub(crate) fn sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

struct Chunks {
    left: u64,
    state: u64,
}

impl Chunks {
    fn new(length: u64, seed: u64) -> Self {
        Self { left: length, state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }
}

impl Iterator for Chunks {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.left == 0 {
            return None;
        }
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while chunk.len() < CHUNK_BYTES {
            // xorshift64*: its numbers need no quality, only no short period.
            self.state ^= self.state >> 12;
            self.state ^= self.state << 25;
            self.state ^= self.state >> 27;
            chunk.extend_from_slice(&self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        chunk.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= chunk.len() as u64;
        Some(chunk.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_has_the_promised_length_and_digest() {
        for length in [0, 1, CHUNK_BYTES as u64, CHUNK_BYTES as u64 + 1, 1 << 20] {
            let (measured, digest) = measure(stream_of(length, 7)).await.unwrap();
            assert_eq!((measured, digest), (length, digest_of(length, 7)));
        }
        assert_ne!(digest_of(1000, 1), digest_of(1000, 2));
    }
}

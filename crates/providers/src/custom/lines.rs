//! Lines of JSON from a stream of bytes, however they are cut.

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;

use super::error::CallError;

/// One line, at most. There is no smaller limit, because published backends
/// write a command's whole output as one; without any, one could fill memory.
pub(super) const LINE_BYTES_MAX: usize = 64 << 20;

pub(super) struct Lines<S> {
    stream: S,
    pending: BytesMut,
    /// Bytes of `pending` that hold no newline.
    searched: usize,
    most: usize,
}

impl<S: Stream<Item = Result<Bytes, CallError>> + Unpin> Lines<S> {
    pub(super) fn new(stream: S, most: usize) -> Self {
        Self { stream, pending: BytesMut::new(), searched: 0, most }
    }

    /// The next line that is a `T`; blank ones and others are skipped, as the
    /// published protocol has it. `None` at the end.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CallError> {
        while let Some(line) = self.line().await? {
            if let Ok(value) = serde_json::from_slice(&line) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    async fn line(&mut self) -> Result<Option<BytesMut>, CallError> {
        loop {
            if let Some(at) = self.pending[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(self.searched + at + 1);
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.pending.len();
            if self.pending.len() > self.most {
                return Err(CallError::Garbage("a line of the stream is too long"));
            }
            match self.stream.next().await {
                Some(piece) => self.pending.extend_from_slice(&piece?),
                None if self.pending.is_empty() => return Ok(None),
                None => {
                    self.searched = 0;
                    return Ok(Some(self.pending.split()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use stacyvm_api::backend::StreamLine;

    use super::*;

    fn lines(pieces: &[&'static str], most: usize) -> Lines<impl Stream<Item = Result<Bytes, CallError>> + Unpin> {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece.as_bytes()))).collect();
        Lines::new(stream::iter(pieces), most)
    }

    #[tokio::test]
    async fn lines_are_put_together_and_what_is_none_is_skipped() {
        let mut lines = lines(
            &[
                "{\"stream\":\"stdout\",\"da",
                "ta\":\"one\"}\n\n{nonsense}\n",
                "{\"stream\":\"stderr\",\"data\":\"two\"}",
            ],
            100,
        );
        let mut seen = Vec::new();
        while let Some(line) = lines.next::<StreamLine>().await.unwrap() {
            seen.push((line.stream, line.data.unwrap_or_default()));
        }
        let expected = [("stdout", "one"), ("stderr", "two")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(seen, expected);
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_an_error() {
        let mut lines = lines(&["aaaaaa", "aaaaaa"], 10);
        assert!(matches!(lines.next::<StreamLine>().await, Err(CallError::Garbage(_))));
    }
}

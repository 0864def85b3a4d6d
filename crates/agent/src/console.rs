//! The last lines that commands wrote.
//!
//! Kept as raw pieces and cut into lines only when somebody asks: commands
//! write far more often than anybody looks.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

/// Bytes kept.
const MAX_BYTES: usize = 256 << 10;

/// Pieces kept; small ones of one source are joined.
const MAX_PIECES: usize = 2048;

/// Lines given out at most.
pub(crate) const MAX_LINES: usize = 1000;

/// A longer line is cut.
const MAX_LINE_BYTES: usize = 8 << 10;

const JOIN_BYTES: usize = 1024;

/// Names one stream of one command, so that lines of two are not mixed.
pub(crate) type Source = u64;

#[derive(Debug, Default)]
pub(crate) struct Console {
    pieces: VecDeque<Piece>,
    bytes: usize,
}

#[derive(Debug)]
struct Piece {
    source: Source,
    bytes: Bytes,
}

impl Console {
    pub(crate) fn push(&mut self, source: Source, bytes: &Bytes) {
        let keep = bytes.slice(bytes.len().saturating_sub(MAX_BYTES)..);
        self.bytes += keep.len();
        match self.pieces.back_mut() {
            Some(last) if last.source == source && last.bytes.len() + keep.len() <= JOIN_BYTES => {
                last.bytes = [&last.bytes[..], &keep[..]].concat().into();
            }
            // A copy, so that a short piece does not hold a large read buffer.
            _ if keep.len() <= JOIN_BYTES => {
                self.pieces.push_back(Piece { source, bytes: Bytes::copy_from_slice(&keep) });
            }
            _ => self.pieces.push_back(Piece { source, bytes: keep }),
        }
        while self.bytes > MAX_BYTES || self.pieces.len() > MAX_PIECES {
            let Some(oldest) = self.pieces.pop_front() else { break };
            self.bytes -= oldest.bytes.len();
        }
    }

    /// At most `count` lines, oldest first. A line that is not finished stands
    /// where its last piece came.
    pub(crate) fn lines(&self, count: usize) -> Vec<String> {
        let mut lines: Vec<(usize, String)> = Vec::new();
        let mut unfinished: HashMap<Source, (usize, Vec<u8>)> = HashMap::new();
        for (order, piece) in self.pieces.iter().enumerate() {
            let (last, line) = unfinished.entry(piece.source).or_default();
            *last = order;
            for part in piece.bytes.split_inclusive(|&byte| byte == b'\n') {
                let (text, finished) = match part.split_last() {
                    Some((b'\n', text)) => (text, true),
                    _ => (part, false),
                };
                let room = MAX_LINE_BYTES.saturating_sub(line.len()).min(text.len());
                line.extend_from_slice(&text[..room]);
                if finished {
                    lines.push((order, as_text(line)));
                    line.clear();
                }
            }
        }
        let rest = unfinished.into_values().filter(|(_, line)| !line.is_empty());
        lines.extend(rest.map(|(order, line)| (order, as_text(&line))));
        lines.sort_by_key(|(order, _)| *order);
        let wanted = count.min(MAX_LINES);
        lines.drain(..lines.len().saturating_sub(wanted));
        lines.into_iter().map(|(_, line)| line).collect()
    }
}

fn as_text(line: &[u8]) -> String {
    String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_two_commands_are_not_mixed() {
        let mut console = Console::default();
        console.push(1, &Bytes::from_static(b"one "));
        console.push(2, &Bytes::from_static(b"two\r\nrest"));
        console.push(1, &Bytes::from_static(b"more\n"));
        assert_eq!(console.lines(10), ["two", "rest", "one more"]);
        assert_eq!(console.lines(1), ["one more"]);
    }

    #[test]
    fn stays_bounded() {
        let mut console = Console::default();
        for index in 0..200_000u64 {
            console.push(index % 3, &Bytes::from(format!("line {index}\n")));
        }
        assert!(console.bytes <= MAX_BYTES && console.pieces.len() <= MAX_PIECES);
        let lines = console.lines(usize::MAX);
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("line 199999"));

        console.push(9, &Bytes::from(vec![b'x'; 10 * MAX_BYTES]));
        assert_eq!(console.lines(1)[0].len(), MAX_LINE_BYTES);
    }
}

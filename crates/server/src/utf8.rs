//! Bytes into text, piece by piece, without cutting characters in half.

use std::borrow::Cow;

/// Decodes one stream of bytes. A character that a read cut off is held back
/// until its other bytes arrive; only bytes that can never be valid become
/// U+FFFD.
#[derive(Debug, Default)]
pub(crate) struct Utf8Decoder {
    /// At most three bytes: a character's beginning.
    tail: Vec<u8>,
}

impl Utf8Decoder {
    pub(crate) fn push<'a>(&mut self, bytes: &'a [u8]) -> Cow<'a, str> {
        if self.tail.is_empty() {
            return match std::str::from_utf8(bytes) {
                Ok(text) => Cow::Borrowed(text),
                Err(_) => Cow::Owned(self.decode(bytes)),
            };
        }
        let mut joined = std::mem::take(&mut self.tail);
        joined.extend_from_slice(bytes);
        Cow::Owned(self.decode(&joined))
    }

    /// Bytes held back.
    pub(crate) fn pending_len(&self) -> u64 {
        self.tail.len() as u64
    }

    /// What is still held back, when no more bytes will come.
    pub(crate) fn finish(&mut self) -> Option<String> {
        let tail = std::mem::take(&mut self.tail);
        (!tail.is_empty()).then(|| String::from_utf8_lossy(&tail).into_owned())
    }

    fn decode(&mut self, mut bytes: &[u8]) -> String {
        let mut text = String::with_capacity(bytes.len());
        loop {
            let error = match std::str::from_utf8(bytes) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => error,
            };
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            text.push_str(&String::from_utf8_lossy(valid));
            let Some(invalid_len) = error.error_len() else {
                self.tail = rest.to_vec();
                return text;
            };
            text.push(char::REPLACEMENT_CHARACTER);
            bytes = &rest[invalid_len..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(pieces: &[&[u8]]) -> Vec<String> {
        let mut decoder = Utf8Decoder::default();
        let mut texts: Vec<String> = pieces.iter().map(|piece| decoder.push(piece).into_owned()).collect();
        texts.extend(decoder.finish());
        texts
    }

    #[test]
    fn characters_cut_by_reads_arrive_whole() {
        assert_eq!(decode(&["plain".as_bytes()]), ["plain"]);
        assert_eq!(decode(&[b"a\xe2", b"\x82", b"\xac!"]), ["a", "", "\u{20ac}!"]);
        assert_eq!(decode(&[b"\xf0\x9f", b"\xa6\x80"]), ["", "\u{1f980}"]);
    }

    #[test]
    fn bytes_that_are_no_text_are_marked_and_nothing_else_is_lost() {
        assert_eq!(decode(&[b"a\xffb"]), ["a\u{fffd}b"]);
        assert_eq!(decode(&[b"a\xe2", b"b"]), ["a", "\u{fffd}b"]);
        assert_eq!(decode(&[b"a\xe2\x82"]), ["a", "\u{fffd}"]);
        assert_eq!(decode(&[b"\xff\xfe", b"\xc3\xa9"]), ["\u{fffd}\u{fffd}", "\u{e9}"]);
    }

    #[test]
    fn every_cut_of_a_text_gives_the_text_back() {
        let text = "z\u{df}\u{6c34}\u{1f980}\u{301}".as_bytes();
        for cut in 0..=text.len() {
            let joined = decode(&[&text[..cut], &text[cut..]]).concat();
            assert_eq!(joined.as_bytes(), text, "cut at {cut}");
        }
    }
}

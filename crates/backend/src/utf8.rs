//! Text from bytes that arrive in pieces: a character cut in two is put
//! together again, what is none becomes the replacement character.

#[derive(Debug, Default)]
pub(crate) struct Decoder {
    rest: Vec<u8>,
}

impl Decoder {
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let cut = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            // Only an end that may still become a character is kept.
            Err(_) => (self.rest.len().saturating_sub(3)..self.rest.len())
                .find(|at| matches!(std::str::from_utf8(&self.rest[*at..]), Err(error) if error.valid_up_to() == 0 && error.error_len().is_none()))
                .unwrap_or(self.rest.len()),
        };
        let rest = self.rest.split_off(cut);
        let text = String::from_utf8_lossy(&self.rest).into_owned();
        self.rest = rest;
        text
    }

    pub(crate) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_survive_any_cut() {
        let text = "a ü 漢 🦀 z";
        for cut in 0..=text.len() {
            let mut decoder = Decoder::default();
            let (one, two) = text.as_bytes().split_at(cut);
            assert_eq!(decoder.push(one) + &decoder.push(two) + &decoder.finish(), text, "{cut}");
        }
    }

    #[test]
    fn what_is_no_text_is_replaced() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xffb") + &decoder.push(b"\xe6\xbc") + &decoder.finish(), "a\u{fffd}b\u{fffd}");
    }
}

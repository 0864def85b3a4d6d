//! Signed permission to open one port of one sandbox for a while.
//!
//! `{port}.{end}.{signature}`: the signature is an HMAC-SHA256 over sandbox,
//! port and end under a key that only this server can derive. The same text is
//! the token of a link, a program's header, and the value of the cookie that a
//! browser gets for a link, so that a session never outlives its link.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use stacyvm_api::Timestamp;

use super::address::Address;

/// What the signing key is derived for.
pub(super) const KEY_PURPOSE: &str = "preview tokens";

/// Longer texts are not looked at.
const MAX_BYTES: usize = 128;

/// Makes and recognises tokens.
#[derive(Clone)]
pub(crate) struct Signer {
    mac: Hmac<Sha256>,
}

impl Signer {
    pub(super) fn new(key: [u8; 32]) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mac = Hmac::new_from_slice(&key).expect("any key length is valid");
        Self { mac }
    }

    /// Works until `end`, which is cut to whole seconds.
    pub(crate) fn sign(&self, address: &Address, end: Timestamp) -> String {
        let end = end.unix_ms().div_euclid(1000);
        let signature = self.signed(address, end).finalize().into_bytes();
        format!("{}.{end}.{}", address.port, BASE64.encode(signature))
    }

    /// Until when the token opens this port; `None` when it does not.
    pub(crate) fn verify(&self, token: &[u8], address: &Address, now: Timestamp) -> Option<Timestamp> {
        let text = std::str::from_utf8(token.get(..token.len().min(MAX_BYTES + 1))?).ok()?;
        if text.len() > MAX_BYTES {
            return None;
        }
        let mut parts = text.split('.');
        let (Some(port), Some(end), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        if port.parse() != Ok(address.port) {
            return None;
        }
        let end: i64 = end.parse().ok()?;
        let signature = BASE64.decode(signature).ok()?;
        self.signed(address, end).verify_slice(&signature).ok()?;
        let end = Timestamp::from_unix_ms(end.checked_mul(1000)?);
        (now < end).then_some(end)
    }

    /// The length of the id goes first, so that no two triples give the same
    /// message.
    fn signed(&self, address: &Address, end: i64) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(&(address.id.as_str().len() as u64).to_be_bytes());
        mac.update(address.id.as_str().as_bytes());
        mac.update(&address.port.to_be_bytes());
        mac.update(&end.to_be_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(id: char, port: u16) -> Address {
        Address { id: format!("sb-{}", id.to_string().repeat(20)).parse().unwrap(), port }
    }

    #[test]
    fn a_token_opens_its_port_until_its_end() {
        let signer = Signer::new([7; 32]);
        let (now, end) = (Timestamp::from_unix_ms(1_000_000), Timestamp::from_unix_ms(1_060_000));
        let token = signer.sign(&address('a', 3000), end);
        let opens = |token: &str, address: &Address, now| signer.verify(token.as_bytes(), address, now);
        assert_eq!(opens(&token, &address('a', 3000), now), Some(end));
        assert_eq!(opens(&token, &address('a', 3001), now), None, "another port");
        assert_eq!(opens(&token, &address('b', 3000), now), None, "another sandbox");
        assert_eq!(opens(&token, &address('a', 3000), end), None, "its end has come");
        assert_eq!(Signer::new([8; 32]).verify(token.as_bytes(), &address('a', 3000), now), None, "another server");
    }

    #[test]
    fn what_was_changed_or_made_up_opens_nothing() {
        let signer = Signer::new([7; 32]);
        let (now, port) = (Timestamp::from_unix_ms(0), address('a', 3000));
        let token = signer.sign(&port, Timestamp::from_unix_ms(60_000));
        let later = token.replacen(".60.", ".61.", 1);
        let long = format!("{token}{}", "A".repeat(200));
        let cut = &token[..token.len() - 1];
        let moved = token.replacen("3000.", "3001.", 1);
        for text in [&later, &long, cut, &moved, "", ".", "..", "3000.60.", "3000.60", "3000.x.AAAA", "3000.60.AAAA.x"]
        {
            assert_eq!(signer.verify(text.as_bytes(), &port, now), None, "{text}");
            assert_eq!(signer.verify(text.as_bytes(), &address('a', 3001), now), None, "{text}");
        }
        assert_eq!(signer.verify(b"\xff\xfe", &port, now), None);
    }
}

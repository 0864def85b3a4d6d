//! Signed permission to open one port of one sandbox for a while.
//!
//! `{port}.{end}.{signature}`, or `{port}.{end}.{key}.{signature}` when it was
//! made with a stored API key: the signature is an HMAC-SHA256 over sandbox, port,
//! end and the key's id under a key that only this server can derive. The same
//! text is the token of a link, a program's header, and the value of the cookie
//! that a browser gets for a link, so that a session never outlives its link, nor
//! either of them the key.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use stacyvm_api::{KeyId, Timestamp};

use super::address::Address;

/// What the signing key is derived for.
pub(super) const KEY_PURPOSE: &str = "preview tokens";

/// Longer texts are not looked at.
const MAX_BYTES: usize = 128;

/// What a token permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Permit {
    pub(super) end: Timestamp,
    /// The stored key that it was made with. Whether that is still valid is the
    /// caller's to look at.
    pub(super) key: Option<KeyId>,
}

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
    pub(crate) fn sign(&self, address: &Address, end: Timestamp, key: Option<&KeyId>) -> String {
        let end = end.unix_ms().div_euclid(1000);
        let signature = BASE64.encode(self.signed(address, end, key).finalize().into_bytes());
        let key = key.map(|key| format!("{key}.")).unwrap_or_default();
        format!("{}.{end}.{key}{signature}", address.port)
    }

    /// What the token permits on this port; `None` when it is nothing.
    pub(super) fn verify(&self, token: &[u8], address: &Address, now: Timestamp) -> Option<Permit> {
        let text = std::str::from_utf8(token.get(..token.len().min(MAX_BYTES + 1))?).ok()?;
        if text.len() > MAX_BYTES {
            return None;
        }
        let parts: Vec<&str> = text.split('.').collect();
        let (port, end, key, signature) = match parts.as_slice() {
            [port, end, signature] => (port, end, None, signature),
            [port, end, key, signature] => (port, end, Some(key.parse().ok()?), signature),
            _ => return None,
        };
        if port.parse() != Ok(address.port) {
            return None;
        }
        let end: i64 = end.parse().ok()?;
        let signature = BASE64.decode(signature).ok()?;
        self.signed(address, end, key.as_ref()).verify_slice(&signature).ok()?;
        let end = Timestamp::from_unix_ms(end.checked_mul(1000)?);
        (now < end).then_some(Permit { end, key })
    }

    /// The length of the sandbox's id goes first and the key's id last, so that no
    /// two permits give the same message.
    fn signed(&self, address: &Address, end: i64, key: Option<&KeyId>) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(&(address.id.as_str().len() as u64).to_be_bytes());
        mac.update(address.id.as_str().as_bytes());
        mac.update(&address.port.to_be_bytes());
        mac.update(&end.to_be_bytes());
        mac.update(key.map(|key| key.as_str().as_bytes()).unwrap_or_default());
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
        let token = signer.sign(&address('a', 3000), end, None);
        let permit = Permit { end, key: None };
        let opens = |token: &str, address: &Address, now| signer.verify(token.as_bytes(), address, now);
        assert_eq!(opens(&token, &address('a', 3000), now), Some(permit));
        assert_eq!(opens(&token, &address('a', 3001), now), None, "another port");
        assert_eq!(opens(&token, &address('b', 3000), now), None, "another sandbox");
        assert_eq!(opens(&token, &address('a', 3000), end), None, "its end has come");
        assert_eq!(Signer::new([8; 32]).verify(token.as_bytes(), &address('a', 3000), now), None, "another server");
    }

    #[test]
    fn what_was_changed_or_made_up_opens_nothing() {
        let signer = Signer::new([7; 32]);
        let (now, port) = (Timestamp::from_unix_ms(0), address('a', 3000));
        let token = signer.sign(&port, Timestamp::from_unix_ms(60_000), None);
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

    #[test]
    fn the_key_of_a_token_cannot_be_taken_out_or_exchanged() {
        let signer = Signer::new([7; 32]);
        let (now, end, port) = (Timestamp::from_unix_ms(0), Timestamp::from_unix_ms(60_000), address('a', 3000));
        let (key, other) = (KeyId::random(), KeyId::random());
        let token = signer.sign(&port, end, Some(&key));
        let opens = |token: &str| signer.verify(token.as_bytes(), &port, now);
        assert_eq!(opens(&token), Some(Permit { end, key: Some(key.clone()) }));
        let without = token.replacen(&format!("{key}."), "", 1);
        let exchanged = token.replacen(key.as_str(), other.as_str(), 1);
        let added = signer.sign(&port, end, None).replacen(".60.", &format!(".60.{key}."), 1);
        for text in
            [without, exchanged, added, token.replacen(key.as_str(), "", 1), token.replacen(key.as_str(), "x", 1)]
        {
            assert_eq!(opens(&text), None, "{text}");
        }
    }
}

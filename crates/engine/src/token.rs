//! Tokens of agents: derived, never stored.

use std::fmt::Write as _;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use stacyvm_api::SandboxId;

use crate::options::ServerSecret;

/// What the agent of a sandbox demands: hex HMAC-SHA256 of the server's secret
/// over the id and the generation. The length of the id goes first, so that no
/// two pairs give the same message.
pub(crate) fn agent_token(secret: &ServerSecret, id: &SandboxId, generation: u32) -> String {
    let mut mac = keyed(secret);
    mac.update(&(id.as_str().len() as u64).to_be_bytes());
    mac.update(id.as_str().as_bytes());
    mac.update(&generation.to_be_bytes());
    hex(&mac.finalize().into_bytes())
}

/// A key for something else than agents: HMAC-SHA256 of the server's secret
/// over what it is for. No id is as long as the number that goes first, so that
/// no purpose gives what an agent's token is made from.
pub(crate) fn derived_key(secret: &ServerSecret, purpose: &str) -> [u8; 32] {
    let mut mac = keyed(secret);
    mac.update(&u64::MAX.to_be_bytes());
    mac.update(purpose.as_bytes());
    mac.finalize().into_bytes().into()
}

#[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
fn keyed(secret: &ServerSecret) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(secret.bytes()).expect("any key length is valid")
}

/// Hex SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_by_secret_id_and_generation() {
        let (secret, id) = (ServerSecret::new([7; 32]), "sb-00000000000000000000".parse().unwrap());
        let token = agent_token(&secret, &id, 1);
        assert_eq!(token.len(), 64);
        assert_eq!(token, agent_token(&secret, &id, 1));
        assert_ne!(token, agent_token(&secret, &id, 2));
        assert_ne!(token, agent_token(&ServerSecret::new([8; 32]), &id, 1));
        assert_ne!(token, agent_token(&secret, &"sb-00000000000000000001".parse().unwrap(), 1));
    }

    #[test]
    fn derived_keys_differ_by_secret_and_purpose() {
        let secret = ServerSecret::new([7; 32]);
        let key = derived_key(&secret, "previews");
        assert_eq!(key, derived_key(&secret, "previews"));
        assert_ne!(key, derived_key(&secret, "other"));
        assert_ne!(key, derived_key(&ServerSecret::new([8; 32]), "previews"));
    }
}

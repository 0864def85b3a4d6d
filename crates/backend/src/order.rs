//! What may be ordered: a client is not trusted to have looked at it.

use std::fmt::Display;
use std::ops::RangeInclusive;

use stacyvm_api::backend::SpawnRequest;

use crate::error::{Answer, Refusal};

const IMAGE_BYTES_MAX: usize = 512;
const USER_BYTES_MAX: usize = 64;
const HOSTNAME_BYTES_MAX: usize = 64;
const TOKEN_BYTES_MAX: usize = 512;
const DESTINATIONS_MAX: usize = 128;
/// As of the server: less starts nothing, more overflows or does not exist.
const MEMORY_MIB: RangeInclusive<u64> = 16..=1 << 24;
const DISK_MIB: RangeInclusive<u64> = 1..=1 << 24;
const PIDS: RangeInclusive<u64> = 16..=1 << 22;
const VCPUS: RangeInclusive<f64> = 0.01..=8192.0;

/// Refuses what no sandbox can be made from. Zero means the default.
pub(crate) fn check(request: &SpawnRequest) -> Answer<()> {
    if request.image.trim().is_empty() {
        return Err(Refusal::bad_request("an image is required"));
    }
    name("image", &request.image, IMAGE_BYTES_MAX)?;
    range("memory_mb", request.memory_mb, &MEMORY_MIB)?;
    range("vcpus", request.vcpus, &VCPUS)?;
    range("disk_size_mb", request.disk_size_mb, &DISK_MIB)?;
    let Some(spec) = &request.spec else { return Ok(()) };
    range("pids_limit", spec.pids_limit, &PIDS)?;
    name("user", spec.user.as_deref().unwrap_or_default(), USER_BYTES_MAX)?;
    name("hostname", spec.hostname.as_deref().unwrap_or_default(), HOSTNAME_BYTES_MAX)?;
    name("agent_token", spec.agent_token.as_deref().unwrap_or_default(), TOKEN_BYTES_MAX)?;
    if spec.network.as_ref().is_some_and(|network| network.allow.len() > DESTINATIONS_MAX) {
        return Err(Refusal::bad_request(format!("network.allow has at most {DESTINATIONS_MAX} destinations")));
    }
    Ok(())
}

/// The text is not repeated: it may be anything, and of any length.
fn name(what: &str, text: &str, most: usize) -> Answer<()> {
    if text.len() <= most && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Refusal::bad_request(format!("{what} has at most {most} bytes and no control characters")))
}

fn range<T: PartialOrd + Default + Display>(what: &str, asked: Option<T>, allowed: &RangeInclusive<T>) -> Answer<()> {
    match asked {
        Some(asked) if asked != T::default() && !allowed.contains(&asked) => {
            let (least, most) = (allowed.start(), allowed.end());
            Err(Refusal::bad_request(format!("{what} has to be between {least} and {most}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_sandbox_can_be_made_from_is_refused_without_repeating_it() {
        let order = || SpawnRequest { image: "alpine".to_owned(), ..SpawnRequest::default() };
        let zeros = SpawnRequest { memory_mb: Some(0), vcpus: Some(0.0), disk_size_mb: Some(0), ..order() };
        let most = SpawnRequest { memory_mb: Some(1 << 24), vcpus: Some(8192.0), ..order() };
        for fine in [order(), zeros, most] {
            check(&fine).unwrap();
        }
        for bad in [
            SpawnRequest { image: " ".to_owned(), ..order() },
            SpawnRequest { image: "a".repeat(IMAGE_BYTES_MAX + 1), ..order() },
            SpawnRequest { image: "al\0pine".to_owned(), ..order() },
            SpawnRequest { memory_mb: Some(17_592_186_044_416), ..order() },
            SpawnRequest { memory_mb: Some(15), ..order() },
            SpawnRequest { vcpus: Some(1e308), ..order() },
            SpawnRequest { vcpus: Some(-1.0), ..order() },
            SpawnRequest { vcpus: Some(f64::NAN), ..order() },
            SpawnRequest { disk_size_mb: Some(u64::MAX), ..order() },
        ] {
            let refusal = check(&bad).expect_err("it is refused");
            assert!(refusal.failure.message.len() < 100, "{refusal:?}");
        }
    }
}

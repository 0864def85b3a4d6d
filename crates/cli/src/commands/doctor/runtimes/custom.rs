//! Sandboxes of a service elsewhere: what it needs of this host is a way there
//! and a key.

use super::Wishes;
use crate::check::Check;
use crate::commands::serve::examine_one;

/// Findings of the provider's, which are about its backend.
const PREFIX: &str = "custom.";

pub(super) async fn check(wishes: &Wishes<'_>) -> Vec<Check> {
    const NAME: &str = "custom.base_url";
    const FIX: &str = "set providers.custom.base_url to a backend's address, such as https://sandboxes.example.com";
    let address = wishes.text("providers.custom.base_url");
    if address.is_empty() {
        return vec![Check::fail(NAME, "no backend is configured", FIX)];
    }
    let Some(server) = &wishes.server else {
        return vec![Check::fail(NAME, "the configuration cannot be read", "stacyvm config lint")];
    };
    match examine_one("custom", server.config, server.environment, server.demands_key).await {
        Ok(report) => {
            let mut checks = vec![Check::pass(NAME, format!("is {address}"))];
            checks.extend(report.findings.into_iter().map(|finding| {
                let check = Check::from(finding);
                Check { name: format!("{PREFIX}{}", check.name), ..check }
            }));
            checks
        }
        Err(error) => vec![Check::fail(NAME, format!("{error:#}"), FIX)],
    }
}

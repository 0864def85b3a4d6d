//! Where previews are, and which site a host is of, as browsers see it.
//!
//! Hosts below one registrable domain share what is the site's: cookies that
//! any of them sets for all, and requests that count as the site's own. What
//! runs in a sandbox is a stranger, so previews must be of another site than
//! the API and the pages that may call it.

use std::net::IpAddr;

use stacyvm_server::PreviewOptions;

use crate::config::schema::Server;

/// A host that is of one site with previews.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    pub(crate) host: String,
    pub(crate) site: String,
}

/// Where previews are, in the terms of the crate that shows them.
pub(crate) fn preview_options(server: &Server) -> PreviewOptions {
    let set = |text: &str| Some(text.trim()).filter(|text| !text.is_empty()).map(str::to_owned);
    PreviewOptions {
        domain: set(&server.preview_domain),
        url: set(&server.preview_url),
        path_port: server.preview_port,
    }
}

/// The first of `hosts` that is of one site with previews below `domain`. Hosts
/// may be origins, patterns (`*.example.com`) or have ports.
pub(crate) fn shared<'a>(domain: &str, hosts: impl IntoIterator<Item = &'a str>) -> Option<Shared> {
    let domain = name_of(domain)?;
    // A preview is one label below, which matters where the domain itself is a
    // public suffix, as `localhost` is one.
    let of_previews = site_of(&format!("preview.{domain}"))?;
    hosts.into_iter().find_map(|host| {
        let name = name_of(host)?;
        let below = name.strip_suffix(&domain).is_some_and(|front| front.ends_with('.'));
        let site = if below { Some(domain.clone()) } else { site_of(&name).filter(|site| *site == of_previews) };
        site.map(|site| Shared { host: host.to_owned(), site })
    })
}

/// The name alone, in lower case; `None` for addresses.
fn name_of(host: &str) -> Option<String> {
    let host = host.trim();
    let host = host.strip_prefix("https://").or_else(|| host.strip_prefix("http://")).unwrap_or(host);
    let host = host.strip_prefix("*.").unwrap_or(host);
    if host.starts_with('[') || host.parse::<IpAddr>().is_ok() {
        return None;
    }
    let name = host.split([':', '/']).next().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
    (!name.is_empty() && name != "*" && name.parse::<IpAddr>().is_err()).then_some(name)
}

/// The registrable domain; `None` for what is a public suffix itself.
fn site_of(name: &str) -> Option<String> {
    psl::domain_str(name).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(domain: &str, host: &str) -> Option<String> {
        shared(domain, [host]).map(|shared| shared.site)
    }

    #[test]
    fn hosts_of_one_registrable_domain_are_of_one_site() {
        for (domain, host, of) in [
            ("preview.example.com", "api.example.com", "example.com"),
            ("preview.example.com", "*.preview.example.com", "example.com"),
            ("preview.example.com", "https://1-a.preview.example.com", "preview.example.com"),
            ("preview.example.com:8443", "https://app.example.com:8443", "example.com"),
            ("example.com", "EXAMPLE.com.", "example.com"),
            ("preview.example.co.uk", "*.example.co.uk", "example.co.uk"),
            // Below a public suffix each name is a site of its own, and here it is a guest's.
            ("localhost", "http://3000-sb-1.localhost:7423", "localhost"),
            ("github.io", "api.github.io", "github.io"),
        ] {
            assert_eq!(site(domain, host).as_deref(), Some(of), "{domain} {host}");
        }
    }

    #[test]
    fn other_domains_addresses_and_localhost_are_apart() {
        for (domain, host) in [
            ("example-preview.com", "api.example.com"),
            ("one.co.uk", "two.co.uk"),
            ("localhost", "localhost"),
            ("localhost", "127.0.0.1"),
            ("localhost", "http://localhost:3000"),
            ("preview.example.com", "0.0.0.0"),
            ("preview.example.com", "[::1]:80"),
            ("preview.example.com", "*"),
            ("", "example.com"),
        ] {
            assert_eq!(site(domain, host), None, "{domain} {host}");
        }
    }
}

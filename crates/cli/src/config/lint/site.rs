//! Which names belong to one site, as browsers see it.

use std::net::IpAddr;

/// The registrable domain (`example.co.uk`) that two names have in common.
/// Addresses and names of no registry have none.
pub(super) fn shared(one: &str, other: &str) -> Option<String> {
    let domain = registrable(one)?;
    (registrable(other)? == domain).then_some(domain)
}

/// `com`, `co.uk`, `github.io`: below it everybody can have a name.
pub(super) fn is_public_suffix(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    psl::suffix(name.as_bytes()).is_some_and(|suffix| suffix.is_known() && suffix.as_bytes() == name.as_bytes())
}

/// A host without port, brackets, wildcard and final dot.
pub(super) fn bare(host: &str) -> &str {
    let host = host.strip_prefix("*.").unwrap_or(host);
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address;
    }
    // More than one colon is an address of version 6 without brackets.
    let name = match host.split_once(':') {
        Some((name, port)) if !port.contains(':') => name,
        _ => host,
    };
    name.trim_end_matches('.')
}

fn registrable(name: &str) -> Option<String> {
    if name.parse::<IpAddr>().is_ok() {
        return None;
    }
    let name = name.to_ascii_lowercase();
    let domain = psl::domain(name.as_bytes()).filter(|domain| domain.suffix().is_known())?;
    std::str::from_utf8(domain.as_bytes()).ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_site_is_one_registrable_domain() {
        assert_eq!(shared("api.example.com", "preview.example.com"), Some("example.com".to_owned()));
        assert_eq!(shared("example.co.uk", "a.b.Example.co.uk"), Some("example.co.uk".to_owned()));
        assert_eq!(shared("a.example.com", "b.example.net"), None);
        assert_eq!(shared("one.co.uk", "two.co.uk"), None, "a suffix is shared by strangers");
        assert_eq!(shared("one.github.io", "two.github.io"), None);
        assert_eq!(shared("localhost", "localhost"), None, "browsers treat it as no site");
        assert_eq!(shared("10.0.0.1", "10.0.0.1"), None);
    }

    #[test]
    fn suffixes_of_everybody_are_known() {
        assert!(is_public_suffix("com") && is_public_suffix("co.uk") && is_public_suffix("github.io"));
        assert!(!is_public_suffix("example.com") && !is_public_suffix("internal"));
    }

    #[test]
    fn hosts_lose_what_is_around_the_name() {
        let cases = [
            ("*.vm.example.com", "vm.example.com"),
            ("vm.example.com:8443", "vm.example.com"),
            ("[::1]:7423", "::1"),
            ("::1", "::1"),
            ("example.com.", "example.com"),
        ];
        for (host, expected) in cases {
            assert_eq!(bare(host), expected, "{host}");
        }
    }
}

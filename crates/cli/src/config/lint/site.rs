//! Names of hosts, without what is around them.

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

#[cfg(test)]
mod tests {
    use super::*;

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

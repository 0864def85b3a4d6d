//! Which port of which sandbox a request means.
//!
//! In `Host`: `{port}-{sandbox}.{domain}`, the form that SDKs print. An id may
//! be written without its `sb-`, because the ids of E2B's SDKs have no dash. In
//! the path, on a listener of its own: `/{sandbox}/{port}/…`, or
//! `/{sandbox}/{port}~{token}/…`, so that what a page links to carries the token
//! that opened it.

use http::uri::{Authority, PathAndQuery};
use stacyvm_api::SandboxId;

/// Begins every id that the engine makes.
const ID_PREFIX: &str = "sb-";

/// Between a port and the token that opens it. No token has one.
const TOKEN_MARK: char = '~';

/// One port of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Address {
    pub(crate) id: SandboxId,
    pub(crate) port: u16,
}

/// The domain below which previews are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Domain {
    /// In lower case.
    name: String,
    /// As browsers see it, where that differs from the listener's.
    pub(crate) port: Option<u16>,
}

impl Domain {
    /// `preview.example.com`, or with a port.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port_number(port)?)),
            None => (text, None),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let is_label = |label: &str| {
            !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        (name.split('.').all(is_label) && !is_address(&name)).then_some(Self { name, port })
    }

    /// A registry's, such as `co.uk`: names below it are those of strangers. What
    /// its owner has had listed as one (`github.io`) may be this server's.
    pub(crate) fn is_registrys(&self) -> bool {
        psl::suffix(self.name.as_bytes())
            .is_some_and(|suffix| suffix.typ() == Some(psl::Type::Icann) && suffix.as_bytes() == self.name.as_bytes())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host name of a preview.
    pub(crate) fn host(&self, address: &Address) -> String {
        format!("{}-{}.{}", address.port, address.id, self.name)
    }

    /// The preview that a host names.
    pub(crate) fn address(&self, host: &Authority) -> Option<Address> {
        let (port, id) = self.parts(host)?;
        Some(Address { id, port: port_number(&port)? })
    }

    /// Whether a host is a preview's in everything but its port.
    pub(crate) fn is_mistaken_in_port(&self, host: &Authority) -> bool {
        self.parts(host).is_some_and(|(port, _)| is_number(&port) && port_number(&port).is_none())
    }

    /// What a name below the domain says is the port, and the sandbox.
    fn parts(&self, host: &Authority) -> Option<(String, SandboxId)> {
        // Nobody but an attacker writes a user in front.
        if host.as_str().contains('@') {
            return None;
        }
        let host = host.host().strip_suffix('.').unwrap_or(host.host());
        let at = host.len().checked_sub(self.name.len() + 1)?;
        let (label, below) = host.split_at_checked(at)?;
        let is_below = below.strip_prefix('.').is_some_and(|name| name.eq_ignore_ascii_case(&self.name));
        if !is_below || label.contains('.') {
            return None;
        }
        let label = label.to_ascii_lowercase();
        let (port, id) = label.split_once('-')?;
        Some((port.to_owned(), sandbox_id(id)?))
    }
}

/// A preview named by a path, and the path that is left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PathForm {
    At {
        address: Address,
        token: Option<String>,
        path: PathAndQuery,
    },
    /// `/{sandbox}/{port}` without the slash: relative links would go wrong.
    NeedsSlash(String),
}

impl PathForm {
    pub(crate) fn parse(path: &PathAndQuery) -> Option<Self> {
        let text = path.as_str();
        let mut parts = path.path().strip_prefix('/')?.splitn(3, '/');
        let (id, door, rest) = (parts.next()?, parts.next()?, parts.next());
        let (port, token) = match door.split_once(TOKEN_MARK) {
            Some((port, token)) => (port, Some(token.to_owned())),
            None => (door, None),
        };
        let address = Address { id: sandbox_id(id)?, port: port_number(port)? };
        // What is behind the first two segments, with its query.
        let behind = &text[id.len() + door.len() + 2..];
        match rest {
            Some(_) => Some(Self::At { address, token, path: behind.parse().ok()? }),
            None => Some(Self::NeedsSlash(format!("/{id}/{door}/{behind}"))),
        }
    }
}

/// What goes in front of a path on the listener for paths.
pub(crate) fn path_prefix(address: &Address, token: Option<&str>) -> String {
    let Address { id, port } = address;
    match token {
        None => format!("/{id}/{port}"),
        Some(token) => format!("/{id}/{port}{TOKEN_MARK}{token}"),
    }
}

/// What URLs take for an IPv4 address (URL Standard, "ends in a number").
fn is_address(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let hex = last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    hex || last.bytes().all(|byte| byte.is_ascii_digit())
}

fn sandbox_id(text: &str) -> Option<SandboxId> {
    if text.starts_with(ID_PREFIX) { text.parse().ok() } else { format!("{ID_PREFIX}{text}").parse().ok() }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Digits only and without leading zeros, so that a port has one name.
fn port_number(text: &str) -> Option<u16> {
    let plain = !text.starts_with('0') && is_number(text);
    text.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "sb-4f9k2m0x7c1v8b3n5q6w";

    fn at(domain: &str, host: &str) -> Option<(String, u16)> {
        let domain = Domain::parse(domain).unwrap();
        domain.address(&host.parse().unwrap()).map(|address| (address.id.to_string(), address.port))
    }

    #[test]
    fn hosts_name_a_port_of_a_sandbox() {
        let wanted = Some((ID.to_owned(), 3000));
        for host in [
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost:7423",
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost.",
            "3000-SB-4F9K2M0X7C1V8B3N5Q6W.LocalHost",
            "3000-4f9k2m0x7c1v8b3n5q6w.localhost",
        ] {
            assert_eq!(at("localhost", host), wanted, "{host}");
        }
        assert_eq!(at("p.example.com:8080", "3000-4f9k2m0x7c1v8b3n5q6w.p.example.com"), wanted);
    }

    #[test]
    fn other_hosts_are_no_previews() {
        for host in [
            "localhost",
            "localhost:7423",
            "127.0.0.1",
            "[::1]",
            "foo.localhost",
            "3000.localhost",
            "3000-.localhost",
            "-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "0-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "080-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "+80-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "65536-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "a.3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost.evil.example",
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.evillocalhost",
            "user@3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "3000-sb-4f9k2m0x7c1v8b3n5q6w",
        ] {
            assert_eq!(at("localhost", host), None, "{host}");
        }
    }

    #[test]
    fn only_a_port_that_is_none_is_a_mistake() {
        let mistaken = |host: &str| Domain::parse("localhost").unwrap().is_mistaken_in_port(&host.parse().unwrap());
        for port in ["0", "080", "65536", "99999999999999999999"] {
            assert!(mistaken(&format!("{port}-{ID}.localhost:7423")), "{port}");
        }
        for host in [
            "3000-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "http-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "99999-sb-4f9k2m0x7c1v8b3n5q6w.evil.example",
            "a.99999-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
            "user@99999-sb-4f9k2m0x7c1v8b3n5q6w.localhost",
        ] {
            assert!(!mistaken(host), "{host}");
        }
    }

    #[test]
    fn domains_are_names() {
        for text in ["localhost", "localhost:80", "Preview.Example.com."] {
            assert!(Domain::parse(text).is_some(), "{text}");
        }
        for text in ["", ".", "a..b", "http://a", "a/b", "a@b", "[::1]", "a:", "a:0", "a:http", "a:1:2", "*.a"] {
            assert_eq!(Domain::parse(text), None, "{text}");
        }
        for address in ["10.0.0.1", "10.0.0.1:80", "127.1", "1", "a.7", "0x7f.1", "a.0x1f"] {
            assert_eq!(Domain::parse(address), None, "{address}");
        }
    }

    #[test]
    fn domains_of_registries_are_told_apart() {
        let is_registrys = |text: &str| Domain::parse(text).unwrap().is_registrys();
        assert!(is_registrys("co.uk") && is_registrys("com") && is_registrys("CO.UK."));
        for own in ["localhost", "internal", "example.com", "p.example.co.uk", "github.io"] {
            assert!(!is_registrys(own), "{own}");
        }
    }

    #[test]
    fn paths_name_a_port_of_a_sandbox() {
        let form = |path: &str| PathForm::parse(&path.parse().unwrap());
        let address = Address { id: ID.parse().unwrap(), port: 8080 };
        let at = |token: Option<&str>, rest: &str| {
            let (address, token) = (address.clone(), token.map(str::to_owned));
            Some(PathForm::At { address, token, path: rest.parse().unwrap() })
        };
        let path = |rest: &str| at(None, rest);
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080/"), path("/"));
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080/a/b?c=/d"), path("/a/b?c=/d"));
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080//a"), path("//a"));
        let slash = |path: &str| Some(PathForm::NeedsSlash(path.to_owned()));
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080?x=/"), slash("/sb-4f9k2m0x7c1v8b3n5q6w/8080/?x=/"));
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080~80.9.A-_/a?b"), at(Some("80.9.A-_"), "/a?b"));
        assert_eq!(form("/sb-4f9k2m0x7c1v8b3n5q6w/8080~t"), slash("/sb-4f9k2m0x7c1v8b3n5q6w/8080~t/"));
        for text in ["/", "/sb-4f9k2m0x7c1v8b3n5q6w", "/sb-4f9k2m0x7c1v8b3n5q6w/", "/a b/80/", "/A/1/", "/a/0/", "*"] {
            if let Ok(path) = text.parse::<PathAndQuery>() {
                assert_eq!(PathForm::parse(&path), None, "{text}");
            }
        }
    }
}

//! Keeps web pages from driving the server.
//!
//! A server without keys trusts whoever can reach its loopback port, and a
//! browser on the same machine can. So every API request must name this server
//! in `Host` (which a rebound DNS name cannot), must not come from another
//! origin, and mutations must have a content type that no HTML form can send.

use std::net::IpAddr;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use stacyvm_api::ErrorCode;

use crate::ServerError;
use crate::error::ApiError;
use crate::options::ServerOptions;

/// A raw or tar upload must carry this header: forms and simple cross-origin
/// requests cannot set it.
pub(crate) const UPLOAD_HEADER: &str = "x-stacyvm-upload";

const SEC_FETCH_SITE: &str = "sec-fetch-site";

const ALLOWED_METHODS: &str = "GET, POST, PUT, PATCH, DELETE, OPTIONS";
const ALLOWED_HEADERS: &str = "Content-Type, X-API-Key, X-Admin-API-Key, X-Request-ID, X-User-ID, X-Tenant-ID, \
    Authorization, Range, Last-Event-ID, Idempotency-Key, X-StacyVM-Upload";
const EXPOSED_HEADERS: &str = "X-Request-ID, X-Next-Cursor, X-Exit-Code, X-Exec-ID, Content-Range, Retry-After, \
    X-RateLimit-Limit, X-RateLimit-Remaining";

/// How long a browser may keep a preflight's answer.
const PREFLIGHT_MAX_AGE_SECONDS: &str = "600";

/// Which hosts and origins are ours.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    hosts: Vec<HostPattern>,
    origins: Origins,
    /// The server listens beyond loopback (and so demands a key): it may be
    /// reached at any address.
    any_address: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Origins {
    Any,
    Listed(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct HostPattern {
    name: String,
    /// `*.name`: names below, not the name itself.
    below: bool,
    port: Option<u16>,
}

/// The header value `Origin` that may read the answer, if any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CorsGrant {
    None,
    Origin(HeaderValue),
    Any,
}

impl Guard {
    pub(crate) fn new(options: &ServerOptions, any_address: bool) -> Result<Self, ServerError> {
        let mut hosts = Vec::with_capacity(options.allowed_hosts.len() + 1);
        for text in &options.allowed_hosts {
            hosts.push(HostPattern::parse(text).ok_or_else(|| ServerError::AllowedHost(text.clone()))?);
        }
        hosts.extend(HostPattern::parse(&options.host));
        Ok(Self { hosts, origins: Origins::parse(&options.cors_origins)?, any_address })
    }

    pub(crate) fn allows_any_origin(&self) -> bool {
        self.origins == Origins::Any
    }

    /// Refuses a `Host` that does not mean this server.
    pub(crate) fn check_host(&self, host: Option<&Authority>) -> Result<(), ApiError> {
        let Some(host) = host else {
            return Err(ApiError::bad_request("the request names no host"));
        };
        if self.is_our_host(host) {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Forbidden, format!("this server does not answer to the host `{host}`"))
            .hint("call it by a loopback name, or add the host to server.allowed_hosts"))
    }

    /// Refuses a request that a page of another origin made. Requests of
    /// programs carry neither header.
    pub(crate) fn check_origin(&self, headers: &HeaderMap, host: Option<&Authority>) -> Result<CorsGrant, ApiError> {
        let refused = |message: String| {
            Err(ApiError::new(ErrorCode::Forbidden, message)
                .hint("to let pages of that origin call the API, add it to server.cors_allowed_origins"))
        };
        if let Some(origin) = headers.get(header::ORIGIN) {
            if let Some(grant) = self.origins.grant(origin) {
                return Ok(grant);
            }
            if !is_same_origin(origin, host) {
                return refused(format!("requests of origin `{}` are refused", origin.to_str().unwrap_or("?")));
            }
        }
        match headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes) {
            None | Some(b"same-origin" | b"none") => Ok(CorsGrant::None),
            Some(_) => refused("requests of other sites' pages are refused".to_owned()),
        }
    }

    /// The origin's grant for a preflight, which carries no credentials and is
    /// answered before they are looked at.
    pub(crate) fn check_preflight(&self, headers: &HeaderMap, host: Option<&Authority>) -> Result<CorsGrant, ApiError> {
        match self.check_origin(headers, host) {
            Ok(CorsGrant::None) => Ok(headers.get(header::ORIGIN).cloned().map_or(CorsGrant::None, CorsGrant::Origin)),
            other => other,
        }
    }

    fn is_our_host(&self, host: &Authority) -> bool {
        let name = bare_name(host.host());
        if let Ok(address) = name.parse::<IpAddr>()
            && (self.any_address || address.to_canonical().is_loopback())
        {
            return true;
        }
        name.eq_ignore_ascii_case("localhost")
            || self.hosts.iter().any(|pattern| pattern.matches(name, host.port_u16()))
    }
}

impl CorsGrant {
    /// Headers of a response that may be read from another origin.
    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        let origin = match self {
            Self::None => return,
            Self::Any => HeaderValue::from_static("*"),
            Self::Origin(origin) => {
                headers.append(header::VARY, HeaderValue::from_static("Origin"));
                origin.clone()
            }
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    }

    pub(crate) fn apply_preflight(&self, headers: &mut HeaderMap) {
        self.apply(headers);
        let mut put = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
        put(header::ACCESS_CONTROL_ALLOW_METHODS, ALLOWED_METHODS);
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS);
        put(header::ACCESS_CONTROL_MAX_AGE, PREFLIGHT_MAX_AGE_SECONDS);
    }
}

/// A browser's question whether it may send a request from another origin.
pub(crate) fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

impl Origins {
    fn parse(listed: &[String]) -> Result<Self, ServerError> {
        let mut origins = Vec::with_capacity(listed.len());
        for text in listed {
            if text == "*" {
                return Ok(Self::Any);
            }
            let origin = text.trim_end_matches('/').to_ascii_lowercase();
            let authority = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
            if authority.is_none_or(|authority| authority.parse::<Authority>().is_err()) {
                return Err(ServerError::CorsOrigin(text.clone()));
            }
            origins.push(origin);
        }
        Ok(Self::Listed(origins))
    }

    fn grant(&self, origin: &HeaderValue) -> Option<CorsGrant> {
        match self {
            Self::Any => Some(CorsGrant::Any),
            Self::Listed(listed) => {
                let text = origin.to_str().ok()?;
                let known = listed.iter().any(|known| known.eq_ignore_ascii_case(text));
                known.then(|| CorsGrant::Origin(origin.clone()))
            }
        }
    }
}

impl HostPattern {
    fn parse(text: &str) -> Option<Self> {
        let (below, rest) = text.strip_prefix("*.").map_or((false, text), |rest| (true, rest));
        // A bare IPv6 address is not an authority; in brackets it is.
        if let Ok(address) = rest.parse::<IpAddr>() {
            return Some(Self { name: address.to_string(), below: false, port: None });
        }
        let authority: Authority = rest.parse().ok()?;
        let name = bare_name(authority.host()).trim_end_matches('.').to_ascii_lowercase();
        (!name.is_empty()).then(|| Self { name, below, port: authority.port_u16() })
    }

    fn matches(&self, name: &str, port: Option<u16>) -> bool {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let named = if self.below {
            name.strip_suffix(&self.name).is_some_and(|label| label.len() > 1 && label.ends_with('.'))
        } else {
            name == self.name
        };
        named && self.port.is_none_or(|wanted| port == Some(wanted))
    }
}

/// The page and the request have the same host and port. The scheme is not
/// compared: a proxy in front may have taken TLS off.
fn is_same_origin(origin: &HeaderValue, host: Option<&Authority>) -> bool {
    let (Ok(origin), Some(host)) = (origin.to_str(), host) else { return false };
    let (authority, default_port) = match (origin.strip_prefix("http://"), origin.strip_prefix("https://")) {
        (Some(authority), _) => (authority, 80),
        (None, Some(authority)) => (authority, 443),
        (None, None) => return false,
    };
    let Ok(origin) = authority.parse::<Authority>() else { return false };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(default_port);
    origin.host().eq_ignore_ascii_case(host.host()) && port(&origin) == port(host)
}

fn bare_name(host: &str) -> &str {
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allowed: &[&str], origins: &[&str]) -> Guard {
        let owned = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        let options =
            ServerOptions { allowed_hosts: owned(allowed), cors_origins: owned(origins), ..ServerOptions::default() };
        Guard::new(&options, false).unwrap()
    }

    fn host_is_ours(guard: &Guard, host: &str) -> bool {
        guard.check_host(host.parse().ok().as_ref()).is_ok()
    }

    fn origin_passes(guard: &Guard, host: &str, pairs: &[(&'static str, &str)]) -> bool {
        let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        guard.check_origin(&headers, host.parse().ok().as_ref()).is_ok()
    }

    #[test]
    fn loopback_by_any_name_is_ours_and_others_are_not() {
        let guard = guard(&[], &[]);
        for host in ["localhost", "LOCALHOST:7423", "127.0.0.1", "127.8.9.1:1", "[::1]:7423", "[::ffff:127.0.0.1]"] {
            assert!(host_is_ours(&guard, host), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.nip.io",
            "192.168.1.5",
            "[fe80::1]",
            "169.254.169.254",
            "3000-sb-0123456789abcdefghij.localhost",
        ] {
            assert!(!host_is_ours(&guard, host), "{host}");
        }
        assert!(guard.check_host(None).is_err());
    }

    #[test]
    fn configured_hosts_may_fix_the_port_or_cover_a_domain() {
        let guard = guard(&["api.example", "tls.example:8443", "*.apps.example"], &[]);
        for host in ["api.example", "API.example:1", "api.example.", "tls.example:8443", "a.b.apps.example:7"] {
            assert!(host_is_ours(&guard, host), "{host}");
        }
        for host in ["tls.example", "tls.example:80", "apps.example", "evilapps.example", ".apps.example"] {
            assert!(!host_is_ours(&guard, host), "{host}");
        }
    }

    #[test]
    fn beyond_loopback_any_address_is_ours_but_no_unknown_name() {
        let options = ServerOptions { host: "0.0.0.0".to_owned(), ..ServerOptions::default() };
        let guard = Guard::new(&options, true).unwrap();
        assert!(host_is_ours(&guard, "192.168.1.5:7423"));
        assert!(!host_is_ours(&guard, "evil.example"));
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        let guard = guard(&[], &["https://app.example"]);
        let passes = |pairs: &[(&'static str, &str)]| origin_passes(&guard, "localhost:7423", pairs);
        assert!(passes(&[]));
        assert!(passes(&[("origin", "http://localhost:7423"), ("sec-fetch-site", "same-origin")]));
        assert!(passes(&[("sec-fetch-site", "none")]));
        assert!(passes(&[("origin", "https://app.example"), ("sec-fetch-site", "cross-site")]));
        for origin in [
            "http://localhost:3000",
            "http://3000-sb-1.localhost:7423",
            "http://127.0.0.1:7423",
            "http://localhost",
            "https://app.example.evil",
            "null",
            "file://",
        ] {
            assert!(!passes(&[("origin", origin)]), "{origin}");
        }
        assert!(!passes(&[("sec-fetch-site", "cross-site")]));
        assert!(!passes(&[("sec-fetch-site", "same-site")]));
        assert!(!passes(&[("origin", "http://localhost:7423"), ("sec-fetch-site", "same-site")]));
        assert!(origin_passes(&guard, "api.example", &[("origin", "https://api.example")]));
        assert!(origin_passes(&guard, "api.example", &[("origin", "http://api.example:80")]));
    }

    #[test]
    fn settings_that_are_no_hosts_or_origins_are_refused() {
        let refused = |options: ServerOptions| Guard::new(&options, false).is_err();
        for origin in ["app.example", "ftp://x", "https://x/path", "https://"] {
            assert!(refused(ServerOptions { cors_origins: vec![origin.to_owned()], ..Default::default() }), "{origin}");
        }
        for host in ["", "a/b", "*."] {
            assert!(refused(ServerOptions { allowed_hosts: vec![host.to_owned()], ..Default::default() }), "{host:?}");
        }
    }
}

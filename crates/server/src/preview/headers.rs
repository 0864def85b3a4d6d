//! What is changed in the heads that pass: hop-by-hop fields (RFC 9110 7.6.1),
//! what says who asked, and what one guest could do to others.

use std::net::IpAddr;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Version, header};

use super::access::{self, our_cookie};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// Begins every field that says how a request came here.
const FORWARDED_BEGIN: &str = "x-forwarded-";

/// Meant for one connection only, whether `Connection` says so or not.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Fields of an answer whose effect is not its own host's alone.
const BEYOND_THE_HOST: [HeaderName; 5] = [
    header::ALT_SVC,
    // Empties the cookies of the whole site, other guests' included.
    HeaderName::from_static("clear-site-data"),
    // Has the browser report addresses, with the tokens that guests never see.
    HeaderName::from_static("nel"),
    // May bind the requests of a whole site to a session.
    HeaderName::from_static("secure-session-registration"),
    HeaderName::from_static("sec-session-registration"),
];

/// Fields of an answer that a browser keeps for its origin or its host, which on
/// the shared listener are other guests' too. What holds for one page or one
/// answer alone (its policies, CORS, caching, links) may pass.
const BEYOND_THE_PAGE: [&str; 27] = [
    // Where to report to.
    "report-to",
    "reporting-endpoints",
    // How to connect.
    "strict-transport-security",
    "public-key-pins",
    "public-key-pins-report-only",
    "expect-ct",
    // What to send along.
    "accept-ch",
    "accept-ch-lifetime",
    "critical-ch",
    "use-as-dictionary",
    // Who somebody is: a password typed for one guest goes to all.
    "www-authenticate",
    "authentication-info",
    "proxy-authentication-info",
    "set-cookie",
    "set-cookie2",
    "set-login",
    "idp-signin-status",
    "secure-session-challenge",
    "sec-session-challenge",
    // What else is kept.
    "service-worker-allowed",
    "origin-agent-cluster",
    "shared-storage-write",
    "observe-browsing-topics",
    "attribution-reporting-register-source",
    "attribution-reporting-register-trigger",
    "attribution-reporting-register-os-source",
    "attribution-reporting-register-os-trigger",
];

/// Schemes of credentials that browsers send by themselves, once they have them,
/// to whatever is of the same origin.
const AMBIENT_SCHEMES: [&str; 4] = ["basic", "digest", "negotiate", "ntlm"];

/// What a guest's page may do on the listener that all of them share.
const SANDBOX_POLICY: HeaderValue =
    HeaderValue::from_static("sandbox allow-scripts allow-forms allow-popups allow-downloads");

/// How a request came.
#[derive(Debug, Clone)]
pub(super) struct Origin<'a> {
    pub(super) host: &'a Authority,
    pub(super) scheme: &'static str,
    pub(super) caller: IpAddr,
    pub(super) version: Version,
    /// What was taken from the front of the path.
    pub(super) prefix: Option<&'a str>,
}

/// Makes a browser's request one that a guest may see. The protocol it is to be
/// upgraded to is the caller's to put back.
pub(super) fn for_guest(headers: &mut HeaderMap, origin: &Origin<'_>) {
    let wants_trailers = lists(headers, &header::TE, "trailers");
    remove_hop_by_hop(headers);
    access::strip_secrets(headers);
    if origin.prefix.is_some() {
        // All guests share what a browser keeps for the host.
        headers.remove(header::COOKIE);
        if access::is_of_a_browser(headers) && has_ambient_credentials(headers) {
            headers.remove(header::AUTHORIZATION);
        }
    }
    if wants_trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    let claimed: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(FORWARDED_BEGIN)).cloned().collect();
    for name in claimed.iter().chain(&[header::FORWARDED, REAL_IP]) {
        headers.remove(name);
    }
    let mut set = |name: HeaderName, text: &str| {
        if let Ok(value) = HeaderValue::from_str(text) {
            headers.insert(name, value);
        }
    };
    set(header::HOST, origin.host.as_str());
    set(FORWARDED_HOST, origin.host.as_str());
    set(FORWARDED_PROTO, origin.scheme);
    set(FORWARDED_FOR, &origin.caller.to_string());
    if let Some(prefix) = origin.prefix {
        set(FORWARDED_PREFIX, prefix);
    }
    let via = if origin.version == Version::HTTP_2 { "2.0 stacyvm" } else { "1.1 stacyvm" };
    headers.append(header::VIA, HeaderValue::from_static(via));
}

/// How a guest's body says where it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    Chunked,
    /// By a length, or by the end of the connection.
    Plain,
}

/// The framing of an answer, or the first coding that would have to be undone:
/// none was asked for (RFC 9112 7.4), and browsers know none.
pub(super) fn framing(headers: &HeaderMap) -> Result<Framing, String> {
    let mut framing = Framing::Plain;
    for coding in words(headers, &header::TRANSFER_ENCODING) {
        if coding.eq_ignore_ascii_case("chunked") {
            framing = Framing::Chunked;
        } else if !coding.eq_ignore_ascii_case("identity") && !coding.is_empty() {
            return Err(coding.to_owned());
        }
    }
    Ok(framing)
}

/// Makes a guest's answer one that a browser may see.
pub(super) fn for_browser(headers: &mut HeaderMap, prefix: Option<&str>) {
    remove_hop_by_hop(headers);
    for name in &BEYOND_THE_HOST {
        headers.remove(name);
    }
    match prefix {
        None => confine_cookies(headers),
        Some(prefix) => {
            for name in BEYOND_THE_PAGE {
                headers.remove(name);
            }
            move_location(headers, prefix);
            confine_page(headers);
        }
    }
}

/// A page of the shared listener gets an origin of its own.
pub(super) fn confine_page(headers: &mut HeaderMap) {
    headers.append(header::CONTENT_SECURITY_POLICY, SANDBOX_POLICY);
}

/// The address holds a token, which no other site is told.
pub(super) fn keep_address(headers: &mut HeaderMap) {
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}

/// The protocols that a request may be upgraded to. Not HTTP/2: requests on
/// such a connection would pass by everything here.
pub(super) fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers.get(header::UPGRADE)?;
    let to_http = lists(headers, &header::UPGRADE, "h2c") || lists(headers, &header::UPGRADE, "h2");
    (lists(headers, &header::CONNECTION, "upgrade") && !to_http).then(|| wanted.clone())
}

pub(super) fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

/// Whether a field holds this word in its list.
pub(super) fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    words(headers, name).any(|found| found.eq_ignore_ascii_case(word))
}

fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|word| word.split(';').next().unwrap_or_default().trim())
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = words(headers, &header::CONNECTION).filter_map(|word| word.parse().ok()).collect();
    // The body was read by its chunks; a length beside them is a lie
    // (RFC 9112 6.3).
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn has_ambient_credentials(headers: &HeaderMap) -> bool {
    headers.get_all(header::AUTHORIZATION).iter().any(|value| {
        let scheme = value.as_bytes().split(|byte| *byte == b' ').next().unwrap_or_default();
        AMBIENT_SCHEMES.iter().any(|known| scheme.eq_ignore_ascii_case(known.as_bytes()))
    })
}

/// A guest sets cookies for its own host only, and never ours.
fn confine_cookies(headers: &mut HeaderMap) {
    let is_plain = |value: &HeaderValue| {
        let mut parts = value.as_bytes().split(|byte| *byte == b';');
        !parts.next().is_some_and(is_our_cookie) && !parts.any(is_domain)
    };
    if headers.get_all(header::SET_COOKIE).iter().all(is_plain) {
        return;
    }
    let confined: Vec<HeaderValue> = headers
        .get_all(header::SET_COOKIE)
        .iter()
        .filter(|value| !value.as_bytes().split(|byte| *byte == b';').next().is_some_and(is_our_cookie))
        .filter_map(without_domain)
        .collect();
    headers.remove(header::SET_COOKIE);
    for value in confined {
        headers.append(header::SET_COOKIE, value);
    }
}

fn without_domain(value: &HeaderValue) -> Option<HeaderValue> {
    let parts: Vec<&[u8]> = value.as_bytes().split(|byte| *byte == b';').filter(|part| !is_domain(part)).collect();
    HeaderValue::from_bytes(&parts.join(&b";"[..])).ok()
}

fn is_domain(attribute: &[u8]) -> bool {
    let name = attribute.split(|byte| *byte == b'=').next().unwrap_or_default();
    name.trim_ascii().eq_ignore_ascii_case(b"domain")
}

/// Browsers take `=name=value` for a cookie without a name and send it back
/// as `name=value`.
fn is_our_cookie(pair: &[u8]) -> bool {
    let begin = pair.iter().position(|byte| !matches!(byte, b'=' | b' ' | b'\t')).unwrap_or(pair.len());
    our_cookie(&pair[begin..]).is_some()
}

/// Addresses that begin at the guest's root begin at its prefix here.
fn move_location(headers: &mut HeaderMap, prefix: &str) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    if location.starts_with('/') && !location.starts_with("//") {
        let moved = format!("{prefix}{location}");
        if let Ok(value) = HeaderValue::try_from(moved) {
            headers.insert(header::LOCATION, value);
        }
    }
}

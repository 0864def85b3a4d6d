//! Who may open a preview, and the exchange of a link for a cookie.
//!
//! A port is public, or wants a token: a signed one in a header or in the
//! address, or the cookie that a browser gets for the latter. Whoever has none may
//! still show an API key, which is the gate's to judge. Browsers
//! are sent on to the address without the token, so that neither the page nor
//! the places it links to ever see it. Where paths name previews there are no
//! cookies; there browsers are sent on to a path that holds the token, so that
//! what the page links to holds it too.

use std::sync::Arc;

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use stacyvm_api::{PortAccess, Timestamp};
use stacyvm_engine::{Keys, StoredKey};

use super::address::{Address, Domain, path_prefix};
use super::token::Signer;

/// Parameter of an address that carries a token.
pub(crate) const TOKEN_PARAMETER: &str = "stacyvm_token";

/// Header of a program that carries a token (e2b-compat 2).
pub(super) const TOKEN_HEADER: HeaderName = HeaderName::from_static("e2b-traffic-access-token");

/// The prefix keeps other hosts, guests of them included, from setting it.
pub(super) const COOKIE: &str = "__Host-stacyvm-preview";

const SEC_FETCH_SITE: &str = "sec-fetch-site";
const SEC_FETCH_MODE: &str = "sec-fetch-mode";

/// Cookies of one request that are looked at: a browser sends one of a name.
const MAX_COOKIES: usize = 8;

/// What happens to a request.
#[derive(Debug)]
pub(super) enum Decision {
    /// The key, when the token was made with one: what is opened ends with it.
    Admit {
        key: Option<Arc<StoredKey>>,
    },
    /// The browser goes on to the address without its token.
    Exchange {
        location: HeaderValue,
        cookie: Option<HeaderValue>,
    },
    Refuse(Refusal),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Nothing was shown.
    NoToken,
    /// What was shown has expired, or is not for this port.
    BadToken,
    /// The cookie is good, but another site's page made the request.
    ForeignPage,
}

/// A token that opens the port.
struct Good {
    end: Timestamp,
    key: Option<Arc<StoredKey>>,
}

/// Where previews are, as far as access is concerned.
pub(super) struct Door<'a> {
    pub(super) signer: &'a Signer,
    pub(super) keys: &'a Keys,
    pub(super) name: Name<'a>,
    pub(super) now: Timestamp,
}

/// What names the preview.
#[derive(Debug, Clone, Copy)]
pub(super) enum Name<'a> {
    Host(&'a Domain),
    /// On a host that all previews share, where none of them can have a cookie.
    Path {
        token: Option<&'a str>,
    },
}

impl Door<'_> {
    pub(super) fn decide(&self, head: &Parts, address: &Address, access: PortAccess) -> Decision {
        let tokens = tokens_of(&head.uri);
        let good = |token: &[u8]| self.verify(token, address);
        let in_address = tokens.iter().find_map(|token| good(token.as_bytes()).map(|good| (*token, good)));
        let public = access == PortAccess::Public;
        if !tokens.is_empty() && is_navigation(head) && (public || in_address.is_some()) {
            return self.exchange(&head.uri, address, in_address, access);
        }
        if public {
            return Decision::Admit { key: None };
        }
        let header = head.headers.get(TOKEN_HEADER).map(HeaderValue::as_bytes);
        let in_path = match self.name {
            Name::Host(_) => None,
            Name::Path { token } => token.map(str::as_bytes),
        };
        let elsewhere = || [in_path, header].into_iter().flatten().find_map(good);
        if let Some(Good { key, .. }) = in_address.map(|(_, good)| good).or_else(elsewhere) {
            return Decision::Admit { key };
        }
        let nothing = tokens.is_empty() && header.is_none() && in_path.is_none();
        let domain = match self.name {
            Name::Host(domain) => domain,
            Name::Path { .. } if nothing => return Decision::Refuse(Refusal::NoToken),
            Name::Path { .. } => return Decision::Refuse(Refusal::BadToken),
        };
        let cookies = cookie_values(&head.headers);
        match (cookies.iter().find_map(|cookie| good(cookie)), is_own_page(head, address, domain)) {
            (Some(Good { key, .. }), true) => Decision::Admit { key },
            (Some(_), false) => Decision::Refuse(Refusal::ForeignPage),
            (None, _) if nothing && cookies.is_empty() => Decision::Refuse(Refusal::NoToken),
            (None, _) => Decision::Refuse(Refusal::BadToken),
        }
    }

    /// Sends a browser on, with what opens the port from there.
    fn exchange(&self, uri: &Uri, address: &Address, good: Option<(&str, Good)>, access: PortAccess) -> Decision {
        match self.name {
            Name::Host(_) => {
                let cookie = good.and_then(|(token, good)| self.cookie(token, good.end));
                Decision::Exchange { location: without_token(uri), cookie }
            }
            Name::Path { .. } => {
                let token = good.filter(|_| access == PortAccess::Token).map(|(token, _)| token);
                let path = format!("{}{}", path_prefix(address, token), guest_path(uri));
                let location = HeaderValue::try_from(path).unwrap_or_else(|_| HeaderValue::from_static("/"));
                Decision::Exchange { location, cookie: None }
            }
        }
    }

    /// A token is worth something as long as the key that it was made with.
    fn verify(&self, token: &[u8], address: &Address) -> Option<Good> {
        let permit = self.signer.verify(token, address, self.now)?;
        let key = match &permit.key {
            None => None,
            Some(id) => Some(self.keys.valid(id)?),
        };
        Some(Good { end: permit.end, key })
    }

    fn cookie(&self, token: &str, end: Timestamp) -> Option<HeaderValue> {
        let seconds = end.since(self.now).as_secs();
        // In a frame of another site the cookie belongs to that site's pages
        // alone (`Partitioned`), so that it need not be the browser's choice
        // whether frames have cookies.
        let text = format!("{COOKIE}={token}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=None; Partitioned");
        HeaderValue::try_from(text).ok()
    }
}

/// Takes everything out that a guest must not see: our cookie, our tokens and
/// the API's keys.
pub(super) fn strip_secrets(headers: &mut HeaderMap) {
    for name in crate::auth::KEY_HEADERS {
        headers.remove(name);
    }
    headers.remove(TOKEN_HEADER);
    // HTTP/2 may split the cookies; HTTP/1.1 wants them in one field
    // (RFC 9113 8.2.3).
    let mut kept: Vec<u8> = Vec::new();
    for pair in cookie_pairs(headers).filter(|pair| our_cookie(pair).is_none()) {
        if !kept.is_empty() {
            kept.extend_from_slice(b"; ");
        }
        kept.extend_from_slice(pair);
    }
    headers.remove(header::COOKIE);
    if let (false, Ok(value)) = (kept.is_empty(), HeaderValue::from_bytes(&kept)) {
        headers.insert(header::COOKIE, value);
    }
}

/// The path and query of the guest's own: without our parameter.
pub(super) fn guest_path(uri: &Uri) -> PathAndQuery {
    let whole = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let Some(query) = uri.query().filter(|query| query.split('&').any(is_token)) else { return whole };
    let rest: Vec<&str> = query.split('&').filter(|parameter| !is_token(parameter)).collect();
    let text = if rest.is_empty() { uri.path().to_owned() } else { format!("{}?{}", uri.path(), rest.join("&")) };
    text.parse().unwrap_or_else(|_| PathAndQuery::from_static("/"))
}

/// Where the browser goes on: always on this host.
fn without_token(uri: &Uri) -> HeaderValue {
    let path = guest_path(uri);
    // `//host/` would lead away, and browsers read a backslash as a slash; the
    // dot segment disappears (RFC 3986 5.2.4).
    let leads_away = path.as_str().as_bytes().get(1).is_some_and(|second| matches!(second, b'/' | b'\\'));
    let text = if leads_away { format!("/.{path}") } else { path.to_string() };
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("/"))
}

fn tokens_of(uri: &Uri) -> Vec<&str> {
    let parameters = uri.query().into_iter().flat_map(|query| query.split('&'));
    parameters.filter(|parameter| is_token(parameter)).filter_map(|parameter| parameter.split('=').nth(1)).collect()
}

fn is_token(parameter: &str) -> bool {
    parameter.strip_prefix(TOKEN_PARAMETER).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

fn cookie_pairs(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let values = headers.get_all(header::COOKIE).into_iter();
    values
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
        .map(<[u8]>::trim_ascii)
        .filter(|it| !it.is_empty())
}

fn cookie_values(headers: &HeaderMap) -> Vec<&[u8]> {
    cookie_pairs(headers).filter_map(our_cookie).take(MAX_COOKIES).collect()
}

/// The value, when the pair is our cookie.
pub(super) fn our_cookie(pair: &[u8]) -> Option<&[u8]> {
    let at = pair.iter().position(|byte| *byte == b'=').unwrap_or(pair.len());
    let (name, value) = pair.split_at(at);
    name.trim_ascii().eq_ignore_ascii_case(COOKIE.as_bytes()).then(|| value.get(1..).unwrap_or_default().trim_ascii())
}

/// Browsers alone say how they came to make a request.
pub(super) fn is_of_a_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(SEC_FETCH_MODE)
}

/// Somebody goes to the address, in a window or a frame.
fn is_navigation(head: &Parts) -> bool {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return false;
    }
    match head.headers.get(SEC_FETCH_MODE) {
        Some(mode) => mode == "navigate",
        // Older browsers do not say; programs do not ask for pages.
        None => !head.headers.contains_key(header::UPGRADE) && super::page::wants_page(&head.headers),
    }
}

/// A cookie that browsers send for any page counts only when a page of the same
/// sandbox made the request, or when somebody goes to the address. Without this
/// the page of another sandbox, which is of the same site, could act with it.
fn is_own_page(head: &Parts, address: &Address, domain: &Domain) -> bool {
    if let Some(origin) = head.headers.get(header::ORIGIN) {
        let text = origin.to_str().unwrap_or_default();
        let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        let page = host.and_then(|host| domain.address(&host.parse().ok()?));
        return page.is_some_and(|page| page.id == address.id);
    }
    match head.headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes) {
        None | Some(b"same-origin" | b"none") => true,
        Some(_) => is_navigation(head),
    }
}

//! Who may call: whoever has the key, or without one, programs of this machine
//! but no web page that somebody has open on it.

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use stacyvm_api::backend::{Code, KEY_HEADER};
use subtle::ConstantTimeEq as _;

use crate::error::Refusal;
use crate::state::App;

pub(crate) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if headers.contains_key(header::ORIGIN) {
        return Refusal::new(403, Code::Unauthorized, "pages may not call a backend").into_response();
    }
    let allowed = match &app.options.key {
        Some(key) => headers.get(KEY_HEADER).is_some_and(|given| given.as_bytes().ct_eq(key.as_bytes()).into()),
        None => headers.get(header::HOST).and_then(|host| host.to_str().ok()).is_some_and(is_loopback),
    };
    if !allowed {
        return Refusal::new(401, Code::Unauthorized, "a valid key is required in X-API-Key").into_response();
    }
    next.run(request).await
}

/// A name that some page made point here is not loopback.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for host in ["127.0.0.1:80", "localhost", "[::1]:7", "127.1.2.3"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["127.0.0.1.evil.test", "evil.test:80", "", "[::2]", "10.0.0.1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}

//! What is shown in place of a guest's answer: a page to browsers, the one
//! error body to programs.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use stacyvm_api::ErrorCode;

use crate::edge::random_uuid;
use crate::error::{ApiError, REQUEST_ID, status};
use crate::table::NO_STORE;

/// Seconds after which a page that may get better looks again.
const RETRY_SECONDS: &str = "2";

/// Our pages need nothing, and frames of any site may show them.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Whether somebody looks at the answer.
pub(super) fn wants_page(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).into_iter();
    accepts.filter_map(|value| value.to_str().ok()).any(|value| value.contains("text/html"))
}

/// The failure as this client can read it.
pub(super) fn failure(wants_page: bool, failure: ApiError) -> Response {
    let request_id = random_uuid();
    let code = failure.code();
    tracing::debug!(target: "stacyvm::preview", request_id, %code, message = failure.message(), cause = failure.cause());
    let (kind, body) = if wants_page {
        ("text/html; charset=utf-8", page(&failure).into_bytes())
    } else {
        ("application/json", failure.body(&request_id))
    };
    let mut response = failure.into_response();
    response.extensions_mut().clear();
    *response.body_mut() = Body::from(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, NO_STORE);
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if may_get_better(code) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_SECONDS));
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        headers.insert(REQUEST_ID, value);
    }
    response
}

/// Sends a browser elsewhere on this host.
pub(super) fn redirect(location: HeaderValue, cookie: Option<HeaderValue>) -> Response {
    let mut response = StatusCode::SEE_OTHER.into_response();
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, location);
    headers.insert(header::CACHE_CONTROL, NO_STORE);
    // The address that is left holds the token.
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Some(cookie) = cookie {
        headers.insert(header::SET_COOKIE, cookie);
    }
    response
}

/// A server inside may still be starting.
fn may_get_better(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::PortClosed | ErrorCode::Unavailable | ErrorCode::Conflict)
}

fn page(failure: &ApiError) -> String {
    let again = may_get_better(failure.code());
    let refresh =
        if again { format!("<meta http-equiv=\"refresh\" content=\"{RETRY_SECONDS}\">") } else { String::new() };
    let waiting = if again { "<p class=\"wait\">This page looks again by itself.</p>" } else { "" };
    let hint = failure.hint_text().map(|hint| format!("<p>{}</p>", escaped(hint))).unwrap_or_default();
    let message = escaped(failure.message());
    let status = status(failure.code());
    let title = status.canonical_reason().unwrap_or("Error");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n{refresh}\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<p class=\"status\">{}</p>\n<h1>{message}</h1>\n\
         {hint}\n{waiting}\n</main>\n</body>\n</html>\n",
        status.as_u16()
    )
}

const STYLE: &str = "\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; }
main { max-width: 34rem; padding: 2rem; }
h1 { font-size: 1.25rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h1::first-letter, p::first-letter { text-transform: uppercase; }
p { margin: .5rem 0; opacity: .75; }
.status { font: 600 .875rem ui-monospace, monospace; margin: 0; }
.wait { font-size: .875rem; }
";

/// Messages hold names that callers chose.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_show_text_and_no_markup_of_others() {
        let failure = ApiError::new(ErrorCode::PortClosed, "<script>alert(1)</script>").hint("a & \"b\"");
        let page = page(&failure);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{page}");
        assert!(page.contains("a &amp; &quot;b&quot;") && page.contains("http-equiv=\"refresh\""), "{page}");
    }

    #[test]
    fn only_what_may_get_better_is_looked_at_again() {
        let page = page(&ApiError::new(ErrorCode::NotFound, "gone"));
        assert!(!page.contains("refresh") && !page.contains("looks again"), "{page}");
    }
}

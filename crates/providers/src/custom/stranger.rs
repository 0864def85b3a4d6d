//! What answers at a backend's address and is none: above all the API of a
//! StacyVM server, whose address is the one that people have at hand.

use std::time::Duration;

use stacyvm_api::Health;
use stacyvm_api::backend::Code;

use super::error::CallError;
use super::http::Http;

/// Only asked where something is wrong already.
const LOOK_TIME_MAX: Duration = Duration::from_secs(5);
/// Below which a server's API is.
const API: &str = "/api/v1";

pub(super) const SERVER: &str = "this answers like a StacyVM server's API, not a backend";

/// Where a backend comes from, for whoever has none at that address.
pub(super) fn advice(setting: &str) -> String {
    format!("start one with `stacyvm backend serve`, and set {setting} to its address")
}

/// Whether a failure of a call that every backend has may come from something
/// else.
pub(super) fn is_likely(error: &CallError) -> bool {
    match error {
        CallError::Refused { status: 401 | 403 | 404 | 405 | 410 | 501, code, .. } => {
            matches!(code, None | Some(Code::NotFound | Code::Unauthorized | Code::Unknown))
        }
        CallError::Garbage(_) => true,
        CallError::Refused { .. } | CallError::Unreachable(_) | CallError::TimedOut(_) | CallError::Broken(_) => false,
    }
}

/// Whether the address is one inside a server's API, where `/health` exists too.
pub(super) fn is_inside_api(http: &Http) -> bool {
    http.base().path().trim_end_matches('/').ends_with(API)
}

/// A server tells everybody its health, with more than a backend has to say.
pub(super) async fn is_server(http: &Http) -> bool {
    let path: &[&str] = if is_inside_api(http) { &["health"] } else { &["api", "v1", "health"] };
    let limit = LOOK_TIME_MAX.min(http.limit());
    http.json_within::<Health>(limit, http.get(path, &[])).await.is_ok()
}

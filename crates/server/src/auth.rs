//! Who is calling, and what that role may do.
//!
//! Without any key the server is open: it then listens on loopback only, and
//! the request guards keep web pages out. With a key, every route that is not
//! public needs one; which scope it needs stands in the route table.

use http::HeaderMap;
use stacyvm_api::ErrorCode;

use crate::error::ApiError;
use crate::options::{AdminFallback, Secret, ServerOptions};

/// What a route demands. Declared once per route in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// No credentials (the API document and its page).
    Public,
    /// Liveness and readiness: public unless configured otherwise.
    Probe,
    /// `read:*`
    Read,
    /// `api:*`
    Api,
    /// `admin:*`
    Admin,
}

impl Scope {
    /// The scope's name in the API document.
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Probe => "probe",
            Self::Read => "read:*",
            Self::Api => "api:*",
            Self::Admin => "admin:*",
        }
    }
}

/// What a caller turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Anonymous,
    Api,
    Admin,
}

/// The configured keys.
#[derive(Debug, Clone)]
pub(crate) struct Authenticator {
    api_key: Option<Secret>,
    admin_api_key: Option<Secret>,
    admin_fallback: AdminFallback,
    probes_public: bool,
}

const API_KEY: &str = "x-api-key";
const ADMIN_API_KEY: &str = "x-admin-api-key";

/// Headers that carry keys: never shown to a guest.
pub(crate) const KEY_HEADERS: [&str; 2] = [API_KEY, ADMIN_API_KEY];

impl Authenticator {
    pub(crate) fn new(options: &ServerOptions) -> Self {
        Self {
            api_key: options.api_key.clone(),
            admin_api_key: options.admin_api_key.clone(),
            admin_fallback: options.admin_fallback,
            probes_public: options.probes == crate::options::ProbeAccess::Public,
        }
    }

    /// No key is configured: whoever reaches the server may use it.
    pub(crate) fn is_open(&self) -> bool {
        self.api_key.is_none() && self.admin_api_key.is_none()
    }

    /// Whether the request carries a key; never true while there is none.
    pub(crate) fn knows(&self, headers: &HeaderMap) -> bool {
        self.role(headers) != Role::Anonymous
    }

    /// Lets the request pass a route of this scope, or says why not.
    pub(crate) fn authorize(&self, headers: &HeaderMap, scope: Scope) -> Result<Role, ApiError> {
        let role = self.role(headers);
        if self.is_open() || self.may(role, scope) {
            return Ok(role);
        }
        match role {
            Role::Anonymous => Err(ApiError::new(ErrorCode::Unauthorized, "a valid API key is required")
                .hint("send it in the header X-API-Key")),
            Role::Api | Role::Admin => Err(ApiError::new(
                ErrorCode::Forbidden,
                format!("this call needs the scope {}, which this key does not have", scope.name()),
            )),
        }
    }

    /// The strongest role that the presented keys prove.
    fn role(&self, headers: &HeaderMap) -> Role {
        let presented = |name: &str, key: Option<&Secret>| {
            let value = headers.get(name).map(http::HeaderValue::as_bytes);
            matches!((value, key), (Some(value), Some(key)) if key.matches(value))
        };
        let admin = self.admin_api_key.as_ref();
        if presented(ADMIN_API_KEY, admin) || presented(API_KEY, admin) {
            return Role::Admin;
        }
        if !presented(API_KEY, self.api_key.as_ref()) {
            return Role::Anonymous;
        }
        match (admin, self.admin_fallback) {
            (None, AdminFallback::Enabled) => Role::Admin,
            (None, AdminFallback::Disabled) | (Some(_), _) => Role::Api,
        }
    }

    fn may(&self, role: Role, scope: Scope) -> bool {
        match scope {
            Scope::Public => true,
            Scope::Probe => self.probes_public || role != Role::Anonymous,
            Scope::Read | Scope::Api => role != Role::Anonymous,
            Scope::Admin => role == Role::Admin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::ProbeAccess;

    fn authenticator(api: &str, admin: &str, fallback: AdminFallback) -> Authenticator {
        Authenticator::new(&ServerOptions {
            api_key: Secret::new(api),
            admin_api_key: Secret::new(admin),
            admin_fallback: fallback,
            ..ServerOptions::default()
        })
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn keys_prove_roles() {
        let both = authenticator("k", "a", AdminFallback::Enabled);
        assert_eq!(both.role(&headers(&[])), Role::Anonymous);
        assert_eq!(both.role(&headers(&[("x-api-key", "wrong")])), Role::Anonymous);
        assert_eq!(both.role(&headers(&[("x-api-key", "k")])), Role::Api);
        assert_eq!(both.role(&headers(&[("x-api-key", "a")])), Role::Admin);
        assert_eq!(both.role(&headers(&[("x-admin-api-key", "a")])), Role::Admin);
        assert_eq!(both.role(&headers(&[("x-admin-api-key", "k")])), Role::Anonymous);
        assert_eq!(both.role(&headers(&[("x-admin-api-key", "no"), ("x-api-key", "k")])), Role::Api);
    }

    #[test]
    fn the_api_key_is_admin_only_under_fallback() {
        let key = headers(&[("x-api-key", "k")]);
        assert_eq!(authenticator("k", "", AdminFallback::Enabled).role(&key), Role::Admin);
        assert_eq!(authenticator("k", "", AdminFallback::Disabled).role(&key), Role::Api);
    }

    #[test]
    fn an_admin_key_alone_closes_the_server_to_all_others() {
        let admin_only = authenticator("", "a", AdminFallback::Enabled);
        assert!(admin_only.authorize(&headers(&[]), Scope::Read).is_err());
        assert!(admin_only.authorize(&headers(&[("x-api-key", "")]), Scope::Read).is_err());
        assert!(admin_only.authorize(&headers(&[("x-api-key", "a")]), Scope::Read).is_ok());
    }

    #[test]
    fn probes_can_be_closed() {
        let mut options = ServerOptions { api_key: Secret::new("k"), ..ServerOptions::default() };
        assert!(Authenticator::new(&options).authorize(&headers(&[]), Scope::Probe).is_ok());
        options.probes = ProbeAccess::Authenticated;
        assert!(Authenticator::new(&options).authorize(&headers(&[]), Scope::Probe).is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        assert!(!format!("{:?}", authenticator("hush", "hush", AdminFallback::Enabled)).contains("hush"));
    }
}

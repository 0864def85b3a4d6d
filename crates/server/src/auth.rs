//! Who is calling, and what that caller may do.
//!
//! Authentication is active when a key is configured, when a key was ever
//! stored, or when the configuration demands it; [`Authenticator::is_open`] is
//! the one place that decides. It never becomes inactive while the server runs:
//! revoking the last stored key leaves a closed server. An open server listens
//! on loopback only, and the request guards keep web pages out.
//!
//! Which scope a route needs stands in the route table.

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderMap;
use stacyvm_api::{ErrorCode, KeyId, KeyScope, OwnerId};
use stacyvm_engine::{KEY_DIGITS, KEY_PREFIX, KeyLookup, Keys, StoredKey, has_key_form};

use crate::ServerError;
use crate::error::ApiError;
use crate::options::{AdminFallback, Authentication, ProbeAccess, Secret, ServerOptions};

/// Layers of percent-encoding that are looked below. A text of more is not
/// shown at all.
const ENCODINGS_MAX: usize = 4;

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
            Self::Read => KeyScope::Read.as_str(),
            Self::Api => KeyScope::Api.as_str(),
            Self::Admin => KeyScope::Admin.as_str(),
        }
    }
}

/// Whom a request's key proves the caller to be.
#[derive(Debug, Clone)]
pub(crate) enum Identity {
    Anonymous(Presented),
    Configured(ConfiguredKey),
    Stored(Arc<StoredKey>),
}

/// What a caller without an identity presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presented {
    Nothing,
    /// A key that is not known, or is revoked.
    UnknownKey,
    ExpiredKey,
}

/// The keys of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ConfiguredKey {
    Api,
    /// The API key while there is no admin key.
    ApiAsAdmin,
    Admin,
}

/// Whether a key that could be guessed is compared at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guesses {
    Compared,
    /// Too many came from there.
    Ignored,
}

impl Identity {
    pub(crate) const NOBODY: Self = Self::Anonymous(Presented::Nothing);

    /// The name under which logs know the caller; never a credential.
    pub(crate) fn actor(&self) -> String {
        match self {
            Self::Anonymous(_) => "anonymous".to_owned(),
            Self::Configured(ConfiguredKey::Api | ConfiguredKey::ApiAsAdmin) => "api_key".to_owned(),
            Self::Configured(ConfiguredKey::Admin) => "admin_key".to_owned(),
            Self::Stored(key) => format!("key:{}", key.name()),
        }
    }

    pub(crate) fn key_id(&self) -> Option<&KeyId> {
        self.stored().map(|key| key.id())
    }

    /// Whom the key is bound to.
    pub(crate) fn owner(&self) -> Option<&OwnerId> {
        self.stored().and_then(|key| key.owner())
    }

    pub(crate) fn stored(&self) -> Option<&Arc<StoredKey>> {
        match self {
            Self::Stored(key) => Some(key),
            Self::Anonymous(_) | Self::Configured(_) => None,
        }
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self, Self::Anonymous(_))
    }

    pub(crate) fn holds(&self, scope: KeyScope) -> bool {
        match self {
            Self::Anonymous(_) => false,
            Self::Configured(ConfiguredKey::Api) => scope != KeyScope::Admin,
            Self::Configured(ConfiguredKey::ApiAsAdmin | ConfiguredKey::Admin) => true,
            Self::Stored(key) => key.grants(scope),
        }
    }

    /// Resolves when the identity ends; for most never.
    pub(crate) async fn ended(&self) {
        match self.stored() {
            Some(key) => key.ended().await,
            None => std::future::pending().await,
        }
    }
}

/// The keys that open this server.
#[derive(Debug, Clone)]
pub(crate) struct Authenticator {
    api_key: Option<Secret>,
    admin_api_key: Option<Secret>,
    admin_fallback: AdminFallback,
    probes: ProbeAccess,
    authentication: Authentication,
    stored: Keys,
}

const API_KEY: &str = "x-api-key";
const ADMIN_API_KEY: &str = "x-admin-api-key";

/// Headers that carry keys: never shown to a guest.
pub(crate) const KEY_HEADERS: [&str; 2] = [API_KEY, ADMIN_API_KEY];

/// Whether the request carries a key, of whatever worth.
pub(crate) fn presents_key(headers: &HeaderMap) -> bool {
    KEY_HEADERS.iter().any(|name| headers.contains_key(*name))
}

impl Authenticator {
    pub(crate) fn new(options: &ServerOptions, stored: Keys) -> Self {
        Self {
            api_key: options.api_key.clone(),
            admin_api_key: options.admin_api_key.clone(),
            admin_fallback: options.admin_fallback,
            probes: options.probes,
            authentication: options.authentication,
            stored,
        }
    }

    /// Whoever reaches the server may use it.
    pub(crate) fn is_open(&self) -> bool {
        !self.has_configured_key()
            && match self.authentication {
                Authentication::WhenThereIsAKey => !self.stored.ever_made(),
                Authentication::Required => false,
                Authentication::Off => true,
            }
    }

    /// Resolves once callers need a key; for a server that stays open, never.
    pub(crate) async fn closed(&self) {
        if !self.is_open() {
            return;
        }
        match self.authentication {
            Authentication::WhenThereIsAKey | Authentication::Required => self.stored.first_made().await,
            Authentication::Off => std::future::pending().await,
        }
    }

    /// Refuses a server that nobody could use, and one that looks closed but is
    /// not.
    pub(crate) fn check(&self) -> Result<(), ServerError> {
        let usable = self.has_configured_key() || self.stored.any_usable(None);
        match self.authentication {
            Authentication::Off if usable => Err(ServerError::KeysWithoutAuthentication),
            _ if !self.is_open() && !usable => Err(ServerError::NoUsableKey),
            Authentication::Off | Authentication::Required | Authentication::WhenThereIsAKey => Ok(()),
        }
    }

    /// Whether some key opens the admin routes now.
    pub(crate) fn can_be_administered(&self) -> bool {
        self.has_configured_admin() || self.stored.any_usable(Some(KeyScope::Admin))
    }

    /// Whether a key of the configuration opens the admin routes.
    pub(crate) fn has_configured_admin(&self) -> bool {
        self.admin_api_key.is_some() || (self.api_key.is_some() && self.admin_fallback == AdminFallback::Enabled)
    }

    /// Whether callers of such a route have to say who they are.
    pub(crate) fn is_public(&self, scope: Scope) -> bool {
        match scope {
            Scope::Public => true,
            Scope::Probe => self.probes == ProbeAccess::Public,
            Scope::Read | Scope::Api | Scope::Admin => false,
        }
    }

    /// Whom the presented keys prove: the strongest configured key, else a
    /// stored one. The admin header comes first.
    pub(crate) fn identify(&self, headers: &HeaderMap, guesses: Guesses) -> Identity {
        if self.is_open() {
            return Identity::NOBODY;
        }
        let [admin_header, api_header] =
            [ADMIN_API_KEY, API_KEY].map(|name| headers.get(name).map(http::HeaderValue::as_bytes));
        let proves = |key: Option<&Secret>, presented: Option<&[u8]>| {
            let key = key.filter(|key| guesses == Guesses::Compared || !key.can_be_guessed());
            matches!((key, presented), (Some(key), Some(presented)) if key.matches(presented))
        };
        let admin = self.admin_api_key.as_ref();
        if proves(admin, admin_header) || proves(admin, api_header) {
            return Identity::Configured(ConfiguredKey::Admin);
        }
        let mut presented = Presented::Nothing;
        for key in [admin_header, api_header].into_iter().flatten() {
            match self.stored.look_up(key) {
                KeyLookup::Valid(key) => return Identity::Stored(key),
                KeyLookup::Expired => presented = Presented::ExpiredKey,
                KeyLookup::Unknown if presented == Presented::Nothing => presented = Presented::UnknownKey,
                KeyLookup::Unknown => {}
            }
        }
        if proves(self.api_key.as_ref(), api_header) {
            return Identity::Configured(match (admin, self.admin_fallback) {
                (None, AdminFallback::Enabled) => ConfiguredKey::ApiAsAdmin,
                (None, AdminFallback::Disabled) | (Some(_), _) => ConfiguredKey::Api,
            });
        }
        Identity::Anonymous(presented)
    }

    /// Lets a caller use a route of this scope, or says why not.
    pub(crate) fn authorize(&self, identity: &Identity, scope: Scope) -> Result<(), ApiError> {
        if self.is_public(scope) || self.is_open() {
            return Ok(());
        }
        let needed = match scope {
            Scope::Public | Scope::Probe => None,
            Scope::Read => Some(KeyScope::Read),
            Scope::Api => Some(KeyScope::Api),
            Scope::Admin => Some(KeyScope::Admin),
        };
        match identity {
            Identity::Anonymous(presented) => Err(unauthorized(*presented)),
            identity if needed.is_none_or(|needed| identity.holds(needed)) => Ok(()),
            Identity::Configured(_) | Identity::Stored(_) => Err(ApiError::new(
                ErrorCode::Forbidden,
                format!("this call needs the scope {}, which this key does not have", scope.name()),
            )),
        }
    }

    /// A text as it may be logged: what a caller puts into a path can hold a key,
    /// also percent-encoded, and then the text is shown decoded.
    pub(crate) fn without_keys<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut shown = self.hide_keys(text);
        let mut layer = percent_decoded(&shown);
        for _ in 0..ENCODINGS_MAX {
            let Some(decoded) = layer else { return shown };
            if let Cow::Owned(hidden) = self.hide_keys(&decoded) {
                layer = percent_decoded(&hidden);
                shown = Cow::Owned(hidden.escape_debug().to_string());
            } else {
                layer = percent_decoded(&decoded);
            }
        }
        match layer {
            None => shown,
            Some(_) => Cow::Owned("…".to_owned()),
        }
    }

    fn hide_keys<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut clean = Cow::Borrowed(text);
        for secret in [&self.api_key, &self.admin_api_key].into_iter().flatten() {
            if let Some(replaced) = secret.hidden_in(&clean) {
                clean = Cow::Owned(replaced);
            }
        }
        while let Some(at) = find_key(&clean) {
            clean.to_mut().replace_range(at + KEY_PREFIX.len()..at + KEY_PREFIX.len() + KEY_DIGITS, "…");
        }
        clean
    }

    /// Whether a text holds a key, as far as keys can be told from words.
    pub(crate) fn finds_key_in(&self, text: &str) -> bool {
        matches!(self.without_keys(text), Cow::Owned(_))
    }

    fn has_configured_key(&self) -> bool {
        self.api_key.is_some() || self.admin_api_key.is_some()
    }
}

fn unauthorized(presented: Presented) -> ApiError {
    let (message, hint) = match presented {
        Presented::Nothing => ("a valid API key is required", "send it in the header X-API-Key"),
        Presented::UnknownKey => ("the API key is not valid here", "it is wrong, or it was revoked"),
        Presented::ExpiredKey => ("the API key has expired", "ask for a new one: stacyvm key create"),
    };
    ApiError::new(ErrorCode::Unauthorized, message).hint(hint)
}

/// What one layer of percent-encoding (RFC 3986 2.1) hides, if there is any.
fn percent_decoded(text: &str) -> Option<String> {
    let digit = |at: usize| text.as_bytes().get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&byte) = text.as_bytes().get(at) {
        let (shown, length) = match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, 3),
            (plain, _, _) => (plain, 1),
        };
        decoded.push(shown);
        at += length;
    }
    (decoded.len() < text.len()).then(|| String::from_utf8_lossy(&decoded).into_owned())
}

fn find_key(text: &str) -> Option<usize> {
    let length = KEY_PREFIX.len() + KEY_DIGITS;
    text.match_indices(KEY_PREFIX)
        .map(|(at, _)| at)
        .find(|at| text.as_bytes().get(*at..at + length).is_some_and(has_key_form))
}

#[cfg(test)]
mod tests {
    use stacyvm_api::ApiKeyRequest;

    use super::*;

    struct Fixture {
        keys: Keys,
        _directory: tempfile::TempDir,
    }

    async fn no_keys() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let keys = Keys::open(&directory.path().join("stacyvm.db")).await.unwrap();
        Fixture { keys, _directory: directory }
    }

    impl Fixture {
        async fn add(&self, scopes: &[KeyScope]) -> String {
            let name = format!("k{}", scopes.len());
            let request = ApiKeyRequest { name, scopes: Some(scopes.to_vec()), ..ApiKeyRequest::default() };
            self.keys.create("test", request).await.unwrap().key
        }

        fn authenticator(&self, api: &str, admin: &str, fallback: AdminFallback) -> Authenticator {
            let options = ServerOptions {
                api_key: Secret::new(api),
                admin_api_key: Secret::new(admin),
                admin_fallback: fallback,
                ..ServerOptions::default()
            };
            Authenticator::new(&options, self.keys.clone())
        }
    }

    /// The caller's actor, and whether it may read, change and administer.
    fn proven(authenticator: &Authenticator, pairs: &[(&'static str, &str)]) -> (String, [bool; 3]) {
        let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let identity = authenticator.identify(&headers, Guesses::Compared);
        let may =
            [Scope::Read, Scope::Api, Scope::Admin].map(|scope| authenticator.authorize(&identity, scope).is_ok());
        (identity.actor(), may)
    }

    #[tokio::test]
    async fn configured_keys_prove_what_they_always_did() {
        let fixture = no_keys().await;
        let both = fixture.authenticator("k", "a", AdminFallback::Enabled);
        let nobody = ("anonymous".to_owned(), [false; 3]);
        let api = ("api_key".to_owned(), [true, true, false]);
        let admin = ("admin_key".to_owned(), [true; 3]);
        assert_eq!(proven(&both, &[]), nobody);
        assert_eq!(proven(&both, &[("x-api-key", "wrong")]), nobody);
        assert_eq!(proven(&both, &[("x-api-key", "k")]), api);
        assert_eq!(proven(&both, &[("x-api-key", "a")]), admin);
        assert_eq!(proven(&both, &[("x-admin-api-key", "a")]), admin);
        assert_eq!(proven(&both, &[("x-admin-api-key", "k")]), nobody);
        assert_eq!(proven(&both, &[("x-admin-api-key", "no"), ("x-api-key", "k")]), api);
    }

    #[tokio::test]
    async fn the_api_key_is_admin_only_under_fallback() {
        let fixture = no_keys().await;
        let key = [("x-api-key", "k")];
        let may = |fallback| proven(&fixture.authenticator("k", "", fallback), &key).1;
        assert_eq!(may(AdminFallback::Enabled), [true; 3]);
        assert_eq!(may(AdminFallback::Disabled), [true, true, false]);
    }

    #[tokio::test]
    async fn an_admin_key_alone_closes_the_server_to_all_others() {
        let fixture = no_keys().await;
        let admin_only = fixture.authenticator("", "a", AdminFallback::Enabled);
        assert_eq!(proven(&admin_only, &[]).1, [false; 3]);
        assert_eq!(proven(&admin_only, &[("x-api-key", "")]).1, [false; 3]);
        assert_eq!(proven(&admin_only, &[("x-api-key", "a")]).1, [true; 3]);
    }

    #[tokio::test]
    async fn stored_keys_prove_their_scopes_in_either_header() {
        let fixture = no_keys().await;
        let open = fixture.authenticator("", "", AdminFallback::Enabled);
        assert!(open.is_open());
        let read = fixture.add(&[KeyScope::Read]).await;
        assert!(!open.is_open(), "the first key closes the server");
        let rest = fixture.add(&[KeyScope::Api, KeyScope::Admin]).await;
        for header in ["x-api-key", "x-admin-api-key"] {
            assert_eq!(proven(&open, &[(header, &read)]), ("key:k1".to_owned(), [true, false, false]));
            assert_eq!(proven(&open, &[(header, &rest)]), ("key:k2".to_owned(), [false, true, true]));
        }
    }

    #[tokio::test]
    async fn when_authentication_is_active() {
        let fixture = no_keys().await;
        let with = |authentication, api: &str| {
            let options = ServerOptions { authentication, api_key: Secret::new(api), ..ServerOptions::default() };
            Authenticator::new(&options, fixture.keys.clone())
        };
        let state = |authenticator: &Authenticator| (authenticator.is_open(), authenticator.check().is_ok());
        assert_eq!(state(&with(Authentication::WhenThereIsAKey, "")), (true, true));
        assert_eq!(state(&with(Authentication::WhenThereIsAKey, "k")), (false, true));
        assert_eq!(state(&with(Authentication::Required, "")), (false, false), "nobody could call");
        assert_eq!(state(&with(Authentication::Off, "")), (true, true));
        assert_eq!(state(&with(Authentication::Off, "k")), (false, false), "it would look closed");

        fixture.add(&[KeyScope::Read]).await;
        assert_eq!(state(&with(Authentication::WhenThereIsAKey, "")), (false, true));
        assert_eq!(state(&with(Authentication::Required, "")), (false, true));
        assert!(with(Authentication::Off, "").check().is_err());

        let key = fixture.keys.list(stacyvm_engine::RevokedKeys::LeftOut).await.unwrap().remove(0);
        fixture.keys.revoke(&key.id, stacyvm_engine::LastAdminKey::Kept).await.unwrap();
        assert_eq!(state(&with(Authentication::WhenThereIsAKey, "")), (false, false), "it stays closed");
        assert_eq!(state(&with(Authentication::Off, "")), (true, true), "opened again only when told so");
    }

    #[tokio::test]
    async fn guesses_are_ignored_for_short_keys_only() {
        let fixture = no_keys().await;
        let long = "0123456789abcdef0123456789abcdef";
        let blocked = |key: &'static str| {
            let headers = [(API_KEY.parse().unwrap(), key.parse().unwrap())].into_iter().collect();
            fixture.authenticator(key, "", AdminFallback::Enabled).identify(&headers, Guesses::Ignored).is_anonymous()
        };
        assert!(blocked("short"));
        assert!(!blocked(long));
    }

    #[tokio::test]
    async fn probes_can_be_closed() {
        let fixture = no_keys().await;
        let mut options = ServerOptions { api_key: Secret::new("k"), ..ServerOptions::default() };
        let passes = |options: &ServerOptions| {
            Authenticator::new(options, fixture.keys.clone()).authorize(&Identity::NOBODY, Scope::Probe).is_ok()
        };
        assert!(passes(&options));
        options.probes = ProbeAccess::Authenticated;
        assert!(!passes(&options));
    }

    #[tokio::test]
    async fn keys_are_neither_printed_nor_logged() {
        let fixture = no_keys().await;
        let configured = "hush-0123456789abcdef";
        let authenticator = fixture.authenticator(configured, "", AdminFallback::Enabled);
        assert!(!format!("{authenticator:?}").contains("hush"));
        let key = fixture.add(&[KeyScope::Read]).await;
        let path = format!("/a/{key}/{configured}{key}");
        assert_eq!(authenticator.without_keys(&path), "/a/e2b_…/…e2b_…");
        for plain in ["/api/v1/sandboxes/e2b_1", "/a%20b/%65%32b_1", "/100%", "/%zz/%f", "/%2525"] {
            assert_eq!(authenticator.without_keys(plain), plain);
        }
        let encoded = |text: &str| text.bytes().fold(String::new(), |text, byte| format!("{text}%{byte:02x}"));
        let partly = format!("/a/{}", key.replacen("b_", "%62%5F", 1));
        assert_eq!(authenticator.without_keys(&partly), "/a/e2b_…");
        for text in [&key, configured, &encoded(&key), &encoded(configured), &encoded(&encoded(&key))] {
            let path = format!("/a/{}%0a", encoded(text));
            let shown = authenticator.without_keys(&path);
            assert!(matches!(&*shown, "/a/e2b_…\\n" | "/a/…\\n"), "{path}: {shown}");
            assert!(authenticator.finds_key_in(&path), "{path}");
        }
        // Whoever wraps it up so often hides something.
        let wrapped = (0..ENCODINGS_MAX).fold(key.clone(), |text, _| encoded(&text));
        assert_eq!(authenticator.without_keys(&encoded(&wrapped)), "…");
    }
}

//! Who may call the server, and how well that is kept.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use stacyvm_api::Duration;

use super::Linter;
use crate::check::Check;
use crate::config::setting::Secret;
use crate::config::settings::Source;

/// Shorter keys can be guessed by whoever may try often enough.
const MIN_KEY_BYTES: usize = 32;

/// What keys of examples look like.
const PLACEHOLDERS: [&str; 3] = ["change-me", "changeme", "replace-me"];

const MAKE_A_KEY: &str = "write one with `openssl rand -hex 32` to a file of mode 0600, and name the file in";

impl Linter<'_> {
    pub(super) fn auth(&mut self) {
        let (api, admin) = (self.settings.secret("auth.api_key"), self.settings.secret("auth.admin_api_key"));
        // With it a server without any key does not start.
        let demanded = self.settings.parsed("auth.enabled") == Some(true);
        self.risk_if(
            api.is_none() && admin.is_none() && !demanded,
            "auth.enabled",
            "callers need a key",
            "callers may need no key: whoever reaches the server may run code",
            "make one (stacyvm key create NAME --scope read --scope api --scope admin) and set auth.enabled to true, or set auth.api_key_file",
        );
        for (key, secret) in [("auth.api_key", api), ("auth.admin_api_key", admin)] {
            if secret.is_none() && self.is_faulty(&format!("{key}_file")) {
                // One is named and cannot be read, which has been said.
                continue;
            }
            if secret.is_none() && demanded {
                self.pass(key, "there is none: keys are made with `stacyvm key create`");
            } else {
                self.key(key, secret);
            }
        }
        self.risk_if(
            self.settings.parsed::<u64>("auth.failures_per_minute") == Some(0),
            "auth.failures_per_minute",
            "wrong keys are limited",
            "keys may be tried without end",
            "set auth.failures_per_minute to 60",
        );
        let equal = matches!((api, admin), (Some(api), Some(admin)) if api == admin);
        if equal {
            let check = self.named(
                "auth.key_separation",
                "the API key is the admin key too: every caller administrates",
                format!("{MAKE_A_KEY} auth.admin_api_key_file"),
            );
            self.add("auth.admin_api_key", check);
        } else {
            self.add("auth.admin_api_key", Check::pass("auth.key_separation", "the keys are not the same"));
        }
        self.risk_if(
            self.settings.parsed("auth.admin_fallback_enabled").unwrap_or(true),
            "auth.admin_fallback_enabled",
            "only the admin key administrates",
            "the API key administrates too while there is no admin key",
            "set auth.admin_fallback_enabled to false",
        );
        self.audit_retention();
    }

    fn key(&mut self, key: &str, secret: Option<&Secret>) {
        let Some(secret) = secret else {
            return self.risk(key, "there is no key", format!("{MAKE_A_KEY} {key}_file"));
        };
        let text = secret.expose();
        let lower = text.to_ascii_lowercase();
        if PLACEHOLDERS.iter().any(|placeholder| lower.contains(placeholder)) {
            self.risk(key, "is the placeholder of an example", format!("{MAKE_A_KEY} {key}_file"));
        } else if text.len() < MIN_KEY_BYTES {
            let message = format!("has {} bytes, and {MIN_KEY_BYTES} are the least that cannot be guessed", text.len());
            self.risk(key, message, format!("{MAKE_A_KEY} {key}_file"));
        } else {
            self.pass(key, format!("has {} bytes", text.len()));
        }
        self.key_place(key);
    }

    /// Who else can read the key where it is kept.
    fn key_place(&mut self, key: &str) {
        let Some(source) = self.settings.get(key).map(|value| value.source.clone()) else { return };
        let (path, inline) = match &source {
            Source::KeyFile(path) => (path.as_path(), false),
            Source::File { name, .. } => (Path::new(name), true),
            Source::Default | Source::Environment(_) | Source::Option(_) => return,
        };
        // A file that went away since was readable a moment ago.
        let open_to_others = path.metadata().is_ok_and(|file| file.mode() & 0o077 != 0);
        if open_to_others {
            let name = format!("{key}_file");
            let message = format!("{} holds a key, and others of this host can read it", path.display());
            let check = self.named(&name, message, format!("chmod 600 {}", path.display()));
            self.add(key, check);
        } else if inline {
            let fix = format!("move it to a file of its own, and name that in {key}_file");
            let check = Check::warn(format!("{key}_file"), "the key stands in the configuration itself", fix);
            self.add(key, check);
        }
    }

    fn audit_retention(&mut self) {
        const KEY: &str = "auth.admin_audit_retention";
        match self.settings.parsed::<Duration>(KEY) {
            None => self.absent(KEY, "log of administration", "keep the access log of the proxy in front"),
            Some(retention) => self.risk_if(
                retention.is_zero(),
                KEY,
                "the log of administration is kept for a time",
                "the log of administration grows without end",
                "set auth.admin_audit_retention, for example to 2160h",
            ),
        }
    }

    pub(super) fn oidc(&mut self) {
        const ENABLED: &str = "auth.oidc_enabled";
        if self.settings.parsed(ENABLED) != Some(true) {
            return self.pass(ENABLED, "people sign in with keys, not with an identity provider");
        }
        let empty = |key: &str| self.settings.text(key).is_empty();
        let issuer = empty("auth.oidc_issuer");
        let has_key = !(empty("auth.oidc_public_key") && empty("auth.oidc_public_key_file"));
        let keys = empty("auth.oidc_jwks_url") && !has_key;
        let audience = empty("auth.oidc_audience");
        let inline = !empty("auth.oidc_public_key");
        let groups = ["auth.oidc_admin_groups", "auth.oidc_operator_groups", "auth.oidc_viewer_groups"];
        let no_groups = groups.iter().all(|key| self.settings.list(key).is_empty());
        self.pass(ENABLED, "tokens of an identity provider are accepted");
        self.risk_if(
            issuer,
            "auth.oidc_issuer",
            "tokens of one issuer only",
            "tokens of any issuer are accepted",
            "set auth.oidc_issuer to the provider's address",
        );
        self.risk_if(
            keys,
            "auth.oidc_jwks_url",
            "signatures can be checked",
            "there are no keys to check signatures with",
            "set auth.oidc_jwks_url",
        );
        if inline {
            self.warn("auth.oidc_public_key", "stands in the configuration itself", "use auth.oidc_public_key_file");
        }
        if audience {
            self.warn("auth.oidc_audience", "tokens made for other services are accepted", "set auth.oidc_audience");
        }
        if no_groups {
            let check = Check::warn("auth.oidc_groups", "no group has a role", "set auth.oidc_operator_groups");
            self.add(ENABLED, check);
        }
    }
}

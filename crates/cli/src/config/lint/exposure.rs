//! What the server shows to the network and to web pages.

use std::net::IpAddr;

use stacyvm_server::is_certifiable;

use super::{Linter, site};
use crate::check::Check;

/// Where CAs look at a challenge by TLS-ALPN-01 (RFC 8737 3).
const HTTPS_PORT: u16 = 443;

impl Linter<'_> {
    pub(super) fn exposure(&mut self) {
        self.host();
        self.allowed_hosts();
        self.origins();
        self.preview_domain();
        self.proxy();
        self.acme();
    }

    fn host(&mut self) {
        const KEY: &str = "server.host";
        let host = self.settings.text(KEY).to_owned();
        let has_key = self.has_key();
        if is_loopback(&host) {
            self.pass(KEY, format!("{host} is reached from this machine only"));
        } else if has_key && self.has_tls() {
            self.pass(KEY, format!("{host} is reached from other machines, over TLS"));
        } else if has_key {
            self.warn(
                KEY,
                format!("{host} is reached from other machines, over plain HTTP: keys can be read on the way"),
                "set server.acme or server.tls_cert_file, listen on 127.0.0.1 behind a proxy that does TLS, or let only a \
                 private network reach it",
            );
        } else {
            self.fail(
                KEY,
                format!("{host} is reached from other machines, and there is no key: the server will not start"),
                "set auth.api_key_file, or listen on 127.0.0.1",
            );
        }
    }

    /// Stored keys are no part of the configuration; where they are demanded, a
    /// server that has none does not start.
    fn has_key(&self) -> bool {
        let demanded = self.settings.parsed("auth.enabled") == Some(true);
        demanded || ["auth.api_key", "auth.admin_api_key"].iter().any(|key| self.settings.secret(key).is_some())
    }

    fn has_tls(&self) -> bool {
        !self.settings.text("server.tls_cert_file").is_empty()
            || self.settings.parsed("server.acme.enabled") == Some(true)
    }

    /// Certificates that the server has issued to itself: whether they can be,
    /// and for all that is shown.
    fn acme(&mut self) {
        const DIRECTORY: &str = "server.acme.directory_url";
        const HOOK: &str = "server.acme.dns_hook";
        if self.settings.parsed("server.acme.enabled") != Some(true) {
            return;
        }
        if self.settings.text(DIRECTORY).contains("staging") {
            let fix = "take it out once an order has worked";
            self.risk(DIRECTORY, "nobody trusts what a CA for trying out issues", fix);
        } else {
            self.pass(DIRECTORY, "certificates come from a CA");
        }
        if !self.settings.text(HOOK).is_empty() {
            return self.pass(HOOK, "names are proven by DNS, and previews have a wildcard");
        }
        let domain = self.settings.text("server.preview_domain").to_owned();
        let name = domain.split(':').next().unwrap_or_default();
        if is_certifiable(name) {
            let message = format!("previews below {name} have no certificate: a wildcard is proven by a DNS record");
            self.risk(HOOK, message, "set it to a program that sets the record");
        } else {
            self.pass(HOOK, "the API's names are proven at port 443");
        }
        let port = self.settings.parsed::<u16>("server.port").unwrap_or_default();
        if port != HTTPS_PORT {
            let message = format!("the CA proves names at port {HTTPS_PORT}, and this server listens on {port}");
            self.warn("server.port", message, "let port 443 lead here, listen on it, or set server.acme.dns_hook");
        }
    }

    /// Names stop pages of other sites from reaching the server through the
    /// browser of somebody who may.
    fn allowed_hosts(&mut self) {
        const KEY: &str = "server.allowed_hosts";
        let widest = self.settings.list(KEY).iter().find(|host| is_whole_suffix(host)).cloned();
        match widest {
            Some(host) => self.risk(
                KEY,
                format!("`{host}` covers names of strangers"),
                "list the names this server is called by, such as vm.example.com",
            ),
            None => self.pass(KEY, "only its own names are answered"),
        }
    }

    fn origins(&mut self) {
        const KEY: &str = "server.cors_allowed_origins";
        let origins = self.settings.list(KEY).to_vec();
        let plain = origins.iter().find(|origin| is_plain_and_remote(origin));
        if origins.iter().any(|origin| origin == "*") && !self.has_key() {
            let message = "pages of every site may call the server, and there is no key: the server will not start";
            self.fail(KEY, message, "set auth.api_key_file, or list the origins of your own pages");
        } else if origins.iter().any(|origin| origin == "*") {
            self.risk(KEY, "pages of every site may call the server", "list the origins of your own pages");
        } else if let Some(origin) = plain {
            self.warn(KEY, format!("{origin} can be changed on its way to the browser"), "use https");
        } else if origins.is_empty() {
            self.pass(KEY, "no page of another origin may call the server");
        } else {
            self.pass(KEY, format!("{} origins are listed", origins.len()));
        }
    }

    /// Names of one site with the API's are refused when the file is read.
    fn preview_domain(&mut self) {
        self.pass("server.preview_domain", "previews have a site of their own");
    }

    /// A server that only this machine reaches, under names that others use, has a
    /// proxy in front.
    fn proxy(&mut self) {
        const TRUSTED: &str = "server.trusted_proxies";
        const URL: &str = "server.preview_url";
        let is_for_others = |host: &String| is_certifiable(site::bare(host));
        if !is_loopback(self.settings.text("server.host")) || self.has_tls() {
            return;
        }
        let shows_previews = is_for_others(&self.settings.text("server.preview_domain").to_owned());
        if !shows_previews && !self.settings.list("server.allowed_hosts").iter().any(is_for_others) {
            return;
        }
        if self.settings.list(TRUSTED).is_empty() {
            let message = "callers behind the proxy all have its address: in the audit log, and where wrong keys of one \
                           lock out the others";
            self.warn(TRUSTED, message, "set it to the proxy's address, which sets X-Forwarded-For: [127.0.0.1]");
        } else {
            self.pass(TRUSTED, "callers have the address that the proxy says");
        }
        if shows_previews && self.settings.text(URL).is_empty() {
            let domain = self.settings.text("server.preview_domain").split(':').next().unwrap_or_default();
            let message = "links to previews name this server's own port and no TLS, which is not where the proxy is";
            self.warn(URL, message, format!("set it to what the proxy shows: https://{domain}"));
        } else if shows_previews {
            self.pass(URL, "links to previews lead to the proxy");
        }
    }

    pub(super) fn rate_limit(&mut self) {
        const ENABLED: &str = "rate_limit.enabled";
        // A burst of 0 is as large as the rate.
        const RATE: &str = "rate_limit.requests_per_minute";
        let Some(enabled) = self.settings.parsed::<bool>(ENABLED) else {
            return self.absent(ENABLED, "rate limits", "limit requests in the proxy in front");
        };
        self.risk_if(
            !enabled,
            ENABLED,
            "requests of one caller are limited",
            "one caller can take all of the server",
            "set rate_limit.enabled to true",
        );
        if !enabled {
            return;
        }
        let check = if self.settings.parsed::<u64>(RATE) == Some(0) {
            self.named("rate_limit.capacity", format!("{RATE} is 0, which is no limit"), format!("set {RATE} above 0"))
        } else {
            Check::pass("rate_limit.capacity", "the rate is set")
        };
        self.add(RATE, check);
        if self.settings.text("rate_limit.key_by") == "ip" {
            let fix = "set rate_limit.key_by to api_key or owner";
            self.warn("rate_limit.key_by", "callers behind one address share a limit", fix);
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = site::bare(host);
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `*.com`, `*.co.uk`: everybody can have a name there.
fn is_whole_suffix(host: &str) -> bool {
    host.strip_prefix("*.").is_some_and(site::is_public_suffix)
}

fn is_plain_and_remote(origin: &str) -> bool {
    let Some(host) = origin.strip_prefix("http://") else { return false };
    let name = site::bare(host);
    !(is_loopback(name) || name.ends_with(".localhost"))
}

//! Which certificate a handshake is answered with.
//!
//! A name that no certificate is for gets the first there is, and before there
//! is any a self-signed one: the server is reached, and the client says what is
//! wrong with the name. Nothing is ever ordered here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::AcmeError;
use super::issued::Issued;

/// The protocol in which a CA looks at a challenge, and which carries nothing
/// (RFC 8737).
pub(crate) const CHALLENGE_PROTOCOL: &[u8] = b"acme-tls/1";

/// The name in the certificate for the time being.
const STOPGAP_NAME: &str = "stacyvm.invalid";

pub(crate) struct Resolver {
    slots: Vec<Slot>,
    stopgap: Arc<CertifiedKey>,
    /// Challenges that the CA may look at now, by name.
    challenges: Mutex<HashMap<String, Arc<CertifiedKey>>>,
}

/// One certificate that is wanted, and the one that there is.
struct Slot {
    names: Vec<String>,
    current: RwLock<Option<Issued>>,
}

impl Resolver {
    pub(super) fn new(names: Vec<Vec<String>>) -> Result<Self, AcmeError> {
        let stopgap = self_signed(STOPGAP_NAME, None).map_err(AcmeError::Stopgap)?;
        let slots = names.into_iter().map(|names| Slot { names, current: RwLock::default() }).collect();
        Ok(Self { slots, stopgap: Arc::new(stopgap), challenges: Mutex::default() })
    }

    pub(super) fn current(&self, index: usize) -> Option<Issued> {
        self.slots[index].current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, index: usize, issued: Issued) {
        *self.slots[index].current.write().unwrap_or_else(PoisonError::into_inner) = Some(issued);
    }

    /// Answers the CA's next look at a name.
    pub(super) fn challenge(&self, name: &str, digest: &[u8]) -> Result<(), String> {
        let key = self_signed(name, Some(digest))?;
        self.lock_challenges().insert(name.to_owned(), Arc::new(key));
        Ok(())
    }

    pub(super) fn end_challenge(&self, name: &str) {
        self.lock_challenges().remove(name);
    }

    fn lock_challenges(&self) -> MutexGuard<'_, HashMap<String, Arc<CertifiedKey>>> {
        self.challenges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn for_name(&self, name: Option<&str>) -> Arc<CertifiedKey> {
        let is_for = |slot: &&Slot| name.is_some_and(|name| slot.names.iter().any(|known| matches(known, name)));
        let key = |slot: &Slot| {
            let current = slot.current.read().unwrap_or_else(PoisonError::into_inner);
            current.as_ref().map(|issued| Arc::clone(&issued.key))
        };
        let named = self.slots.iter().filter(is_for).find_map(key);
        named.or_else(|| self.slots.iter().find_map(key)).unwrap_or_else(|| Arc::clone(&self.stopgap))
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let is_challenge = hello.alpn().is_some_and(|mut offered| offered.any(|it| it == CHALLENGE_PROTOCOL));
        if is_challenge {
            return self.lock_challenges().get(name.as_deref()?).cloned();
        }
        Some(self.for_name(name.as_deref()))
    }
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

/// Whether a name of a certificate is one that was asked for; `*` is one label.
fn matches(known: &str, name: &str) -> bool {
    match known.strip_prefix("*.") {
        Some(domain) => name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == domain),
        None => known == name,
    }
}

/// A certificate that nobody trusts; with a challenge's answer in it where there
/// is one.
fn self_signed(name: &str, digest: Option<&[u8]>) -> Result<CertifiedKey, String> {
    let made = || {
        let mut params = CertificateParams::new([name.to_owned()])?;
        params.custom_extensions.extend(digest.map(CustomExtension::new_acme_identifier));
        let key = KeyPair::generate()?;
        Ok::<_, rcgen::Error>((params.self_signed(&key)?, key))
    };
    let (certificate, key) = made().map_err(|error| error.to_string())?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    // Not `from_der`, which refuses a certificate with a challenge's extension.
    let key = ring::default_provider().key_provider.load_private_key(key).map_err(|error| error.to_string())?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(name: &str) -> Issued {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        Issued::parse((made.cert.pem() + &made.signing_key.serialize_pem()).as_bytes()).unwrap()
    }

    #[test]
    fn a_name_gets_its_certificate_and_others_the_first() {
        let names = [["api.example.com".to_owned()].into(), ["*.example.net".to_owned()].into()];
        let resolver = Resolver::new(names.into()).unwrap();
        let shown = |name: Option<&str>| resolver.for_name(name).cert[0].clone();
        let stopgap = resolver.stopgap.cert[0].clone();
        assert_eq!(shown(Some("api.example.com")), stopgap);
        let (api, previews) = (issued("api.example.com"), issued("*.example.net"));
        let (api_cert, previews_cert) = (api.key.cert[0].clone(), previews.key.cert[0].clone());
        resolver.replace(1, previews);
        assert_eq!(shown(Some("api.example.com")), previews_cert, "better than none");
        resolver.replace(0, api);
        for name in [Some("api.example.com"), Some("example.net"), Some("a.b.example.net"), Some("other.org"), None] {
            assert_eq!(shown(name), api_cert, "{name:?}");
        }
        assert_eq!(shown(Some("3000-sb-1.example.net")), previews_cert);
    }
}

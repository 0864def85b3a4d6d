//! TLS on our own listeners: a certificate from files, read again when they
//! change, so that renewing it needs no restart, or certificates that [`acme`]
//! keeps.
//!
//! [`acme`]: crate::acme

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::ServerError;
use crate::acme::{Acme, AcmeOptions, CHALLENGE_PROTOCOL, CertificateState, time_of};
use crate::edge::random_uuid;
use crate::error::ApiError;
use crate::preview::Domain;
use crate::x509::Facts;

/// A client that does not finish the handshake by then is sent away.
pub(crate) const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// How often the files are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);

/// Protocols that clients are offered, in our order.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Where the certificates of the listeners come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsOptions {
    /// Somebody else renews them.
    Files(TlsFiles),
    /// A CA issues them to this server.
    Acme(AcmeOptions),
}

/// PEM files of a certificate with its chain, and of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {why}", .path.display())]
    Read { path: PathBuf, why: String },
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    #[error("{} holds no private key", .0.display())]
    NoKey(PathBuf),
    #[error("the certificate and key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

impl TlsFiles {
    /// Whether a server could use what is in them, and until when.
    pub fn check(&self) -> Result<Option<SystemTime>, TlsError> {
        Ok(facts(&load(self)?).map(|facts| facts.not_after))
    }
}

/// TLS as the listeners speak it.
#[derive(Clone)]
pub(crate) struct Tls {
    source: Source,
    pub(crate) acceptor: TlsAcceptor,
}

#[derive(Clone)]
enum Source {
    Files(Arc<Certificate>),
    Acme(Arc<Acme>),
}

impl Tls {
    pub(crate) fn open(options: &TlsOptions, previews: Option<&Domain>) -> Result<Self, ServerError> {
        let (source, resolver, challenges): (_, Arc<dyn ResolvesServerCert>, _) = match options {
            TlsOptions::Files(files) => {
                let certificate = Certificate::read(files.clone())?;
                (Source::Files(Arc::clone(&certificate)), certificate, None)
            }
            TlsOptions::Acme(options) => {
                let acme = Acme::open(options.clone(), previews)?;
                let resolver = Arc::clone(acme.resolver());
                (Source::Acme(acme), resolver, Some(CHALLENGE_PROTOCOL))
            }
        };
        Ok(Self { source, acceptor: acceptor(resolver, challenges)? })
    }

    pub(crate) fn certificates(&self) -> Vec<CertificateState> {
        match &self.source {
            Source::Files(certificate) => vec![certificate.state()],
            Source::Acme(acme) => acme.states(),
        }
    }

    /// Keeps the certificates up to date until `closing`.
    pub(crate) fn keep(&self, background: &mut JoinSet<()>, closing: &CancellationToken) {
        match &self.source {
            Source::Files(certificate) => {
                background.spawn(Arc::clone(certificate).watch(closing.clone()));
            }
            Source::Acme(acme) => {
                for index in 0..acme.count() {
                    background.spawn(Arc::clone(acme).keep(index, closing.clone()));
                }
            }
        }
    }
}

/// Whether a client speaks plain HTTP, by the first byte that it sends: methods
/// are letters, and the first record of TLS begins with 22 (RFC 8446 5.1).
pub(crate) fn is_plain_http(first_byte: u8) -> bool {
    first_byte.is_ascii_uppercase()
}

/// The answer to one that does.
pub(crate) fn https_only() -> Vec<u8> {
    let refusal = ApiError::bad_request("this server speaks https").hint("write https:// where you wrote http://");
    let body = refusal.body(&random_uuid());
    let head = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

/// Whether a handshake was only a CA's look at a challenge: nothing follows.
pub(crate) fn is_challenge(connection: &rustls::ServerConnection) -> bool {
    connection.alpn_protocol() == Some(CHALLENGE_PROTOCOL)
}

fn acceptor(resolver: Arc<dyn ResolvesServerCert>, challenges: Option<&[u8]>) -> Result<TlsAcceptor, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = PROTOCOLS.into_iter().chain(challenges).map(<[u8]>::to_vec).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The certificate in use.
struct Certificate {
    files: TlsFiles,
    current: RwLock<Arc<CertifiedKey>>,
    seen: Mutex<Seen>,
}

/// The files as they were looked at last.
struct Seen {
    stamp: Stamp,
    /// Why they cannot be used.
    refusal: Option<String>,
}

/// What tells a file from its next version.
type Stamp = [Option<(SystemTime, u64)>; 2];

impl Certificate {
    fn read(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let seen = Seen { stamp: stamp(&files), refusal: None };
        let current = Arc::new(load(&files)?);
        Ok(Arc::new(Self { files, current: RwLock::new(current), seen: Mutex::new(seen) }))
    }

    /// Takes in new versions of the files until `closing`. One that cannot be
    /// used is reported, and the one before stays.
    async fn watch(self: Arc<Self>, closing: CancellationToken) {
        let mut ticks = tokio::time::interval(WATCH_INTERVAL);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = closing.cancelled() => return,
            }
            let certificate = Arc::clone(&self);
            tokio::task::spawn_blocking(move || certificate.refresh()).await.ok();
        }
    }

    fn refresh(&self) {
        let now = stamp(&self.files);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if now == seen.stamp {
            return;
        }
        *seen = Seen { stamp: now, refusal: None };
        match load(&self.files) {
            Ok(fresh) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                tracing::info!("the certificate was read anew");
            }
            // The two files are written one after the other: the next look
            // finds both.
            Err(error) => {
                tracing::warn!(%error, "the new certificate cannot be used; the one before stays");
                seen.refusal = Some(error.to_string());
            }
        }
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn state(&self) -> CertificateState {
        let facts = facts(&self.current());
        let last_error = self.seen.lock().unwrap_or_else(PoisonError::into_inner).refusal.clone();
        CertificateState {
            certificate: "files",
            not_after: facts.as_ref().map(|facts| time_of(facts.not_after)),
            names: facts.map(|facts| facts.names).unwrap_or_default(),
            next_attempt: None,
            failures: u32::from(last_error.is_some()),
            last_error,
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("files", &self.files).finish_non_exhaustive()
    }
}

fn load(files: &TlsFiles) -> Result<CertifiedKey, TlsError> {
    let unreadable = |path: &Path, error: pem::Error| TlsError::Read { path: path.to_owned(), why: error.to_string() };
    let path = files.certificate.as_path();
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|error| unreadable(path, error))?;
    if chain.is_empty() {
        return Err(TlsError::Empty(path.to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::NoKey(files.key.clone()),
        error => unreadable(&files.key, error),
    })?;
    Ok(CertifiedKey::from_der(chain, key, &ring::default_provider())?)
}

/// None of a certificate that only clients can read.
fn facts(key: &CertifiedKey) -> Option<Facts> {
    Facts::of(key.cert.first()?).ok()
}

fn stamp(files: &TlsFiles) -> Stamp {
    [&files.certificate, &files.key].map(|path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;

    use super::*;

    #[test]
    fn files_say_until_when_and_a_broken_one_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let files = TlsFiles { certificate: directory.path().join("cert.pem"), key: directory.path().join("key.pem") };
        let made = generate_simple_self_signed(["vm.example.com".to_owned()]).unwrap();
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        assert!(files.check().unwrap().unwrap() > SystemTime::now());
        let certificate = Certificate::read(files.clone()).unwrap();
        let sound = certificate.state();
        assert!(sound.not_after.is_some() && sound.failures == 0, "{sound:?}");
        assert_eq!(sound.names, ["vm.example.com"]);

        std::fs::write(&files.certificate, "broken").unwrap();
        certificate.refresh();
        let broken = certificate.state();
        assert_eq!((broken.failures, broken.not_after), (1, sound.not_after), "the one before stays");
        assert!(broken.last_error.is_some_and(|why| why.contains("holds no certificate")));
    }
}

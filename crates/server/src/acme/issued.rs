//! A certificate with its chain and key, as one PEM text: either all of it is
//! on disk or none.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::x509::Facts;

/// What a handshake needs, and what we have to know of it.
#[derive(Clone)]
pub(super) struct Issued {
    pub(super) key: Arc<CertifiedKey>,
    /// In lower case.
    names: Vec<String>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

/// Why a certificate of a CA, or of ours on disk, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnusableCertificate {
    #[error("it is no PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error("there is no certificate in it")]
    Empty,
    #[error("its certificate cannot be read: {0}")]
    Certificate(String),
    #[error("its certificate and key do not fit: {0}")]
    Key(#[from] rustls::Error),
    #[error("it does not cover the names that were ordered")]
    OtherNames,
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

impl Issued {
    /// Chain and key, in any order.
    pub(super) fn parse(pem: &[u8]) -> Result<Self, UnusableCertificate> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(pem)?;
        let first = chain.first().ok_or(UnusableCertificate::Empty)?;
        let Facts { names, not_before, not_after } = Facts::of(first).map_err(UnusableCertificate::Certificate)?;
        let key = Arc::new(CertifiedKey::from_der(chain, key, &ring::default_provider())?);
        Ok(Self { key, names, not_before, not_after })
    }

    pub(super) fn covers(&self, names: &[String]) -> bool {
        names.iter().all(|name| self.names.contains(name))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;

    use super::*;

    #[test]
    fn names_and_times_are_read_from_the_first_certificate() {
        let made = generate_simple_self_signed(["*.Example.net".to_owned(), "a.example.com".to_owned()]).unwrap();
        let text = made.cert.pem() + &made.signing_key.serialize_pem();
        let issued = Issued::parse(text.as_bytes()).unwrap();
        let covers = |names: &[&str]| issued.covers(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert!(covers(&["*.example.net"]) && covers(&["a.example.com", "*.example.net"]));
        assert!(!covers(&["a.example.net"]) && !covers(&["a.example.com", "b.example.com"]));
        assert!(issued.not_before < SystemTime::now() && issued.not_after > SystemTime::now());
        let other = generate_simple_self_signed(["a.example.com".to_owned()]).unwrap();
        let mixed = made.cert.pem() + &other.signing_key.serialize_pem();
        assert!(matches!(Issued::parse(mixed.as_bytes()), Err(UnusableCertificate::Key(_))));
        assert!(Issued::parse(made.signing_key.serialize_pem().as_bytes()).is_err());
        assert!(Issued::parse(b"").is_err());
    }
}

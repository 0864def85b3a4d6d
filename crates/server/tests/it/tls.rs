//! TLS on the server's own listener.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use stacyvm_api::CreateRequest;
use stacyvm_engine::{Caller, CreateOptions, Engine, EngineOptions, ServerSecret};
use stacyvm_providers::mock::MockProvider;
use stacyvm_server::{Server, ServerError, ServerOptions, TlsFiles, TlsOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::guest::{Guest, PORT, Preview, field, previews};
use crate::support::{Live, eventually, within};

/// Writes a certificate for every local name; what it is.
fn certify(directory: &Path) -> CertificateDer<'static> {
    let names = ["localhost".to_owned(), "*.localhost".to_owned()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
    std::fs::write(directory.join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), signing_key.serialize_pem()).unwrap();
    cert.der().clone()
}

fn files(directory: &Path) -> TlsOptions {
    TlsOptions::Files(TlsFiles { certificate: directory.join("cert.pem"), key: directory.join("key.pem") })
}

/// Connects, trusting only this certificate.
async fn connect(
    preview: &Preview,
    trusted: &CertificateDer<'static>,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    connect_to(preview.fixture.address, "localhost", trusting(trusted), protocol).await
}

/// Connects and asks for a name.
pub(crate) async fn connect_to(
    address: SocketAddr,
    name: &str,
    mut config: ClientConfig,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    within(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream)).await
}

/// A client that trusts this root and no other.
pub(crate) fn trusting(root: &CertificateDer<'static>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    builder.with_root_certificates(roots).with_no_client_auth()
}

/// A client that only looks.
pub(crate) fn trusting_anybody() -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody)).with_no_client_auth()
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn previews_and_the_api_are_served_over_tls() {
    let directory = tempfile::tempdir().unwrap();
    let certificate = certify(directory.path());
    let fixture =
        crate::support::Fixture::with_options(ServerOptions { tls: Some(files(directory.path())), ..previews() }).await;
    let id =
        fixture.engine.create(&Caller::default(), CreateRequest::default(), CreateOptions::default()).await.unwrap().id;
    let guest = Guest::echoing().await;
    fixture.mock.listen(&id, PORT, stacyvm_providers::mock::MockService::At(guest.address));
    let preview = Preview { fixture, id: id.to_string() };

    let mut stream = connect(&preview, &certificate, b"http/1.1").await.unwrap();
    let request = format!("GET /page HTTP/1.1\r\nHost: {}\r\n\r\n", preview.host(PORT));
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut live = within(Live::of(&mut stream)).await;
    let head = String::from_utf8(live.rest().await).unwrap();
    assert!(live.status == 200 && head.starts_with("GET /page "), "{head}");
    assert_eq!(field(&head, "x-forwarded-proto"), Some("https"));

    let request = format!("GET /api/v1/sandboxes/{id}/ports/3000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut live = within(Live::of(&mut stream)).await;
    let port: serde_json::Value = serde_json::from_slice(&live.rest().await).unwrap();
    assert_eq!(port["url"].as_str(), Some(format!("https://{}/", preview.host(PORT)).as_str()));

    let stream = connect(&preview, &certificate, b"h2").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut plain = TcpStream::connect(preview.fixture.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    within(plain.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert!(head.starts_with("HTTP/1.1 400 ") && body["code"] == "BAD_REQUEST", "{answer}");
    assert_eq!(body["message"], "this server speaks https");
}

#[tokio::test]
async fn a_renewed_certificate_is_taken_in_and_a_broken_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let old = certify(directory.path());
    let options = ServerOptions { tls: Some(files(directory.path())), ..previews() };
    let fixture = crate::support::Fixture::with_options(options).await;
    let preview = Preview { fixture, id: "sb-00000000000000000000".to_owned() };
    assert!(connect(&preview, &old, b"http/1.1").await.is_ok());
    std::fs::write(directory.path().join("cert.pem"), "broken").unwrap();
    let new = certify(directory.path());
    eventually("the new certificate is shown", || async { connect(&preview, &new, b"http/1.1").await.ok() }).await;
    assert!(connect(&preview, &old, b"http/1.1").await.is_err());
}

#[tokio::test]
async fn files_that_hold_no_certificate_are_refused_at_start() {
    let directory = tempfile::tempdir().unwrap();
    certify(directory.path());
    let other = tempfile::tempdir().unwrap();
    certify(other.path());
    let data = tempfile::tempdir().unwrap();
    let engine = EngineOptions::new(data.path().join("stacyvm.db"), ServerSecret::new([7; 32]), "mock");
    let engine = Engine::start(engine, vec![Arc::new(MockProvider::new("mock"))]).await.unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    for (certificate, key, why) in [
        (directory.path().join("missing"), directory.path().join("key.pem"), "cannot read"),
        (empty, directory.path().join("key.pem"), "holds no certificate"),
        (directory.path().join("cert.pem"), directory.path().join("cert.pem"), "holds no private key"),
        (directory.path().join("cert.pem"), other.path().join("key.pem"), "KeyMismatch"),
    ] {
        let tls = Some(TlsOptions::Files(TlsFiles { certificate, key }));
        let options = ServerOptions { port: 0, tls: tls.clone(), ..ServerOptions::default() };
        let refused = Server::bind(options, engine.clone()).await.err();
        assert!(
            matches!(&refused, Some(ServerError::Tls(said)) if said.to_string().contains(why)),
            "{tls:?}: {refused:?}"
        );
    }
}

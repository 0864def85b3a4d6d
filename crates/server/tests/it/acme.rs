//! Certificates from a real CA.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;
use stacyvm_api::CreateRequest;
use stacyvm_engine::{Caller, CreateOptions, Engine, EngineOptions, ServerSecret};
use stacyvm_providers::mock::{MockProvider, MockService};
use stacyvm_server::{
    AcmeError, AcmeOptions, DnsHook, ExternalAccount, PreviewOptions, Server, ServerError, ServerOptions, TlsOptions,
};
use tokio::io::AsyncWriteExt as _;

use crate::ca::{Ca, CaOptions};
use crate::guest::{Guest, PORT, field};
use crate::support::{Fixture, Live, eventually, within};
use crate::tls::{connect_to, trusting, trusting_anybody};

const API: &str = "vm.example.test";
const DOMAIN: &str = "preview-example.test";

/// A host of a preview, whether or not there is one.
const PREVIEW: &str = "3000-sb-00000000000000000000.preview-example.test";

/// A name that somebody made up.
const STRANGER: &str = "stranger.example.test";

fn server(acme: AcmeOptions) -> ServerOptions {
    ServerOptions {
        allowed_hosts: vec![API.to_owned()],
        preview: PreviewOptions { domain: Some(DOMAIN.to_owned()), ..PreviewOptions::default() },
        tls: Some(TlsOptions::Acme(acme)),
        ..ServerOptions::default()
    }
}

fn with_hook(acme: AcmeOptions, hook: DnsHook) -> AcmeOptions {
    AcmeOptions { dns_hook: Some(hook), ..acme }
}

/// The certificate that a name is shown, if its chain leads to the root.
async fn shown(address: SocketAddr, name: &str, root: &CertificateDer<'static>) -> Option<CertificateDer<'static>> {
    let stream = connect_to(address, name, trusting(root), b"http/1.1").await.ok()?;
    stream.get_ref().1.peer_certificates()?.first().cloned()
}

/// The same, once there is one.
async fn issued(address: SocketAddr, name: &str, root: &CertificateDer<'static>) -> CertificateDer<'static> {
    eventually("a trusted certificate is shown", || shown(address, name, root)).await
}

/// What `/diagnostics` says of the certificates, whoever issued them.
async fn states(address: SocketAddr) -> Vec<Value> {
    let mut stream = connect_to(address, API, trusting_anybody(), b"http/1.1").await.unwrap();
    let request = format!("GET /api/v1/diagnostics HTTP/1.1\r\nHost: {API}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut live = within(Live::of(&mut stream)).await;
    let body: Value = serde_json::from_slice(&live.rest().await).unwrap();
    body["certificates"].as_array().unwrap_or_else(|| panic!("{body}")).clone()
}

/// What is wrong with each certificate, once something is wrong with all.
async fn troubles(address: SocketAddr) -> Vec<String> {
    eventually("orders fail", || async {
        let states = states(address).await;
        let errors = states.iter().map(|state| Some(state["last_error"].as_str()?.to_owned()));
        errors.collect::<Option<Vec<String>>>()
    })
    .await
}

/// Every file below.
fn files(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn the_wildcard_and_the_apis_name_are_ordered_through_dns() {
    let (mut ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let root = ca.root().await;
    let options = server(with_hook(ca.options(state.path(), &[API]), ca.hook()));
    let fixture = Fixture::with_options(options.clone()).await;
    let id =
        fixture.engine.create(&Caller::default(), CreateRequest::default(), CreateOptions::default()).await.unwrap().id;
    let guest = Guest::echoing().await;
    fixture.mock.listen(&id, PORT, MockService::At(guest.address));
    let address = fixture.address;
    let api = issued(address, API, &root).await;
    let host = format!("{PORT}-{id}.{DOMAIN}");
    let wildcard = issued(address, &host, &root).await;
    assert_ne!(api, wildcard, "they are of two domains");
    assert_eq!(shown(address, DOMAIN, &root).await, None);

    let mut stream = connect_to(address, &host, trusting(&root), b"http/1.1").await.unwrap();
    stream.write_all(format!("GET /page HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    let mut live = within(Live::of(&mut stream)).await;
    let head = String::from_utf8(live.rest().await).unwrap();
    assert!(live.status == 200 && head.starts_with("GET /page "), "{head}");
    assert_eq!(field(&head, "x-forwarded-proto"), Some("https"));

    let records = [format!("_acme-challenge.{API}."), format!("_acme-challenge.{DOMAIN}.")];
    for record in &records {
        let of_record = || ca.calls().into_iter().filter(|call| call.ends_with(record)).collect::<Vec<_>>();
        assert_eq!(of_record(), [format!("present {record}"), format!("cleanup {record}")]);
    }
    let states = states(address).await;
    assert!(states.iter().all(|state| state["failures"] == 0 && state["last_error"].is_null()), "{states:?}");
    for path in files(state.path()) {
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
    assert_eq!(files(state.path()).len(), 3, "the account and two certificates");

    // The next start needs no CA.
    let orders = ca.orders();
    ca.stop();
    let fixture = fixture.on_engine(ServerOptions { port: 0, ..options }).await;
    assert_eq!(shown(fixture.address, API, &root).await, Some(api));
    assert_eq!(shown(fixture.address, &host, &root).await, Some(wildcard));
    assert_eq!((orders, ca.orders()), (2, 2));
}

#[tokio::test]
async fn a_certificate_is_renewed_before_its_end_and_shown_without_a_restart() {
    let validity = Some(Duration::from_secs(20));
    let (ca, state) = (Ca::running(CaOptions { validity, ..CaOptions::default() }).await, tempfile::tempdir().unwrap());
    let root = ca.root().await;
    let fixture = Fixture::with_options(server(with_hook(ca.options(state.path(), &[API]), ca.hook()))).await;
    let first = issued(fixture.address, API, &root).await;
    let stored = files(state.path()).into_iter().find(|path| path.ends_with("api.pem")).unwrap();
    let second = eventually("another is kept", || async {
        let now = CertificateDer::from_pem_file(&stored).unwrap();
        (now != first).then_some(now)
    })
    .await;
    eventually("it is shown", || async {
        // The old one is good until then.
        let now = shown(fixture.address, API, &root).await.expect("one that is valid");
        (now == second).then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_a_ca_the_server_works_and_tries_again() {
    let (mut ca, state) = (Ca::stopped(), tempfile::tempdir().unwrap());
    let fixture = Fixture::with_options(server(ca.options(state.path(), &[API]))).await;
    let address = fixture.address;
    let error = troubles(address).await.remove(0);
    assert!(error.contains("error sending request") && error.contains("refused"), "{error}");

    // Now by TLS-ALPN-01, on the listener of the API itself.
    ca.start(CaOptions { tls_port: address.port(), ..CaOptions::default() }).await;
    let root = ca.root().await;
    let api = issued(address, API, &root).await;
    let states = states(address).await;
    assert!(states[0]["failures"] == 0 && states[0]["not_after"].is_string(), "{states:?}");
    assert_eq!(states.len(), 1, "a wildcard needs DNS");

    // Other names get that certificate, and none of their own.
    for name in [STRANGER, PREVIEW, DOMAIN] {
        assert_eq!(shown(address, name, &root).await, None);
        let stream = connect_to(address, name, trusting_anybody(), b"http/1.1").await.unwrap();
        assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], api);
        let challenge = connect_to(address, name, trusting_anybody(), b"acme-tls/1").await;
        assert!(challenge.is_err(), "nobody has asked for a challenge of {name}");
    }
    assert_eq!(ca.orders(), 1);
    assert!(connect_to(address, API, trusting_anybody(), b"acme-tls/1").await.is_err(), "the challenge is over");
}

#[tokio::test]
async fn a_hook_that_fails_or_hangs_is_reported_and_harms_nothing() {
    let (ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let hook =
        ca.hook_of(&format!("case $2 in *{DOMAIN}.) sleep 1000 & wait ;; esac; echo 'no such zone' >&2; exit 3"));
    let hook = DnsHook { timeout: Duration::from_secs(1), ..hook };
    let fixture = Fixture::with_options(server(with_hook(ca.options(state.path(), &[API]), hook))).await;
    let troubles = troubles(fixture.address).await;
    assert_eq!(
        troubles[0],
        format!(
            "server.acme.dns_hook (present _acme-challenge.{API}.) ended with exit status: 3; the server's log has what \
             it said"
        )
    );
    assert!(troubles[1].contains("did not end within 1 s and was killed"), "{troubles:?}");
    assert!(ca.calls().contains(&format!("cleanup _acme-challenge.{API}.")), "it may have set something");
}

#[tokio::test]
async fn what_the_ca_finds_wrong_is_reported() {
    let (ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let acme = with_hook(ca.options(state.path(), &[API]), ca.hook_of("exit 0"));
    let fixture = Fixture::with_options(server(acme)).await;
    let troubles = troubles(fixture.address).await;
    assert!(troubles[0].starts_with(&format!("the CA refuses {API}: No TXT records found")), "{troubles:?}");
    assert!(troubles[1].starts_with(&format!("the CA refuses *.{DOMAIN}: ")), "{troubles:?}");
}

#[tokio::test]
async fn the_end_of_the_server_does_not_wait_for_the_hook() {
    let (ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let hook = DnsHook { timeout: Duration::from_hours(1), ..ca.hook_of("sleep 1000") };
    let mut fixture = Fixture::with_options(server(with_hook(ca.options(state.path(), &[API]), hook))).await;
    eventually("the hook runs", || async { (!ca.calls().is_empty()).then_some(()) }).await;
    fixture.stop().await;
    let removed = ca.calls().into_iter().filter(|call| call.starts_with("cleanup ")).count();
    assert!(removed > 0, "records are removed all the same: {:?}", ca.calls());
}

#[tokio::test]
async fn an_account_that_the_ca_forgot_is_made_anew() {
    let (mut ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let options = |names: &[&str], ca: &Ca| server(with_hook(ca.options(state.path(), names), ca.hook()));
    let fixture = Fixture::with_options(options(&[API], &ca)).await;
    let root = ca.root().await;
    let before = issued(fixture.address, API, &root).await;
    // It keeps its accounts in memory.
    ca.stop();
    ca.start(CaOptions::default()).await;
    let fixture = fixture.on_engine(ServerOptions { port: 0, ..options(&[STRANGER], &ca) }).await;
    let error = eventually("the account is refused", || async {
        let states = states(fixture.address).await;
        states[0]["last_error"].as_str().map(str::to_owned)
    })
    .await;
    assert!(error.contains("accountDoesNotExist"), "{error}");
    assert_eq!(
        shown(fixture.address, API, &root).await,
        Some(before),
        "the old one stays, though other names are wanted"
    );
    let account = files(state.path()).into_iter().find(|path| path.ends_with("account.json"));
    assert_eq!(account, None, "the next try makes another");
}

#[tokio::test]
async fn an_account_that_is_damaged_on_disk_is_made_anew() {
    let (ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let options = |names: &[&str]| server(with_hook(ca.options(state.path(), names), ca.hook()));
    let mut fixture = Fixture::with_options(options(&[API])).await;
    let root = ca.root().await;
    issued(fixture.address, API, &root).await;
    for (damage, name) in [("{", STRANGER), ("no key", "other.example.test")] {
        let account = files(state.path()).into_iter().find(|path| path.ends_with("account.json")).unwrap();
        let damaged = match damage {
            "no key" => {
                let mut credentials: Value = serde_json::from_slice(&std::fs::read(&account).unwrap()).unwrap();
                credentials["key_pkcs8"] = "AAAA".into();
                credentials.to_string()
            }
            text => text.to_owned(),
        };
        std::fs::write(&account, &damaged).unwrap();
        fixture = fixture.on_engine(ServerOptions { port: 0, ..options(&[name]) }).await;
        issued(fixture.address, name, &root).await;
        let aside = account.with_extension("json.damaged");
        assert_eq!(std::fs::read_to_string(aside).unwrap(), damaged, "it is kept for whoever wonders");
        assert_ne!(std::fs::read_to_string(&account).unwrap(), damaged);
    }
}

#[tokio::test]
async fn a_directory_that_is_none_is_told_with_its_setting() {
    let (ca, state) = (Ca::running(CaOptions::default()).await, tempfile::tempdir().unwrap());
    let good = with_hook(ca.options(state.path(), &[API]), ca.hook());
    let page = good.directory_url.replace("/dir", "/no-such-page");
    let closed = good.directory_url.replace(":14000", ":1");
    for (url, said) in [(page, "is no CA's directory (it answers HTTP 404)"), (closed, "cannot be reached at")] {
        let fixture = Fixture::with_options(server(AcmeOptions { directory_url: url.clone(), ..good.clone() })).await;
        let error = troubles(fixture.address).await.remove(0);
        assert!(error.contains(said) && error.contains(&url), "{error}");
        assert!(error.contains("server.acme.directory_url"), "{error}");
    }
}

#[tokio::test]
async fn a_ca_that_wants_an_account_of_the_operators_gets_it() {
    const KEY: [u8; 32] = [7; 32];
    let key = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    let members = Some(("ours", key));
    let (ca, state) = (Ca::running(CaOptions { members, ..CaOptions::default() }).await, tempfile::tempdir().unwrap());
    let stranger = with_hook(ca.options(state.path(), &[API]), ca.hook());
    let fixture = Fixture::with_options(server(stranger.clone())).await;
    let error = troubles(fixture.address).await.remove(0);
    assert!(error.contains("externalAccountRequired"), "{error}");
    let external_account = Some(ExternalAccount { key_id: "ours".to_owned(), hmac_key: KEY.to_vec() });
    let member = server(AcmeOptions { external_account, ..stranger });
    let fixture = fixture.on_engine(ServerOptions { port: 0, ..member }).await;
    issued(fixture.address, API, &ca.root().await).await;
}

#[tokio::test]
async fn options_that_cannot_work_are_refused_at_start() {
    let (ca, state) = (Ca::stopped(), tempfile::tempdir().unwrap());
    let data = tempfile::tempdir().unwrap();
    let engine = EngineOptions::new(data.path().join("stacyvm.db"), ServerSecret::new([7; 32]), "mock");
    let engine = Engine::start(engine, vec![Arc::new(MockProvider::new("mock"))]).await.unwrap();
    let good = || ca.options(state.path(), &[API]);
    let refused = async |acme: AcmeOptions| {
        let bound = Server::bind(ServerOptions { port: 0, ..server(acme) }, engine.clone()).await;
        match bound.err() {
            Some(ServerError::Acme(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    let ca_file = |path: &Path| AcmeOptions { ca_file: Some(path.to_owned()), ..good() };
    let empty = data.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    assert!(matches!(refused(ca_file(&empty)).await, AcmeError::Roots { .. }));
    assert!(matches!(refused(ca_file(Path::new("/no/roots.pem"))).await, AcmeError::Roots { .. }));
    let hook = DnsHook { program: "/no/hook".into(), ..ca.hook() };
    assert!(matches!(refused(with_hook(good(), hook)).await, AcmeError::Hook { .. }));
    assert!(matches!(refused(AcmeOptions { state_dir: empty.join("acme"), ..good() }).await, AcmeError::State { .. }));
    assert!(matches!(refused(ca.options(state.path(), &["*.example.test"])).await, AcmeError::Wildcard(_)));
    assert!(matches!(refused(ca.options(state.path(), &[])).await, AcmeError::NoNames));
}

//! A real CA that speaks ACME, on a loopback address of its own: Debian's
//! `pebble`, and the name server that comes with it, whose records a hook sets.
//! Every name has the address 127.0.0.1 there.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use stacyvm_server::{AcmeOptions, DnsHook};

use crate::support::eventually;

const DIRECTORY_PORT: u16 = 14000;
const MANAGEMENT_PORT: u16 = 15000;
const DNS_PORT: u16 = 8053;
const RECORDS_PORT: u16 = 8055;

const MISSING: &str = "pebble is missing: scripts/setup.sh test";

/// A CA's address and files; it need not run.
pub(crate) struct Ca {
    directory: tempfile::TempDir,
    /// Nobody else's, so that its ports are free.
    address: String,
    processes: Vec<Child>,
}

/// How a CA differs from a usual one.
#[derive(Default)]
pub(crate) struct CaOptions {
    /// Where it looks at TLS-ALPN-01 challenges.
    pub(crate) tls_port: u16,
    /// Life of its certificates.
    pub(crate) validity: Option<Duration>,
    /// Ids and keys (base64) of those who may have an account; anybody without.
    pub(crate) members: Option<(&'static str, &'static str)>,
}

impl Ca {
    pub(crate) async fn running(options: CaOptions) -> Self {
        let mut ca = Self::stopped();
        ca.start(options).await;
        ca
    }

    pub(crate) fn stopped() -> Self {
        let [high, low] = rand::random::<[u8; 2]>();
        let address = format!("127.77.{high}.{}", low.max(1));
        let directory = tempfile::tempdir().unwrap();
        certify(directory.path(), &address);
        Self { directory, address, processes: Vec::new() }
    }

    pub(crate) async fn start(&mut self, options: CaOptions) {
        let file = |name: &str| self.file(name);
        let at = |port: u16| format!("{}:{port}", self.address);
        let mut settings = serde_json::json!({
            "listenAddress": at(DIRECTORY_PORT),
            "managementListenAddress": at(MANAGEMENT_PORT),
            "certificate": file("cert.pem"),
            "privateKey": file("key.pem"),
            "tlsPort": options.tls_port,
        });
        if let Some(validity) = options.validity {
            settings["certificateValidityPeriod"] = validity.as_secs().into();
        }
        if let Some((id, key)) = options.members {
            settings["externalAccountBindingRequired"] = true.into();
            settings["externalAccountMACKeys"] = serde_json::json!({ id: key });
        }
        std::fs::write(file("pebble.json"), serde_json::json!({ "pebble": settings }).to_string()).unwrap();
        let log = File::create(file("log")).unwrap();
        let ca = Command::new("pebble")
            .arg("-config")
            .arg(file("pebble.json"))
            .args(["-dnsserver", &at(DNS_PORT)])
            // Without what it does to try clients out.
            .envs([("PEBBLE_VA_NOSLEEP", "1"), ("PEBBLE_WFE_NONCEREJECT", "0"), ("PEBBLE_AUTHZREUSE", "0")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect(MISSING);
        let names = Command::new("pebble-challtestsrv")
            .args(["-dns01", &at(DNS_PORT), "-management", &at(RECORDS_PORT), "-defaultIPv6", ""])
            .args(["-http01", "", "-https01", "", "-tlsalpn01", ""])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect(MISSING);
        self.processes = vec![ca, names];
        eventually("the CA answers", || async { self.client().get(self.directory_url()).send().await.ok() }).await;
        let records = format!("http://{}/clear-txt", at(RECORDS_PORT));
        eventually("the name server answers", || async {
            self.client().post(&records).body(r#"{"host":"nobody."}"#).send().await.ok()
        })
        .await;
    }

    /// It is not reached any more.
    pub(crate) fn stop(&mut self) {
        for mut process in self.processes.drain(..) {
            process.kill().ok();
            process.wait().ok();
        }
    }

    fn directory_url(&self) -> String {
        format!("https://{}:{DIRECTORY_PORT}/dir", self.address)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The root of what it issues, which it makes at its start.
    pub(crate) async fn root(&self) -> CertificateDer<'static> {
        let url = format!("https://{}:{MANAGEMENT_PORT}/roots/0", self.address);
        let pem = self.client().get(url).send().await.unwrap().bytes().await.unwrap();
        CertificateDer::from_pem_slice(&pem).unwrap()
    }

    /// How many certificates somebody has asked for.
    pub(crate) fn orders(&self) -> usize {
        std::fs::read_to_string(self.file("log")).unwrap().matches("Added order").count()
    }

    pub(crate) fn options(&self, state_dir: &Path, names: &[&str]) -> AcmeOptions {
        AcmeOptions {
            directory_url: self.directory_url(),
            contact_email: "ops@example.com".to_owned(),
            external_account: None,
            ca_file: Some(self.file("ca.pem")),
            state_dir: state_dir.to_owned(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            dns_hook: None,
        }
    }

    /// A hook that sets records in this CA's name server.
    pub(crate) fn hook(&self) -> DnsHook {
        let records = format!("http://{}:{RECORDS_PORT}", self.address);
        self.hook_of(&format!(
            r#"case "$1" in
                present) exec curl -fsS -d "{{\"host\":\"$2\",\"value\":\"$3\"}}" {records}/set-txt ;;
                cleanup) exec curl -fsS -d "{{\"host\":\"$2\"}}" {records}/clear-txt ;;
            esac"#
        ))
    }

    /// A hook that notes its calls and then runs a script.
    pub(crate) fn hook_of(&self, script: &str) -> DnsHook {
        let (program, calls) = (self.file("hook"), self.file("calls"));
        let text = format!("#!/bin/sh\necho \"$1 $2\" >> {}\n{script}\n", calls.display());
        std::fs::write(&program, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&program, mode).unwrap();
        DnsHook {
            program,
            environment: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
            timeout: Duration::from_mins(1),
            settle: Duration::ZERO,
        }
    }

    /// Calls of the hook so far, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.file("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn client(&self) -> reqwest::Client {
        rustls::crypto::ring::default_provider().install_default().ok();
        let root = reqwest::Certificate::from_pem(&std::fs::read(self.file("ca.pem")).unwrap()).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([root]).build().unwrap()
    }
}

impl Drop for Ca {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the CA's own listeners show, and the root that is trusted for them.
fn certify(directory: &Path, address: &str) {
    let mut root = CertificateParams::new([]).unwrap();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root_key = KeyPair::generate().unwrap();
    let root_cert = root.self_signed(&root_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::new(root, root_key);
    let cert = CertificateParams::new([address.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    for (name, pem) in [("ca.pem", root_cert.pem()), ("cert.pem", cert.pem()), ("key.pem", key.serialize_pem())] {
        std::fs::write(directory.join(name), pem).unwrap();
    }
}

//! Certificates from a CA that speaks ACME (RFC 8555): ordered, kept and renewed
//! by the server itself.
//!
//! ```text
//!             none yet, or two thirds of its life are over
//!   waiting ────────────────────────────────────────────► ordering ─► challenges ─► certificate
//!     ▲  ▲                                                    │                         │
//!     │  └── failed: a pause, longer each time; the old stays ┘                         │
//!     └──────────────────── kept on disk, and shown from the next handshake on ◄────────┘
//! ```
//!
//! Only names of the configuration are ever ordered, never what a client asks
//! for: nobody outside can make this server use up what the CA allows it. The
//! API's names and the wildcard of previews are two certificates, because they
//! are of two domains and one must not wait for the other's.
//!
//! With a program that sets DNS records ([`DnsHook`]) names are proven by DNS-01,
//! which alone gives wildcards; without one by TLS-ALPN-01 on our own listener.
//! The protocol is `instant-acme`'s; `rustls-acme` does more of the rest, but
//! knows no DNS-01, and brings a second HTTP client.

mod client;
mod hook;
mod issued;
mod order;
mod resolver;
mod store;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, SystemTime};

use instant_acme::{Account, AccountCredentials, ExternalAccountKey, NewAccount};
use rustls::crypto::ring;
use serde::Serialize;
use stacyvm_api::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::preview::Domain;
use client::CaClient;
pub use hook::DnsHook;
use issued::Issued;
pub use issued::UnusableCertificate;
use order::OrderError;
pub(crate) use resolver::CHALLENGE_PROTOCOL;
use resolver::Resolver;
use store::Store;

/// Let's Encrypt takes as many in one certificate.
const MAX_NAMES: usize = 100;

/// First pause after the CA was not reached, and the longest. Nothing counts
/// such tries.
const UNREACHABLE_PAUSES: Pauses =
    Pauses { first: Duration::from_secs(5), factor: 2, longest: Duration::from_mins(10) };

/// First pause after the CA said no, or a challenge could not be set up, and the
/// longest. Let's Encrypt allows five failed validations of a name in an hour.
const REFUSED_PAUSES: Pauses = Pauses { first: Duration::from_mins(1), factor: 3, longest: Duration::from_hours(6) };

/// The clock is looked at this often while nothing is due: it may be set, and
/// the machine may have slept.
const LONGEST_SLEEP: Duration = Duration::from_mins(30);

const ACCOUNT_FILE: &str = "account.json";

/// Which CA, for which names, and how they are proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcmeOptions {
    /// `https://…`, where the CA lists its addresses (RFC 8555 7.1.1).
    pub directory_url: String,
    /// For the CA to write to. Whoever sets it has agreed to the CA's terms.
    pub contact_email: String,
    /// An account that the operator has at the CA already, for CAs that want one.
    pub external_account: Option<ExternalAccount>,
    /// PEM file of the roots that the directory is trusted by; the system's
    /// without it.
    pub ca_file: Option<PathBuf>,
    /// Where the account's key and the certificates are kept, for us alone.
    pub state_dir: PathBuf,
    /// Names of the API; `*.name` only with a hook.
    pub names: Vec<String>,
    pub dns_hook: Option<DnsHook>,
}

/// Binds our account to one of the operator's (RFC 8555 7.3.4).
#[derive(Clone, PartialEq, Eq)]
pub struct ExternalAccount {
    pub key_id: String,
    pub hmac_key: Vec<u8>,
}

/// Why ACME cannot be begun with.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    #[error("server.acme.directory_url: `{0}` is no https address; take the one that the CA publishes")]
    Directory(String),
    #[error(
        "server.acme.names: there is no name to order a certificate for; list the API's, or set server.acme.dns_hook \
         for the wildcard of server.preview_domain"
    )]
    NoNames,
    #[error("server.acme.names: `{0}` is no name that a CA could certify; write for example vm.example.com")]
    Name(String),
    #[error("server.acme.names: `{0}` needs server.acme.dns_hook: wildcards are proven by a DNS record")]
    Wildcard(String),
    #[error("server.acme.names: {0} names do not fit into one certificate; list {MAX_NAMES} at most")]
    TooManyNames(usize),
    #[error("server.acme.ca_file: {} holds no usable root: {why}", .path.display())]
    Roots { path: PathBuf, why: String },
    #[error("server.acme.dns_hook: {} cannot be run: {why}", .path.display())]
    Hook { path: PathBuf, why: String },
    #[error("cannot keep certificates in {}", .path.display())]
    State { path: PathBuf, source: std::io::Error },
    #[error("no client for the CA can be made")]
    Client(#[source] reqwest::Error),
    #[error("no certificate for the time being can be made: {0}")]
    Stopgap(String),
}

/// One certificate that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    /// Its file, and what it is called in messages.
    label: &'static str,
    names: Vec<String>,
}

/// How a certificate is, as `/diagnostics` and the metrics show it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CertificateState {
    pub(crate) certificate: &'static str,
    pub(crate) names: Vec<String>,
    /// Absent while there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) not_after: Option<Timestamp>,
    /// When it is ordered next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next_attempt: Option<Timestamp>,
    /// Tries in a row that failed.
    pub(crate) failures: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_error: Option<String>,
}

/// A certificate on disk, for those who look without a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCertificate {
    pub names: Vec<String>,
    /// Absent where there is none that covers the names.
    pub life: Option<Life>,
}

/// How far a certificate is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub not_after: SystemTime,
    /// It should have been renewed long ago: five sixths of its life are over.
    pub overdue: bool,
}

/// What keeps the certificates of one server.
pub(crate) struct Acme {
    options: AcmeOptions,
    wanted: Vec<Wanted>,
    resolver: Arc<Resolver>,
    states: Mutex<Vec<CertificateState>>,
    store: Store,
    http: CaClient,
    account: tokio::sync::Mutex<Option<Account>>,
}

impl Acme {
    /// Checks the options, takes up what is on disk, and asks nobody yet.
    pub(crate) fn open(options: AcmeOptions, previews: Option<&Domain>) -> Result<Arc<Self>, AcmeError> {
        let wanted = wanted(&options, previews)?;
        if let Some(hook) = &options.dns_hook {
            hook.check()?;
        }
        install_crypto();
        let http = CaClient::new(options.ca_file.as_deref())?;
        let store = Store::open(&options.state_dir, &options.directory_url)
            .map_err(|source| AcmeError::State { path: options.state_dir.clone(), source })?;
        let resolver = Arc::new(Resolver::new(wanted.iter().map(|wanted| wanted.names.clone()).collect())?);
        let states = wanted.iter().map(CertificateState::of).collect();
        let acme = Self { options, wanted, resolver, states: Mutex::new(states), store, http, account: None.into() };
        for (index, wanted) in acme.wanted.iter().enumerate() {
            match acme.store.certificate(wanted) {
                Ok(Some(issued)) => acme.take_up(index, issued),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(certificate = wanted.label, %error, "the stored certificate cannot be used: a new one is ordered");
                }
            }
        }
        Ok(Arc::new(acme))
    }

    pub(crate) fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    pub(crate) fn states(&self) -> Vec<CertificateState> {
        self.lock_states().clone()
    }

    /// How many certificates there are to [`keep`](Self::keep).
    pub(crate) fn count(&self) -> usize {
        self.wanted.len()
    }

    /// Orders one certificate whenever that is due, until `closing`.
    pub(crate) async fn keep(self: Arc<Self>, index: usize, closing: CancellationToken) {
        let wanted = &self.wanted[index];
        let (mut unreachable, mut refused) = (0, 0);
        // One for other names is better than none, until there is another.
        let current = self.resolver.current(index).filter(|issued| issued.covers(&wanted.names));
        let mut due = current.map_or_else(SystemTime::now, |issued| renewal(&issued));
        loop {
            self.update(index, |state| state.next_attempt = Some(time_of(due)));
            if !sleep_until(due, &closing).await {
                return;
            }
            tracing::info!(certificate = wanted.label, names = %wanted.names.join(", "), "ordering a certificate");
            let error = match self.order(wanted, &closing).await {
                Ok(issued) => {
                    (unreachable, refused) = (0, 0);
                    due = renewal(&issued);
                    tracing::info!(certificate = wanted.label, until = %time_of(issued.not_after), "a certificate was issued and is in use");
                    self.take_up(index, issued);
                    continue;
                }
                Err(OrderError::Closing) => return,
                Err(error) => error,
            };
            let pause = if error.is_unreachable() {
                unreachable += 1;
                UNREACHABLE_PAUSES.after(unreachable)
            } else {
                refused += 1;
                REFUSED_PAUSES.after(refused)
            };
            due = SystemTime::now() + pause;
            self.failed(index, &error, pause);
        }
    }

    /// Orders a certificate and keeps it. One that cannot be kept is used all
    /// the same: it counts against the CA's limits.
    async fn order(&self, wanted: &Wanted, closing: &CancellationToken) -> Result<Issued, OrderError> {
        let account = tokio::select! {
            account = self.account() => account?,
            () = closing.cancelled() => return Err(OrderError::Closing),
        };
        let hook = self.options.dns_hook.as_ref();
        let ordered = order::certificate(&account, &wanted.names, hook, &self.resolver, closing).await;
        let pem = match ordered {
            Err(error) if error.is_unknown_account() => {
                // The CA has forgotten us; the next try makes another.
                *self.account.lock().await = None;
                self.store.remove(ACCOUNT_FILE).await.ok();
                return Err(error);
            }
            ordered => ordered?,
        };
        let issued = Issued::parse(pem.as_bytes()).map_err(OrderError::Unusable)?;
        if !issued.covers(&wanted.names) {
            return Err(OrderError::Unusable(UnusableCertificate::OtherNames));
        }
        if let Err(error) = self.store.write(&store::certificate_file(wanted), pem.into_bytes()).await {
            tracing::error!(certificate = wanted.label, %error, "the certificate cannot be kept: the next start orders it again");
        }
        Ok(issued)
    }

    /// Our account at the CA, from the disk or made.
    async fn account(&self) -> Result<Account, OrderError> {
        let mut account = self.account.lock().await;
        if let Some(account) = &*account {
            return Ok(account.clone());
        }
        self.http.check_directory(&self.options.directory_url).await?;
        let stored = self.store.read(ACCOUNT_FILE).map_err(|error| self.unkept(error))?;
        let opened = match stored {
            Some(bytes) => self.stored_account(&bytes).await?,
            None => None,
        };
        let opened = match opened {
            Some(opened) => opened,
            None => self.new_account().await?,
        };
        Ok(account.insert(opened).clone())
    }

    /// The account that a file holds. A file that holds none is set aside: the CA
    /// gives another to whoever asks.
    async fn stored_account(&self, bytes: &[u8]) -> Result<Option<Account>, OrderError> {
        use instant_acme::Error;
        let why = match serde_json::from_slice::<AccountCredentials>(bytes) {
            Err(error) => error.to_string(),
            Ok(credentials) => {
                let builder = Account::builder_with_http(Box::new(self.http.clone()));
                match builder.from_credentials(credentials).await {
                    Ok(account) => return Ok(Some(account)),
                    // About what is in the file, and not about the CA.
                    Err(error @ (Error::KeyRejected | Error::Crypto | Error::InvalidUri(_) | Error::Str(_))) => {
                        error.to_string()
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let path = self.store.path(ACCOUNT_FILE);
        let aside = self.store.set_aside(ACCOUNT_FILE).await.map_err(|error| self.unkept(error))?;
        tracing::warn!(path = %path.display(), why, kept = %aside.display(), "the account at the CA is damaged; another is made");
        Ok(None)
    }

    fn unkept(&self, error: std::io::Error) -> OrderError {
        OrderError::Account { path: self.store.path(ACCOUNT_FILE), error }
    }

    async fn new_account(&self) -> Result<Account, OrderError> {
        let contact = format!("mailto:{}", self.options.contact_email);
        let request = NewAccount { contact: &[&contact], terms_of_service_agreed: true, only_return_existing: false };
        let builder = Account::builder_with_http(Box::new(self.http.clone()));
        let external = self.options.external_account.as_ref();
        let external = external.map(|external| ExternalAccountKey::new(external.key_id.clone(), &external.hmac_key));
        let (account, credentials) =
            builder.create(&request, self.options.directory_url.clone(), external.as_ref()).await?;
        let bytes = serde_json::to_vec(&credentials).map_err(|error| self.unkept(error.into()))?;
        self.store.write(ACCOUNT_FILE, bytes).await.map_err(|error| self.unkept(error))?;
        Ok(account)
    }

    fn take_up(&self, index: usize, issued: Issued) {
        let not_after = time_of(issued.not_after);
        self.resolver.replace(index, issued);
        self.update(index, |state| {
            state.not_after = Some(not_after);
            state.failures = 0;
            state.last_error = None;
        });
    }

    fn failed(&self, index: usize, error: &OrderError, pause: Duration) {
        let wanted = &self.wanted[index];
        let in_use = if self.resolver.current(index).is_some() {
            "the one before stays in use"
        } else {
            "a self-signed one is shown meanwhile"
        };
        let next = stacyvm_api::Duration::from(Duration::from_secs(pause.as_secs()));
        tracing::warn!(certificate = wanted.label, names = %wanted.names.join(", "), %error, said = error.said(), again_in = %next, "no certificate was issued; {in_use}");
        self.update(index, |state| {
            state.failures = state.failures.saturating_add(1);
            state.last_error = Some(error.to_string());
        });
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut CertificateState)) {
        if let Some(state) = self.lock_states().get_mut(index) {
            change(state);
        }
    }

    fn lock_states(&self) -> MutexGuard<'_, Vec<CertificateState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is on disk for these options. Makes nothing.
pub fn stored_certificates(
    options: &AcmeOptions,
    preview_domain: Option<&str>,
) -> Result<Vec<StoredCertificate>, AcmeError> {
    let wanted = wanted(options, preview_domain.and_then(Domain::parse).as_ref())?;
    let store = Store::at(&options.state_dir, &options.directory_url);
    if let Some(hook) = &options.dns_hook {
        hook.check()?;
    }
    if let Some(path) = &options.ca_file {
        client::roots(path)?;
    }
    let stored = wanted.into_iter().map(|wanted| {
        let issued = store.certificate(&wanted).ok().flatten().filter(|issued| issued.covers(&wanted.names));
        StoredCertificate { life: issued.as_ref().map(Life::of), names: wanted.names }
    });
    Ok(stored.collect())
}

/// What the options say of themselves, without a look at this host.
pub fn check_options(options: &AcmeOptions, preview_domain: Option<&str>) -> Result<(), AcmeError> {
    wanted(options, preview_domain.and_then(Domain::parse).as_ref()).map(|_| ())
}

/// Whether a CA could certify a name: of the DNS, and not one that every
/// machine has for itself. Names may begin with `*.`.
pub fn is_certifiable(name: &str) -> bool {
    let base = name.strip_prefix("*.").unwrap_or(name);
    let is_label = |label: &str| {
        let inside = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        (1..=63).contains(&label.len()) && inside && !label.starts_with('-') && !label.ends_with('-')
    };
    let last = base.rsplit('.').next().unwrap_or_default();
    base.len() <= 253
        && base.contains('.')
        && base.split('.').all(is_label)
        && !last.eq_ignore_ascii_case("localhost")
        // No top-level domain is a number, and addresses end in one.
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// The certificates that the options ask for: at least one.
fn wanted(options: &AcmeOptions, previews: Option<&Domain>) -> Result<Vec<Wanted>, AcmeError> {
    let authority = options.directory_url.strip_prefix("https://");
    let has_host = options.directory_url.parse::<http::Uri>().is_ok_and(|uri| uri.host().is_some());
    if authority.is_none() || !has_host {
        return Err(AcmeError::Directory(options.directory_url.clone()));
    }
    let mut names: Vec<String> = Vec::with_capacity(options.names.len());
    for name in &options.names {
        let name = name.trim().to_ascii_lowercase();
        if !is_certifiable(&name) {
            return Err(AcmeError::Name(name));
        }
        if name.starts_with("*.") && options.dns_hook.is_none() {
            return Err(AcmeError::Wildcard(name));
        }
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.len() > MAX_NAMES {
        return Err(AcmeError::TooManyNames(names.len()));
    }
    let mut wanted = Vec::new();
    if !names.is_empty() {
        wanted.push(Wanted { label: "api", names });
    }
    let wildcard = previews.map(|domain| format!("*.{}", domain.name())).filter(|name| is_certifiable(name));
    if let (Some(name), Some(_)) = (wildcard, &options.dns_hook) {
        wanted.push(Wanted { label: "previews", names: vec![name] });
    }
    if wanted.is_empty() { Err(AcmeError::NoNames) } else { Ok(wanted) }
}

impl Life {
    fn of(issued: &Issued) -> Self {
        let whole = issued.not_after.duration_since(issued.not_before).unwrap_or_default();
        let overdue = SystemTime::now() > issued.not_before + whole.mul_f64(5.0 / 6.0);
        Self { not_after: issued.not_after, overdue }
    }
}

impl std::fmt::Debug for ExternalAccount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExternalAccount").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl CertificateState {
    fn of(wanted: &Wanted) -> Self {
        Self {
            certificate: wanted.label,
            names: wanted.names.clone(),
            not_after: None,
            next_attempt: None,
            failures: 0,
            last_error: None,
        }
    }
}

/// How long to wait after each failure in a row.
struct Pauses {
    first: Duration,
    factor: u32,
    longest: Duration,
}

impl Pauses {
    /// Up to a quarter longer than it says: servers that were started together
    /// do not ask together.
    fn after(&self, failures: u32) -> Duration {
        let steps = failures.saturating_sub(1);
        let pause = self.factor.checked_pow(steps).and_then(|factor| self.first.checked_mul(factor));
        let pause = pause.unwrap_or(self.longest).min(self.longest);
        pause.mul_f64(1.0 + rand::random::<f64>() / 4.0)
    }
}

/// When two thirds of its life are over, and up to a thirtieth later.
fn renewal(issued: &Issued) -> SystemTime {
    let life = issued.not_after.duration_since(issued.not_before).unwrap_or_default();
    issued.not_before + life.mul_f64(2.0 / 3.0 + rand::random::<f64>() / 30.0)
}

/// Whether the time came before the end of the server.
async fn sleep_until(due: SystemTime, closing: &CancellationToken) -> bool {
    while let Ok(left) = due.duration_since(SystemTime::now()) {
        tokio::select! {
            () = tokio::time::sleep(left.min(LONGEST_SLEEP)) => {}
            () = closing.cancelled() => return false,
        }
    }
    !closing.is_cancelled()
}

pub(crate) fn time_of(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_unix_ms(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The client takes the process's provider; whoever came first has installed
/// the same one.
fn install_crypto() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| drop(ring::default_provider().install_default()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(names: &[&str]) -> AcmeOptions {
        AcmeOptions {
            directory_url: "https://ca.example/directory".to_owned(),
            contact_email: "ops@example.com".to_owned(),
            external_account: None,
            ca_file: None,
            state_dir: PathBuf::new(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            dns_hook: None,
        }
    }

    fn hook() -> DnsHook {
        DnsHook {
            program: PathBuf::from("/bin/true"),
            environment: Vec::new(),
            timeout: Duration::from_secs(1),
            settle: Duration::ZERO,
        }
    }

    fn labels(options: &AcmeOptions, domain: &str) -> Vec<(&'static str, Vec<String>)> {
        let wanted = wanted(options, Domain::parse(domain).as_ref()).unwrap();
        wanted.into_iter().map(|wanted| (wanted.label, wanted.names)).collect()
    }

    #[test]
    fn the_wildcard_of_previews_needs_a_hook_and_a_domain() {
        let api = ("api", vec!["vm.example.com".to_owned()]);
        let previews = ("previews", vec!["*.p.example.net".to_owned()]);
        let without = options(&["VM.example.com", "vm.example.com"]);
        assert_eq!(labels(&without, "p.example.net:8443"), std::slice::from_ref(&api));
        let with = AcmeOptions { dns_hook: Some(hook()), ..without };
        assert_eq!(labels(&with, "p.example.net:8443"), [api.clone(), previews.clone()]);
        assert_eq!(labels(&with, "localhost"), [api]);
        assert_eq!(labels(&AcmeOptions { names: Vec::new(), ..with }, "p.example.net"), [previews]);
    }

    #[test]
    fn what_no_ca_could_certify_is_refused() {
        for name in
            ["localhost", "a.localhost", "192.168.1.5", "[::1]", "vm", "a b.example", "-a.example", "*", "*.com."]
        {
            let refused = wanted(&AcmeOptions { dns_hook: Some(hook()), ..options(&[name]) }, None);
            assert!(matches!(refused, Err(AcmeError::Name(_))), "{name}: {refused:?}");
        }
        assert!(matches!(wanted(&options(&["*.example.com"]), None), Err(AcmeError::Wildcard(_))));
        assert!(matches!(wanted(&options(&[]), None), Err(AcmeError::NoNames)));
        for url in ["http://ca.example/directory", "ftp://ca.example", "ca.example", "https://", "file:///etc/passwd"] {
            let refused = wanted(&AcmeOptions { directory_url: url.to_owned(), ..options(&["vm.example.com"]) }, None);
            assert!(matches!(refused, Err(AcmeError::Directory(_))), "{url}: {refused:?}");
        }
    }

    #[test]
    fn pauses_grow_to_their_limit() {
        let within = |failures, least: Duration| {
            let pause = REFUSED_PAUSES.after(failures);
            assert!(pause >= least && pause <= least.mul_f64(1.25), "{failures}: {pause:?}");
        };
        within(1, Duration::from_mins(1));
        within(2, Duration::from_mins(3));
        within(3, Duration::from_mins(9));
        within(50, Duration::from_hours(6));
    }
}

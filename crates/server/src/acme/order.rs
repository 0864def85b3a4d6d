//! One order: prove every name, then have the certificate issued. What was set
//! up to prove them is taken down again, however the order ends.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, KeyAuthorization, NewOrder, Order, OrderStatus,
    RetryPolicy,
};
use tokio_util::sync::CancellationToken;

use super::hook::{DnsHook, HookError, Step};
use super::issued::UnusableCertificate;
use super::resolver::Resolver;

/// CAs that look several times, from several places, take a minute.
const POLLING: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(500)).backoff(1.5).timeout(Duration::from_mins(3));

/// What the server's end waits for records to be removed.
const CLOSING_GRACE: Duration = Duration::from_secs(5);

const UNKNOWN_ACCOUNT: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Why an order came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OrderError {
    #[error("{}", causes(.0))]
    Ca(#[from] instant_acme::Error),
    #[error("the CA refuses {name}: {why}")]
    Refused { name: String, why: String },
    #[error("the CA refuses the order and does not say why")]
    RefusedOrder,
    #[error("the CA wants proof of `{0}`, which was not ordered")]
    OtherName(String),
    #[error("the CA does not offer the challenge {kind} for {name}{}", .hint)]
    NoChallenge { name: String, kind: &'static str, hint: &'static str },
    #[error("server.acme.dns_hook ({} {fqdn}) {error}", .step.word())]
    Hook { step: Step, fqdn: String, error: HookError },
    #[error("the challenge of {name} cannot be set up: {why}")]
    Challenge { name: String, why: String },
    #[error("the certificate cannot be used: {0}")]
    Unusable(UnusableCertificate),
    #[error("the account at the CA cannot be read or kept in {}: {error}", .path.display())]
    Account { path: PathBuf, error: std::io::Error },
    #[error("the CA cannot be reached at {url} (server.acme.directory_url): {}", causes(.error))]
    Unreachable { url: String, error: reqwest::Error },
    #[error(
        "server.acme.directory_url: {url} is no CA's directory ({why}); compare it with the address that the CA publishes"
    )]
    NoDirectory { url: String, why: String },
    #[error("the server ends")]
    Closing,
}

impl OrderError {
    /// The CA does not know of the try.
    pub(super) fn is_unreachable(&self) -> bool {
        let failed = match self {
            Self::Unreachable { error, .. } => Some(error),
            Self::Ca(instant_acme::Error::Other(error)) => error.downcast_ref::<reqwest::Error>(),
            _ => None,
        };
        failed.is_some_and(|error| error.is_connect() || error.is_timeout())
    }

    /// What the hook said, if it was the hook.
    pub(super) fn said(&self) -> &str {
        if let Self::Hook { error, .. } = self { error.said() } else { "" }
    }

    pub(super) fn is_unknown_account(&self) -> bool {
        matches!(self, Self::Ca(instant_acme::Error::Api(problem)) if problem.r#type.as_deref() == Some(UNKNOWN_ACCOUNT))
    }
}

/// Something that was set up for the CA to look at.
#[derive(Debug)]
enum Placed {
    Record { fqdn: String, value: String },
    Listener { name: String },
}

/// What an order works with.
struct Proving<'a> {
    hook: Option<&'a DnsHook>,
    resolver: &'a Resolver,
    placed: Mutex<Vec<Placed>>,
}

/// The certificate for these names: its chain and key as PEM.
pub(super) async fn certificate(
    account: &Account,
    names: &[String],
    hook: Option<&DnsHook>,
    resolver: &Resolver,
    closing: &CancellationToken,
) -> Result<String, OrderError> {
    let proving = Proving { hook, resolver, placed: Mutex::default() };
    let ordered = tokio::select! {
        ordered = proving.order(account, names) => ordered,
        () = closing.cancelled() => Err(OrderError::Closing),
    };
    proving.take_down(closing).await;
    ordered
}

impl Proving<'_> {
    async fn order(&self, account: &Account, names: &[String]) -> Result<String, OrderError> {
        let identifiers: Vec<Identifier> = names.iter().map(|name| Identifier::Dns(name.clone())).collect();
        let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
        self.set_up(&mut order, names).await?;
        let status = order.poll_ready(&POLLING).await;
        match status {
            Ok(OrderStatus::Ready) => {}
            Ok(_) => return Err(refusal(&mut order).await.unwrap_or(OrderError::RefusedOrder)),
            // The order says only that it failed; its challenges say why.
            Err(error @ instant_acme::Error::Api(_)) => {
                return Err(refusal(&mut order).await.unwrap_or(OrderError::Ca(error)));
            }
            Err(error) => return Err(error.into()),
        }
        let key = order.finalize().await?;
        let chain = order.poll_certificate(&POLLING).await?;
        Ok(format!("{}\n{key}", chain.trim_end()))
    }

    /// Sets up every challenge, and then says that they can be looked at.
    async fn set_up(&self, order: &mut Order, names: &[String]) -> Result<(), OrderError> {
        let (kind, kind_name, hint) = match self.hook {
            Some(_) => (ChallengeType::Dns01, "dns-01", ""),
            None => (ChallengeType::TlsAlpn01, "tls-alpn-01", ": set server.acme.dns_hook"),
        };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status != AuthorizationStatus::Pending {
                continue;
            }
            // The name goes to the hook: it has to be one of ours, whatever the CA says.
            let name = plain_name(authorization.identifier().identifier);
            if !names.iter().any(|ours| ours.strip_prefix("*.").unwrap_or(ours) == name) {
                return Err(OrderError::OtherName(name));
            }
            let missing = || OrderError::NoChallenge { name: name.clone(), kind: kind_name, hint };
            let challenge = authorization.challenge(kind.clone()).ok_or_else(missing)?;
            self.place(&name, &challenge.key_authorization()).await?;
        }
        if let (Some(hook), true) = (self.hook, self.has_placed()) {
            tokio::time::sleep(hook.settle).await;
        }
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status == AuthorizationStatus::Pending
                && let Some(mut challenge) = authorization.challenge(kind.clone())
            {
                challenge.set_ready().await?;
            }
        }
        Ok(())
    }

    async fn place(&self, name: &str, answer: &KeyAuthorization) -> Result<(), OrderError> {
        let Some(hook) = self.hook else {
            self.remember(Placed::Listener { name: name.to_owned() });
            let placed = self.resolver.challenge(name, answer.digest().as_ref());
            return placed.map_err(|why| OrderError::Challenge { name: name.to_owned(), why });
        };
        // Also what failed, or was broken off, may have left a record.
        let (fqdn, value) = (format!("_acme-challenge.{name}."), answer.dns_value());
        self.remember(Placed::Record { fqdn: fqdn.clone(), value: value.clone() });
        let step = Step::Present;
        hook.call(step, &fqdn, &value).await.map_err(|error| OrderError::Hook { step, fqdn, error })
    }

    fn remember(&self, placed: Placed) {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner).push(placed);
    }

    fn has_placed(&self) -> bool {
        !self.placed.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Failures here harm nobody: a record that stays proves nothing any more.
    async fn take_down(self, closing: &CancellationToken) {
        for placed in self.placed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match placed {
                Placed::Listener { name } => self.resolver.end_challenge(&name),
                Placed::Record { fqdn, value } => {
                    let Some(hook) = self.hook else { continue };
                    let in_time = async {
                        closing.cancelled().await;
                        tokio::time::sleep(CLOSING_GRACE).await;
                    };
                    let removed = tokio::select! {
                        removed = hook.call(Step::Cleanup, &fqdn, &value) => removed,
                        () = in_time => Err(HookError::Closing),
                    };
                    if let Err(error) = removed {
                        let said = error.said();
                        tracing::warn!(fqdn, %error, said, "server.acme.dns_hook did not remove a record");
                    }
                }
            }
        }
    }
}

/// What the CA found wrong with a name.
async fn refusal(order: &mut Order) -> Option<OrderError> {
    let mut authorizations = order.authorizations();
    while let Some(Ok(authorization)) = authorizations.next().await {
        let why = authorization.challenges.iter().find_map(|challenge| challenge.error.as_ref());
        if let Some(why) = why {
            let name = authorization.identifier().to_string();
            let why = why.detail.clone().unwrap_or_else(|| why.to_string());
            return Some(OrderError::Refused { name, why });
        }
    }
    None
}

/// The name that is proven: of a wildcard the one below which it is.
fn plain_name(identifier: &Identifier) -> String {
    match identifier {
        Identifier::Dns(name) => name.to_ascii_lowercase(),
        other => format!("{other:?}"),
    }
}

/// An error with its causes: its first line is often only that a request failed.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}

//! Whether a backend can be worked with, and if not, which of the many reasons.

use std::time::Duration;

use stacyvm_api::SandboxId;
use stacyvm_api::backend::{Feature, Status};
use stacyvm_sandbox::{HealthReport, Provider as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::CustomProvider;
use super::error::CallError;
use super::stranger;

/// Health is asked for often; a backend that needs longer is not healthy.
const STEP_TIME_MAX: Duration = Duration::from_secs(5);

/// Step by step, from the name of the machine to the key: each only makes sense
/// when the one before holds.
pub(super) async fn check(provider: &CustomProvider) -> HealthReport {
    let mut report = HealthReport::default();
    if reach(provider, &mut report).await.is_some() && answers(provider, &mut report).await.is_some() {
        understands(provider, &mut report).await;
    }
    report
}

fn section(provider: &CustomProvider) -> String {
    format!("providers.custom (`{}`)", provider.name())
}

async fn reach(provider: &CustomProvider, report: &mut HealthReport) -> Option<()> {
    let limit = STEP_TIME_MAX.min(provider.http.limit());
    let base = provider.http.base();
    let (host, port) = (base.host_str()?.trim_matches(['[', ']']), base.port_or_known_default()?);
    let address = format!("{host}, port {port}");
    let fix = format!("check base_url in {}", section(provider));
    let found = match timeout(limit, lookup_host((host, port))).await {
        Ok(Ok(found)) => found.collect::<Vec<_>>(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    };
    if found.is_empty() {
        report.fail("backend_name", format!("the name {host} has no address"), fix);
        return None;
    }
    let connected = timeout(limit, TcpStream::connect(&*found)).await;
    if !matches!(connected, Ok(Ok(_))) {
        let fix = format!("start the backend, or {fix}");
        report.fail("backend_connection", format!("nobody answers at {address}"), fix);
        return None;
    }
    report.ok("backend_connection", format!("{address} accepts connections"));
    let is_plain = base.scheme() == "http" && !found.iter().all(|it| it.ip().is_loopback());
    if is_plain && provider.options.api_key.is_some() {
        let message = "the key and everything else crosses the network unencrypted";
        report.warn("backend_tls", message, "put TLS in front of the backend and use https://");
    }
    Some(())
}

async fn answers(provider: &CustomProvider, report: &mut HealthReport) -> Option<()> {
    let asked = timeout(STEP_TIME_MAX, provider.http.done(provider.http.get(&["health"], &[]))).await;
    match asked.unwrap_or(Err(CallError::TimedOut(STEP_TIME_MAX))) {
        Ok(()) if stranger::is_inside_api(&provider.http) && stranger::is_server(&provider.http).await => {
            report.fail("backend_protocol", stranger::SERVER, advice(provider));
            None
        }
        Ok(()) => {
            report.ok("backend_health", "the backend says that it is healthy");
            Some(())
        }
        Err(error) => {
            refused(provider, report, "backend_health", &error).await;
            None
        }
    }
}

/// `/health` may be open to everybody; the key shows at what is not.
async fn understands(provider: &CustomProvider, report: &mut HealthReport) {
    let probe = SandboxId::random();
    let status = provider.http.json::<Status>(provider.http.get(&["status", probe.as_str()], &[]));
    match timeout(STEP_TIME_MAX, status).await.unwrap_or(Err(CallError::TimedOut(STEP_TIME_MAX))) {
        Ok(_) | Err(CallError::Refused { status: 404 | 410, .. }) => report.ok("backend_key", "calls are accepted"),
        Err(error) => return refused(provider, report, "backend_key", &error).await,
    }
    match timeout(STEP_TIME_MAX, provider.discover()).await.unwrap_or(Err(CallError::TimedOut(STEP_TIME_MAX))) {
        Ok(offered) if offered.has(Feature::Agent) => {
            report.ok("backend_protocol", "sandboxes there can do what sandboxes here can");
        }
        Ok(offered) if offered.features.is_empty() => {
            let message =
                "it has none of the protocol's extensions; whether it is a backend shows at the first sandbox";
            report.ok("backend_protocol", message);
        }
        Ok(offered) => {
            let message = format!("it has {} of the protocol's extensions", offered.features.len());
            report.ok("backend_protocol", message);
        }
        Err(error) => refused(provider, report, "backend_protocol", &error).await,
    }
}

fn advice(provider: &CustomProvider) -> String {
    stranger::advice(&format!("base_url in {}", section(provider)))
}

async fn refused(provider: &CustomProvider, report: &mut HealthReport, name: &str, error: &CallError) {
    if stranger::is_likely(error) && stranger::is_server(&provider.http).await {
        return report.fail("backend_protocol", stranger::SERVER, advice(provider));
    }
    let section = section(provider);
    if name == "backend_health"
        && let CallError::Refused { status: status @ (404 | 405 | 410), .. } = error
    {
        let message = format!("what answers is not a backend: there is no GET /health (HTTP {status})");
        return report.fail("backend_protocol", message, advice(provider));
    }
    let fix = match error {
        CallError::Refused { status: 401 | 403, .. } if provider.options.api_key.is_none() => {
            format!("the backend wants a key: set api_key_file in {section}")
        }
        CallError::Refused { status: 401 | 403, .. } => {
            format!("set api_key or api_key_file in {section} to the backend's own key")
        }
        CallError::Refused { said: Some(said), .. } if said.hint.is_some() => said.hint.clone().unwrap_or_default(),
        CallError::Refused { .. } => "look at the backend's own log".to_owned(),
        CallError::Garbage(_) => format!("check that base_url in {section} is a backend's address"),
        CallError::Unreachable(_) => format!("check the certificate and the scheme of base_url in {section}"),
        CallError::TimedOut(_) | CallError::Broken(_) => "restart the backend, and look at its log".to_owned(),
    };
    report.fail(name, error.summary(), fix);
}

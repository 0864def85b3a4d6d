//! Labels: how containers of ours are found again, and told from everybody
//! else's, other servers' on the same daemon included.

use std::collections::{BTreeMap, HashMap};

use stacyvm_api::{LimitReport, SandboxId};
use stacyvm_sandbox::SandboxSpec;

use super::NAME;
use super::options::{DockerOptions, Network};

const OURS: &str = "stacyvm";
const OURS_VALUE: &str = "true";
const PROVIDER: &str = "stacyvm.provider";
const SANDBOX: &str = "stacyvm.sandbox";
pub(super) const IMAGE: &str = "stacyvm.image";
const METADATA: &str = "stacyvm.metadata";
const LIMITS: &str = "stacyvm.limits";

/// Which server it belongs to.
const INSTANCE: &str = "stacyvm.instance";

/// On what carries the agent to a daemon elsewhere.
const AGENT: &str = "stacyvm.agent";

/// The port that Traefik shows (spec: providers 2.2).
const PREVIEW_PORT: u16 = 3000;

pub(super) type Labels = HashMap<String, String>;

/// Those of a sandbox's container.
pub(super) fn of_sandbox(
    id: &SandboxId,
    spec: &SandboxSpec,
    limits: &LimitReport,
    instance: &str,
    options: &DockerOptions,
) -> Labels {
    let mut labels = of_instance(instance);
    labels.insert(SANDBOX.to_owned(), id.to_string());
    labels.insert(IMAGE.to_owned(), spec.image.clone());
    labels.insert(LIMITS.to_owned(), serde_json::to_string(limits).unwrap_or_default());
    if !spec.metadata.is_empty() {
        let metadata = serde_json::to_string(&spec.metadata).unwrap_or_default();
        labels.insert(METADATA.to_owned(), metadata);
    }
    if let Some(domain) = &options.traefik_domain {
        labels.extend(of_traefik(id, domain, &options.network));
    }
    labels
}

/// Those of a volume with the agent, and of a container that only carries it
/// there.
pub(super) fn of_agent(instance: &str, digest: &str) -> Labels {
    let mut labels = of_instance(instance);
    labels.insert(AGENT.to_owned(), digest.to_owned());
    labels
}

fn of_instance(instance: &str) -> Labels {
    HashMap::from(
        [(OURS, OURS_VALUE), (PROVIDER, NAME), (INSTANCE, instance)]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
    )
}

fn of_traefik(id: &SandboxId, domain: &str, network: &Network) -> Labels {
    let name = format!("{id}-{PREVIEW_PORT}");
    let mut labels = Labels::from([
        ("traefik.enable".to_owned(), "true".to_owned()),
        (format!("traefik.http.routers.{name}.rule"), format!("Host(`{PREVIEW_PORT}-{id}.{domain}`)")),
        (format!("traefik.http.services.{name}.loadbalancer.server.port"), PREVIEW_PORT.to_string()),
    ]);
    if let Network::Named(network) = network {
        labels.insert("traefik.docker.network".to_owned(), network.clone());
    }
    labels
}

/// What the daemon is asked for.
pub(super) fn filter_of(instance: &str) -> String {
    format!("{INSTANCE}={instance}")
}

/// The sandbox that a container of this server is.
pub(super) fn sandbox(labels: &Labels, instance: &str) -> Option<SandboxId> {
    let is = |name: &str, value: &str| labels.get(name).is_some_and(|found| found == value);
    if !is(OURS, OURS_VALUE) || !is(INSTANCE, instance) {
        return None;
    }
    labels.get(SANDBOX)?.parse().ok()
}

/// Whether something of this server's is there for the agent's sake.
pub(super) fn is_agents(labels: &Labels, instance: &str) -> bool {
    labels.get(INSTANCE).is_some_and(|found| found == instance) && labels.contains_key(AGENT)
}

pub(super) fn metadata(labels: &Labels) -> BTreeMap<String, String> {
    labels.get(METADATA).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

pub(super) fn limits(labels: &Labels) -> Option<LimitReport> {
    serde_json::from_str(labels.get(LIMITS)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_servers_sandboxes_are_recognised() {
        let id = SandboxId::random();
        let mut labels = of_instance("one");
        assert_eq!(sandbox(&labels, "one"), None);
        labels.insert(SANDBOX.to_owned(), id.to_string());
        assert_eq!(sandbox(&labels, "one"), Some(id));
        assert_eq!(sandbox(&labels, "two"), None);
        labels.insert(OURS.to_owned(), "false".to_owned());
        assert_eq!(sandbox(&labels, "one"), None);
        assert!(is_agents(&of_agent("one", "d"), "one") && !is_agents(&of_agent("one", "d"), "two"));
        assert_eq!(sandbox(&of_agent("one", "d"), "one"), None);
    }

    #[test]
    fn traefik_is_told_the_network_it_shares() {
        let id: SandboxId = "sb-12345678".parse().unwrap();
        let labels = of_traefik(&id, "example.com", &Network::Named("net".into()));
        assert_eq!(labels["traefik.http.routers.sb-12345678-3000.rule"], "Host(`3000-sb-12345678.example.com`)");
        assert_eq!(labels["traefik.http.services.sb-12345678-3000.loadbalancer.server.port"], "3000");
        assert_eq!(labels["traefik.docker.network"], "net");
    }
}

//! Servers whose sandboxes are containers of a docker daemon, which the tests
//! start themselves.

mod everyday;
mod outage;
mod restart;

#[path = "../../../../providers/tests/it/dockerd.rs"]
pub(crate) mod dockerd;

use std::process::Command;
use std::sync::Arc;

use dockerd::Dockerd;

use crate::support::{Server, Site};

/// A server with nothing but docker, which looks often at what there is.
pub(crate) async fn start(site: &Arc<Site>, daemon: &Dockerd, settings: &[(&str, &str)]) -> Server {
    Server::start_with(site, |serve| {
        serve.env("DOCKER_HOST", format!("unix://{}", daemon.socket().display()));
        only_docker(serve).envs(settings.iter().copied());
    })
    .await
}

fn only_docker(serve: &mut Command) -> &mut Command {
    serve.env("STACYVM_PROVIDERS_DEFAULT", "docker").env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
    serve.env("STACYVM_PROVIDERS_RECONCILE_INTERVAL", "1s")
}

/// Names of the containers that a site's servers have on a daemon.
fn containers(site: &Site, daemon: &Dockerd) -> Vec<String> {
    let instance = std::fs::read_to_string(site.data_dir().join("docker/instance")).expect("the server has a name");
    let filter = format!("label=stacyvm.instance={}", instance.trim());
    let listed = daemon.docker(&["ps", "--all", "--format", "{{.Names}}", "--filter", &filter]);
    listed.lines().map(str::to_owned).collect()
}

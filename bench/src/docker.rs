//! Sandboxes on a docker daemon, beside what the same daemon takes for bare
//! containers with the same limits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::baseline::succeed;
use crate::dockerd::Dockerd;
use crate::server::{IMAGE, Runtime, ServeOptions, Server, Setup};
use crate::statistics::Spread;

const WARM_UPS: usize = 2;
const CREATES: usize = 30;
const EXECS: usize = 200;
const CLIENT_EXECS: usize = 30;

pub(crate) struct Docker {
    /// Asked for over REST, and ready for commands.
    pub(crate) create: Spread,
    /// The Engine API's create and start.
    pub(crate) bare: Spread,
    pub(crate) exec: Spread,
    /// `docker exec`.
    pub(crate) client_exec: Spread,
}

pub(crate) async fn measure(setup: &Setup) -> anyhow::Result<Docker> {
    let (archive, directory) = (setup.archive.clone(), setup.directory.path().join("dockerd"));
    let daemon = Arc::new(tokio::task::spawn_blocking(move || Dockerd::start(&archive, &directory)).await??);
    let options = ServeOptions { runtime: Runtime::Docker(daemon.socket().to_owned()), ..ServeOptions::default() };
    let server = Server::start(setup, "docker", options).await?;
    let (mut create, mut bare) = (Vec::new(), Vec::new());
    // In turns: what else this machine does strikes both alike.
    for round in 0..WARM_UPS + CREATES {
        let start = Instant::now();
        let id = server.create().await?;
        let ours = start.elapsed();
        server.destroy(&id).await?;
        let theirs = blocking(&daemon, bare_container).await?;
        if round >= WARM_UPS {
            create.push(ours);
            bare.push(theirs);
        }
    }
    let id = server.create().await?;
    let (mut exec, mut client_exec) = (Vec::new(), Vec::new());
    for round in 0..WARM_UPS + EXECS {
        let start = Instant::now();
        server.exec_true(&id).await?;
        if round >= WARM_UPS {
            exec.push(start.elapsed());
        }
    }
    for round in 0..WARM_UPS + CLIENT_EXECS {
        let name = id.to_string();
        let took = blocking(&daemon, move |daemon| {
            let start = Instant::now();
            succeed(&mut daemon.docker(&["exec", &name, "/bin/true"]))?;
            Ok(start.elapsed())
        });
        let took = took.await?;
        if round >= WARM_UPS {
            client_exec.push(took);
        }
    }
    server.destroy(&id).await?;
    server.stop().await?;
    Ok(Docker {
        create: Spread::of(&create),
        bare: Spread::of(&bare),
        exec: Spread::of(&exec),
        client_exec: Spread::of(&client_exec),
    })
}

async fn blocking<T: Send + 'static>(
    daemon: &Arc<Dockerd>,
    work: impl FnOnce(&Dockerd) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let daemon = Arc::clone(daemon);
    tokio::task::spawn_blocking(move || work(&daemon)).await?
}

/// As `Server::create` asks for it, and no more.
fn bare_container(daemon: &Dockerd) -> anyhow::Result<Duration> {
    const BYTES: u64 = 128 << 20;
    let body = json!({
        "Image": IMAGE,
        "Entrypoint": ["/bin/sleep", "600"],
        "HostConfig": {
            "NetworkMode": "bridge", "Memory": BYTES, "MemorySwap": BYTES, "NanoCpus": 1_000_000_000_u64,
            "PidsLimit": 64, "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"],
            "LogConfig": { "Type": "none" },
        },
    });
    let start = Instant::now();
    let made: Value = serde_json::from_str(&daemon.api("POST", "/containers/create", &body.to_string())?)?;
    let id = made["Id"].as_str().context("a container without an id")?;
    daemon.api("POST", &format!("/containers/{id}/start"), "")?;
    let took = start.elapsed();
    daemon.api("DELETE", &format!("/containers/{id}?force=true&v=true"), "")?;
    Ok(took)
}

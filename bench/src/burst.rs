//! Many sandboxes asked for at the same moment.

use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::time::Instant;

use crate::server::{ServeOptions, Server, Setup};
use crate::statistics::Spread;

pub(crate) const BURST: usize = 100;

pub(crate) struct Burst {
    /// With a pair of namespaces ready for each.
    pub(crate) from_pool: Spread,
    /// With none ready.
    pub(crate) from_nothing: Spread,
}

pub(crate) async fn measure(setup: &Setup) -> anyhow::Result<Burst> {
    let ready = ServeOptions { namespace_pool: Some(BURST), ..ServeOptions::default() };
    let from_pool = ask_at_once(setup, "burst-ready", ready).await?;
    let from_nothing =
        ask_at_once(setup, "burst-empty", ServeOptions { namespace_pool: Some(0), ..ServeOptions::default() }).await?;
    Ok(Burst { from_pool, from_nothing })
}

async fn ask_at_once(setup: &Setup, name: &str, options: ServeOptions) -> anyhow::Result<Spread> {
    let pool = options.namespace_pool.unwrap_or(0);
    let server = Server::start(setup, name, options).await?;
    // The image is unpacked and the code is warm; the pool is as asked for.
    let id = server.create().await?;
    server.exec_true(&id).await?;
    server.destroy(&id).await?;
    server.wait_for_pool(pool).await?;
    let one = async || -> anyhow::Result<_> {
        let start = Instant::now();
        let id = server.create().await?;
        server.exec_true(&id).await?;
        Ok((id, start.elapsed()))
    };
    let answered = try_join_all((0..BURST).map(|_| one())).await?;
    let times: Vec<Duration> = answered.iter().map(|(_, time)| *time).collect();
    for destroyed in join_all(answered.iter().map(|(id, _)| server.destroy(id))).await {
        destroyed?;
    }
    server.stop().await?;
    Ok(Spread::of(&times))
}

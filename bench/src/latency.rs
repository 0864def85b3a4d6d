//! One sandbox at a time: create to first result, exec, destroy; and in turns
//! with them what other runtimes take for the same command.

use tokio::task::block_in_place;
use tokio::time::Instant;

use crate::baseline::{Baseline, Contenders};
use crate::server::{ServeOptions, Server, Setup};
use crate::statistics::Spread;

/// Not counted: they fill caches and connections.
const WARM_UPS: usize = 5;

/// So many of ours, then as many of each other runtime: what else this machine
/// does strikes all alike, and each finds its caches as warm as the others theirs.
const TURN: usize = 4;

pub(crate) struct Latency {
    /// Asked for, made, `true` run, result received.
    pub(crate) create_and_exec: Spread,
    pub(crate) create: Spread,
    /// In a sandbox that runs already.
    pub(crate) exec: Spread,
    pub(crate) destroy: Spread,
    pub(crate) others: Vec<Baseline>,
}

pub(crate) async fn measure(setup: &Setup, creates: usize, execs: usize) -> anyhow::Result<Latency> {
    let mut others = Contenders::prepare(setup).await?;
    let server = Server::start(setup, "latency", ServeOptions::default()).await?;
    let (mut create, mut first, mut destroy) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM_UPS + creates {
        if round % TURN == 0 {
            block_in_place(|| others.take_turns(TURN));
        }
        let start = Instant::now();
        let id = server.create().await?;
        let made = start.elapsed();
        server.exec_true(&id).await?;
        let answered = start.elapsed();
        let start = Instant::now();
        server.destroy(&id).await?;
        let ended = start.elapsed();
        if round >= WARM_UPS {
            create.push(made);
            first.push(answered);
            destroy.push(ended);
        }
    }
    let id = server.create().await?;
    let mut exec = Vec::new();
    for round in 0..WARM_UPS + execs {
        let start = Instant::now();
        server.exec_true(&id).await?;
        if round >= WARM_UPS {
            exec.push(start.elapsed());
        }
    }
    server.destroy(&id).await?;
    server.stop().await?;
    Ok(Latency {
        create_and_exec: Spread::of(&first),
        create: Spread::of(&create),
        exec: Spread::of(&exec),
        destroy: Spread::of(&destroy),
        others: others.results(),
    })
}

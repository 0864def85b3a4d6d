//! Sandboxes under PRoot, beside what PRoot takes by itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::baseline::succeed;
use crate::server::{Runtime, ServeOptions, Server, Setup};
use crate::statistics::Spread;

const WARM_UPS: usize = 2;
const CREATES: usize = 20;
const EXECS: usize = 200;

pub(crate) struct Proot {
    /// Asked for over REST, and ready for commands.
    pub(crate) create: Spread,
    pub(crate) exec: Spread,
    /// `proot /bin/true` in the same root.
    pub(crate) bare: Spread,
}

pub(crate) async fn measure(setup: &Setup) -> anyhow::Result<Proot> {
    let options = ServeOptions { runtime: Runtime::Proot, ..ServeOptions::default() };
    let server = Server::start(setup, "proot", options).await?;
    let mut create = Vec::new();
    for round in 0..WARM_UPS + CREATES {
        let start = Instant::now();
        let id = server.create().await?;
        if round >= WARM_UPS {
            create.push(start.elapsed());
        }
        server.destroy(&id).await?;
    }
    let id = server.create().await?;
    let root: PathBuf =
        [server.data_dir.as_path(), Path::new("proot/sandboxes"), Path::new(id.as_str()), Path::new("root")]
            .iter()
            .collect();
    let (mut exec, mut bare) = (Vec::new(), Vec::new());
    // In turns: what else this machine does strikes both alike.
    for round in 0..WARM_UPS + EXECS {
        let start = Instant::now();
        server.exec_true(&id).await?;
        let ours = start.elapsed();
        let root = root.clone();
        let theirs = tokio::task::spawn_blocking(move || bare_call(&root)).await??;
        if round >= WARM_UPS {
            exec.push(ours);
            bare.push(theirs);
        }
    }
    server.destroy(&id).await?;
    server.stop().await?;
    Ok(Proot { create: Spread::of(&create), exec: Spread::of(&exec), bare: Spread::of(&bare) })
}

fn bare_call(root: &Path) -> anyhow::Result<Duration> {
    let mut proot = Command::new("proot");
    proot.arg("-0").arg("-r").arg(root).args(["-b", "/proc", "-b", "/dev/null", "-w", "/", "/bin/true"]);
    let start = Instant::now();
    succeed(&mut proot)?;
    Ok(start.elapsed())
}

//! The same command in the same image, by the runtimes people know.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::dockerd::Dockerd;
use crate::server::{IMAGE, Setup};
use crate::statistics::Spread;

const WARM_UPS: usize = 2;
const OCI_RUNS: usize = 60;
const DOCKER_RUNS: usize = 20;

/// What another runtime needed, or why it could not be asked.
pub(crate) struct Baseline {
    pub(crate) name: &'static str,
    pub(crate) outcome: Result<Spread, String>,
}

#[derive(Serialize, Deserialize)]
struct Samples {
    nanos: Vec<u64>,
}

pub(crate) async fn measure(setup: &Setup) -> anyhow::Result<Vec<Baseline>> {
    let archive = setup.archive.clone();
    let directory = setup.directory.path().join("baseline");
    tokio::task::spawn_blocking(move || {
        fs::create_dir_all(&directory)?;
        let bundle = make_bundle(&archive, &directory.join("bundle"))?;
        let outcome = |result: anyhow::Result<Spread>| result.map_err(|error| format!("{error:#}"));
        Ok(vec![
            Baseline { name: "crun run", outcome: outcome(oci_runtime("crun", &bundle)) },
            Baseline { name: "runc run", outcome: outcome(oci_runtime("runc", &bundle)) },
            Baseline { name: "docker run", outcome: outcome(docker(&archive, &directory.join("docker"))) },
        ])
    })
    .await?
}

/// The image unpacked, and a configuration as `runc spec` writes it, running
/// `true`.
fn make_bundle(archive: &Path, bundle: &Path) -> anyhow::Result<PathBuf> {
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs)?;
    let unpacked = bundle.join("archive");
    fs::create_dir_all(&unpacked)?;
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&unpacked))?;
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(unpacked.join("manifest.json"))?)?;
    let layers = manifest[0]["Layers"].as_array().context("the archive lists no layers")?;
    for layer in layers {
        let layer = unpacked.join(layer.as_str().context("a layer without a path")?);
        succeed(Command::new("tar").arg("-xf").arg(layer).arg("-C").arg(&rootfs))?;
    }
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": ["/bin/true"], "cwd": "/",
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "noNewPrivileges": true,
            "capabilities": { "bounding": [], "effective": [], "permitted": [] },
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "bench",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "size=65536k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
        ],
        "linux": {
            "namespaces": namespaces,
            "resources": { "memory": { "limit": 134_217_728_i64 }, "pids": { "limit": 64 } },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    Ok(bundle.to_owned())
}

/// Some runtimes refuse a host with both kinds of cgroups. In a mount namespace
/// of its own the second kind can be taken away, with a place for what they make
/// there that goes with the namespace; the timing happens inside, so that
/// entering it costs nothing.
fn oci_runtime(name: &str, bundle: &Path) -> anyhow::Result<Spread> {
    let program = find_program(name).with_context(|| format!("{name} is not installed"))?;
    let script = "unified=/sys/fs/cgroup/unified\n\
                  ! umount $unified 2>/dev/null || mount -t tmpfs -o size=64k none $unified\n\
                  exec \"$@\"";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe()?)
        .arg("runtime")
        .arg(program)
        .arg(bundle)
        .arg(OCI_RUNS.to_string())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    let samples: Samples = serde_json::from_slice(&output.stdout)?;
    let samples: Vec<Duration> = samples.nanos.into_iter().map(Duration::from_nanos).collect();
    ensure!(!samples.is_empty(), "no samples");
    Ok(Spread::of(&samples))
}

/// The helper's part: runs and prints the samples.
pub(crate) fn measure_here(program: &Path, bundle: &Path, count: usize) -> anyhow::Result<()> {
    let mut nanos = Vec::with_capacity(count);
    for round in 0..WARM_UPS + count {
        let id = format!("stacyvm-bench-{}-{round}", std::process::id());
        let start = Instant::now();
        succeed(Command::new(program).arg("run").arg("--bundle").arg(bundle).arg(id))?;
        if round >= WARM_UPS {
            nanos.push(u64::try_from(start.elapsed().as_nanos())?);
        }
    }
    println!("{}", serde_json::to_string(&Samples { nanos })?);
    Ok(())
}

/// `docker run` with a daemon of our own.
fn docker(archive: &Path, directory: &Path) -> anyhow::Result<Spread> {
    let daemon = Dockerd::start(archive, directory)?;
    let mut samples = Vec::new();
    for round in 0..WARM_UPS + DOCKER_RUNS {
        let start = Instant::now();
        succeed(&mut daemon.docker(&["run", "--rm", "--memory=128m", "--pids-limit=64", IMAGE, "/bin/true"]))?;
        if round >= WARM_UPS {
            samples.push(start.elapsed());
        }
    }
    Ok(Spread::of(&samples))
}

pub(crate) fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}

//! The same command in the same image, by the runtimes people know.
//!
//! OCI runtimes are measured twice. Once with the isolation that our sandboxes
//! have: the configuration is the one that our own provider hands to such a
//! runtime (`providers.oci.runtime`), so that the two cannot drift apart. And
//! once bare: neither system call filter nor user namespace, few masks.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::dockerd::Dockerd;
use crate::report::promised;
use crate::server::{IMAGE, Runtime, ServeOptions, Server, Setup};
use crate::statistics::Spread;

const WARM_UPS: usize = 2;
const DOCKER_RUNS: usize = 20;

/// And how many times faster we promise to be.
const PROGRAMS: [(&str, f64); 2] = [("crun", promised::THAN_CRUN), ("runc", promised::THAN_RUNC)];

/// What another runtime needed, or why it could not be asked.
pub(crate) struct Baseline {
    pub(crate) name: String,
    /// How many times faster we promise to be.
    pub(crate) promised: Option<f64>,
    pub(crate) outcome: Result<Spread, String>,
}

/// OCI runtimes, each with each of the bundles.
pub(crate) struct Contenders(Vec<Contender>);

struct Contender {
    name: String,
    promised: Option<f64>,
    /// `Err` from the first failure on.
    outcome: Result<(Stopwatch, Vec<Duration>), String>,
}

impl Contenders {
    pub(crate) async fn prepare(setup: &Setup) -> anyhow::Result<Self> {
        let directory = setup.directory.path().join("baseline");
        fs::create_dir_all(&directory)?;
        // The root of a user namespace is nobody here, and has to get there.
        for path in [setup.directory.path(), &directory] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o711))?;
        }
        let bare = make_bundle(&setup.archive, &directory.join("bare"), &bare_configuration())?;
        let same = match same_configuration(setup, &directory).await {
            Ok(configuration) => Ok(make_bundle(&setup.archive, &directory.join("same"), &configuration)?),
            Err(error) => Err(format!("{error:#}")),
        };
        let mut all = Vec::new();
        for (program, promised) in PROGRAMS {
            let bundles = [("the same isolation", Some(promised), same.clone()), ("bare", None, Ok(bare.clone()))];
            for (isolation, promised, bundle) in bundles {
                let started =
                    bundle.and_then(|bundle| Stopwatch::start(program, &bundle).map_err(|error| format!("{error:#}")));
                let outcome = started.map(|stopwatch| (stopwatch, Vec::new()));
                all.push(Contender { name: format!("{program} run, {isolation}"), promised, outcome });
            }
        }
        Ok(Self(all))
    }

    /// A turn of so many runs for each.
    pub(crate) fn take_turns(&mut self, runs: usize) {
        for Contender { outcome, .. } in &mut self.0 {
            for _ in 0..runs {
                let Ok((stopwatch, samples)) = outcome else { break };
                match stopwatch.run() {
                    Ok(sample) => samples.push(sample),
                    Err(error) => *outcome = Err(format!("{error:#}")),
                }
            }
        }
    }

    pub(crate) fn results(self) -> Vec<Baseline> {
        let result = |Contender { name, promised, outcome }| Baseline {
            name,
            promised,
            outcome: outcome.map(|(_, samples)| Spread::of(samples.get(WARM_UPS..).unwrap_or(&samples))),
        };
        self.0.into_iter().map(result).collect()
    }
}

/// What our provider would have a runtime do, with `true` in place of the agent.
/// What it prepares (two namespaces, control groups) the runtime makes itself.
async fn same_configuration(setup: &Setup, directory: &Path) -> anyhow::Result<Value> {
    let program =
        PROGRAMS.iter().find_map(|(name, _)| find_program(name)).context("neither crun nor runc is installed")?;
    let (wrapper, copy) = (directory.join("runtime"), directory.join("handed-over.json"));
    let script = format!(
        "#!/bin/sh\n\
         for argument in \"$@\"; do\n\
         [ ! -f \"$argument/config.json\" ] || cp \"$argument/config.json\" '{}'\n\
         done\n\
         exec '{}' \"$@\"\n",
        copy.display(),
        program.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let options = ServeOptions { runtime: Runtime::OciBy(wrapper), ..ServeOptions::default() };
    let server = Server::start(setup, "handed-over", options).await?;
    let made = server.create().await;
    if let Ok(id) = &made {
        server.destroy(id).await?;
    }
    server.stop().await?;
    made?;
    let mut configuration: Value = serde_json::from_slice(&fs::read(&copy)?)?;
    configuration["process"]["args"] = json!(["/bin/true"]);
    configuration["root"]["path"] = json!("rootfs");
    let linux = configuration["linux"].as_object_mut().context("it has no part `linux`")?;
    linux.remove("cgroupsPath");
    for namespace in linux["namespaces"].as_array_mut().context("it names no namespaces")? {
        namespace.as_object_mut().context("a namespace that is none")?.remove("path");
    }
    Ok(configuration)
}

/// About as `runc spec` writes it.
fn bare_configuration() -> Value {
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    json!({
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
    })
}

/// The image unpacked, beside a configuration.
fn make_bundle(archive: &Path, bundle: &Path, configuration: &Value) -> anyhow::Result<PathBuf> {
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs)?;
    let unpacked = bundle.join("archive");
    fs::create_dir_all(&unpacked)?;
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&unpacked))?;
    let manifest: Value = serde_json::from_slice(&fs::read(unpacked.join("manifest.json"))?)?;
    let layers = manifest[0]["Layers"].as_array().context("the archive lists no layers")?;
    for layer in layers {
        let layer = unpacked.join(layer.as_str().context("a layer without a path")?);
        succeed(Command::new("tar").arg("-xf").arg(layer).arg("-C").arg(&rootfs))?;
    }
    fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(configuration)?)?;
    Ok(bundle.to_owned())
}

/// A process of ours that runs a runtime on demand, and times it.
///
/// Some runtimes refuse a host with both kinds of cgroups. In a mount namespace
/// of its own the second kind can be taken away, with a place for what they make
/// there that goes with the namespace; the timing happens inside, so that
/// entering it costs nothing.
struct Stopwatch {
    process: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Stopwatch {
    fn start(name: &str, bundle: &Path) -> anyhow::Result<Self> {
        let program = find_program(name).with_context(|| format!("{name} is not installed"))?;
        let script = "unified=/sys/fs/cgroup/unified\n\
                      ! umount $unified 2>/dev/null || mount -t tmpfs -o size=16m none $unified\n\
                      exec \"$@\"";
        let mut process = Command::new("unshare")
            .args(["-m", "sh", "-c", script, "sh"])
            .arg(std::env::current_exe()?)
            .arg("runtime")
            .arg(program)
            .arg(bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let ask = process.stdin.take().context("it has no input")?;
        let answers = BufReader::new(process.stdout.take().context("it has no output")?);
        Ok(Self { process, ask, answers })
    }

    fn run(&mut self) -> anyhow::Result<Duration> {
        self.ask.write_all(b"\n")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        match line.trim().split_once(' ') {
            Some(("ran", nanos)) => Ok(Duration::from_nanos(nanos.parse()?)),
            Some(("failed", reason)) => bail!("{reason}"),
            _ => bail!("the process that runs it has ended"),
        }
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        // It waits for a line between two runs, and makes nothing by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process's part: a run for each line that comes in.
pub(crate) fn measure_here(program: &Path, bundle: &Path) -> anyhow::Result<()> {
    for (round, line) in std::io::stdin().lock().lines().enumerate() {
        line?;
        let id = format!("stacyvm-bench-{}-{round}", std::process::id());
        let start = Instant::now();
        let outcome = succeed(Command::new(program).arg("run").arg("--bundle").arg(bundle).arg(id));
        let nanos = start.elapsed().as_nanos();
        match outcome {
            Ok(()) => println!("ran {nanos}"),
            Err(error) => println!("failed {}", format!("{error:#}").replace('\n', " ")),
        }
    }
    Ok(())
}

/// `docker run` with a daemon of our own.
pub(crate) async fn docker(setup: &Setup) -> anyhow::Result<Baseline> {
    let (archive, directory) = (setup.archive.clone(), setup.directory.path().join("baseline/docker"));
    let measured = tokio::task::spawn_blocking(move || docker_runs(&archive, &directory)).await?;
    let outcome = measured.map_err(|error| format!("{error:#}"));
    Ok(Baseline { name: "docker run".to_owned(), promised: Some(promised::THAN_DOCKER), outcome })
}

fn docker_runs(archive: &Path, directory: &Path) -> anyhow::Result<Spread> {
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

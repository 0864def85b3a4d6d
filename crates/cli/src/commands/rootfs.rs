//! `stacyvm rootfs`: the directory that is image `rootfs` of the provider
//! `proot`. No server is needed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use stacyvm_image::ImageStore;
use stacyvm_providers::proot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::commands::serve::image_store;
use crate::commands::{Context, stop_when_told};
use crate::config::{self, Environment};
use crate::data_dir;
use crate::failure::Advice;

/// How long killed tools may take to end, and how often that is looked at.
const GROUP_PATIENCE: Duration = Duration::from_secs(10);
const GROUP_LOOK: Duration = Duration::from_millis(5);

/// Make the root file system of sandboxes under PRoot
#[derive(Debug, Args)]
pub(crate) struct RootfsArgs {
    #[command(subcommand)]
    command: RootfsCommand,
}

#[derive(Debug, Subcommand)]
enum RootfsCommand {
    Build(BuildArgs),
}

/// Make a root file system, of a distribution or of an image
///
/// Without --image it is a minimal Debian or Ubuntu, made by debootstrap, which
/// needs root. An image is unpacked without any privilege. The directory must
/// not be there; it appears once it is complete.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm rootfs build --image python:3.12-slim
  sudo stacyvm rootfs build --include python3,nodejs ./rootfs
  stacyvm rootfs build --image alpine:latest ~/rootfs && STACYVM_PROVIDERS_PROOT_ROOTFS_PATH=~/rootfs stacyvm serve")]
struct BuildArgs {
    /// Directory to make; `providers.proot.rootfs_path` otherwise
    path: Option<PathBuf>,
    /// Unpack this image, which is fetched if it is not here
    #[arg(long, value_name = "REFERENCE", conflicts_with_all = ["suite", "include", "mirror"])]
    image: Option<String>,
    /// Release that debootstrap makes; this host's own on Debian and Ubuntu,
    /// `stable` elsewhere
    #[arg(long)]
    suite: Option<String>,
    /// Packages besides the minimal ones, separated by commas
    #[arg(long, value_name = "PACKAGES")]
    include: Option<String>,
    /// Where packages come from; debootstrap's own choice otherwise
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Data directory of the server, for its images
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file of the server
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: RootfsArgs) -> anyhow::Result<()> {
    let RootfsCommand::Build(args) = args.command;
    let environment = Environment::of_this_process();
    let mut config = config::load(args.config.as_deref(), &environment)?.config;
    if args.data_dir.is_some() {
        config.top.data_dir.clone_from(&args.data_dir);
    }
    let path = args.path.clone().unwrap_or_else(|| config.proot.rootfs_path.clone());
    if path.exists() {
        // What is in it may be anybody's: nothing here says to remove that.
        let is_empty = path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        let hint =
            if is_empty { "rmdir it, or name another directory" } else { "name a directory that is not there yet" };
        return Err(Advice::new(format!("{} is there already", path.display()), hint).into());
    }
    if args.image.is_none() && !rustix::process::geteuid().is_root() {
        let message = "debootstrap, which makes a distribution and its packages, needs root";
        return Err(Advice::new(message, "use sudo, or unpack an image instead: --image REFERENCE").into());
    }
    let stop = interruption();
    let fresh = Fresh::beside(&path)?;
    if let Some(reference) = &args.image {
        let data_dir = data_dir::resolve(config.top.data_dir.as_deref(), environment.home.as_deref())?;
        data_dir::create(&data_dir)?;
        let store = ImageStore::open(image_store(&config, &data_dir, &environment)).await?;
        let image = stop.run_until_cancelled(store.get(reference, &())).await.ok_or_else(interrupted)??;
        let (layers, target) = (image.layers.clone(), fresh.root());
        tokio::task::spawn_blocking(move || proot::unpack(&layers, &target))
            .await?
            .with_context(|| format!("unpack {reference}"))?;
        anyhow::ensure!(!stop.is_cancelled(), interrupted());
    } else {
        debootstrap(&args, &fresh.root(), &stop).await?;
    }
    fresh.move_to(&path)?;
    let shown = path.display().to_string();
    context.output.show(&json!({ "rootfs": shown }), |_| {
        format!("made {shown}\nuse it: STACYVM_PROVIDERS_PROOT_ROOTFS_PATH={shown} stacyvm serve\n")
    })
}

/// Is cancelled when the build is to end before it is done.
fn interruption() -> CancellationToken {
    let stop = stop_when_told();
    let told = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            told.cancel();
        }
    });
    stop
}

fn interrupted() -> anyhow::Error {
    anyhow::anyhow!("interrupted; what was begun is removed")
}

async fn debootstrap(args: &BuildArgs, target: &Path, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new("debootstrap");
    command.arg("--variant=minbase").args(args.include.iter().map(|list| format!("--include={list}")));
    let suite = args.suite.clone().or_else(own_release).unwrap_or_else(|| "stable".to_owned());
    command.arg(suite).arg(target).args(&args.mirror);
    // Its progress is for people; what this command prints is for programs.
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    // In a group of its own, so that it ends with all that it has started.
    let mut child = match command.process_group(0).spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let fix = "install the package debootstrap, or unpack an image: --image REFERENCE";
            return Err(Advice::new("debootstrap is not installed", fix).into());
        }
        Err(error) => return Err(error).context("start debootstrap"),
    };
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let Some(status) = stop.run_until_cancelled(child.wait()).await else {
        if let Some(group) = group {
            // Itself counts as one of the group until it has been waited for.
            let _ = kill_process_group(group, Signal::KILL);
            child.wait().await.context("wait for debootstrap")?;
            end_group(group).await;
        }
        return Err(interrupted());
    };
    let status = status.context("wait for debootstrap")?;
    anyhow::ensure!(status.success(), "debootstrap failed ({status})");
    Ok(())
}

/// Kills a group of processes, and waits until they write no more.
async fn end_group(group: Pid) {
    let deadline = Instant::now() + GROUP_PATIENCE;
    while kill_process_group(group, Signal::KILL).is_ok() && Instant::now() < deadline {
        tokio::time::sleep(GROUP_LOOK).await;
    }
}

/// The release of this host, if debootstrap knows how to make it: its keys are
/// here too.
fn own_release() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?.trim_matches('"');
    Path::new("/usr/share/debootstrap/scripts").join(name).exists().then(|| name.to_owned())
}

/// A directory that goes away unless it gets its name.
struct Fresh {
    directory: tempfile::TempDir,
}

impl Fresh {
    fn beside(path: &Path) -> anyhow::Result<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let make = || {
            std::fs::create_dir_all(parent)?;
            let directory = tempfile::Builder::new().prefix(".stacyvm-rootfs-").tempdir_in(parent)?;
            std::fs::create_dir(directory.path().join("root"))?;
            Ok::<_, std::io::Error>(directory)
        };
        match make() {
            Ok(directory) => Ok(Self { directory }),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let message = format!("no directory can be made in {}: permission denied", parent.display());
                Err(Advice::new(message, "name one of your own: `stacyvm rootfs build … ./rootfs`").into())
            }
            Err(error) => Err(error).with_context(|| format!("make a directory in {}", parent.display())),
        }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    fn move_to(self, path: &Path) -> anyhow::Result<()> {
        std::fs::rename(self.root(), path).with_context(|| format!("make {}", path.display()))
    }
}

impl Drop for Fresh {
    /// What a tool that was killed had mounted inside would be in the way, and
    /// its files are the host's.
    fn drop(&mut self) {
        let Ok(inside) = self.directory.path().canonicalize() else { return };
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points =
            mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|at| Path::new(at).starts_with(&inside));
        for point in points.collect::<Vec<_>>().into_iter().rev() {
            if let Err(error) = rustix::mount::unmount(point, UnmountFlags::DETACH) {
                tracing::warn!(point, %error, "cannot be unmounted");
            }
        }
    }
}

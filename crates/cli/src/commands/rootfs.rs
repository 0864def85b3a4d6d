//! `stacyvm rootfs`: the directory that is image `rootfs` of the provider
//! `proot`. No server is needed.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_image::ImageStore;
use stacyvm_providers::proot;

use crate::commands::Context;
use crate::commands::serve::image_store;
use crate::config::{self, Environment};
use crate::data_dir;
use crate::failure::Advice;

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
        let message = format!("{} is there already", path.display());
        return Err(Advice::new(message, "remove it, or name another directory").into());
    }
    if args.image.is_none() && !rustix::process::geteuid().is_root() {
        let message = "debootstrap, which makes a distribution and its packages, needs root";
        return Err(Advice::new(message, "use sudo, or unpack an image instead: --image REFERENCE").into());
    }
    let fresh = Fresh::beside(&path)?;
    if let Some(reference) = &args.image {
        let data_dir = data_dir::resolve(config.top.data_dir.as_deref(), environment.home.as_deref())?;
        data_dir::create(&data_dir)?;
        let store = ImageStore::open(image_store(&config, &data_dir, &environment)).await?;
        let image = store.get(reference, &()).await?;
        let (layers, target) = (image.layers.clone(), fresh.root());
        tokio::task::spawn_blocking(move || proot::unpack(&layers, &target))
            .await?
            .with_context(|| format!("unpack {reference}"))?;
    } else {
        debootstrap(&args, &fresh.root()).await?;
    }
    fresh.move_to(&path)?;
    let shown = path.display().to_string();
    context.output.show(&json!({ "rootfs": shown }), |_| format!("made {shown}\n"))
}

async fn debootstrap(args: &BuildArgs, target: &Path) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new("debootstrap");
    command.arg("--variant=minbase").args(args.include.iter().map(|list| format!("--include={list}")));
    let suite = args.suite.clone().or_else(own_release).unwrap_or_else(|| "stable".to_owned());
    command.arg(suite).arg(target).args(&args.mirror);
    // Its progress is for people; what this command prints is for programs.
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let status = match command.status().await {
        Ok(status) => status,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let fix = "install the package debootstrap, or unpack an image: --image REFERENCE";
            return Err(Advice::new("debootstrap is not installed", fix).into());
        }
        Err(error) => return Err(error).context("start debootstrap"),
    };
    anyhow::ensure!(status.success(), "debootstrap failed ({status})");
    Ok(())
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

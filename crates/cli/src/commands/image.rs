//! `stacyvm image`: the images kept on this host. No server is needed: the
//! store is made for several programs at once.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use clap::{Args, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use stacyvm_api::Timestamp;
use stacyvm_image::{ExportFormat, Image, ImageStore, ImageSummary, ImportOptions};
use stacyvm_sandbox::{Progress, ProgressSink};

use crate::commands::Context;
use crate::commands::serve::image_store;
use crate::commands::settings::announce_data_dir;
use crate::config::{self, Environment};
use crate::data_dir;
use crate::output::{self, Output, lines};

/// Longest digest shown in tables.
const DIGEST_CHARS: usize = "sha256:".len() + 12;

/// Bring in, list and remove the images kept on this host
///
/// Works on the image store of a data directory of this host, beside a running
/// server or without one; --server has no part in it. Run it as the user that the
/// server runs as.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
    /// Data directory of the server
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file of the server
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Fetch an image from its registry, newer than what is here or not
    #[command(after_help = "Examples:
  stacyvm image pull python:3.12
  stacyvm image pull ghcr.io/owner/tool@sha256:<digest>")]
    Pull {
        reference: String,
    },
    Import(ImportArgs),
    /// List images
    #[command(visible_alias = "ls", after_help = "Examples:\n  stacyvm image list\n  stacyvm image list --json")]
    List,
    /// Remove images; sandboxes that use them keep what they need
    #[command(visible_alias = "remove", after_help = "Examples:\n  stacyvm image rm alpine:latest")]
    Rm {
        #[arg(required = true)]
        references: Vec<String>,
    },
    Export(ExportArgs),
    /// Free what no image needs, and images beyond the store's size
    #[command(after_help = "Examples:\n  stacyvm image prune")]
    Prune,
}

/// Bring in an archive of `docker save`, an OCI layout, or a root file system
///
/// Archives may be compressed; layouts may be directories.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  docker save alpine:latest | gzip > alpine.tar.gz && stacyvm image import alpine.tar.gz
  stacyvm image import rootfs.tar --name my/base:1
  stacyvm image import ./oci-layout")]
struct ImportArgs {
    path: PathBuf,
    /// What to call the image, where the archive does not say
    #[arg(long)]
    name: Option<String>,
}

/// Write an image to a tar file that others can import
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm image export alpine:latest alpine.tar
  stacyvm image export alpine:latest alpine.tar --format docker && docker load -i alpine.tar")]
struct ExportArgs {
    reference: String,
    path: PathBuf,
    /// Form of the archive
    #[arg(long, value_enum, default_value_t = Format::Oci)]
    format: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// Blobs and digests stay as they are
    Oci,
    /// What `docker load` reads
    Docker,
}

/// An image, for `--json`.
#[derive(Debug, Serialize)]
struct Entry {
    reference: String,
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored_at: Option<Timestamp>,
    layers: usize,
}

pub(crate) async fn run(context: &Context, args: ImageArgs) -> anyhow::Result<()> {
    let output = context.output;
    let (store, data_dir) = open(context, &args).await?;
    // A server with another directory does not see what is brought in here.
    let say_where = || output.note(&format!("stored in {}, for servers with this data directory", data_dir.display()));
    match args.command {
        ImageCommand::Pull { reference } => {
            let image = store.pull(&reference, &Watch::new(output, &reference)).await?;
            show(output, &[Entry::of_image(&image)])?;
            say_where();
            Ok(())
        }
        ImageCommand::Import(import) => {
            let watch = Watch::new(output, &import.path.display().to_string());
            let images = store.import(&import.path, ImportOptions { name: import.name }, &watch).await?;
            show(output, &images.iter().map(Entry::of_image).collect::<Vec<_>>())?;
            say_where();
            Ok(())
        }
        ImageCommand::List => {
            let images: Vec<_> = store.list().await?.into_iter().map(Entry::of_summary).collect();
            output.show(&images, |images| table(output, images))
        }
        ImageCommand::Rm { references } => {
            for reference in &references {
                store.remove(reference).await?;
            }
            output
                .show(&json!({ "removed": references }), |_| lines(references.iter().map(|it| format!("removed {it}"))))
        }
        ImageCommand::Export(export) => {
            let format = match export.format {
                Format::Oci => ExportFormat::Oci,
                Format::Docker => ExportFormat::Docker,
            };
            store.export(&export.reference, &export.path, format).await?;
            let path = export.path.display().to_string();
            output.show(&json!({ "exported": export.reference, "path": path }), |_| {
                format!("exported {} to {path}\n", export.reference)
            })
        }
        ImageCommand::Prune => {
            let report = store.collect_garbage().await?;
            let freed = json!({
                "removed_images": report.removed_images,
                "freed_bytes": report.freed_bytes,
                "remaining_bytes": report.remaining_bytes,
            });
            output.show(&freed, |_| {
                let (freed, rest) = (output::bytes(report.freed_bytes), output::bytes(report.remaining_bytes));
                format!("removed {} images, freed {freed}, {rest} remain\n", report.removed_images.len())
            })
        }
    }
}

/// The store that a server with the same options uses, and its data directory.
async fn open(context: &Context, args: &ImageArgs) -> anyhow::Result<(ImageStore, PathBuf)> {
    let environment = Environment::of_this_process();
    let mut config = config::load(args.config.as_deref(), &environment)?.config;
    if args.data_dir.is_some() {
        config.top.data_dir.clone_from(&args.data_dir);
    }
    let data_dir = data_dir::resolve(config.top.data_dir.as_deref(), environment.home.as_deref())?;
    announce_data_dir(context, &config, &data_dir);
    data_dir::create(&data_dir)?;
    let store = ImageStore::open(image_store(&config, &data_dir, &environment)).await?;
    Ok((store, data_dir))
}

impl Entry {
    fn of_image(image: &Image) -> Self {
        Self {
            reference: image.reference.clone(),
            digest: image.digest.clone(),
            size_bytes: None,
            architecture: None,
            stored_at: None,
            layers: image.layers.len(),
        }
    }

    fn of_summary(summary: ImageSummary) -> Self {
        Self {
            reference: summary.reference,
            digest: summary.digest,
            size_bytes: Some(summary.size_bytes),
            architecture: Some(summary.architecture),
            stored_at: Some(summary.stored_at),
            layers: summary.layers,
        }
    }
}

fn show(output: Output, images: &[Entry]) -> anyhow::Result<()> {
    output.show(&images, |images| lines(images.iter().map(|image| format!("{}  {}", image.reference, image.digest))))
}

fn table(output: Output, images: &[Entry]) -> String {
    if images.is_empty() {
        return "no images; bring one in with `stacyvm image pull`, or use --image host (oci) or rootfs (proot)\n"
            .to_owned();
    }
    let rows = images.iter().map(|image| {
        vec![
            image.reference.clone(),
            image.digest.chars().take(DIGEST_CHARS).collect(),
            image.architecture.clone().unwrap_or_default(),
            image.size_bytes.map(output::bytes).unwrap_or_default(),
            image.stored_at.map(output::relative).unwrap_or_default(),
        ]
    });
    output.table(&["IMAGE", "DIGEST", "ARCH", "SIZE", "STORED"], rows.collect())
}

/// A bar that follows a pull or an import.
struct Watch {
    bar: ProgressBar,
    total: Mutex<u64>,
}

impl Watch {
    fn new(output: Output, what: &str) -> Self {
        Self { bar: output.progress(what, Some(0)), total: Mutex::new(0) }
    }
}

impl ProgressSink for Watch {
    fn report(&self, progress: Progress) {
        let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
        if *total != progress.total_bytes {
            *total = progress.total_bytes;
            self.bar.set_length(progress.total_bytes);
        }
        self.bar.set_position(progress.done_bytes);
        self.bar.set_message(format!("{} {}", progress.phase, progress.message));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

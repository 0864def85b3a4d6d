//! `stacyvm cp`: files and directories between here and sandboxes.

mod destination;
mod pack;
mod place;
mod unpack;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use indicatif::ProgressBar;
use rustix::fs::OFlags;
use serde_json::json;
use stacyvm_api::{ErrorCode, FileInfo};
use stacyvm_client::{Client, ClientError, SandboxClient, UploadOptions};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWriteExt as _};

use crate::commands::Context;
use crate::failure::Advice;
use crate::output::{self, Output, json_line};
use destination::Destination;
use place::Place;

/// Copy files and directories to, from and between sandboxes
///
/// One side is `ID:/path`. A directory is copied with all that is in it; into
/// a directory that exists, unless the source ends in `/.`, which means what is
/// inside. `-` is standard input or output. Devices and sockets stay behind; out
/// of a sandbox files lose set-ID bits, hard links become files of their own, and
/// a link here that is in the way is replaced, never written through.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm cp main.py sb-4f9k2m0x7c1v8b3n5q6w:/workspace/
  stacyvm cp sb-4f9k2m0x7c1v8b3n5q6w:/workspace/results ./results
  stacyvm cp ./project/. sb-4f9k2m0x7c1v8b3n5q6w:/workspace
  stacyvm cp sb-4f9k2m0x7c1v8b3n5q6w:/var/log/app.log - | tail")]
pub(crate) struct CpArgs {
    /// What to copy: a local path, `ID:/path`, or `-`
    #[arg(value_parser = Place::parse)]
    from: Place,
    /// Where to: a local path, `ID:/path`, or `-`
    #[arg(value_parser = Place::parse)]
    to: Place,
}

pub(crate) async fn run(context: &Context, args: CpArgs) -> anyhow::Result<()> {
    let copy = Copy { client: context.client()?, output: context.output };
    let started = Instant::now();
    let bytes = match (args.from, args.to) {
        (Place::Sandbox(id, from), Place::Sandbox(to_id, to)) => {
            copy.across(&copy.client.sandbox(id), &from, &copy.client.sandbox(to_id), &to).await?
        }
        (Place::Sandbox(id, from), to) => copy.download(&copy.client.sandbox(id), &from, to).await?,
        (from, Place::Sandbox(id, to)) => copy.upload(from, &copy.client.sandbox(id), &to).await?,
        (Place::Local(_) | Place::Stream, Place::Local(_) | Place::Stream) => {
            return Err(Advice::new("neither side is in a sandbox", "write one of them as ID:/path").into());
        }
    };
    let took = started.elapsed();
    let summary = json!({ "bytes": bytes, "duration_ms": took.as_millis() as u64 });
    if context.output.is_json() {
        return json_line(&summary);
    }
    context.output.note(&format!("copied {} in {}", output::bytes(bytes), output::took(took)));
    Ok(())
}

struct Copy {
    client: Client,
    output: Output,
}

impl Copy {
    async fn upload(&self, from: Place, sandbox: &SandboxClient, to: &str) -> anyhow::Result<u64> {
        match from {
            Place::Stream => {
                if to.ends_with('/') {
                    return Err(Advice::new(format!("`{to}` is a directory"), "name the file to write").into());
                }
                let bar = self.output.progress("stdin", None);
                sandbox.upload(to, bar.wrap_async_read(tokio::io::stdin()), &UploadOptions::default()).await?;
                Ok(bar.position())
            }
            Place::Local(path) => {
                let metadata = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
                if metadata.is_dir() {
                    self.upload_tree(&path, sandbox, to).await
                } else {
                    self.upload_file(&path, &metadata, sandbox, to).await
                }
            }
            Place::Sandbox(..) => unreachable!("copies between sandboxes go another way"),
        }
    }

    async fn upload_file(
        &self,
        path: &Path,
        metadata: &std::fs::Metadata,
        sandbox: &SandboxClient,
        to: &str,
    ) -> anyhow::Result<u64> {
        let file = File::open(path).await.with_context(|| format!("cannot read {}", path.display()))?;
        let target = self.target(sandbox, &place::local_name(path)?, to).await?;
        // Pipes and devices have no size.
        let size = metadata.is_file().then_some(metadata.len());
        let options =
            UploadOptions { mode: Some(format!("{:04o}", metadata.permissions().mode() & 0o777)), size_bytes: size };
        let bar = self.output.progress(&target, size);
        sandbox.upload(&target, bar.wrap_async_read(file), &options).await?;
        Ok(bar.position())
    }

    async fn upload_tree(&self, path: &Path, sandbox: &SandboxClient, to: &str) -> anyhow::Result<u64> {
        let target = if place::means_contents(path) {
            to.to_owned()
        } else {
            match stat(sandbox, to).await? {
                Some(info) if info.is_dir => place::join(to, &place::local_name(path)?),
                Some(_) => anyhow::bail!("`{to}` in the sandbox is a file, and {} is a directory", path.display()),
                None => to.to_owned(),
            }
        };
        ensure_dir(sandbox, &target).await?;
        let bar = self.output.progress(&target, None);
        let (reader, packing) = pack::stream(path.to_owned());
        let sent = sandbox.upload_archive(&target, bar.wrap_async_read(reader)).await;
        // Why packing stopped says more than that the upload broke off.
        packing.await.context("pack the directory")??;
        sent?;
        Ok(bar.position())
    }

    async fn download(&self, sandbox: &SandboxClient, from: &str, to: Place) -> anyhow::Result<u64> {
        let info = sandbox.stat(from).await?;
        match to {
            Place::Stream if info.is_dir => {
                let download = sandbox.download_archive(from).await?;
                let bar = self.output.progress(from, None);
                to_stdout(bar.wrap_async_read(download.into_reader())).await
            }
            Place::Stream => {
                let download = sandbox.download(from, None).await?;
                let bar = self.output.progress(from, download.size_bytes());
                to_stdout(bar.wrap_async_read(download.into_reader())).await
            }
            Place::Local(path) if info.is_dir => self.download_tree(sandbox, from, &path).await,
            Place::Local(path) => self.download_file(sandbox, from, &info, &path).await,
            Place::Sandbox(..) => unreachable!("copies between sandboxes go another way"),
        }
    }

    /// Written aside and renamed, so that a copy that breaks off leaves what
    /// was there before, and a link is replaced: the sandbox may have put it
    /// there with an earlier copy.
    async fn download_file(
        &self,
        sandbox: &SandboxClient,
        from: &str,
        info: &FileInfo,
        to: &Path,
    ) -> anyhow::Result<u64> {
        let target = local_file(from, to)?;
        let cannot = || format!("cannot write {}", target.display());
        let download = sandbox.download(from, None).await?;
        let bar = self.output.progress(&target.display().to_string(), download.size_bytes());
        if target.symlink_metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_symlink()) {
            // A device or a pipe.
            let mut options = tokio::fs::OpenOptions::new();
            let opened = options.write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(&target).await;
            let mut file = opened.with_context(cannot)?;
            tokio::io::copy(&mut bar.wrap_async_read(download.into_reader()), &mut file).await.with_context(cannot)?;
            file.flush().await.with_context(cannot)?;
            return Ok(bar.position());
        }
        let directory = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let scratch = tempfile::NamedTempFile::new_in(directory).with_context(cannot)?;
        let mut file = File::from_std(scratch.reopen().with_context(cannot)?);
        let mut reader = bar.wrap_async_read(download.into_reader());
        tokio::io::copy_buf(&mut tokio::io::BufReader::with_capacity(unpack::BUFFER_BYTES, &mut reader), &mut file)
            .await
            .with_context(cannot)?;
        file.flush().await.with_context(cannot)?;
        let asked = u32::from_str_radix(&info.mode, 8).unwrap_or(0o644);
        let permissions = std::fs::Permissions::from_mode(asked & unpack::PERMISSION_BITS);
        file.set_permissions(permissions).await.with_context(cannot)?;
        scratch.persist(&target).map_err(|error| error.error).with_context(cannot)?;
        self.note_plainer(u64::from(asked & unpack::SPECIAL_BITS != 0));
        Ok(bar.position())
    }

    async fn download_tree(&self, sandbox: &SandboxClient, from: &str, to: &Path) -> anyhow::Result<u64> {
        let into = to.is_dir() && !place::remote_means_contents(from);
        let download = sandbox.download_archive(from).await?;
        let cannot = || format!("cannot make {}", to.display());
        let mut target = Destination::open(to).with_context(cannot)?;
        if into {
            target = target.within(Path::new(&place::remote_name(from)?)).with_context(cannot)?;
        }
        let bar = self.output.progress(&target.path().display().to_string(), None);
        let unpacked = unpack::unpack(bar.wrap_async_read(download.into_reader()), &target).await?;
        if unpacked.skipped > 0 {
            self.output.note(&format!("note: left out {} devices, pipes or sockets", unpacked.skipped));
        }
        self.note_plainer(unpacked.plainer);
        Ok(bar.position())
    }

    fn note_plainer(&self, count: u64) {
        if count > 0 {
            self.output.note(&format!("note: left out the set-ID and sticky bits of {count} files or directories"));
        }
    }

    async fn across(
        &self,
        source: &SandboxClient,
        from: &str,
        sandbox: &SandboxClient,
        to: &str,
    ) -> anyhow::Result<u64> {
        let info = source.stat(from).await?;
        let target = if info.is_dir && place::remote_means_contents(from) {
            to.to_owned()
        } else {
            self.target(sandbox, &place::remote_name(from)?, to).await?
        };
        if info.is_dir {
            ensure_dir(sandbox, &target).await?;
            let bar = self.output.progress(&target, None);
            let reader = source.download_archive(from).await?.into_reader();
            sandbox.upload_archive(&target, bar.wrap_async_read(reader)).await?;
            return Ok(bar.position());
        }
        let download = source.download(from, None).await?;
        let size = download.size_bytes();
        let bar: ProgressBar = self.output.progress(&target, size);
        let options = UploadOptions { mode: Some(info.mode), size_bytes: size };
        sandbox.upload(&target, bar.wrap_async_read(download.into_reader()), &options).await?;
        Ok(bar.position())
    }

    /// The path to write: inside `to` when that is a directory.
    async fn target(&self, sandbox: &SandboxClient, name: &str, to: &str) -> anyhow::Result<String> {
        let inside = to.ends_with('/') || stat(sandbox, to).await?.is_some_and(|info| info.is_dir);
        Ok(if inside { place::join(to, name) } else { to.to_owned() })
    }
}

/// The local file that a copy of one writes.
fn local_file(from: &str, to: &Path) -> anyhow::Result<PathBuf> {
    let leads_to = to.metadata().ok();
    let is_link = to.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
    match leads_to {
        Some(found) if is_link && found.is_dir() => Err(Advice::new(
            format!("{} is a link to a directory, which a sandbox may have put there", to.display()),
            format!("write {}/ to copy into the directory", to.display()),
        )
        .into()),
        Some(found) if is_link && !found.is_file() => Err(Advice::new(
            format!("{} is a link to a device or a pipe", to.display()),
            "name that itself, or write `-` for standard output",
        )
        .into()),
        Some(found) if found.is_dir() => Ok(to.join(place::remote_name(from)?)),
        Some(_) | None => Ok(to.to_owned()),
    }
}

/// What is at a path in the sandbox, if anything is.
async fn stat(sandbox: &SandboxClient, path: &str) -> Result<Option<FileInfo>, ClientError> {
    match sandbox.stat(path).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.code() == Some(ErrorCode::FileNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The directory is there afterwards, as it may have been before.
async fn ensure_dir(sandbox: &SandboxClient, path: &str) -> Result<(), ClientError> {
    match sandbox.make_dir(path).await {
        Err(error) if error.code() == Some(ErrorCode::FileConflict) => match stat(sandbox, path).await? {
            Some(info) if info.is_dir => Ok(()),
            Some(_) | None => Err(error),
        },
        made => made.map(drop),
    }
}

async fn to_stdout(mut reader: impl AsyncRead + Unpin) -> anyhow::Result<u64> {
    let mut stdout = tokio::io::stdout();
    let count = tokio::io::copy(&mut reader, &mut stdout).await.context("write to standard output")?;
    stdout.flush().await.context("write to standard output")?;
    Ok(count)
}

/// For tests of this module's parts.
#[cfg(test)]
pub(super) fn fixture(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir_all(tree.join("a/empty")).expect("make the tree");
    std::fs::write(tree.join("a/run.sh"), "#!/bin/sh\n").expect("write a file");
    std::fs::set_permissions(tree.join("a/run.sh"), std::fs::Permissions::from_mode(0o755)).expect("set its mode");
    std::fs::write(tree.join("odd \u{fc}\nname"), b"\0\xff").expect("write a file");
    std::os::unix::fs::symlink("a/run.sh", tree.join("link")).expect("make a link");
    tree
}

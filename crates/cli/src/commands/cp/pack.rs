//! A local directory as a tar stream.

use std::path::PathBuf;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio_tar::Builder;

/// Between the packer and the upload.
const PIPE_BYTES: usize = 1024 * 1024;

/// What is in `dir`, links as links. The task says why the stream ended early.
pub(super) fn stream(dir: PathBuf) -> (impl AsyncRead + Send + 'static, JoinHandle<anyhow::Result<()>>) {
    let (writer, reader) = tokio::io::duplex(PIPE_BYTES);
    let task = tokio::spawn(async move {
        let mut builder = Builder::new(writer);
        builder.follow_symlinks(false);
        let packed = builder.append_dir_all("", &dir).await;
        if packed.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe) {
            // The upload ended first, and says why.
            return Ok(());
        }
        packed.with_context(|| format!("cannot read all of {}", dir.display()))?;
        let mut writer = builder.into_inner().await.context("end the archive")?;
        writer.shutdown().await.context("end the archive")
    });
    (reader, task)
}

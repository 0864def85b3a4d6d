//! A large file through the API, up and down.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::ensure;
use stacyvm_client::UploadOptions;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Instant;

use crate::idle::resident_kib;
use crate::server::{ServeOptions, Server, Setup};

const PATH: &str = "/workspace/large";
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) struct Transfer {
    pub(crate) bytes: u64,
    pub(crate) up: Duration,
    pub(crate) down: Duration,
    /// Resident memory of the server before, and at its highest since.
    pub(crate) server_before_kib: u64,
    pub(crate) server_peak_kib: u64,
}

pub(crate) async fn measure(setup: &Setup, bytes: u64) -> anyhow::Result<Transfer> {
    let server = Server::start(setup, "transfer", ServeOptions::default()).await?;
    let id = server.create().await?;
    server.exec_true(&id).await?;
    let sandbox = server.client.sandbox(id.clone());
    let server_before_kib = resident_kib(server.pid())?;
    let pid = server.pid();
    let watch = tokio::spawn(async move {
        let mut peak = 0;
        loop {
            peak = peak.max(resident_kib(pid).unwrap_or(0));
            PEAK_KIB.store(peak, std::sync::atomic::Ordering::Relaxed);
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
    });
    let options = UploadOptions { mode: None, size_bytes: Some(bytes) };
    let start = Instant::now();
    sandbox.upload(PATH, Pattern { left: bytes }, &options).await?;
    let up = start.elapsed();
    let start = Instant::now();
    let mut download = sandbox.download(PATH, None).await?;
    let mut received = 0;
    while let Some(chunk) = download.chunk().await? {
        received += chunk.len() as u64;
    }
    let down = start.elapsed();
    watch.abort();
    ensure!(received == bytes, "{received} of {bytes} bytes came back");
    let server_peak_kib = PEAK_KIB.load(std::sync::atomic::Ordering::Relaxed).max(resident_kib(pid)?);
    server.destroy(&id).await?;
    server.stop().await?;
    Ok(Transfer { bytes, up, down, server_before_kib, server_peak_kib })
}

static PEAK_KIB: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Bytes that cost nothing to make.
struct Pattern {
    left: u64,
}

impl AsyncRead for Pattern {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = buffer.remaining().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        buffer.initialize_unfilled_to(count).fill(b'x');
        buffer.advance(count);
        self.left -= count as u64;
        Poll::Ready(Ok(()))
    }
}

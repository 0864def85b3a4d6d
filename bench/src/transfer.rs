//! A large file through the API, up and down, beside the disk that it lies on.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::ensure;
use rustix::fs::Advice;
use stacyvm_client::UploadOptions;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Instant;

use crate::idle::resident_kib;
use crate::server::{ServeOptions, Server, Setup};

const PATH: &str = "/workspace/large";
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// Memory of a sandbox beside what the file takes in the page cache.
const SPARE_MIB: u64 = 512;

/// Memory of a sandbox that holds only part of the file, so that the disk
/// takes part.
const SMALL_MIB: u64 = 512;

const BUFFER_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub(crate) up: Duration,
    pub(crate) down: Duration,
}

pub(crate) struct Transfer {
    pub(crate) bytes: u64,
    pub(crate) cached: Rates,
    pub(crate) small: Rates,
    pub(crate) disk: Rates,
    /// Resident memory of the server before, and at its highest since.
    pub(crate) server_before_kib: u64,
    pub(crate) server_peak_kib: u64,
}

pub(crate) async fn measure(setup: &Setup, bytes: u64) -> anyhow::Result<Transfer> {
    let server = Server::start(setup, "transfer", ServeOptions::default()).await?;
    let pid = server.pid();
    let server_before_kib = resident_kib(pid)?;
    let peak = Arc::new(AtomicU64::new(server_before_kib));
    let highest = Arc::clone(&peak);
    let watch = tokio::spawn(async move {
        loop {
            highest.fetch_max(resident_kib(pid).unwrap_or(0), Ordering::Relaxed);
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
    });
    let cached = through(&server, bytes, (bytes >> 20) + SPARE_MIB).await?;
    let small = through(&server, bytes, SMALL_MIB).await?;
    watch.abort();
    let beside = server.data_dir.join("beside");
    let disk = tokio::task::spawn_blocking(move || disk(&beside, bytes)).await??;
    server.stop().await?;
    let server_peak_kib = peak.load(Ordering::Relaxed);
    Ok(Transfer { bytes, cached, small, disk, server_before_kib, server_peak_kib })
}

async fn through(server: &Server, bytes: u64, memory_mib: u64) -> anyhow::Result<Rates> {
    let id = server.create_with_memory(memory_mib).await?;
    server.exec_true(&id).await?;
    let sandbox = server.client.sandbox(id.clone());
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
    ensure!(received == bytes, "{received} of {bytes} bytes came back");
    server.destroy(&id).await?;
    Ok(Rates { up, down })
}

/// The file system itself: until all is on the disk, and from there again.
fn disk(path: &Path, bytes: u64) -> anyhow::Result<Rates> {
    let mut buffer = vec![b'x'; BUFFER_BYTES];
    let start = std::time::Instant::now();
    let mut file = File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        let count = left.min(BUFFER_BYTES as u64);
        file.write_all(&buffer[..count as usize])?;
        left -= count;
    }
    file.sync_all()?;
    let up = start.elapsed();
    let mut file = File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let start = std::time::Instant::now();
    while file.read(&mut buffer)? > 0 {}
    let down = start.elapsed();
    std::fs::remove_file(path)?;
    Ok(Rates { up, down })
}

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

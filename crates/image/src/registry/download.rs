//! Blobs, in pieces if need be: what arrived stays, the next try asks for the
//! rest, and only the whole with the right digest counts.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Response, StatusCode};
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use super::{FIRST_BACKOFF, Failure, MAX_BACKOFF, Registry, transport};
use crate::digest::Hasher;
use crate::{Digest, ImageError, ImageReference};

/// Tries in a row that bring nothing new.
const MAX_FRUITLESS_ATTEMPTS: u32 = 5;
/// Tries in all, for a registry that cuts every connection after a few bytes.
const MAX_BLOB_ATTEMPTS: u32 = 100;
/// For one blob, however it trickles.
const BLOB_DEADLINE: Duration = Duration::from_hours(4);
const READ_BUFFER_BYTES: usize = 256 * 1024;

/// What to fetch, and where to.
pub(crate) struct BlobRequest<'a> {
    pub(crate) reference: &'a ImageReference,
    pub(crate) digest: &'a Digest,
    pub(crate) size: u64,
    /// Holds what an earlier try brought; complete and synced on success.
    pub(crate) partial: &'a Path,
    /// Told how many bytes are here.
    pub(crate) on_progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// The part that has arrived.
struct Partial {
    file: File,
    length: u64,
    hasher: Hasher,
}

impl Registry {
    /// Nobody else may work on the same partial file.
    pub(crate) async fn fetch_blob(&self, request: &BlobRequest<'_>) -> Result<(), ImageError> {
        let failed = |error| ImageError::storage("store a download", request.partial, error);
        let deadline = Instant::now() + BLOB_DEADLINE;
        let mut partial = Partial::open(request).await.map_err(failed)?;
        let mut resumed = partial.length > 0;
        let mut fruitless = 0;
        let mut backoff = FIRST_BACKOFF;
        for _ in 0..MAX_BLOB_ATTEMPTS {
            let before = partial.length;
            if partial.length < request.size {
                match self.continue_blob(request, &mut partial).await {
                    Ok(()) => {}
                    Err(Failure::Final(error)) => {
                        // Bytes that do not fit the blob must not be built on.
                        if matches!(error, ImageError::Malformed { .. }) {
                            partial.restart().await.map_err(failed)?;
                        }
                        return Err(error);
                    }
                    Err(Failure::Passing { error, wait }) => {
                        partial.file.flush().await.map_err(failed)?;
                        fruitless = if partial.length > before { 0 } else { fruitless + 1 };
                        if fruitless >= MAX_FRUITLESS_ATTEMPTS || Instant::now() >= deadline {
                            return Err(error);
                        }
                        tracing::debug!(%error, have = partial.length, of = request.size, "download interrupted");
                        backoff = if fruitless == 0 { FIRST_BACKOFF } else { (backoff * 2).min(MAX_BACKOFF) };
                        tokio::time::sleep(wait.unwrap_or(backoff)).await;
                        continue;
                    }
                }
            }
            let actual = partial.hasher.clone().finish();
            if actual == *request.digest {
                partial.file.flush().await.map_err(failed)?;
                return partial.file.sync_all().await.map_err(failed);
            }
            partial.restart().await.map_err(failed)?;
            // What lay here from an earlier process may be to blame; fresh
            // bytes get one chance.
            if !resumed {
                return Err(ImageError::DigestMismatch {
                    what: format!("a layer of `{}`", request.reference),
                    expected: request.digest.to_string(),
                    actual: actual.to_string(),
                });
            }
            resumed = false;
        }
        Err(ImageError::malformed(request.reference, "its registry cuts every download short"))
    }

    /// One request for what is missing.
    async fn continue_blob(&self, request: &BlobRequest<'_>, partial: &mut Partial) -> Result<(), Failure> {
        let reference = request.reference;
        let failed = |error| Failure::Final(ImageError::storage("store a download", request.partial, error));
        let mut headers = HeaderMap::new();
        if partial.length > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", partial.length));
            headers.insert(header::RANGE, range.map_err(|error| failed(std::io::Error::other(error)))?);
        }
        let path = format!("blobs/{}", request.digest);
        let response = match self.send(reference, &path, headers, Some(BLOB_DEADLINE)).await {
            // The image is there, but not whole.
            Err(Failure::Final(ImageError::NotFound { .. })) => {
                let reason = format!("its registry lacks the blob {}", request.digest);
                return Err(Failure::Final(ImageError::malformed(reference, reason)));
            }
            outcome => outcome?,
        };
        if partial.length > 0 && !continues_at(&response, partial.length) {
            partial.restart().await.map_err(failed)?;
            if response.status() != StatusCode::OK {
                let error = ImageError::malformed(reference, "its registry answers for other bytes than asked");
                return Err(Failure::Passing { error, wait: None });
            }
        }
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| transport(reference, error))?;
            if partial.length + chunk.len() as u64 > request.size {
                return Err(Failure::Final(ImageError::malformed(
                    reference,
                    format!("blob {} is longer than its manifest says", request.digest),
                )));
            }
            partial.file.write_all(&chunk).await.map_err(failed)?;
            partial.hasher.update(&chunk);
            partial.length += chunk.len() as u64;
            (request.on_progress)(partial.length);
        }
        if partial.length < request.size {
            let cause = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the download ended early");
            let error =
                ImageError::RegistryUnavailable { reference: reference.to_string(), cause: std::sync::Arc::new(cause) };
            return Err(Failure::Passing { error, wait: None });
        }
        Ok(())
    }
}

/// Whether the answer goes on where we stopped.
fn continues_at(response: &Response, offset: u64) -> bool {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return false;
    }
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok());
    start == Some(offset)
}

impl Partial {
    /// What is there already is hashed again: it came from an earlier try.
    async fn open(request: &BlobRequest<'_>) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true).mode(0o600);
        let file = options.open(request.partial).await?;
        let mut partial = Self { file, length: 0, hasher: Hasher::default() };
        if partial.file.metadata().await?.len() > request.size {
            partial.restart().await?;
            return Ok(partial);
        }
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        loop {
            let count = partial.file.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            partial.hasher.update(&buffer[..count]);
            partial.length += count as u64;
        }
        (request.on_progress)(partial.length);
        Ok(partial)
    }

    async fn restart(&mut self) -> std::io::Result<()> {
        self.file.flush().await?;
        self.file.set_len(0).await?;
        self.file.seek(std::io::SeekFrom::Start(0)).await?;
        self.length = 0;
        self.hasher = Hasher::default();
        Ok(())
    }
}

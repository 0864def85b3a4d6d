//! Files inside a sandbox, as bytes of any size, and whole trees as tar.

use std::ops::RangeInclusive;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RANGE};
use reqwest::{Body, Method, Response};
use stacyvm_api::{ChmodRequest, FileInfo, MakeDirRequest, MoveRequest, WatchEvent, WriteRequest};
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::lines::Lines;
use crate::{ClientError, SandboxClient};

/// Read from an upload's source at a time.
const UPLOAD_CHUNK_BYTES: usize = 256 * 1024;

/// Browsers cannot send this header across origins without asking first, so
/// the server takes raw uploads only with it.
const UPLOAD: HeaderName = HeaderName::from_static("x-stacyvm-upload");
const UPLOAD_VALUE: HeaderValue = HeaderValue::from_static("1");

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const TAR: HeaderValue = HeaderValue::from_static("application/x-tar");

/// How to store an uploaded file.
#[derive(Debug, Clone, Default)]
pub struct UploadOptions {
    /// Octal permission bits; `0644` unless given.
    pub mode: Option<String>,
    /// The size, when it is known: a source that ends early or runs on is then
    /// an error instead of a file of the wrong length.
    pub size_bytes: Option<u64>,
}

/// What to watch for.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Directories below the watched one too.
    pub recursive: bool,
}

/// A file or an archive on its way here.
#[derive(Debug)]
pub struct Download {
    server: String,
    response: Response,
}

/// Changes below a directory, as they happen.
#[derive(Debug)]
pub struct WatchStream {
    lines: Lines,
}

impl SandboxClient {
    /// Writes a small text file, making its parent directories.
    pub async fn write_file(&self, request: &WriteRequest) -> Result<(), ClientError> {
        self.client.send(self.client.request(Method::POST, &self.files(&[]))?.json(request)).await.map(drop)
    }

    /// Reads a whole file into memory.
    pub async fn read_file(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.download(path, None).await?.bytes().await
    }

    /// Streams `source` into a file, making its parent directories. Wrap the
    /// source to watch the progress.
    pub async fn upload<R>(&self, path: &str, source: R, options: &UploadOptions) -> Result<(), ClientError>
    where
        R: AsyncRead + Send + 'static,
    {
        let mut request = self.client.request(Method::PUT, &self.files(&[]))?.query(&[("path", path)]);
        if let Some(mode) = &options.mode {
            request = request.query(&[("mode", mode)]);
        }
        if let Some(size) = options.size_bytes {
            request = request.header(CONTENT_LENGTH, size);
        }
        self.client
            .send(request.header(UPLOAD, UPLOAD_VALUE).header(CONTENT_TYPE, OCTETS).body(body_of(source)))
            .await
            .map(drop)
    }

    /// Streams a file, or the given bytes of it, here.
    pub async fn download(&self, path: &str, range: Option<RangeInclusive<u64>>) -> Result<Download, ClientError> {
        let mut request = self.client.request(Method::GET, &self.files(&[]))?.query(&[("path", path)]);
        if let Some(range) = range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start(), range.end()));
        }
        let response = self.client.send(request).await?;
        Ok(Download { server: self.client.server().to_owned(), response })
    }

    /// Unpacks a tar stream below the directory `path`.
    pub async fn upload_archive<R>(&self, path: &str, source: R) -> Result<(), ClientError>
    where
        R: AsyncRead + Send + 'static,
    {
        let request = self.client.request(Method::PUT, &self.files(&["archive"]))?.query(&[("path", path)]);
        self.client
            .send(request.header(UPLOAD, UPLOAD_VALUE).header(CONTENT_TYPE, TAR).body(body_of(source)))
            .await
            .map(drop)
    }

    /// A tar stream of `path`: of the tree below it, or of the one file.
    pub async fn download_archive(&self, path: &str) -> Result<Download, ClientError> {
        let request = self.client.request(Method::GET, &self.files(&["archive"]))?.query(&[("path", path)]);
        let response = self.client.send(request).await?;
        Ok(Download { server: self.client.server().to_owned(), response })
    }

    pub async fn list_files(&self, path: &str) -> Result<Vec<FileInfo>, ClientError> {
        self.client.json(self.client.request(Method::GET, &self.files(&["list"]))?.query(&[("path", path)])).await
    }

    pub async fn stat(&self, path: &str) -> Result<FileInfo, ClientError> {
        self.client.json(self.client.request(Method::GET, &self.files(&["stat"]))?.query(&[("path", path)])).await
    }

    /// Paths that match a pattern; `**` crosses directories.
    pub async fn glob(&self, pattern: &str) -> Result<Vec<String>, ClientError> {
        self.client.json(self.client.request(Method::GET, &self.files(&["glob"]))?.query(&[("pattern", pattern)])).await
    }

    pub async fn move_file(&self, old_path: &str, new_path: &str) -> Result<(), ClientError> {
        let body = MoveRequest { old_path: old_path.to_owned(), new_path: new_path.to_owned() };
        self.client.send(self.client.request(Method::POST, &self.files(&["move"]))?.json(&body)).await.map(drop)
    }

    /// Sets the permission bits, in octal.
    pub async fn chmod(&self, path: &str, mode: &str) -> Result<(), ClientError> {
        let body = ChmodRequest { path: path.to_owned(), mode: mode.to_owned() };
        self.client.send(self.client.request(Method::POST, &self.files(&["chmod"]))?.json(&body)).await.map(drop)
    }

    /// Makes a directory and the missing ones above it.
    pub async fn make_dir(&self, path: &str) -> Result<FileInfo, ClientError> {
        let body = MakeDirRequest { path: path.to_owned() };
        self.client.call(Method::POST, &self.files(&["mkdir"]), &body).await
    }

    /// Removes a file or an empty directory.
    pub async fn remove(&self, path: &str) -> Result<(), ClientError> {
        self.client
            .send(self.client.request(Method::DELETE, &self.files(&[]))?.query(&[("path", path)]))
            .await
            .map(drop)
    }

    /// Removes a file, or a directory with all that is in it.
    pub async fn remove_all(&self, path: &str) -> Result<(), ClientError> {
        let query = [("path", path), ("recursive", "true")];
        self.client.send(self.client.request(Method::DELETE, &self.files(&[]))?.query(&query)).await.map(drop)
    }

    /// Changes below the directory `path`, from now on.
    pub async fn watch(&self, path: &str, options: &WatchOptions) -> Result<WatchStream, ClientError> {
        let recursive = if options.recursive { "true" } else { "false" };
        let query = [("path", path), ("recursive", recursive)];
        let response =
            self.client.send(self.client.request(Method::GET, &self.files(&["watch"]))?.query(&query)).await?;
        Ok(WatchStream { lines: Lines::new(self.client.server().to_owned(), response) })
    }

    fn files<'a>(&'a self, rest: &[&'a str]) -> Vec<&'a str> {
        let mut path = vec!["sandboxes", self.id.as_str(), "files"];
        path.extend(rest);
        path
    }
}

impl Download {
    /// Bytes to come, when the server said so.
    pub fn size_bytes(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// The next piece; `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.response.chunk().await.map_err(|error| crate::client::transport(&self.server, error))
    }

    /// The whole of it, in memory.
    pub async fn bytes(mut self) -> Result<Vec<u8>, ClientError> {
        let mut all = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }

    pub fn into_reader(self) -> impl AsyncRead + Send + Unpin {
        StreamReader::new(self.response.bytes_stream().map_err(std::io::Error::other))
    }

    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, ClientError>> + Send + Unpin {
        let server = self.server;
        self.response.bytes_stream().map(move |chunk| chunk.map_err(|error| crate::client::transport(&server, error)))
    }
}

impl WatchStream {
    /// The next change; `None` once the server has ended the stream.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, ClientError> {
        while let Some(line) = self.lines.next().await? {
            if !line.is_empty() {
                let event = serde_json::from_slice(&line)
                    .map_err(|error| ClientError::Protocol(format!("a watch event: {error}")))?;
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}

fn body_of<R: AsyncRead + Send + 'static>(source: R) -> Body {
    Body::wrap_stream(ReaderStream::with_capacity(source, UPLOAD_CHUNK_BYTES))
}
